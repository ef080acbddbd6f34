//! Tool calls: formats of templates, what forces a call, and calls in replies.

use qkov::error::Error;
use qkov::serve::tools::{Choice, Event, FORMATS, Format, Reply, Tool, messages, tools};
use qkov::token::template::{Context, Template};
use serde_json::{Value, json};

use crate::grammar::Bytes;
use crate::shared;

fn weather() -> Value {
    json!([
        {"type": "function", "function": {
            "name": "get_weather",
            "description": "The weather of a place",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"]
            }
        }},
        {"type": "function", "function": {
            "name": "get_time",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}}
        }}
    ])
}

/// Ids as all known templates allow them.
fn conversation() -> Value {
    json!([
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": null, "tool_calls": [{
            "id": "abcdef123", "type": "function",
            "function": {"name": "get_weather", "arguments": "{\"city\": \"Par\\\"is {\", \"days\": 2}"}
        }]},
        {"role": "tool", "tool_call_id": "abcdef123", "content": "hail"},
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": [{"type": "text", "text": "Thank "}, {"type": "text", "text": "you"}]}
    ])
}

fn format(name: &str) -> Format {
    *FORMATS.iter().find(|f| f.name == name).unwrap()
}

/// Small templates of each format, which write calls as the real ones do.
const TEMPLATES: &[(&str, &str)] = &[
    (
        "hermes",
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\
         {% for c in m.tool_calls %}\n<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": \
         {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}",
    ),
    (
        "mistral-args",
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\
         {% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]\
         {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}",
    ),
    (
        "mistral",
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\
         {% for c in m.tool_calls %}[TOOL_CALLS][{\"name\": \"{{ c.function.name }}\", \"arguments\": \
         {{ c.function.arguments | tojson }}, \"id\": \"{{ c.id }}\"}]{% endfor %}{% endfor %}",
    ),
    (
        "granite",
        "{% if tools %}Use <|tool_call|> and a JSON list. {{ tools | tojson }}{% endif %}\
         {% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}<|tool_call|>\
         [{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson }}}]\
         {% endfor %}{% endfor %}",
    ),
    (
        "command-r7b",
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\
         {% for c in m.tool_calls %}<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \
         \"{{ c.function.name }}\", \"parameters\": {{ c.function.arguments | tojson }}}\n]<|END_ACTION|>\
         {% endfor %}{% endfor %}",
    ),
    (
        "llama3",
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\
         {% if m.tool_calls %}{{ '{\"name\": \"' + m.tool_calls[0].function.name + '\", ' }}\
         {{ '\"parameters\": ' }}{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% endif %}\
         {% endfor %}",
    ),
];

fn render(source: &str, messages: &Value) -> Result<String, Error> {
    let context = Context { tools: Some(weather()), ..Context::default() };
    Template::new(source)?.render(messages, &context)
}

/// A reply at once or in pieces: its content and its calls, and whether these have ended.
#[derive(Debug, PartialEq, Default)]
struct Read {
    content: String,
    calls: Vec<(String, String, bool)>,
}

fn read<'a>(format: Format, pieces: impl Iterator<Item = &'a str>) -> Read {
    let tools = tools(&weather()).unwrap();
    let mut reply = Reply::new(format, &tools);
    let mut events = Vec::new();
    pieces.for_each(|piece| events.extend(reply.push(piece)));
    events.extend(reply.finish());
    let mut read = Read::default();
    for event in events {
        match event {
            Event::Content(text) => {
                assert!(!text.is_empty());
                read.content.push_str(&text);
            }
            Event::Begin { index, name } => {
                assert_eq!(index, read.calls.len());
                read.calls.push((name, String::new(), false));
            }
            Event::Arguments { index, text } => {
                assert!(index + 1 == read.calls.len() && !text.is_empty() && !read.calls[index].2);
                read.calls[index].1.push_str(&text);
            }
            Event::End { index } => {
                assert!(index + 1 == read.calls.len() && !read.calls[index].2);
                read.calls[index].2 = true;
            }
        }
    }
    read
}

/// The same, however it is cut.
fn read_all_ways(format: Format, text: &str) -> Read {
    let at_once = read(format, [text].into_iter());
    let each = text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]);
    assert_eq!(read(format, each), at_once, "{text}");
    for (at, _) in text.char_indices() {
        assert_eq!(read(format, [&text[..at], &text[at..]].into_iter()), at_once, "{text}");
    }
    at_once
}

