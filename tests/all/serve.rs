//! The server over HTTP, with a trained model of this project.

mod ends;
pub mod http;
mod refusals;

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use qkov::engine::Threads;
use qkov::measure::divergence::Row;
use qkov::serve::api::{Server, Settings, Stopper, listen};
use qkov::session::embed::normalize;
use qkov::session::pool::Pool;
use qkov::session::{Options, Session};

use crate::family;
use http::{Events, chunks, get, post};

const N_CTX: usize = 256;

/// A template that can tell of tools; its marks are those of the format "hermes".
const TEMPLATE: &str = "{% if tools %}<tool_call>{{ tools | tojson }} arguments\n{% endif %}\
    {% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";

fn options() -> Options {
    let n_threads = Threads { one: 2, batch: 2 };
    Options { n_ctx: Some(N_CTX), n_threads, pin: false, ..Options::default() }
}

/// A server on a port of its own.
struct Running {
    address: SocketAddr,
    stopper: Stopper,
    thread: JoinHandle<qkov::error::Result<()>>,
}

fn settings() -> Settings {
    Settings {
        id: "softmax".into(),
        names: vec!["softmax.gguf".into()],
        template: Some(TEMPLATE.into()),
        ..Settings::default()
    }
}

fn run(settings: Settings) -> Running {
    let pool = Pool::new(Arc::new(family::softmax()), &options()).unwrap();
    let server = Server::start(listen("127.0.0.1", 0).unwrap(), pool, settings).unwrap();
    let (address, stopper) = (server.address(), server.stopper());
    Running { address, stopper, thread: std::thread::spawn(|| server.run()) }
}

impl Running {
    /// Ends it, and gives what came of it.
    fn end(self) {
        self.stopper.stop();
        self.thread.join().unwrap().unwrap();
    }
}

/// One that most tests share.
fn shared() -> SocketAddr {
    static SERVER: LazyLock<Running> = LazyLock::new(|| run(settings()));
    SERVER.address
}

fn ok(path: &str, body: &Value) -> Value {
    let response = post(shared(), path, body);
    assert_eq!(response.status, 200, "{body}: {}", response.body);
    response.json()
}

/// Text of a streamed answer, its last chunk with a choice, and the one with usage.
fn joined(path: &str, body: &Value) -> (String, Value, Value) {
    let mut body = body.clone();
    body["stream_options"] = json!({"include_usage": true});
    let all = chunks(shared(), path, &body);
    let (usage, rest) = all.split_last().unwrap();
    let text = rest.iter().map(|chunk| {
        let choice = &chunk["choices"][0];
        choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default()
    });
    (text.collect(), rest.last().unwrap().clone(), usage.clone())
}

fn greedy(prompt: &str, n: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": true})
}

fn text_of(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

#[test]
fn streams_say_what_whole_answers_say() {
    for temperature in [0.0, 1.5] {
        let messages = json!([{"role": "developer", "content": "Tell."},
            {"role": "user", "content": [{"type": "text", "text": "A storm"}]}]);
        let more = json!({"max_completion_tokens": 24, "temperature": temperature, "seed": 3,
            "logprobs": true, "top_logprobs": 2});
        for path in ["/v1/chat/completions", "/v1/completions"] {
            let mut body = more.clone();
            if path == "/v1/completions" {
                body = greedy("A storm", 24);
                body["temperature"] = temperature.into();
                body["seed"] = 3.into();
            } else {
                body["messages"] = messages.clone();
            }
            let whole = ok(path, &body);
            let choice = &whole["choices"][0];
            let text = choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap();
            let (streamed, last, usage) = joined(path, &body);
            assert!(!text.is_empty());
            assert_eq!(streamed, text);
            assert_eq!(last["choices"][0]["finish_reason"], choice["finish_reason"]);
            assert_eq!(last["timings"]["predicted_n"], whole["usage"]["completion_tokens"]);
            for name in ["prompt_tokens", "completion_tokens", "total_tokens"] {
                assert_eq!(usage["usage"][name], whole["usage"][name], "{name}");
            }
            assert_eq!(usage["choices"], json!([]));
        }
    }
}

#[test]
fn chat_tells_probabilities() {
    let body = json!({"messages": [{"role": "user", "content": "The sea"}], "max_tokens": 6,
        "temperature": 0, "logprobs": true, "top_logprobs": 3});
    let whole = ok("/v1/chat/completions", &body);
    let tokens = whole["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let mut bytes = Vec::new();
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // The likeliest is chosen.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]));
        bytes.extend(token["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8));
    }
    assert_eq!(String::from_utf8(bytes).unwrap(), whole["choices"][0]["message"]["content"]);
    let chunks = chunks(shared(), "/v1/chat/completions", &body);
    let streamed = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(&streamed.flatten().cloned().collect::<Vec<_>>(), tokens);
}

#[test]
fn prompts_come_in_four_kinds() {
    let tokenizer = family::softmax().tokenizer;
    let ids = tokenizer.encode("The sea", true, true).unwrap();
    let one = ok("/v1/completions", &greedy("The sea", 8));
    let mut body = greedy("", 8);
    for (prompt, n) in [
        (json!(["The sea"]), 1),
        (json!(ids), 1),
        (json!([ids, ids]), 2),
        (json!(["The sea", "The sea", "A storm"]), 3),
    ] {
        body["prompt"] = prompt;
        let answer = ok("/v1/completions", &body);
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), n);
        for (i, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], i);
            assert_eq!(choice["text"] == text_of(&one), i < 2, "{choice}");
        }
    }
    assert_eq!(one["usage"]["prompt_tokens"], ids.len());
}

