//! One session file, and several processes; and files that are damaged.

use std::io::Write;
use std::process::{Child, Stdio};
use std::sync::Arc;

use qkov::engine::Threads;
use qkov::gguf::Lock;
use qkov::model::Model;
use qkov::session::{Options, Session};

use super::{Place, line_of, until};
use crate::tiny::Tiny;

const CHAT: [&str; 10] =
    ["chat", "-m", "model.gguf", "--template", "template", "-n", "4", "--session", "s", "--no-pin"];
const GENERATE: [&str; 9] =
    ["generate", "-m", "model.gguf", "-p", "A", "-n", "4", "--session", "s"];

fn place() -> Place {
    let place = Place::new();
    std::fs::write(place.path("template"), "{% for m in messages %}{{ m.content }}|{% endfor %}")
        .unwrap();
    place
}

/// A chat that waits for a message.
fn holder(place: &Place) -> Child {
    let mut child = place.command(&CHAT).stdin(Stdio::piped()).spawn().unwrap();
    assert!(until(&mut child, || place.path(".s.lock").exists()));
    // Locked, too: from now on nobody else gets it.
    assert!(until(&mut child, || Lock::take(&place.path("s")).is_err()));
    child
}

#[test]
fn the_second_one_is_told() {
    let place = place();
    let mut child = holder(&place);
    for args in [&GENERATE[..], &[&CHAT[..], &["-p", "Hi"]].concat()] {
        let output = place.command(args).output().unwrap();
        assert_eq!(line_of(&output, 1), "error: s: in use by another process\n");
        assert!(output.stdout.is_empty());
    }
    // Also by another name, and after the file was written, which makes it another.
    child.stdin.as_mut().unwrap().write_all(b"Hi\n").unwrap();
    assert!(until(&mut child, || place.path("s").exists()));
    std::os::unix::fs::symlink("s", place.path("link")).unwrap();
    for name in ["s", "link", "./s"] {
        let mut args = GENERATE;
        args[8] = name;
        let line = line_of(&place.command(&args).output().unwrap(), 1);
        assert_eq!(line, format!("error: {name}: in use by another process\n"));
    }
    let kept = std::fs::read(place.path("s")).unwrap();
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    assert!(std::fs::read(place.path("s")).unwrap() == kept);
    assert!(place.strays().is_empty(), "{:?}", place.strays());
    place.ok(&[&CHAT[..], &["-p", "And then?"]].concat());
    assert!(place.strays().is_empty(), "{:?}", place.strays());
}

#[test]
fn the_killed_hold_nothing() {
    let place = place();
    for _ in 0..5 {
        let mut child = holder(&place);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(place.strays(), [".s.lock"]);
        place.ok(&GENERATE);
        assert!(place.strays().is_empty(), "{:?}", place.strays());
        std::fs::remove_file(place.path("s")).unwrap();
    }
}

/// Of many at once some get it, one after the other, and what they write is whole.
#[test]
fn many_at_once_do_not_mix() {
    let place = place();
    let children: Vec<Child> = (0..12).map(|_| place.command(&GENERATE).spawn().unwrap()).collect();
    let mut n_done = 0;
    for child in children {
        let output = child.wait_with_output().unwrap();
        match output.status.success() {
            true => n_done += 1,
            false => assert_eq!(line_of(&output, 1), "error: s: in use by another process\n"),
        }
    }
    assert!(n_done > 0);
    place.ok(&GENERATE);
    assert!(place.strays().is_empty(), "{:?}", place.strays());
}

/// Every length and every byte of a small one: an error, or the same session where the byte says nothing.
#[test]
fn a_session_that_is_damaged_anywhere_is_refused() {
    let place = place();
    let path = place.path("kept");
    let options = Options {
        n_ctx: Some(16),
        pin: false,
        n_threads: Threads { one: 1, batch: 1 },
        ..Options::default()
    };
    let model = Arc::new(Model::open(&place.path("model.gguf")).unwrap());
    let open = || Session::new(model.clone(), &options).unwrap();
    let mut first = open();
    first.feed_prompt(&[3, 5, 7]).unwrap();
    first.save(&path, "a note").unwrap();
    let next = |session: &mut Session| {
        session.feed(&[9]).unwrap();
        let logits = session.logits().to_vec();
        session.rewind(3);
        logits
    };
    let expected = next(&mut first);
    let whole = std::fs::read(&path).unwrap();
    let mut session = open();
    let (mut n, mut n_same) = (0, 0);
    let mut meets = |bytes: &[u8], what: String| {
        std::fs::write(&path, bytes).unwrap();
        n += 1;
        if let Ok(note) = session.restore(&path) {
            n_same += 1;
            assert_eq!((note.as_str(), session.tokens()), ("a note", &[3, 5, 7][..]), "{what}");
            assert!(next(&mut session) == expected, "{what}");
        }
    };
    for at in 0..whole.len() {
        meets(&whole[..at], format!("{at} bytes"));
        for change in [1 << (at % 8), 0xFF] {
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            meets(&bytes, format!("byte {at} ^ {change}"));
        }
    }
    eprintln!("{n} damaged sessions, {n_same} of them where nothing is kept");
    assert!(n_same < n / 10, "{n_same} of {n}");
    // Another model of the same shape.
    std::fs::write(&path, &whole).unwrap();
    Tiny::llama().tensor("output_norm.weights", &[8]).writer().write(&place.path("other")).unwrap();
    let other = Arc::new(Model::open(&place.path("other")).unwrap());
    let line = Session::new(other, &options).unwrap().restore(&path).unwrap_err().to_string();
    assert!(line.contains("kept: a session of another model"), "{line}");
    assert_eq!(session.restore(&path).unwrap(), "a note");
}
