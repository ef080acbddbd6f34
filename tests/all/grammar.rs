//! Grammars: texts that follow them and texts that do not, byte by byte, and what strangers may send.

mod random;
mod schemas;

use std::time::Instant;

use qkov::error::Error;
use qkov::session::grammar::{Grammar, Part, Spec, Vocabulary};
use qkov::token::Tokenizer;
use serde_json::{Value, json};

use crate::cli::{code_and_text, error, ok};
use crate::token::vocabularies::{V, bpe, spm};

/// A vocabulary with a token for each byte, and some longer ones.
pub struct Bytes {
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
}

impl Bytes {
    pub fn new() -> Bytes {
        let tokenizer = spm().open();
        let vocabulary = Vocabulary::new(&tokenizer, tokenizer.n_vocab()).unwrap();
        Bytes { tokenizer, vocabulary }
    }

    fn grammar(&self, spec: &Spec) -> Grammar {
        Grammar::new(&self.vocabulary, spec).unwrap()
    }

    /// Which tokens can follow.
    fn allowed(&self, grammar: &mut Grammar) -> Vec<bool> {
        let mut logits = vec![0.0; self.tokenizer.n_vocab()];
        grammar.restrict(&mut logits).unwrap();
        logits.iter().map(|x| *x == 0.0).collect()
    }

    /// Whether a text follows a grammar, to its end.
    fn accepts(&self, spec: &Spec, text: &str) -> bool {
        self.follows(self.grammar(spec), text)
    }

    /// The same from here.
    fn follows(&self, mut grammar: Grammar, text: &str) -> bool {
        let end = self.tokenizer.eos().unwrap();
        for byte in text.bytes() {
            let token = u32::from(byte) + 3;
            let allowed = self.allowed(&mut grammar)[token as usize];
            let taken = grammar.accept(token);
            assert_eq!(allowed, taken.is_ok(), "{text:?} at {byte}: {taken:?}");
            if !allowed {
                return false;
            }
        }
        let may_end = self.allowed(&mut grammar)[end as usize];
        assert!(may_end || !grammar.is_over());
        assert_eq!(may_end, grammar.accept(end).is_ok());
        may_end
    }

    pub fn check(&self, spec: &Spec, good: &[&str], bad: &[&str]) {
        let grammar = self.grammar(spec);
        for text in good {
            assert!(self.follows(grammar.clone(), text), "{text:?} refused by {spec:?}");
        }
        for text in bad {
            assert!(!self.follows(grammar.clone(), text), "{text:?} accepted by {spec:?}");
        }
    }

    /// The message of what is refused.
    fn refused(&self, spec: &Spec) -> String {
        match Grammar::new(&self.vocabulary, spec) {
            Err(Error::Usage(line)) => {
                assert!(!line.contains('\n') && line.len() < 400, "{line}");
                line
            }
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("accepted"),
        }
    }
}

fn gbnf(text: &str) -> Spec {
    Spec::Gbnf(text.into())
}