#[test]
fn formats_are_told_by_their_templates() {
    for (name, source) in TEMPLATES {
        assert_eq!(Format::of(source).unwrap().name, *name);
    }
    assert_eq!(TEMPLATES.len(), FORMATS.len());
    let none =
        Format::of("{# tools #}{% for m in messages %}<tool_call>{{ m.content }}{% endfor %}");
    assert_eq!(none.unwrap_err().to_string(), "tools: the model's chat template has no tools");
    let unknown = Format::of("{% for t in tools %}{{ t }}{% endfor %}").unwrap_err().to_string();
    assert!(unknown.contains("is not known; known: hermes, mistral-args"), "{unknown}");
}

/// What a template writes of a call is read as that call, and allowed where a call is forced.
#[test]
fn calls_that_templates_write_are_read_and_allowed() {
    let messages = messages(&conversation()).unwrap();
    let tools = tools(&weather()).unwrap();
    let bytes = Bytes::new();
    for (name, source) in TEMPLATES {
        let text = render(source, &messages).unwrap();
        let start = text.find("<assistant>").unwrap() + "<assistant>".len();
        let reply = &text[start..text.find("<tool>").unwrap()];
        let found = read_all_ways(format(name), reply);
        assert_eq!(found.content.trim(), "", "{name}: {reply}");
        let [(function, arguments, true)] = &found.calls[..] else { panic!("{name}: {found:?}") };
        assert_eq!(function, "get_weather");
        let arguments: Value = serde_json::from_str(arguments).unwrap();
        assert_eq!(arguments, json!({"city": "Par\"is {", "days": 2}), "{name}");
        assert!(text.contains("hail") && text.ends_with("Thank you"), "{text}");
        // Ids are what this program adds, not the model.
        let forced = reply.trim().replace("\"tool_call_id\": \"0\", ", "");
        let forced =
            forced.replace("[CALL_ID]abcdef123", "").replace(", \"id\": \"abcdef123\"", "");
        let forced = forced.replace("[\n    {", "[{").replace("}\n]", "}]");
        let other = forced.replace("get_weather", "get_time");
        let empty = other.replace(r#"{"city": "Par\"is {", "days": 2}"#, "{}");
        let wrong = forced.replace("\"days\": 2", "\"days\": \"2\"");
        let unknown = forced.replace("get_weather", "get_wind");
        let spec = Choice::Required.spec(&format(name), &tools, false).unwrap();
        bytes.check(&spec, &[&forced, &empty], &["", "Hello", &other, &wrong, &unknown]);
        let choice = Choice::Function("get_time".into());
        let spec = choice.spec(&format(name), &tools, true).unwrap();
        bytes.check(&spec, &[&empty], &[&forced, &other]);
        assert_eq!(Choice::Auto.spec(&format(name), &tools, true), None);
    }
}

#[test]
fn several_calls() {
    let one = r#"{"name": "get_time", "arguments": {}}"#;
    let two = r#"{"name": "get_weather", "arguments": {"city": "Oslo"}}"#;
    let calls = |content: &str| Read {
        content: content.into(),
        calls: vec![
            ("get_time".into(), "{}".into(), true),
            ("get_weather".into(), "{\"city\": \"Oslo\"}".into(), true),
        ],
    };
    let tools = tools(&weather()).unwrap();
    let check = |name: &str, text: &str| {
        assert_eq!(read_all_ways(format(name), text), calls(""), "{name}");
        let spec = format(name).spec(&tools, true);
        Bytes::new().check(&spec, &[text], &[&text[..text.len() - 1], &format!("{text}x")]);
    };
    check("hermes", &format!("<tool_call>\n{one}\n</tool_call>\n<tool_call>\n{two}\n</tool_call>"));
    check("mistral", &format!("[TOOL_CALLS][{one}, {two}]"));
    check("granite", &format!("<|tool_call|>[{one}, {two}]"));
    check(
        "mistral-args",
        "[TOOL_CALLS]get_time[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Oslo\"}",
    );
    // Text may be around them.
    let text = format!("Wait. <tool_call>{one}</tool_call> \n<tool_call>{two}</tool_call> Done.");
    assert_eq!(read_all_ways(format("hermes"), &text), calls("Wait.  Done."));
}

#[test]
fn what_only_looks_like_a_call_is_content() {
    let all = |name: &str, texts: &[&str]| {
        for text in texts {
            let read = read_all_ways(format(name), text);
            assert_eq!((read.content.as_str(), &read.calls[..]), (*text, &[][..]), "{name}");
        }
    };
    let plain =
        ["", "Hello", " \n", "a < b", "{", "[1]", "{\"a\": 1}", "é<to", "<|", "[TOOL_", "ẞ["];
    FORMATS.iter().for_each(|f| all(f.name, &plain));
    all(
        "hermes",
        &[
            "<tool_call",
            "<tool_call>",
            "<tool_calls> are",
            "<tool_call> are written so",
            "<tool_call>\n{\"name\": \"get_time\"",
            "<tool_call>\n{\"name\": \"get_time\"}\n</tool_call>",
            "<tool_call>\n{\"arguments\": {}, \"name\": \"get_time\"}\n</tool_call>",
            "<tool_call>{\"name\": 1, \"arguments\": {}}",
            "<tool_call>{\"name\": \"get_time\", \"arguments\": 5}</tool_call>",
            "<tool_call>{name: \"get_time\"}</tool_call>",
            "<<tool_call<tool_call>é",
        ],
    );
    let long = format!("<tool_call>{{\"name\": \"{}\", \"arguments\": {{}}}}", "x".repeat(5000));
    let read = read(format("hermes"), [&long[..]].into_iter());
    assert_eq!((read.content, read.calls), (long, vec![]));
    all("mistral", &["[TOOL_CALLS]", "[TOOL_CALLS]{}", "[TOOL_CALLS][]", "[TOOL_CALLS][{}]"]);
    all("mistral-args", &["[TOOL_CALLS]f", "[TOOL_CALLS]f[ARGS]", "[TOOL_CALLS]a b[ARGS]{}"]);
    all(
        "llama3",
        &[
            "{\"name\": \"no_tool\", \"parameters\": {}}",
            "{\"name\": \"get_time\"}",
            "So: {\"name\": \"get_time\", \"parameters\": {}}",
            "<|python_tag|>print(1)",
            "{\"answer\": 42}",
        ],
    );
}

#[test]
fn broken_calls_keep_what_was_begun() {
    let hermes = |text: &str| read_all_ways(format("hermes"), text);
    let begun = |arguments: &str, ended, content: &str| Read {
        content: content.into(),
        calls: vec![("f".into(), arguments.into(), ended)],
    };
    let head = r#"<tool_call>{"name": "f", "arguments": "#;
    assert_eq!(hermes(&format!("{head}{{\"a\": [1,")), begun("{\"a\": [1,", false, ""));
    assert_eq!(hermes(&format!("{head}{{}}")), begun("{}", true, ""));
    assert_eq!(hermes(&format!("{head}{{}}}}")), begun("{}", true, ""));
    assert_eq!(hermes(&format!("{head}{{}}}}</tool")), begun("{}", true, ""));
    assert_eq!(hermes(&format!("{head}{{}}}} and")), begun("{}", true, "and"));
    assert_eq!(hermes(&format!("{head}{{}} and")), begun("{}", true, " and"));
    let llama = |text: &str| read_all_ways(format("llama3"), text);
    let call = ("get_time".to_string(), "{}".to_string(), true);
    let text =
        " <|python_tag|>{\"type\": \"function\", \"name\": \"get_time\", \"parameters\": {}}\n";
    assert_eq!(llama(text), Read { content: String::new(), calls: vec![call] });
}

#[test]
fn requests_that_are_none() {
    let message = |result: Result<_, Error>| match result {
        Err(Error::Usage(line)) => line,
        other => panic!("{:?}", other.map(|_: ()| ())),
    };
    let of_tools = |value: Value| message(tools(&value).map(|_| ()));
    assert_eq!(of_tools(json!({})), "tools: expected an array");
    assert_eq!(of_tools(json!([{}])), "tools[0]: expected the type \"function\"");
    let named = |name: &str| json!([{"type": "function", "function": {"name": name}}]);
    assert!(of_tools(named("a b")).contains("\"a b\"; allowed 1 to 64"));
    assert!(of_tools(named("\"}")).starts_with("tools[0].function.name"));
    assert!(of_tools(named(&"x".repeat(65))).starts_with("tools[0].function.name"));
    let nothing = json!({"properties": {}, "additionalProperties": false, "type": "object"});
    assert_eq!(tools(&named("f")).unwrap(), [Tool { name: "f".into(), parameters: nothing }]);
    let list = tools(&weather()).unwrap();
    let choice = |value: Value| Choice::read(&value, &list);
    assert_eq!(choice(Value::Null).unwrap(), Choice::Auto);
    assert_eq!(Choice::read(&Value::Null, &[]).unwrap(), Choice::None);
    assert_eq!(choice(json!("required")).unwrap(), Choice::Required);
    let function = |name: &str| json!({"type": "function", "function": {"name": name}});
    assert_eq!(choice(function("get_time")).unwrap(), Choice::Function("get_time".into()));
    assert!(message(choice(function("x")).map(|_| ())).contains("there is no tool \"x\""));
    assert!(message(choice(json!("any")).map(|_| ())).contains("allowed none, auto, required"));
    let none: Vec<Tool> = Vec::new();
    assert!(message(Choice::read(&json!("required"), &none).map(|_| ())).contains("no tools"));
    let of_messages = |value: Value| message(messages(&value).map(|_| ()));
    let call = |arguments: &str| {
        json!([{"role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}])
    };
    assert!(of_messages(call("[1]")).contains("tool_calls[0].function.arguments: expected a JSON"));
    assert!(of_messages(call("{")).starts_with("messages[0]"));
    let image = json!([{"role": "user", "content": [{"type": "image_url"}]}]);
    assert_eq!(of_messages(image), "messages[0].content[0]: expected a text");
}

/// Real templates: which format each has, and that calls go through those that write them.
#[test]
fn formats_of_real_templates() {
    let Some(folder) = shared().map(|path| path.join("templates")) else { return };
    let expected = [
        ("CohereForAI-c4ai-command-r7b-12-2024-tool_use", "command-r7b"),
        ("GLM-4.6", "not known"),
        ("HuggingFaceTB-SmolLM3-3B", "no tools"),
        ("LFM2.5-Instruct", "not known"),
        ("Mistral-Small-3.2-24B-Instruct-2506", "mistral-args"),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "hermes"),
        ("Qwen-QwQ-32B", "hermes"),
        ("Qwen-Qwen2.5-7B-Instruct", "hermes"),
        ("Qwen-Qwen3-0.6B", "hermes"),
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "no tools"),
        ("google-gemma-2-2b-it", "no tools"),
        ("ibm-granite-granite-3.3-2B-Instruct", "granite"),
        ("meta-llama-Llama-3.1-8B-Instruct", "llama3"),
        ("meta-llama-Llama-3.2-3B-Instruct", "llama3"),
        ("microsoft-Phi-3.5-mini-instruct", "no tools"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "mistral"),
        ("openai-gpt-oss-120b", "not known"),
        ("openbmb-MiniCPM5-1B", "not known"),
    ];
    let messages = messages(&conversation()).unwrap();
    for (name, expected) in expected {
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let found = match Format::of(&source) {
            Ok(format) => format,
            Err(e) => {
                assert!(e.to_string().contains(expected), "{name}: {e}");
                continue;
            }
        };
        assert_eq!(found.name, expected, "{name}");
        let text = render(&source, &messages).unwrap();
        assert!(text.contains("The weather of a place"), "{name} does not tell of tools");
        assert!(text.contains("hail"), "{name} does not tell of results");
        // Granite's template writes no calls of earlier turns.
        let Some(at) = text.rfind("Par\\\"is") else {
            assert_eq!(expected, "granite");
            continue;
        };
        let before = match found.controls().first() {
            Some(open) if found.is_parallel() => text[..at].rfind(open).unwrap(),
            _ => text[..at].rfind("{\"name\"").unwrap(),
        };
        let after = at + text[at..].find("hail").unwrap();
        let read = read_all_ways(found, &text[before..after]);
        assert_eq!(read.calls.len(), 1, "{name}: {read:?}");
        let arguments: Value = serde_json::from_str(&read.calls[0].1).unwrap();
        assert_eq!(arguments, json!({"city": "Par\"is {", "days": 2}), "{name}");
        assert!(read.calls[0].0 == "get_weather" && read.calls[0].2, "{name}: {read:?}");
    }
    let n = std::fs::read_dir(folder)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|e| e == "jinja"));
    assert_eq!(n.count(), expected.len(), "all templates are in the list");
}
