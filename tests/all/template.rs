//! Chat templates against Jinja2: real ones, each feature alone, and hostile ones.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use qkov::error::Error;
use qkov::token::template::{Context, Template};
use serde_json::{Value, json};

use crate::shared;
use crate::tiny::Tiny;

#[test]
fn real_templates_match_jinja2() {
    let Some(shared) = shared() else { return };
    let folder = shared.join("templates");
    let cases = std::fs::read_to_string(folder.join("expected.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&cases).unwrap();
    let mut wrong = Vec::new();
    for case in &cases {
        let text = |key: &str| case[key].as_str().unwrap_or_default().to_string();
        let context = Context {
            bos_token: text("bos_token"),
            eos_token: text("eos_token"),
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            now: text("now").parse().unwrap(),
            ..Context::default()
        };
        let source = std::fs::read_to_string(folder.join(text("template"))).unwrap();
        let result = Template::new(&source).and_then(|t| t.render(&case["messages"], &context));
        match (&result, case["expected"].as_str()) {
            (Ok(found), Some(expected)) if found == expected => {}
            (Err(Error::Usage(error)), None) if text("error").ends_with(error) => {}
            _ => wrong.push((text("template"), text("chat"), result, text("expected"))),
        }
    }
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), cases.len());
    assert!(cases.len() >= 100);
}

fn messages() -> Value {
    json!([{"role": "user", "content": "Hello"}])
}

fn render(source: &str) -> Result<String, Error> {
    Template::new(source)?.render(&messages(), &Context::default())
}

/// Small templates with the text or the error of Jinja2, written by `tests/golden/template.py`.
#[test]
fn features_match_jinja2() {
    let golden: Value = serde_json::from_str(include_str!("../golden/template.json")).unwrap();
    let context = Context {
        bos_token: "<s>".into(),
        eos_token: "</s>".into(),
        add_generation_prompt: true,
        now: golden["now"].as_str().unwrap().parse().unwrap(),
        ..Context::default()
    };
    let mut wrong = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let source = case["template"].as_str().unwrap();
        let result = Template::new(source).and_then(|t| t.render(&golden["messages"], &context));
        let same = match (&result, case["expected"].as_str(), case["raised"].as_str()) {
            (Ok(found), Some(expected), _) => found == expected,
            (Err(Error::Usage(found)), None, Some(text)) => *found == text.replace('\n', "\\n"),
            (Err(Error::File(line)), None, None) => {
                line.starts_with("chat template") && !line.contains('\n')
            }
            _ => false,
        };
        if !same {
            wrong.push((source, result, case["expected"].as_str()));
        }
    }
    assert!(wrong.is_empty(), "{}: {wrong:#?}", wrong.len());
}

#[test]
fn variables_reach_the_template() {
    let mut context = Context { tools: Some(json!([{"name": "f"}])), ..Context::default() };
    context.extra.insert("enable_thinking".into(), json!(false));
    let source = "{{ tools[0].name }} {{ enable_thinking }} {{ messages[0].content }}";
    let text = Template::new(source).unwrap().render(&messages(), &context).unwrap();
    assert_eq!(text, "f False Hello");
}

/// Every one of these must end soon, in an error of one line or in a text, and never in a crash.
fn hostile() -> Vec<(&'static str, String)> {
    let n = 60_000;
    let grow = |what: &str, then: &str| {
        format!(
            "{{% set ns = namespace(a=[1]) %}}{{% for i in range(100000) %}}{{% for j in range(9) %}}\
             {{% set ns.a = {what} %}}{{% endfor %}}{{% endfor %}}{then}"
        )
    };
    let double = |n: usize, then: &str| {
        format!(
            "{{% set ns = namespace(a=[1]) %}}{{% for i in range({n}) %}}\
             {{% set ns.a = [ns.a, ns.a] %}}{{% endfor %}}{then}"
        )
    };
    let deep = |then: &str| {
        format!(
            "{{% set ns = namespace(a=[1]) %}}{{% for i in range(60000) %}}\
             {{% set ns.a = [ns.a] %}}{{% endfor %}}{then}"
        )
    };
    vec![
        ("parentheses", format!("{{{{ {} }}}}", "(".repeat(n))),
        ("balanced", format!("{{{{ {}1{} }}}}", "(".repeat(n), ")".repeat(n))),
        ("lists", format!("{{{{ {}{} }}}}", "[".repeat(n), "]".repeat(n))),
        ("dictionaries", format!("{{{{ {} }}}}", "{1:".repeat(n))),
        ("ifs", format!("{}{}", "{% if 1 %}".repeat(6000), "{% endif %}".repeat(6000))),
        ("open ifs", "{% if 1 %}".repeat(6000)),
        ("fors", "{% for x in messages %}".repeat(6000)),
        ("elifs", format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(n / 4))),
        ("nots", format!("{{{{ {}1 }}}}", "not ".repeat(n))),
        ("minus signs", format!("{{{{ {}1 }}}}", "-".repeat(n))),
        ("sum", format!("{{{{ {}x }}}}", "x+".repeat(n))),
        ("attributes", format!("{{{{ x{} }}}}", ".a".repeat(n))),
        ("filters", format!("{{{{ x{} }}}}", "|e".repeat(n))),
        ("calls", format!("{{{{ x{} }}}}", "()".repeat(n))),
        ("tests", format!("{{{{ x{} }}}}", " is none".repeat(n / 4))),
        ("conditions", format!("{{{{ {}x }}}}", "x if x else ".repeat(n / 6))),
        ("unbalanced", format!("{{{{ ) }}}}{{{{ {}x }}}}", "x+".repeat(n))),
        ("string never ends", format!("{{{{ '{}", "x+".repeat(n))),
        ("large", "x".repeat(1 << 20)),
        ("braces", "{".repeat(n)),
        ("generation", "{% generation %}".repeat(6000)),
        ("macro", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into()),
        ("loops", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into()),
        ("range", "{{ range(10**9) | list | length }}".into()),
        ("times", "{{ 'a' * 10**9 }}".into()),
        ("list times", "{{ ([1] * 10**9) | length }}".into()),
        ("power", "{{ 10 ** 10 ** 10 }}".into()),
        ("doubling", "{% set ns = namespace(a='xxxxxxxx') %}{% for i in range(64) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}".into()),
        ("replace", "{{ ('a' * 100000).replace('a', 'b' * 100000) }}".into()),
        ("join", "{{ (range(9999) | list) | join('b' * 100000) }}".into()),
        ("format", "{{ '%999999999d' | format(1) }}".into()),
        ("indent", "{{ 'a\n' * 1000 | indent(10**8) }}".into()),
        ("tojson indent", "{{ [1] | tojson(indent=10**9) }}".into()),
        ("output", "{% for i in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}".into()),
        ("recursive loop", "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}".into()),
        ("strftime", "{{ strftime_now('%Q %') }}".into()),
        ("include", "{% include messages[0].content %}".into()),
        ("import", "{% import 'a' as x | dictsort %}".into()),
        ("from", "{% from '/etc/passwd' import x %}".into()),
        ("extends", "{% extends 'a' %}".into()),
        ("classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}".into()),
        ("nested value", grow("[ns.a]", "")),
        ("nested dictionary", grow("{'a': ns.a}", "")),
        ("nested value printed", deep("{{ ns.a }}")),
        ("nested value as text", deep("{{ ns.a | string | length }}")),
        ("nested value as JSON", deep("{{ ns.a | tojson }}")),
        ("nested value compared", deep("{% set old = ns.a %}{{ [old] == [old] }}")),
        ("nested value as key", deep("{{ {ns.a: 1} | length }}")),
        ("nested value sorted", deep("{{ [ns.a, [ns.a]] | sort | length }}")),
        ("shared value printed", double(64, "{{ ns.a }}")),
        ("shared value as text", double(20, "{{ ns.a ~ 'x' }}")),
        ("shared value as JSON", double(64, "{{ ns.a | tojson }}")),
        ("shared value joined", double(20, "{{ ns.a | join(',') }}")),
    ]
}