#[test]
fn every_feature_of_gbnf() {
    let bytes = Bytes::new();
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("root ::= \"abc\"", &["abc"], &["", "ab", "abcd", "xbc"]),
        ("root ::= \"\"", &[""], &["a"]),
        ("root ::=", &[""], &["a"]),
        ("root ::= \"a\" |", &["", "a"], &["aa", "b"]),
        ("root ::= | \"a\" | \"b\"", &["", "a", "b"], &["ab"]),
        (r#"root ::= "\n\t\r\\\"\[\]\x41\u00e9\U0001F600""#, &["\n\t\r\\\"[]Aé😀"], &["ntr"]),
        ("root ::= \"é世\"", &["é世"], &["é", "è世", "é丗"]),
        ("root ::= [abc]", &["a", "c"], &["d", "", "ab"]),
        ("root ::= [a-cx0-9]", &["b", "x", "7"], &["d", "-", "a-"]),
        (r"root ::= [a\]\-\[]", &["]", "a", "-", "["], &["\\", "b"]),
        ("root ::= [a-]", &["a", "-"], &["b"]),
        ("root ::= [^a-y]", &["z", "\n", "é", "😀"], &["a", "m", "zz"]),
        (r"root ::= [^\n]+", &["ab c", "é"], &["a\nb", ""]),
        (r"root ::= [\x41-\x43]", &["A", "C"], &["D"]),
        ("root ::= [ぁ-ゟ]+", &["ひらがな"], &["カ", "a"]),
        (r"root ::= [\U0001F600-\U0001F64F]", &["😀", "🙏"], &["🚀"]),
        ("root ::= .", &["a", "\n", "世", "😀"], &["", "ab"]),
        ("root ::= . .", &["ab", "😀é"], &["a", "abc"]),
        ("root ::= \"a\" \"b\" | \"c\" \"d\"", &["ab", "cd"], &["abd", "acd", "a"]),
        ("root ::= \"a\" (\"b\" | \"c\") \"d\"", &["abd", "acd"], &["ad", "abcd"]),
        ("root ::= \"ab\"*", &["", "ab", "abab"], &["a", "aba"]),
        ("root ::= \"ab\"+", &["ab", "ababab"], &["", "aba"]),
        ("root ::= \"ab\"?", &["", "ab"], &["abab"]),
        ("root ::= [ab]{3}", &["aba", "bbb"], &["ab", "abab"]),
        ("root ::= [ab]{2,}", &["ab", "ababa"], &["a"]),
        ("root ::= [ab]{ 1 , 3 }", &["a", "aba"], &["", "abab"]),
        ("root ::= [ab]{0,2} \"c\"", &["c", "abc"], &["abac"]),
        ("root ::= \"a\"{0} \"b\"", &["b"], &["ab"]),
        ("root ::= \"a\"{20,30}", &["aaaaaaaaaaaaaaaaaaaaaaaa"], &["aaaaaaaaaaaaaaaaaaa"]),
        ("root ::= (\"a\" \"b\"?){2,3} \"c\"", &["aac", "ababac"], &["ac", "abababac"]),
        ("root ::= (\"a\"*)* \"b\"", &["b", "aaab"], &["a"]),
        ("root ::= (\"\")* \"b\"", &["b"], &["", "a"]),
        ("root ::= (\n  \"a\"\n  # between\n  \"b\"\n)", &["ab"], &["a"]),
        ("root ::= \"a\" |\n  \"b\"\nx ::= \"c\"", &["a", "b"], &["c"]),
        ("# first\nroot ::= a-b  # last\r\na-b ::= \"x\"\r\n", &["x"], &["y"]),
        ("root ::=\n  \"a\"", &["a"], &["b"]),
        ("root ::= Rule_1\nRule_1 ::= 2nd\n2nd ::= \"a\"", &["a"], &["b"]),
    ];
    for (text, good, bad) in cases {
        bytes.check(&gbnf(text), good, bad);
    }
}

#[test]
fn recursive_grammars() {
    let bytes = Bytes::new();
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("root ::= \"(\" root \")\" | \"\"", &["", "()", "((()))"], &["(", "())", ")("]),
        ("root ::= root \"a\" | \"b\"", &["b", "baa"], &["", "a", "bb"]),
        ("root ::= \"a\" root | \"b\"", &["b", "aab"], &["", "a", "ba"]),
        ("root ::= \"a\" root \"a\" | \"b\"", &["b", "aba", "aabaa"], &["ab", "aaba"]),
        ("root ::= x x\nx ::= \"a\" x | \"\"", &["", "a", "aaaa"], &["b"]),
        // The longest first part is not the right one.
        (
            "root ::= [a-z]+ \"b\" y\ny ::= \"c\" y | \"\"",
            &["ab", "abb", "abcc"],
            &["a", "b", "aa"],
        ),
        (
            "root ::= (\"a\" | \"ab\") (\"bc\" | \"c\") y\ny ::= \"d\" y | \"\"",
            &["abc", "ac", "abbc", "abcdd"],
            &["ab", "abcc"],
        ),
        (
            "root ::= \" \"* x \" \"* \"\\n\"\nx ::= \"(\" x \")\" \" \"* | [a-z ]+",
            &[" a b \n", "(a) \n", "((a ) ) \n"],
            &["a", "(a\n"],
        ),
        (
            "root ::= e\ne ::= t (\" + \" t)*\nt ::= [0-9]+ \" \"? | \"(\" e \")\"",
            &["1 + 2", "1  + 2", "(1 + 2 ) + 3"],
            &["1+2", "1 +", "(1"],
        ),
    ];
    for (text, good, bad) in cases {
        bytes.check(&gbnf(text), good, bad);
    }
}

const JSON: &str = r#"
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( pair ("," ws pair)* )? "}" ws
pair   ::= string ":" ws value
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn json_as_a_grammar() {
    let good = [
        "{}",
        "{ }",
        r#"{"a": [1, -2.5e+3, {"b": "\u00e9 \" é"}], "c":null}"#,
        "{\n  \"a\": [true, false, []]\n}",
    ];
    let bad =
        ["", "[]", "{\"a\"}", "{\"a\": 01}", "{\"a\": 1,}", "{\"a\": \"\t\"}", "{\"a\": \"\\x\"}"];
    Bytes::new().check(&gbnf(JSON), &good, &bad);
}