#[test]
fn several_texts_have_seeds_of_their_own() {
    let body = |seed: u64, n: usize| json!({"prompt": "Once", "max_tokens": 8, "temperature": 1.5, "seed": seed, "n": n});
    // More than are written at once.
    let answer = ok("/v1/completions", &body(5, 20));
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 20);
    for i in [0, 1, 19] {
        assert_eq!(choices[i]["text"], text_of(&ok("/v1/completions", &body(5 + i as u64, 1))));
    }
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    let n = family::softmax().tokenizer.encode("Once", true, true).unwrap().len();
    assert_eq!(answer["usage"]["prompt_tokens"], n);
}

#[test]
fn echo_tells_what_a_session_says() {
    let mut session = Session::new(Arc::new(family::softmax()), &options()).unwrap();
    let tokenizer = &session.model().clone().tokenizer;
    let text = "It was a dark night, né?";
    let ids = tokenizer.encode(text, true, true).unwrap();
    let n_vocab = session.model().hparams.n_vocab;
    let logits = session.feed_wanting(&ids, 0..ids.len()).unwrap().to_vec();
    let body = json!({"prompt": text, "max_tokens": 0, "echo": true, "logprobs": 1,
        "temperature": 0, "seed": 1234});
    let answer = ok("/v1/completions", &body);
    assert_eq!(text_of(&answer), text);
    let table = &answer["choices"][0]["logprobs"];
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(table[name].as_array().unwrap().len(), ids.len(), "{name}");
    }
    assert!(table["token_logprobs"][0].is_null() && table["top_logprobs"][0].is_null());
    for (i, row) in logits.chunks_exact(n_vocab).take(ids.len() - 1).enumerate() {
        let row = Row::new(row);
        let told = table["token_logprobs"][i + 1].as_f64().unwrap();
        assert!((told - row.ln_p(ids[i + 1])).abs() < 1e-3, "{i}: {told}");
        let top = table["top_logprobs"][i + 1].as_object().unwrap();
        let best = (0..n_vocab as u32).map(|id| row.ln_p(id)).fold(f64::MIN, f64::max);
        let first = top.values().next().unwrap().as_f64().unwrap();
        assert!((first - best).abs() < 1e-3);
        assert!(top.contains_key(table["tokens"][i + 1].as_str().unwrap()));
    }
    // Characters, not bytes: the last token is the question mark.
    let last = table["text_offset"][ids.len() - 1].as_u64().unwrap() as usize;
    assert_eq!(last, text.chars().count() - 1);
    // The same as tokens, and with something behind.
    let body =
        json!({"prompt": ids, "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0});
    let more = ok("/v1/completions", &body);
    assert!(text_of(&more).starts_with(text));
    let told = more["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    assert_eq!(told.len(), ids.len() + 1);
    let (streamed, ..) = joined("/v1/completions", &body);
    assert_eq!(streamed, text_of(&more));
}

#[test]
fn a_stop_ends_a_text_in_front_of_it() {
    let whole = ok("/v1/completions", &greedy("The", 40));
    let text = text_of(&whole).to_string();
    let chars: Vec<(usize, char)> = text.char_indices().collect();
    for (start, n) in [(10, 1), (20, 3), (25, 9)] {
        let stop = &text[chars[start].0..chars[start + n].0];
        let at = text.find(stop).unwrap();
        let mut body = greedy("The", 40);
        body["stop"] = json!([stop, "never in any text"]);
        let answer = ok("/v1/completions", &body);
        assert_eq!(text_of(&answer), &text[..at]);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert_eq!(joined("/v1/completions", &body).0, text[..at]);
    }
}

#[test]
fn a_banned_token_is_not_chosen() {
    let mut body = greedy("The sea", 1);
    body["logprobs"] = 0.into();
    let first = ok("/v1/completions", &body)["choices"][0]["logprobs"]["tokens"][0].clone();
    let id = family::softmax().tokenizer.encode(first.as_str().unwrap(), false, false).unwrap();
    assert_eq!(id.len(), 1);
    body["logit_bias"] = json!({id[0].to_string(): -100});
    assert_ne!(ok("/v1/completions", &body)["choices"][0]["logprobs"]["tokens"][0], first);
}

#[test]
fn a_text_is_the_same_alone_and_beside_others() {
    let texts = || {
        let threads = (0..16).map(|i| {
            std::thread::spawn(move || {
                let prompt = ["The sea", "A storm", "Once upon a time", "He said"][i % 4];
                text_of(&ok("/v1/completions", &greedy(prompt, 20 + i % 4))).to_string()
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    };
    let alone = text_of(&ok("/v1/completions", &greedy("The sea", 20))).to_string();
    let together = texts();
    for i in [0, 4, 8, 12] {
        assert_eq!(together[i], alone);
    }
}

#[test]
fn a_format_is_kept_to() {
    let schema = json!({"type": "object", "properties": {"weather": {"enum": ["storm", "calm"]}},
        "required": ["weather"], "additionalProperties": false});
    let body = json!({"messages": [{"role": "user", "content": "The sea"}], "temperature": 0,
        "response_format": {"type": "json_schema",
            "json_schema": {"name": "sea", "schema": schema, "strict": true}}});
    let answer = ok("/v1/chat/completions", &body);
    let content = answer["choices"][0]["message"]["content"].as_str().unwrap();
    let content: Value = serde_json::from_str(content).unwrap();
    assert!(["storm", "calm"].contains(&content["weather"].as_str().unwrap()), "{content}");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let mut body = greedy("The sea", 40);
    body["grammar"] = "root ::= \"yes\" | \"no\"".into();
    assert!(["yes", "no"].contains(&text_of(&ok("/v1/completions", &body))));
}

#[test]
fn a_call_is_found() {
    let parameters = json!({"type": "object", "properties": {"wind": {"enum": ["north", "south"]}},
        "required": ["wind"], "additionalProperties": false});
    let tool = json!({"type": "function",
        "function": {"name": "sail", "description": "Sails.", "parameters": parameters}});
    let body = json!({"messages": [{"role": "user", "content": "Go"}], "temperature": 0,
        "tools": [tool], "tool_choice": "required", "parallel_tool_calls": false});
    let answer = ok("/v1/chat/completions", &body);
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    assert!(choice["message"]["content"].is_null());
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("sail")));
    let arguments = call["function"]["arguments"].as_str().unwrap();
    let parsed: Value = serde_json::from_str(arguments).unwrap();
    assert!(["north", "south"].contains(&parsed["wind"].as_str().unwrap()));
    let all = chunks(shared(), "/v1/chat/completions", &body);
    let deltas = || all.iter().map(|chunk| &chunk["choices"][0]["delta"]["tool_calls"][0]);
    let text = deltas().filter_map(|call| call["function"]["arguments"].as_str());
    assert_eq!(text.collect::<String>(), arguments);
    assert_eq!(deltas().filter(|call| call["id"].is_string()).count(), 1);
    assert_eq!(all.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    // The conversation goes on with the call and its result.
    let messages = json!([{"role": "user", "content": "Go"}, choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "done"}]);
    ok("/v1/chat/completions", &json!({"messages": messages, "max_tokens": 2}));
}

#[test]
fn embeddings_are_a_session_s() {
    let mut session = Session::new(Arc::new(family::softmax()), &options()).unwrap();
    let ids = session.model().tokenizer.encode("calm sea", true, false).unwrap();
    let mut expected = session.embed(&ids, session.model().hparams.pooling()).unwrap();
    normalize(&mut expected);
    let answer = ok("/v1/embeddings", &json!({"input": ["calm sea", "storm"]}));
    assert_eq!(answer["data"].as_array().unwrap().len(), 2);
    let numbers: Vec<f32> = serde_json::from_value(answer["data"][0]["embedding"].clone()).unwrap();
    let near = |a: &[f32]| a.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(numbers.len() == expected.len() && near(&numbers));
    let body = json!({"input": ids, "encoding_format": "base64", "dimensions": expected.len()});
    let answer = ok("/v1/embeddings", &body);
    let bytes = STANDARD.decode(answer["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let floats = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    assert!(near(&floats.collect::<Vec<_>>()));
    assert_eq!(answer["usage"]["prompt_tokens"], ids.len());
}

#[test]
fn variants_are_compared() {
    let body = |b: Value| json!({"prompt": "The sea", "reply": " was calm and still", "variants": [{}, b]});
    let same = ok("/qkov/compare", &body(json!({"mask": "causal"})));
    assert!(same["mean_kl"].as_f64().unwrap() < 1e-9);
    assert_eq!(same["perplexity"][0], same["perplexity"][1]);
    let other = ok("/qkov/compare", &body(json!({"norm": "sigmoid"})));
    assert!(other["mean_kl"].as_f64().unwrap() > 1e-3);
    let tokens = other["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert_eq!(text, " was calm and still");
    assert_eq!(tokens[0]["top"][1].as_array().unwrap().len(), 5);
    // What a text says of the first variant is what echo says.
    let body = json!({"prompt": "The sea was calm and still", "max_tokens": 0, "echo": true, "logprobs": 0});
    let echo = ok("/v1/completions", &body);
    let told = echo["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    let told = &told[told.len() - tokens.len()..];
    for (token, told) in tokens.iter().zip(told) {
        let x = token["logprobs"][0].as_f64().unwrap();
        assert!((x - told.as_f64().unwrap()).abs() < 1e-2, "{token}");
    }
}

#[test]
fn a_head_is_shown() {
    let body = json!({"messages": [{"role": "user", "content": "The sea"}], "reply": " calm",
        "layer": 2, "head": 5});
    let map = ok("/qkov/attention", &body);
    let n = map["tokens"].as_array().unwrap().len();
    assert!((map["n_prompt"].as_u64().unwrap() as usize) < n);
    let max = map["max"].as_f64().unwrap();
    let bytes = STANDARD.decode(map["weights"].as_str().unwrap()).unwrap();
    assert_eq!(bytes.len(), n * n);
    for (query, row) in bytes.chunks_exact(n).enumerate() {
        let sum: f64 = row.iter().map(|b| f64::from(*b as i8) / 127.0 * max).sum();
        assert!((sum - 1.0).abs() < n as f64 * max / 254.0 + 1e-3, "{query}: {sum}");
        assert!(row[query + 1..].iter().all(|b| *b == 0));
    }
    assert_eq!(map["entropy"].as_array().unwrap().len(), map["n_heads"].as_u64().unwrap() as usize);
}

#[test]
fn the_server_says_what_it_is() {
    let address = shared();
    assert_eq!(get(address, "/health").json(), json!({"status": "ok"}));
    assert_eq!(get(address, "/v1/models").json()["data"][0]["id"], "softmax");
    let model = get(address, "/qkov/model").json();
    assert_eq!((&model["n_ctx"], &model["chat"]), (&json!(N_CTX), &json!(true)));
    let norms = model["norms"].as_array().unwrap();
    assert_eq!(norms.len(), qkov::normalizer::kinds().len());
    assert_eq!(model["sampling"]["temperature"], 0.8);
    let status = get(address, "/qkov/status").json();
    assert_eq!(status["slots"].as_array().unwrap().len(), 16);
    let body = json!({"content": "calm sea", "with_pieces": true});
    let pieces = ok("/tokenize", &body)["tokens"].as_array().unwrap().clone();
    let ids: Vec<&Value> = pieces.iter().map(|piece| &piece["id"]).collect();
    assert_eq!(ok("/detokenize", &json!({"tokens": ids}))["content"], "calm sea");
    let metrics = get(address, "/metrics").body;
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.split_once(' ').unwrap();
        assert!(name.starts_with("qkov_") && value.parse::<f64>().is_ok(), "{line}");
    }
    for name in ["qkov_predicted_tokens_total", "qkov_first_token_seconds_bucket{le=\"+Inf\"}"] {
        assert!(metrics.contains(&format!("\n{name} ")), "{name}");
    }
    let page = get(address, "/");
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"), "{policy}");
    assert!(page.header("access-control-allow-origin").is_none());
    assert_eq!(page.body.len().to_string(), page.header("content-length").unwrap());
}

#[test]
fn other_attention_is_asked_for_by_text() {
    let mut body = greedy("The sea", 8);
    let plain = ok("/v1/completions", &body);
    body["qkov"] = json!({"norm": "sigmoid"});
    let other = ok("/v1/completions", &body);
    assert_ne!(text_of(&plain), text_of(&other));
    assert!(other["system_fingerprint"].as_str().unwrap().contains("sigmoid"));
    body["model"] = "softmax.gguf".into();
    assert_eq!(text_of(&ok("/v1/completions", &body)), text_of(&other));
}

/// A text that takes long.
fn endless() -> Value {
    greedy("The", 200)
}

/// A stream that has begun.
fn begun(address: SocketAddr) -> Events {
    let mut events = Events::open(address, "/v1/completions", &endless());
    events.next().unwrap();
    events
}
