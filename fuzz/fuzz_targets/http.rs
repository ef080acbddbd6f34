//! Requests to the server, without connections: a path on the first line, and behind it a body, if there
//! is one. Nothing may be the server's fault, and every answer is what it says it is.

#![no_main]

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt;
use libfuzzer_sys::fuzz_target;
use qkov::serve::api::{Server, Settings, listen};
use qkov::session::Options;
use qkov::session::pool::Pool;
use qkov_fuzz::{forgive, model, options};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};
use tower_service::Service;

/// Time that an answer may take: what is asked for is read by a tiny model.
const MAX_TIME: Duration = Duration::from_secs(9);

/// Room for a conversation with tools, by bytes.
const N_CTX: usize = 256;

struct Bench {
    runtime: Runtime,
    router: Router,
    _server: Server,
}

static BENCH: LazyLock<Bench> = LazyLock::new(|| {
    let options = Options { n_ctx: Some(N_CTX), ..options() };
    let pool = Pool::new(Arc::new(model()), &options).unwrap();
    let settings = Settings { id: "tiny".into(), n_slots: 2, ..Settings::default() };
    let server = Server::start(listen("127.0.0.1", 0).unwrap(), pool, settings).unwrap();
    let runtime = Builder::new_current_thread().enable_time().build().unwrap();
    Bench { runtime, router: server.router(), _server: server }
});

fn check(kind: &str, body: &[u8]) {
    let text = std::str::from_utf8(body).unwrap();
    match kind {
        "application/json" => drop(serde_json::from_str::<Value>(text).unwrap()),
        "text/event-stream" => {
            for line in text.lines().filter(|line| !line.is_empty()) {
                let data = line.strip_prefix("data: ").unwrap_or_else(|| panic!("{line:?}"));
                assert!(data == "[DONE]" || serde_json::from_str::<Value>(data).is_ok(), "{line}");
            }
        }
        _ => {}
    }
}

fuzz_target!(init: forgive(&["minijinja", "llguidance"]), |data: &[u8]| {
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    let (path, body) = data.split_at(end);
    let method = if body.is_empty() { "GET" } else { "POST" };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(Body::from(body.to_vec()));
    let Ok(request) = request else { return };
    let Bench { runtime, router, .. } = &*BENCH;
    let answer = async {
        let Ok(response) = router.clone().call(request).await;
        let (head, body) = response.into_parts();
        (head, body.collect().await.unwrap().to_bytes())
    };
    let (head, body) = runtime
        .block_on(async { tokio::time::timeout(MAX_TIME, answer).await })
        .expect("the answer takes too long");
    let told = String::from_utf8_lossy(&body);
    assert_ne!(head.status, StatusCode::INTERNAL_SERVER_ERROR, "{told}");
    let kind = head.headers.get("content-type").map_or("", |kind| kind.to_str().unwrap());
    check(kind.split(';').next().unwrap_or_default(), &body);
});