#[test]
fn grammars_that_are_none() {
    let bytes = Bytes::new();
    for (text, words) in [
        ("", "no rule \"root\""),
        ("x ::= \"a\"", "no rule \"root\""),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2: rule \"root\" is defined again"),
        ("root ::= \"a\"\n  missing", "line 2: found the end; expected ::="),
        ("root ::= \"a\" missing", "line 1: rule \"missing\" is not defined"),
        ("root = \"a\"", "line 1: found \"= \"a\"\"; expected ::="),
        ("root ::= \"a", "line 1: the \" at the end is missing"),
        ("root ::= [a", "line 1: the ] at the end is missing"),
        ("root ::= []", "line 1: no character is in the class"),
        ("root ::= [z-a]", "line 1: the range U+007A to U+0061 runs backwards"),
        ("root ::= (\"a\"", "line 1: found the end; expected the ) for line 1"),
        ("root ::= \"a\")", "line 1: found \")\"; expected the end of the rule"),
        ("root ::= *", "line 1: found \"*\"; nothing to repeat before it"),
        ("root ::= \"a\"{", "line 1: found the end; expected a number"),
        ("root ::= \"a\"*?+*?+*?+", "more than 8 repetitions of one another"),
        ("root ::= \"a\"{3,1}", "a repetition of 3 times or more, and fewer"),
        ("root ::= \"a\"{99999999999}", "99999999999 repetitions; allowed 0..=10000"),
        ("root ::= \"\\q\"", "line 1: unknown escape \\q"),
        ("root ::= \"\\u12\"", "line 1: \\u needs 4 hexadecimal digits"),
        ("root ::= \"\\ud800\"", "line 1: \\u needs 4 hexadecimal digits"),
        ("root ::= root", "rule \"root\" can never end"),
        ("root ::= \"a\" x\nx ::= \"b\" x", "rule \"root\" can never end"),
        ("\n\nroot ::= <[1]>", "line 3: found \"<[1]>\"; expected the end of the rule"),
    ] {
        let line = bytes.refused(&gbnf(text));
        assert!(line.contains(words) && line.starts_with("grammar"), "{text:?}: {line}");
    }
}

/// Every one of these must end soon, in an error of one line or in a grammar that works.
fn hostile() -> Vec<(&'static str, Spec)> {
    let n = 60_000;
    let doubling = |n: usize, last: &str| {
        let rules: String = (0..n).map(|i| format!("r{i} ::= r{0} r{0}\n", i + 1)).collect();
        gbnf(&format!("root ::= r0\n{rules}r{n} ::= {last}"))
    };
    let chain = |n: usize, end: &str| {
        let rules: String = (0..n).map(|i| format!("r{i} ::= \"a\" r{}\n", i + 1)).collect();
        gbnf(&format!("root ::= r0\n{rules}r{n} ::= {end}"))
    };
    let words = |n: usize| (0..n).map(|i| format!("\"word{i}\"")).collect::<Vec<_>>().join(" | ");
    vec![
        ("parentheses", gbnf(&format!("root ::= {}", "(".repeat(n)))),
        ("balanced", gbnf(&format!("root ::= {}\"a\"{}", "(".repeat(n), ")".repeat(n)))),
        ("large", gbnf(&"root ::= \"a\"\n".repeat(1 << 20))),
        ("stars", gbnf(&format!("root ::= \"a\"{}", "*".repeat(n)))),
        ("counts", gbnf("root ::= ((((\"a\"{9999}){9999}){9999}){9999}){9999}")),
        ("ranges", gbnf("root ::= ((([ab]{0,9999}){0,9999}){0,9999}){0,9999}")),
        ("recursive counts", gbnf("root ::= (\"a\" x{0,9999}){9999}\nx ::= \"(\" x \")\" | \"b\"")),
        ("doubling", doubling(60, "\"a\"")),
        ("doubling nothing", doubling(60, "\"\"")),
        ("doubling recursion", doubling(60, "\"a\" r60 | \"b\"")),
        ("chain", chain(9_000, "\"b\"")),
        ("shorter chain", chain(6_000, "\"b\"")),
        ("endless chain", chain(6_000, "\"b\" | r0")),
        ("shorter endless chain", chain(1_500, "\"b\" | r0")),
        ("words", gbnf(&format!("root ::= {}", words(9_000)))),
        ("fewer words", gbnf(&format!("root ::= {}", words(2_500)))),
        ("words that nest", gbnf(&format!("root ::= \"(\" root \")\" | {}", words(2_500)))),
        ("few words that nest", gbnf(&format!("root ::= \"(\" root \")\" | {}", words(400)))),
        ("ambiguous", gbnf("root ::= root root | \"a\" | \"\"")),
        ("literal", gbnf(&format!("root ::= \"{}\"", "a".repeat(200_000)))),
        ("a page", gbnf(&format!("root ::= \"{}\"", "a".repeat(3_000)))),
        ("shorter literal", gbnf(&format!("root ::= \"{}\"", "a".repeat(25_000)))),
        ("literals", gbnf(&format!("root ::= {}", "\"a\" ".repeat(n)))),
        ("choices", gbnf(&format!("root ::= {}\"b\"", "\"a\" | ".repeat(n / 2)))),
        ("fewer options", gbnf(&format!("root ::= {}", "[a-z]? ".repeat(5_000)))),
        ("options", gbnf(&format!("root ::= {}", "[a-z]? ".repeat(n / 2)))),
        ("classes", gbnf(&format!("root ::= [{}]", "a-z".repeat(n)))),
    ]
}

