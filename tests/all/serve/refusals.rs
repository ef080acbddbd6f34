//! What is refused, and what it is told.

use serde_json::{Value, json};

use super::http::{Response, get, post, post_bytes, raw, request};
use super::{endless, run, settings, shared};
use crate::family;
use qkov::serve::api::Settings;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Asks with a body that is not right in one field.
fn with(path: &str, field: &str, value: Value) -> Response {
    let mut body = match path {
        CHAT => json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}),
        TEXT => json!({"prompt": "Hello", "max_tokens": 1}),
        "/v1/embeddings" => json!({"input": "Hello"}),
        _ => json!({"prompt": "The sea", "reply": " calm", "variants": [{}, {}]}),
    };
    body[field] = value;
    post(shared(), path, &body)
}

#[test]
fn a_wrong_field_is_named() {
    let long = "x ".repeat(400);
    for (path, field, value, part) in [
        (TEXT, "temperature", json!(-1), "allowed 0 or more"),
        (TEXT, "temperature", json!(1e308), "allowed 0 or more"),
        (TEXT, "temperature", json!("hot"), "a string; a number is needed"),
        (TEXT, "temperature", json!([1]), "an array; a number"),
        (TEXT, "top_p", json!(2), "allowed 0 to 1"),
        (TEXT, "top_k", json!(-5), "allowed whole numbers, 0 or more"),
        (TEXT, "top_k", json!(1.5), "allowed whole numbers"),
        (TEXT, "min_p", json!(true), "a number is needed"),
        (TEXT, "typical_p", json!(-0.5), "allowed 0 to 1"),
        (TEXT, "dynatemp_exponent", json!(-1), "allowed 0 or more"),
        (TEXT, "repeat_penalty", json!(0), "allowed above 0"),
        (TEXT, "mirostat", json!(2), "true or false is needed"),
        (TEXT, "samplers", json!(["top_k", "luck"]), "allowed penalties"),
        (TEXT, "samplers", json!("top_k"), "an array is needed"),
        (TEXT, "max_tokens", json!(-2), "allowed whole numbers, 1 or more"),
        (TEXT, "max_tokens", json!(0), "allowed whole numbers, 1 or more"),
        (TEXT, "n", json!(1_000_000), "allowed whole numbers, 1 to 128"),
        (TEXT, "n", json!(0), "1 to 128"),
        (TEXT, "seed", json!(18_446_744_073_709_551_616.0), "64 bits"),
        (TEXT, "seed", json!("x"), "a whole number is needed"),
        (TEXT, "logit_bias", json!({"99999999": 1}), "allowed 0 to"),
        (TEXT, "logit_bias", json!({"the": 1}), "not the number of a token"),
        (TEXT, "logit_bias", json!({"1": 101}), "allowed -100 to 100"),
        (TEXT, "logit_bias", json!([1]), "an object is needed"),
        (TEXT, "stop", json!(vec!["x"; 1000]), "1000 texts; allowed 16"),
        (TEXT, "stop", json!(""), "empty"),
        (TEXT, "stop", json!([3]), "a string is needed"),
        (TEXT, "logprobs", json!(21), "0 to 20"),
        (TEXT, "best_of", json!(2), "allowed 1"),
        (TEXT, "suffix", json!("end"), "suffix"),
        (TEXT, "echo", json!("yes"), "true or false"),
        (TEXT, "prompt", json!(5), "is needed"),
        (TEXT, "prompt", json!([]), "allowed 1 to 2048"),
        (TEXT, "prompt", json!([1, -2]), "allowed whole numbers, 0 to"),
        (TEXT, "prompt", json!([[1], []]), "is needed"),
        (TEXT, "prompt", json!(["a", 1]), "is needed"),
        (TEXT, "stream_options", json!({"include_usage": true}), "without \"stream\""),
        (TEXT, "grammar", json!("root = x"), "grammar"),
        (TEXT, "grammar", json!("(".repeat(60_000)), "grammar"),
        (TEXT, "n_discard", json!(-1), "unknown field"),
        (TEXT, "qkov", json!({"norm": "magic"}), "not known"),
        (TEXT, "qkov", json!({"form": 1}), "a string is needed"),
        (TEXT, "qkov", json!({"mask": "nope"}), "nope"),
        (TEXT, "qkov", json!({"norms": "softmax"}), "unknown field"),
        (CHAT, "messages", json!([]), "allowed 1 to"),
        (CHAT, "messages", json!("Hello"), "an array is needed"),
        (CHAT, "messages", json!([{"role": "user"}]), "messages[0].content is missing"),
        (CHAT, "messages", json!([{"content": "x"}]), "messages[0].role is missing"),
        (CHAT, "messages", json!([{"role": "robot", "content": "x"}]), "allowed system"),
        (CHAT, "messages", json!([{"role": "user", "content": "x", "mood": 1}]), "unknown field"),
        (
            CHAT,
            "messages",
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "allowed text",
        ),
        (CHAT, "max_tokens", json!(0), "1 or more"),
        (CHAT, "max_completion_tokens", json!(2), "they mean the same"),
        (CHAT, "top_logprobs", json!(2), "without \"logprobs\""),
        (CHAT, "logprobs", json!(2), "true or false"),
        (CHAT, "response_format", json!({"type": "xml"}), "allowed text"),
        (CHAT, "response_format", json!({"type": "json_schema"}), "json_schema is missing"),
        (CHAT, "tools", json!([{"type": "robot"}]), "tools[0]"),
        (CHAT, "tool_choice", json!("required"), "no tools"),
        (CHAT, "functions", json!([]), "unknown field"),
        (CHAT, "modalities", json!(["audio"]), "allowed [\"text\"]"),
        (CHAT, "chat_template_kwargs", json!({"messages": 1}), "field of its own"),
        ("/v1/embeddings", "input", json!([]), "allowed 1 to"),
        ("/v1/embeddings", "input", json!({}), "is needed"),
        ("/v1/embeddings", "dimensions", json!(3), "this model has"),
        ("/v1/embeddings", "encoding_format", json!("hex"), "allowed float, base64"),
        ("/qkov/compare", "variants", json!([{}]), "an array of 2"),
        ("/qkov/compare", "variants", json!([{}, {"norm": "magic"}]), "not known"),
        ("/qkov/compare", "reply", json!(""), "no tokens"),
        ("/qkov/compare", "reply", json!(long), "the context holds 256"),
    ] {
        let response = with(path, field, value.clone());
        let error = response.error();
        assert_eq!(response.status, 400, "{field} {value}: {error}");
        assert!(error.contains(part), "{field} {value}: {error}");
        let param = response.json()["error"]["param"].as_str().unwrap_or_default().to_string();
        assert!(part.contains("context") || param.starts_with(field) || param == "max_tokens");
    }
}

