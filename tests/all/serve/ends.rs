//! Clients that go away, and how the server ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::http::{get, post, request};
use super::{begun, endless, greedy, run, settings};
use crate::family;
use qkov::serve::api::Settings;

/// Time after which a slot is free that nobody waits for.
const FREE_TIME: Duration = Duration::from_millis(250);

/// Waits for something to become true.
pub fn until(is_true: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed() < Duration::from_secs(20), "it never was");
        std::thread::sleep(Duration::from_millis(5));
    }
    start.elapsed()
}

fn is_idle(address: SocketAddr) -> bool {
    let status = get(address, "/qkov/status").json();
    status["slots"].as_array().unwrap().iter().all(|slot| slot["busy"] == false)
}

#[test]
fn who_goes_away_frees_a_slot() {
    let server = run(settings());
    let address = server.address;
    let other = std::thread::spawn(move || {
        let all: Vec<String> = begun(address).collect();
        assert_eq!(all.last().unwrap(), "[DONE]");
    });
    // The other text goes on.
    drop(begun(address));
    other.join().unwrap();
    // Slow enough that it would run on: many texts at once.
    let mut body = endless();
    body["n"] = 16.into();
    let body = body.to_string();
    for streamed in [true, false] {
        let mut stream = TcpStream::connect(address).unwrap();
        let path = ("POST", "/v1/completions");
        let body = match streamed {
            true => body.replacen('{', "{\"stream\": true, ", 1),
            false => body.clone(),
        };
        let json = [("Content-Type", "application/json")];
        stream.write_all(&request(address, path, &json, body.as_bytes())).unwrap();
        until(|| !is_idle(address));
        drop(stream);
        let time = until(|| is_idle(address));
        assert!(time < 2 * FREE_TIME, "{streamed}: {time:?}");
    }
    server.end();
}

#[test]
fn running_texts_end_with_the_server() {
    let drain_time = Duration::from_millis(300);
    let server = run(Settings { drain_time, n_slots: 2, ..settings() });
    let address = server.address;
    let mut body = endless();
    body["n"] = 40.into();
    let mut events = super::Events::open(address, "/v1/completions", &body);
    events.next().unwrap();
    server.stopper.stop();
    until(|| get(address, "/health").status == 503);
    let refused = post(address, "/v1/completions", &greedy("The", 1));
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &"stopping".into()));
    let all: Vec<String> = events.collect();
    assert_eq!(all.last().unwrap(), "[DONE]");
    let ends = all[..all.len() - 1].iter().filter_map(|data| {
        let chunk: Value = serde_json::from_str(data).unwrap();
        (chunk["choices"][0]["finish_reason"] == "length").then_some(chunk)
    });
    let lengths = ends.map(|chunk| chunk["timings"]["predicted_n"].as_u64().unwrap());
    let lengths: Vec<u64> = lengths.collect();
    assert_eq!(lengths.len(), 40);
    assert!(lengths.iter().any(|n| *n < 200), "{lengths:?}");
    let start = Instant::now();
    server.end();
    assert!(start.elapsed() < Duration::from_secs(3));
}

/// The program, and where it listens.
fn program(more: &[&str]) -> (Child, SocketAddr) {
    let model = family::path("softmax");
    let mut child = Command::new(env!("CARGO_BIN_EXE_qkov"))
        .args(["serve", "--port", "0", "-c", "4096", "-t", "1", "--no-pin", "-m"])
        .arg(model)
        .args(more)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = lines.find(|line| line.as_ref().unwrap().contains("http://")).unwrap().unwrap();
    let address = line.split("http://").nth(1).unwrap().split(',').next().unwrap();
    (child, address.parse().unwrap())
}

#[cfg(unix)]
fn signal(child: &Child, name: &str) {
    let kill = Command::new("kill").args([name, &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
}

#[test]
#[cfg(unix)]
fn a_signal_ends_the_program() {
    let (mut child, address) = program(&[]);
    assert_eq!(get(address, "/v1/models").json()["data"][0]["id"], "softmax-q8_0");
    let start = Instant::now();
    signal(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    // With a text that is being written, it is written to its end.
    let (mut child, address) = program(&["--alias", "sea"]);
    let events = begun(address);
    signal(&child, "-INT");
    let all: Vec<String> = events.collect();
    assert_eq!(all.last().unwrap(), "[DONE]");
    assert!(all[all.len() - 2].contains("\"predicted_n\":200"), "{}", all[all.len() - 2]);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
#[cfg(unix)]
fn a_second_signal_ends_it_at_once() {
    let (mut child, address) = program(&["--parallel", "2"]);
    let body = greedy("The", 4000);
    let mut events = super::Events::open(address, "/v1/completions", &body);
    events.next().unwrap();
    signal(&child, "-TERM");
    until(|| get(address, "/health").status == 503);
    let start = Instant::now();
    signal(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[test]
fn a_port_in_use_is_one_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut child = Command::new(env!("CARGO_BIN_EXE_qkov"))
        .args(["serve", "--port", &port])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(text.lines().count() == 1 && text.contains(&port), "{text}");
}