#[test]
fn hostile_grammars_end_soon() {
    let bytes = Bytes::new();
    ends_soon(&bytes, hostile());
}

/// A tenth of a second is what is aimed at; the limit leaves room for a machine that is busy.
fn ends_soon(bytes: &Bytes, cases: Vec<(&'static str, Spec)>) {
    for (name, spec) in cases {
        let start = Instant::now();
        let grammar = Grammar::new(&bytes.vocabulary, &spec);
        let made = start.elapsed().as_secs_f32();
        let result = grammar.and_then(|mut g| {
            for _ in 0..20 {
                let mut logits = vec![0.0; bytes.tokenizer.n_vocab()];
                g.restrict(&mut logits)?;
                let next = (3..259).find(|id| logits[*id as usize] == 0.0);
                next.map_or(Ok(()), |id| g.accept(id))?;
            }
            Ok(())
        });
        let seconds = start.elapsed().as_secs_f32();
        eprintln!("{name}: made in {made:.3} s, 20 tokens in {:.3} s: {result:?}", seconds - made);
        assert!(seconds < 2.0, "{name}: {seconds} s");
        if let Err(e) = result {
            let line = e.to_string();
            assert!(line.len() < 400 && !line.contains('\n'), "{name}: {line}");
        }
    }
}

/// What the model that ships writes under a schema is complete and valid, even when it is hot.
#[test]
fn generated_text_is_valid() {
    let schema = json!({
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 20},
            "year": {"type": "integer", "minimum": 1800, "maximum": 1899},
            "kind": {"enum": ["novel", "poem"]},
            "words": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 3},
        },
        "required": ["title", "year", "kind", "words"],
        "additionalProperties": false
    });
    let schema = schema.to_string();
    for seed in 0..8 {
        let seed = seed.to_string();
        let args = ["generate", "-p", "Book: ", "--temp", "1.5", "--seed", &seed, "-n", "400"];
        let text = ok(&[&args[..], &["--json-schema", &schema]].concat(), "");
        let value: Value = serde_json::from_str(text.strip_prefix("Book: ").unwrap()).unwrap();
        let fields = value.as_object().unwrap();
        assert_eq!(fields.len(), 4, "{text}");
        assert!(fields["title"].as_str().unwrap().chars().count() <= 20, "{text}");
        assert!((1800..1900).contains(&fields["year"].as_i64().unwrap()), "{text}");
        assert!(["novel", "poem"].contains(&fields["kind"].as_str().unwrap()), "{text}");
        let words = fields["words"].as_array().unwrap();
        assert!(words.len() <= 3 && words.iter().all(Value::is_string), "{text}");
    }
}

#[test]
fn the_command_line_takes_grammars() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    std::fs::write(file.path(), "root ::= (\"yes\" | \"no\") \".\"").unwrap();
    let args = ["generate", "-p", "Is it? ", "--seed", "1"];
    let text = ok(&[&args[..], &["--grammar", path]].concat(), "");
    assert!(["Is it? yes.\n", "Is it? no.\n"].contains(&text.as_str()), "{text}");
    let (code, text) = code_and_text(&[&args[..], &["--grammar", path, "-n", "0"]].concat());
    assert_eq!(
        (code, text.as_str()),
        (0, "Is it? \nnote: the text ends before the grammar does\n")
    );
    std::fs::write(file.path(), "root ::= \"yes").unwrap();
    let line = error(&[&args[..], &["--grammar", path]].concat(), 2);
    assert_eq!(line, "error: grammar line 1: the \" at the end is missing\n");
    std::fs::write(file.path(), "{\"type\": 5}").unwrap();
    let line = error(&[&args[..], &["--json-schema", path]].concat(), 2);
    assert!(line.starts_with("error: grammar: ") && line.lines().count() == 1, "{line}");
    let line = error(&[&args[..], &["--json-schema", "{\"type\": "]].concat(), 2);
    assert!(line.starts_with("error: JSON schema: EOF"), "{line}");
}

