//! JSON schemas.

use qkov::session::grammar::{Grammar, Spec};
use serde_json::{Value, json};

use super::{Bytes, ends_soon};

fn schema(value: Value) -> Spec {
    Spec::JsonSchema(value)
}

#[test]
fn texts_follow_their_schema() {
    let bytes = Bytes::new();
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2}
        },
        "required": ["name", "age"],
        "additionalProperties": false
    });
    bytes.check(
        &schema(person),
        &[
            r#"{"name": "Ann", "age": 42}"#,
            r#"{"name":"é","age":0,"tags":["x","y"]}"#,
            "{\n  \"name\": \"Ann\",\n  \"age\": 7\n}",
        ],
        &[
            "",
            "{}",
            r#"{"name": "Ann"}"#,
            r#"{"name": "", "age": 42}"#,
            r#"{"name": "Ann", "age": 151}"#,
            r#"{"name": "Ann", "age": 42, "tags": ["z"]}"#,
            r#"{"name": "Ann", "age": 42, "more": 1}"#,
        ],
    );
    let tree = json!({
        "$ref": "#/$defs/node",
        "$defs": {"node": {
            "type": "object",
            "properties": {"to": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["to"],
            "additionalProperties": false
        }}
    });
    bytes.check(
        &schema(tree),
        &[r#"{"to": []}"#, r#"{"to":[{"to":[]},{"to":[{"to":[]}]}]}"#],
        &["{}", r#"{"to": [1]}"#],
    );
    let cases: &[(Value, &[&str], &[&str])] = &[
        (json!({}), &["1", "null", "{\"a\":[]}", "\"x\""], &["", "x", "[1"]),
        (json!(true), &["1", "[]"], &["x"]),
        (json!({"type": ["string", "null"]}), &["null", "\"a\""], &["1"]),
        (json!({"const": {"a": 1}}), &["{\"a\":1}", "{\"a\": 1}"], &["{\"a\":2}"]),
        (json!({"type": "string", "pattern": "^[a-c]{2}$"}), &["\"ab\""], &["\"a\"", "\"ad\""]),
        (json!({"type": "string"}), &[r#""a\"\u00e9\ud83d\ude00é""#], &["\"\\ud83d\"", "\"\\x\""]),
        (json!({"type": "string", "format": "date"}), &["\"2024-02-29\""], &["\"2024-13-01\""]),
        (json!({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}), &["1", "true"], &["\"\""]),
        (json!({"anyOf": [{"const": 1}, {"const": "1"}]}), &["1", "\"1\""], &["2"]),
        (json!({"type": "number", "multipleOf": 0.5}), &["1.5", "2"], &["1.3"]),
    ];
    for (value, good, bad) in cases {
        bytes.check(&schema(value.clone()), good, bad);
    }
    bytes.check(
        &Spec::JsonObject,
        &["{}", "{\"a\": [1, {\"b\": null}]}"],
        &["", "[]", "1", "{a: 1}"],
    );
}

/// A model that writes blanks for ever would never close its braces.
#[test]
fn white_space_ends() {
    let bytes = Bytes::new();
    for (blanks, is_allowed) in
        [("", true), (" ", true), ("\n", true), ("\n  ", true), ("  ", false), ("\n\n", false)]
    {
        let text = format!("{{{blanks}}}");
        assert_eq!(bytes.accepts(&Spec::JsonObject, &text), is_allowed, "{text:?}");
    }
    let text = |n| format!("{{\n{}}}", " ".repeat(n));
    assert!(bytes.accepts(&Spec::JsonObject, &text(20)));
    assert!(!bytes.accepts(&Spec::JsonObject, &text(21)));
}

#[test]
fn schemas_that_are_none() {
    let bytes = Bytes::new();
    for (value, words) in [
        (json!(1), "JSON schema: it is no object"),
        (json!(false), "JSON schema: it is no object"),
        (json!({"type": "text"}), "text"),
        (json!({"$ref": "#/$defs/missing"}), "missing"),
        (json!({"$ref": "https://example.com/schema.json"}), "example.com"),
        (json!({"$ref": "file:///etc/passwd"}), "passwd"),
        (json!({"type": "string", "pattern": "("}), "unclosed group"),
        (json!({"$ref": "#"}), "no text follows it"),
        (json!({"not": {"type": "string"}}), "not"),
        (json!({"type": "integer", "minimum": 3, "maximum": 2}), "nsatisfiable"),
    ] {
        let line = bytes.refused(&schema(value.clone()));
        assert!(line.contains(words), "{value}: {line}");
    }
}

/// Lists of lists, made without copying them again and again.
fn deep(n: usize) -> Value {
    (0..n).fold(Value::Bool(true), |inner, _| {
        let fields = [("type", Value::from("array")), ("items", inner)];
        Value::Object(fields.map(|(name, value)| (name.to_string(), value)).into_iter().collect())
    })
}

fn hostile() -> Vec<(&'static str, Spec)> {
    let chain: Value = (0..5000)
        .map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)})))
        .chain([("d5000".to_string(), json!({"type": "null"}))])
        .collect::<serde_json::Map<_, _>>()
        .into();
    let tree: Value = (0..60)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            (format!("d{i}"), json!({"type": "object", "properties": {"a": next, "b": next}}))
        })
        .chain([("d60".to_string(), json!({"type": "null"}))])
        .collect::<serde_json::Map<_, _>>()
        .into();
    let all: Value = (0..40)
        .map(|i| {
            let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
            (format!("d{i}"), json!({"allOf": [next, next]}))
        })
        .chain([("d40".to_string(), json!({"type": "null"}))])
        .collect::<serde_json::Map<_, _>>()
        .into();
    let pattern = |text: &str| schema(json!({"type": "string", "pattern": text}));
    let fields: serde_json::Map<_, _> =
        (0..4000).map(|i| (format!("field{i}"), json!({"type": "integer"}))).collect();
    let names: Vec<_> = (0..9000).map(|i| format!("name {i}")).collect();
    vec![
        ("depth 90", schema(deep(90))),
        ("depth 5000", schema(deep(5000))),
        ("cycle", schema(json!({"$ref": "#"}))),
        (
            "cycle of two",
            schema(json!({"$ref": "#/$defs/a", "$defs": {
            "a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})),
        ),
        ("cycle of all", schema(json!({"allOf": [{"$ref": "#"}, {"type": "object"}]}))),
        ("cycle of any", schema(json!({"anyOf": [{"$ref": "#"}, {"type": "null"}]}))),
        ("chain", schema(json!({"$ref": "#/$defs/d0", "$defs": chain}))),
        ("tree", schema(json!({"$ref": "#/$defs/d0", "$defs": tree}))),
        ("tree of all", schema(json!({"$ref": "#/$defs/d0", "$defs": all}))),
        ("pattern of counts", pattern("^(((a{1000}){1000}){1000}){1000}$")),
        ("pattern of choices", pattern("^(a|aa)+$")),
        ("pattern of a place", pattern("(a|b)*a(a|b){60}c")),
        ("pattern of places", pattern("^(.*a.{40}){20}$")),
        ("pattern of parentheses", pattern(&format!("{}a{}", "(".repeat(5000), ")".repeat(5000)))),
        ("pattern looks back", pattern("^(a)\\1$")),
        ("lengths", schema(json!({"type": "string", "minLength": 1000000, "maxLength": 2000000}))),
        (
            "items",
            schema(json!({"type": "array", "minItems": 1000000, "items": {"type": "array"}})),
        ),
        ("numbers", schema(json!({"type": "number", "multipleOf": 1e-300}))),
        ("large", schema(json!({"enum": vec!["x".repeat(100); 9000]}))),
        ("many values", schema(json!({"enum": vec![0; 60000]}))),
        ("fields", schema(json!({"type": "object", "properties": fields}))),
        ("names", schema(json!({"enum": names}))),
        (
            "patterns",
            schema(json!({"type": "object", "patternProperties": {
            "^(a|b)*a(a|b){20}$": {}, "^(a|b)*b(a|b){20}$": {}}})),
        ),
        ("options", schema(json!({"x-guidance": {"no such": 1}, "type": "null"}))),
    ]
}

/// What is nested 5000 times needs a large stack even to be made here.
fn on_large_stack(run: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(256 << 20).spawn(run).unwrap().join().unwrap();
}

#[test]
fn hostile_schemas_end_soon() {
    on_large_stack(|| ends_soon(&Bytes::new(), hostile()));
}

#[test]
fn deep_schemas_are_refused() {
    on_large_stack(|| {
        let bytes = Bytes::new();
        let refused = "JSON schema: more than 100 values in each other";
        assert_eq!(bytes.refused(&schema(deep(5000))), refused);
        assert!(Grammar::new(&bytes.vocabulary, &schema(deep(90))).is_ok());
    });
}