#[test]
fn hostile_templates_end_in_an_error() {
    for (name, source) in hostile() {
        let start = std::time::Instant::now();
        let result = render(&source);
        let seconds = start.elapsed().as_secs_f32();
        assert!(seconds < 5.0, "{name}: {seconds} s");
        match result {
            Err(Error::File(line)) => assert!(line.len() < 400 && !line.contains('\n'), "{line}"),
            Ok(text) => assert!(text.len() <= 4 << 20, "{name}: {} bytes", text.len()),
            Err(other) => panic!("{name}: {other:?}"),
        }
    }
}

/// Nothing but time ends this one, and the process with it.
#[test]
fn a_template_that_never_ends_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let source = "{% set ns = namespace(a=[1]) %}{% for i in range(64) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a == ns.a ~ '' }}";
    std::fs::write(file.path(), source).unwrap();
    let output = std::process::Command::new("sh")
        .args(["-c", "echo '[]' | \"$0\" template --file \"$1\"", env!("CARGO_BIN_EXE_qkov")])
        .arg(file.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(line, "error: chat template: not done after 4 s\n");
}

/// A server ends with it: its memory would be gone soon.
#[test]
fn a_server_ends_with_a_template_that_never_ends() {
    let folder = tempfile::tempdir().unwrap();
    let source = "{% if messages[0].content == 'end' %}{% set ns = namespace(a=[1]) %}{% for i in range(64) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a == ns.a ~ '' }}{% endif %}Hi";
    let model = folder.path().join("m.gguf");
    std::fs::write(&model, Tiny::llama().set("tokenizer.chat_template", source).bytes()).unwrap();
    let mut server = std::process::Command::new(env!("CARGO_BIN_EXE_qkov"))
        .args(["serve", "--port", "0", "-m"])
        .arg(&model)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(server.stderr.take().unwrap()).lines().map(Result::unwrap);
    let url = lines.find_map(|line| {
        line.split_whitespace().find_map(|word| word.strip_prefix("http://").map(String::from))
    });
    let address = url.unwrap().trim_end_matches([',', '.', '/']).to_string();
    let say = |text: &str| {
        let body = json!({"messages": [{"role": "user", "content": text}], "max_tokens": 2});
        let body = body.to_string();
        let mut stream = TcpStream::connect(&address).unwrap();
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        reply
    };
    assert!(say("go on").starts_with("HTTP/1.1 200"));
    let reply = say("end");
    assert!(reply.starts_with("HTTP/1.1 400") && reply.contains("not done after 4 s"), "{reply}");
    assert_eq!(server.wait().unwrap().code(), Some(3));
    let last = lines.last().unwrap();
    assert!(last.starts_with("error: the chat template runs on after its time"), "{last}");
}

#[test]
fn limits_leave_room_for_long_conversations() {
    let Some(shared) = shared() else { return };
    let turn = |i: usize| {
        let role = ["user", "assistant"][i % 2];
        json!({"role": role, "content": "word ".repeat(200)})
    };
    let messages: Value = (0..999).map(turn).collect();
    for entry in std::fs::read_dir(shared.join("templates")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "jinja") {
            let template = Template::new(&std::fs::read_to_string(&path).unwrap()).unwrap();
            let text = template.render(&messages, &Context::default()).unwrap();
            assert!(text.len() > 400_000, "{path:?}: {}", text.len());
        }
    }
}