#[test]
fn a_body_that_is_no_json_is_refused() {
    let deep = "[".repeat(100_000);
    let nested = format!("{{\"prompt\": {}{}}}", "[".repeat(200), "]".repeat(200));
    for (body, part) in [
        (&b""[..], "empty"),
        (b"{", "not JSON"),
        (b"[]", "a JSON object is needed"),
        (b"\"text\"", "a JSON object is needed"),
        (b"{\"prompt\": \"a\"} {}", "not JSON"),
        (b"{\"prompt\": \"a\", \"prompt\": \"b\"}", "\"prompt\" is there twice"),
        (b"{\"prompt\": \"a\", \"qkov\": {\"norm\": \"a\", \"norm\": \"b\"}}", "there twice"),
        (b"{\"prompt\": \"\\ud800\"}", "not JSON"),
        (b"{\"prompt\": \"a\0b\"}", "not JSON"),
        (b"\xEF\xBB\xBF{\"prompt\": \"a\"}", "not JSON"),
        (b"{\"prompt\": \"\xFF\"}", "not UTF-8 at byte 12"),
        (b"{\"prompt\": \"a\", \"temperature\": NaN}", "not JSON"),
        (b"{\"prompt\": \"a\", \"temperature\": 1e999}", "not JSON"),
        (deep.as_bytes(), "not JSON"),
        (nested.as_bytes(), "not JSON"),
    ] {
        let response = post_bytes(shared(), TEXT, body);
        assert_eq!(response.status, 400);
        assert!(response.error().contains(part), "{}", response.body);
    }
}

