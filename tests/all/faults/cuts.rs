//! Model files that are shortened, changed or replaced while they are in use.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::sync::Arc;

use qkov::error::Error;
use qkov::gguf::{Fate, Gguf, Writer};
use qkov::model::Model;
use qkov::session::pool::Pool;
use qkov::session::{Options, Session};
use serde_json::json;

use super::{Place, begun, text};
use crate::serve::http::{Events, get};

/// Leaves a file its first `n` bytes.
fn cut(place: &Place, n: u64) {
    OpenOptions::new().write(true).open(place.path("model.gguf")).unwrap().set_len(n).unwrap();
}

fn message<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("accepted"),
        Err(Error::File(text)) => text,
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn a_model_that_is_cut_before_it_is_loaded_is_refused() {
    let place = Place::new();
    let path = place.path("model.gguf");
    let whole = std::fs::read(&path).unwrap();
    let n = whole.len() as u64;
    for (i, left) in [0, 1, 4096, n / 2, n - 40].into_iter().enumerate() {
        std::fs::write(&path, &whole).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        let last = gguf.data(gguf.tensors().last().unwrap());
        assert!(last.check().is_ok() && last.fate() == Fate::Same);
        cut(&place, left);
        let line = message(Model::from_gguf(gguf));
        assert!(line.contains("shortened while in use"), "{line}");
        assert!(line.contains(&format!("has {left} bytes")), "{line}");
        assert!(last.check().is_err() && last.fate() == Fate::Changed);

        // Between opening and the engine, which reads every weight.
        std::fs::write(&path, &whole).unwrap();
        let model = Arc::new(Model::open(&path).unwrap());
        cut(&place, left);
        let options = Options { n_ctx: Some(16), pin: false, ..Options::default() };
        let line = match i % 2 {
            0 => message(Session::new(model, &options)),
            _ => message(Pool::new(model, &options)),
        };
        assert!(line.contains("model.gguf: the file was shortened while in use"), "{line}");
    }
    // A copy of it is not made.
    std::fs::write(&path, &whole).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let mut copy = Writer::new();
    gguf.tensors().iter().for_each(|tensor| copy.copy_tensor(&gguf, tensor).unwrap());
    cut(&place, n / 2);
    let line = message(copy.write(&place.path("copy.gguf")));
    assert!(line.contains("copy.gguf: ") && line.contains("model.gguf: the file was"), "{line}");
    assert!(!place.path("copy.gguf").exists() && place.strays().is_empty());
    // What is written anew under the name is no harm to what is open.
    std::fs::write(&path, &whole).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    std::fs::rename(&path, place.path("old.gguf")).unwrap();
    std::fs::write(&path, &whole[..100]).unwrap();
    let model = Model::from_gguf(gguf).unwrap();
    assert_eq!(model.fate(), Fate::Replaced);
}

const COMMON: [&str; 6] = ["-m", "model.gguf", "-t", "1", "--no-pin", "-c"];

fn ends_with_3(child: Child) {
    let output = child.wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{:?}: {said}", output.status);
    let last = said.lines().last().unwrap();
    assert_eq!(last, "error: model.gguf: the file was shortened while in use");
}

#[test]
fn a_model_that_is_cut_while_it_writes_ends_the_program() {
    // Of the last page that is left, the rest would be zeros, and pages are larger elsewhere.
    for left in if cfg!(target_arch = "x86_64") { vec![0, 4096] } else { vec![0] } {
        let place = Place::new();
        let generate = ["generate", "--ignore-eos", "-p", "A", "--seed", "1"];
        let mut child =
            place.command(&[&generate[..], &COMMON, &["4000000"]].concat()).spawn().unwrap();
        begun(&mut child);
        cut(&place, left);
        let mut out = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || out.read_to_end(&mut Vec::new()).unwrap());
        ends_with_3(child);
        reader.join().unwrap();
    }
}

/// A server, and where it listens.
pub fn server(place: &Place) -> (Child, SocketAddr, std::process::ChildStderr) {
    let mut command = place.command(
        &[&["serve", "--port", "0", "--parallel", "2"], &COMMON[..], &["1000000"]].concat(),
    );
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let mut stderr = BufReader::with_capacity(1, child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("http://") {
        said.clear();
        assert!(stderr.read_line(&mut said).unwrap() > 0);
    }
    let address = said.split("http://").nth(1).unwrap().split(',').next().unwrap().parse();
    (child, address.unwrap(), stderr.into_inner())
}

#[test]
fn a_model_that_is_cut_under_a_server_ends_it() {
    let place = Place::new();
    let (mut child, address, mut stderr) = server(&place);
    assert_eq!(get(address, "/qkov/status").json()["model_file"], "same");
    let body = json!({"prompt": "A", "max_tokens": 900_000, "ignore_eos": true, "temperature": 0});
    let mut events = Events::open(address, "/v1/completions", &body);
    events.next().unwrap();
    // Longer is no harm, but it is told.
    let file = OpenOptions::new().append(true).open(place.path("model.gguf"));
    file.unwrap().write_all(b"more").unwrap();
    assert_eq!(get(address, "/qkov/status").json()["model_file"], "changed");
    cut(&place, 0);
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(3), "{said}");
    assert_eq!(
        said.lines().last().unwrap(),
        "error: model.gguf: the file was shortened while in use"
    );
}

#[test]
fn a_server_goes_on_with_a_model_that_is_replaced() {
    let place = Place::new();
    let (mut child, address, _stderr) = server(&place);
    std::fs::write(place.path("new.gguf"), "another").unwrap();
    std::fs::rename(place.path("new.gguf"), place.path("model.gguf")).unwrap();
    assert_eq!(get(address, "/qkov/status").json()["model_file"], "replaced");
    let body = json!({"prompt": "A", "max_tokens": 4, "ignore_eos": true});
    assert_eq!(crate::serve::http::post(address, "/v1/completions", &body).status, 200);
    super::signal(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