/// Control tokens are no text, even where their name is; ends come only where the grammar does.
#[test]
fn special_tokens_are_no_text() {
    let tokenizer = bpe().set("eot_token_id", V::U32(260)).open();
    let n_vocab = tokenizer.n_vocab();
    let end = |id: u32| tokenizer.is_eog(id);
    let ends: Vec<u32> = (0..n_vocab as u32).filter(|id| end(*id)).collect();
    assert_eq!(ends.len(), 2, "the end of a turn too");
    let control = (0..n_vocab as u32).find(|id| tokenizer.text(*id) == b"<|ctl|>").unwrap();
    // A model may have more logits than its tokenizer has tokens.
    let vocabulary = Vocabulary::new(&tokenizer, n_vocab + 7).unwrap();
    let allowed = |grammar: &mut Grammar| -> Vec<u32> {
        let mut logits = vec![0.0; n_vocab + 7];
        grammar.restrict(&mut logits).unwrap();
        (0..n_vocab as u32 + 7).filter(|id| logits[*id as usize] == 0.0).collect()
    };
    let mut grammar = Grammar::new(&vocabulary, &gbnf("root ::= .*")).unwrap();
    let found = allowed(&mut grammar);
    assert!(found.len() > 100 && !found.contains(&control));
    assert!(found.iter().all(|id| (*id as usize) < n_vocab), "{found:?}");
    assert!(ends.iter().all(|id| found.contains(id)), "the text may end at once");
    let mut grammar = Grammar::new(&vocabulary, &gbnf("root ::= \"<|ctl|>\"")).unwrap();
    for byte in "<|ctl|>".chars() {
        let found = allowed(&mut grammar);
        let next = found.iter().find(|id| tokenizer.piece(**id, false) == [byte as u8]).unwrap();
        assert!(!found.contains(&control) && !found.iter().any(|id| end(*id)), "{found:?}");
        assert!(grammar.accept(control).is_err());
        grammar.accept(*next).unwrap();
    }
    assert!(grammar.is_over());
    assert_eq!(allowed(&mut grammar), ends);
    assert!(matches!(grammar.accept(3), Err(Error::Usage(_))));
    grammar.accept(ends[1]).unwrap();
    assert!(grammar.is_over());
    let parts = [Part::Control("<|ctl|>".into()), Part::Text("hello".into())];
    let mut grammar = Grammar::new(&vocabulary, &Spec::Parts(parts.into())).unwrap();
    assert_eq!(allowed(&mut grammar), [control]);
    grammar.accept(control).unwrap();
    tokenizer.encode("hello", false, false).unwrap().into_iter().for_each(|id| {
        assert!(allowed(&mut grammar).contains(&id));
        grammar.accept(id).unwrap();
    });
    assert!(grammar.is_over());
    assert!(grammar.restrict(&mut [0.0; 3]).is_err(), "of another length");
}

/// A server makes grammars in one thread and uses them in others.
#[test]
fn grammars_go_to_other_threads() {
    fn is_send<T: Send>() {}
    fn is_sync<T: Sync>() {}
    is_send::<Grammar>();
    is_send::<Vocabulary>();
    is_sync::<Vocabulary>();
}

#[test]
fn parts_beside_each_other() {
    let text = |text: &str| Part::Text(text.into());
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}},
        "required": ["n"], "additionalProperties": false});
    let call = |name: &str| {
        vec![text("call "), text(name), Part::Control("<none>".into()), Part::Json(schema.clone())]
    };
    let calls = Part::OneOf(vec![call("get"), call("get_more")]);
    let spec = Spec::Parts(vec![Part::OneOrMore(vec![calls], vec![text("; ")]), text(".")]);
    Bytes::new().check(
        &spec,
        &["call get<none>{\"n\": 1}.", "call get_more<none>{\"n\":-20}; call get<none>{\"n\":0}."],
        &["", ".", "call get{\"n\": 1}.", "call get<none>{}.", "call get<none>{\"n\": 1};."],
    );
    let nothing: Value = json!({"type": "integer", "minimum": 3, "maximum": 2});
    let line = Bytes::new().refused(&Spec::Parts(vec![Part::Json(nothing)]));
    assert!(line.contains("nsatisfiable"), "{line}");
}