#[test]
fn every_refusal_has_its_status_and_code() {
    let address = shared();
    let code = |response: &Response, status: u16, code: Value| {
        response.error();
        let found = (response.status, response.json()["error"]["code"].clone());
        assert_eq!(found, (status, code), "{}", response.body);
    };
    let long = "word ".repeat(2000);
    let response = with(TEXT, "prompt", json!(long));
    code(&response, 400, json!("context_length_exceeded"));
    let n = family::softmax().tokenizer.encode(&long, true, true).unwrap().len();
    assert!(response.error().contains(&format!("has {n} tokens; the context holds 256")));
    code(&with(TEXT, "model", json!("gpt-4")), 404, json!("model_not_found"));
    assert_eq!(with(TEXT, "model", json!("")).status, 200);
    code(&get(address, "/v2/models"), 404, json!("unknown_path"));
    code(&get(address, TEXT), 405, Value::Null);
    code(&post(address, "/health", &json!({})), 405, Value::Null);
    let ask = |method: &str, headers: &[(&str, &str)], body: &[u8]| {
        raw(address, &request(address, (method, TEXT), headers, body))
    };
    code(&ask("OPTIONS", &[], b""), 405, Value::Null);
    code(&ask("POST", &[("Content-Type", "text/plain")], b"{\"prompt\": \"a\"}"), 415, Value::Null);
    code(&ask("POST", &[], b"{\"prompt\": \"a\"}"), 415, Value::Null);
    let json = ("Content-Type", "application/json; charset=utf-8");
    code(&ask("POST", &[json, ("Content-Encoding", "gzip")], b"x"), 415, Value::Null);
    assert_eq!(ask("POST", &[json], b"{\"prompt\": \"a\", \"max_tokens\": 1}").status, 200);
    let large = vec![b' '; (8 << 20) + 1];
    code(&ask("POST", &[json], &large), 413, Value::Null);
    // Who asks first is told before it sends anything.
    let expect = format!(
        "POST {TEXT} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: 9000000\r\nExpect: 100-continue\r\n\r\n"
    );
    code(&raw(address, expect.as_bytes()), 413, Value::Null);
    let head = raw(address, &request(address, ("HEAD", "/health"), &[], b""));
    assert_eq!((head.status, &head.body[..]), (200, ""));
}

#[test]
fn strangers_pages_are_kept_out() {
    let address = shared();
    let health = |headers: &[(&str, &str)]| {
        raw(address, &request(address, ("GET", "/health"), headers, b""))
    };
    let own = format!("http://{address}");
    for (headers, status) in [
        (&[("Host", "evil.example")][..], 403),
        (&[("Host", "127.0.0.1.evil.example:80")], 403),
        (&[("Host", "localhost")], 200),
        (&[("Host", "localhost:9")], 200),
        (&[("Host", "[::1]:80")], 200),
        (&[("Host", "a b")], 400),
        (&[("Origin", "http://evil.example")], 403),
        (&[("Origin", "null")], 403),
        (&[("Origin", own.as_str())], 200),
    ] {
        let response = health(headers);
        assert_eq!(response.status, status, "{headers:?}: {}", response.body);
        assert_eq!(response.header("x-content-type-options"), Some("nosniff"));
    }
    let without = raw(address, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert_eq!(without.status, 400);
    // Programs of old do not name the server.
    assert_eq!(raw(address, b"GET /health HTTP/1.0\r\n\r\n").status, 200);
    let target = format!(
        "GET http://evil.example/health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    );
    assert_eq!(raw(address, target.as_bytes()).status, 403);
}

#[test]
fn a_key_is_asked_for() {
    let server = run(Settings { key: Some("s3cret".into()), ..settings() });
    let address = server.address;
    let models = |headers: &[(&str, &str)]| {
        raw(address, &request(address, ("GET", "/v1/models"), headers, b""))
    };
    for key in ["Bearer wrong", "Bearer s3cre", "Bearer ", "s3cret", "Basic s3cret"] {
        let response = models(&[("Authorization", key)]);
        assert_eq!(response.status, 401);
        assert_eq!(response.json()["error"]["code"], "invalid_api_key");
        assert!(!response.error().contains("s3cre"));
    }
    let response = models(&[]);
    assert_eq!((response.status, response.header("www-authenticate")), (401, Some("Bearer")));
    assert_eq!(models(&[("Authorization", "Bearer s3cret")]).status, 200);
    assert_eq!((get(address, "/health").status, get(address, "/").status), (200, 200));
    server.end();
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = run(Settings { n_slots: 1, n_queue: 1, ..settings() });
    let address = server.address;
    // One text after the other, so that one of them or the other request always waits.
    let mut body = endless();
    body["n"] = 10.into();
    let mut running = super::Events::open(address, TEXT, &body);
    running.next().unwrap();
    let waiting = super::Events::open(address, TEXT, &endless());
    super::ends::until(|| get(address, "/qkov/status").json()["queued"] == 1);
    let response = post(address, TEXT, &endless());
    assert_eq!(response.status, 429, "{}", response.body);
    assert_eq!(response.json()["error"]["type"], "rate_limit_error");
    let seconds = response.header("retry-after").unwrap().parse::<u32>().unwrap();
    assert!((1..=60).contains(&seconds));
    // Who waited has a turn.
    assert!(running.last().unwrap() == "[DONE]" && waiting.last().unwrap() == "[DONE]");
    server.end();
}
