//! Signals that end the program.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::cuts::server;
use super::{Place, begun, names, signal, text, until};
use crate::serve::http::Events;

/// How soon a program ends, on a machine that does much else.
const SOON: Duration = Duration::from_secs(5);

const SIGNALS: [(&str, i32); 3] = [("-INT", 2), ("-TERM", 15), ("-HUP", 1)];

/// What began the tests may want a signal ignored, and then the program does as well.
fn is_ignored(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}

fn ends(mut child: Child, (name, number): (&str, i32), what: &str) {
    // Waiting would close it, and that ends a chat as well.
    let _held = child.stdin.take();
    let start = Instant::now();
    signal(&child, name);
    let status = child.wait().unwrap();
    // Before it watches for signals, it ends as all programs do, which to a shell is the same.
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    assert_eq!(code, Some(128 + number), "{what}, {name}: {status:?}");
    assert!(start.elapsed() < SOON, "{what}, {name}: {:?}", start.elapsed());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(!said.contains("error") && !said.contains("panicked"), "{what}: {said}");
}

#[test]
fn a_signal_ends_what_runs_and_leaves_nothing() {
    // A text that takes long.
    let long = "The sea was calm, and nobody spoke of the storm.\n".repeat(40_000);
    let cases: &[(&str, &[&str])] = &[
        ("generate", &["generate", "-p", "A", "--ignore-eos", "-c", "4000000", "--session", "s"]),
        ("eval", &["eval", "-f", "long", "-c", "64", "--save-base", "base"]),
        ("bench", &["bench", "-p", "64", "-n", "60000", "-r", "50"]),
        ("imatrix", &["imatrix", "-f", "long", "-c", "64", "-o", "i.gguf"]),
        (
            "calibrate",
            &["calibrate", "-f", "long", "--norm", "relu", "--tokens", "100000", "-o", "p.toml"],
        ),
        (
            "compare",
            &["compare", "-f", "long", "--norm", "relu", "--windows", "30000", "-o", "c.json"],
        ),
        ("embed", &["embed", "-f", "long"]),
        (
            "merge",
            &[
                "merge",
                "--form",
                "lowrank:kl=0.01",
                "--form-text",
                "long",
                "--form-tokens",
                "900000",
                "-o",
                "m.gguf",
            ],
        ),
    ];
    let place = Place::new();
    std::fs::write(place.path("long"), &long).unwrap();
    for signal in SIGNALS.into_iter().filter(|(_, number)| !is_ignored(*number)) {
        for (what, args) in cases {
            let more = ["-m", "model.gguf", "-t", "1", "--no-pin"];
            let mut child = place.command(&[*args, &more].concat()).spawn().unwrap();
            match *what {
                "generate" => begun(&mut child),
                "eval" => {
                    let is_writing =
                        || names(place.folder.path()).iter().any(|n| n.ends_with(".tmp"));
                    assert!(until(&mut child, is_writing), "eval has ended");
                }
                _ => std::thread::sleep(Duration::from_millis(150)),
            }
            assert!(child.try_wait().unwrap().is_none(), "{what} has ended");
            ends(child, signal, what);
            assert!(place.strays().is_empty(), "{what}: {:?}", place.strays());
        }
    }
    let mut left = names(place.folder.path());
    left.sort();
    assert_eq!(left, ["long", "model.gguf", "text"]);
}

#[test]
fn a_signal_ends_a_chat() {
    let place = Place::new();
    std::fs::write(place.path("template"), "{% for m in messages %}{{ m.content }}|{% endfor %}")
        .unwrap();
    let args =
        ["chat", "-m", "model.gguf", "--template", "template", "-c", "4000000", "--session", "s"];
    let chat = || {
        let mut child = place.command(&args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"Hi\n").unwrap();
        child
    };
    for signal in SIGNALS.into_iter().filter(|(_, number)| !is_ignored(*number)) {
        // While it waits for a message.
        let mut child = place.command(&args).stdin(Stdio::piped()).spawn().unwrap();
        let has_lock = || place.strays() == [".s.lock"];
        assert!(until(&mut child, has_lock));
        std::thread::sleep(Duration::from_millis(150));
        ends(child, signal, "chat");
        assert!(place.strays().is_empty(), "{:?}", place.strays());
    }
    // While it replies, the first Ctrl-C stops the reply, and the next one ends it.
    let mut child = chat();
    begun(&mut child);
    let mut out = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || out.read_to_end(&mut Vec::new()).unwrap());
    signal(&child, "-INT");
    assert!(until(&mut child, || place.path("s").exists()), "the reply is kept");
    std::thread::sleep(Duration::from_millis(50));
    assert!(child.try_wait().unwrap().is_none(), "it goes on");
    ends(child, SIGNALS[0], "chat");
    reader.join().unwrap();
    assert!(place.strays().is_empty());
}

#[test]
fn a_signal_ends_a_server_with_streams() {
    let place = Place::new();
    let body = json!({"prompt": "A", "max_tokens": 900_000, "ignore_eos": true});
    for (name, code) in [("-TERM", 143), ("-INT", 130)] {
        let (mut child, address, mut stderr) = server(&place);
        let mut streams: Vec<Events> =
            (0..3).map(|_| Events::open(address, "/v1/completions", &body)).collect();
        streams[0].next().unwrap();
        signal(&child, name);
        std::thread::sleep(Duration::from_millis(300));
        assert!(child.try_wait().unwrap().is_none(), "texts go on");
        let start = Instant::now();
        signal(&child, name);
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(start.elapsed() < SOON);
        let mut said = String::new();
        stderr.read_to_string(&mut said).unwrap();
        assert!(!said.contains("panicked"), "{said}");
    }
    if !is_ignored(1) {
        let (mut child, _, _) = server(&place);
        signal(&child, "-HUP");
        assert_eq!(child.wait().unwrap().signal(), Some(1));
    }
}

/// Who starts it in the background wants it to stay.
#[test]
fn what_is_ignored_stays_ignored() {
    let place = Place::new();
    let mut command = std::process::Command::new("sh");
    command.current_dir(place.folder.path()).args(["-c", "trap '' HUP INT; exec \"$@\"", "sh"]);
    command.arg(env!("CARGO_BIN_EXE_qkov"));
    command.args(["generate", "-m", "model.gguf", "-p", "A", "--ignore-eos", "-c", "4000000"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    begun(&mut child);
    let mut out = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || out.read_to_end(&mut Vec::new()).unwrap());
    signal(&child, "-HUP");
    signal(&child, "-INT");
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "it goes on");
    signal(&child, "-TERM");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", text(&output.stderr));
    reader.join().unwrap();
}
