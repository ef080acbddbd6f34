//! Sessions in files: what goes on from one, and what is refused.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use qkov::engine::CacheType;
use qkov::gguf::Gguf;
use qkov::mask::MASKS;
use qkov::merge::FORMS;
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::golden::FOLDER;
use crate::{families, family};

fn options(cache: CacheType) -> Options {
    Options { n_ctx: Some(64), pin: false, cache: (cache, cache), ..Options::default() }
}

fn open(name: &str) -> Model {
    Model::open(&PathBuf::from(FOLDER).join(format!("{name}.gguf"))).unwrap()
}

/// Saves after `n` tokens, restores elsewhere, and reads the rest there; compared with reading on.
fn goes_on(mut first: Session, mut second: Session, what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kept.session");
    let prompt: Vec<u32> = (0..13).map(|i| (i * 5 + 3) % 50 + 2).collect();
    first.feed_prompt(&prompt).unwrap();
    first.feed(&[7, 9]).unwrap();
    first.save(&path, "a note").unwrap();
    assert_eq!(second.restore(&path).unwrap(), "a note");
    assert_eq!(second.tokens(), first.tokens(), "{what}");
    for session in [&mut first, &mut second] {
        session.become_tokens(&prompt, &[7, 9, 11], &mut |_| true).unwrap();
        session.feed(&[4]).unwrap();
    }
    assert!(first.logits() == second.logits(), "{what}");
    assert_eq!(second.tokens(), first.tokens(), "{what}");
}

#[test]
fn every_cache_goes_on_from_a_file() {
    for (name, _) in families::files() {
        if open(&name).output.is_none() {
            continue;
        }
        for cache in CacheType::ALL {
            let session = || Session::new(Arc::new(open(&name)), &options(cache)).unwrap();
            goes_on(session(), session(), &format!("{name}, {}", cache.name()));
        }
        for form in FORMS {
            let mut model = open(&name);
            let mut plan = model.plan.clone();
            plan.set_forms(form.name()).unwrap();
            if form.rewrites() || model.check_forms(&plan).is_err() {
                continue;
            }
            model.set_plan(plan.clone());
            let mut again = open(&name);
            again.set_plan(plan);
            let session = |model| Session::new(Arc::new(model), &options(CacheType::F16)).unwrap();
            goes_on(session(model), session(again), &format!("{name}, {}", form.name()));
        }
    }
    for mask in MASKS {
        let session = || {
            let mut model = family::softmax();
            model.set_masks(mask.name).unwrap();
            Session::new(Arc::new(model), &options(CacheType::F16)).unwrap()
        };
        goes_on(session(), session(), mask.name);
    }
}

#[test]
fn what_belongs_to_another_or_is_damaged_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kept.session");
    let session = |change: &dyn Fn(&mut Model), cache| {
        let mut model = family::softmax();
        change(&mut model);
        Session::new(Arc::new(model), &options(cache)).unwrap()
    };
    let mut first = session(&|_| {}, CacheType::F16);
    first.feed_prompt(&[3, 5, 7, 9]).unwrap();
    first.save(&path, "").unwrap();
    let refused = |mut session: Session| session.restore(&path).unwrap_err().to_string();
    let other = Session::new(Arc::new(open("llama")), &options(CacheType::F16)).unwrap();
    assert!(refused(other).contains("another model"));
    let other = session(&|m| m.set_normalizers("0.1=sigmoid").unwrap(), CacheType::F16);
    assert!(refused(other).contains("another plan"));
    let other = session(&|m| m.set_masks("window:n=8").unwrap(), CacheType::F16);
    assert!(refused(other).contains("another plan"));
    assert!(refused(session(&|_| {}, CacheType::Q8_0)).contains("types f16, f16"));
    assert!(Model::open(&path).err().unwrap().to_string().contains("session"));

    // Every byte, and every length, of a small one: an error, or the same bytes where nothing is kept.
    let whole = std::fs::read(&path).unwrap();
    let mut same = session(&|_| {}, CacheType::F16);
    let broken = folder.path().join("broken.session");
    let mut n_refused = 0;
    let step = whole.len() / 400;
    for at in (0..whole.len()).step_by(step.max(1)) {
        for cut in [true, false] {
            let mut bytes = whole.clone();
            match cut {
                true => bytes.truncate(at),
                false => bytes[at] ^= 1 << (at % 8),
            }
            std::fs::write(&broken, bytes).unwrap();
            match same.restore(&broken) {
                Err(_) => n_refused += 1,
                Ok(_) => assert_eq!(same.tokens(), first.tokens()),
            }
        }
    }
    assert!(n_refused > 700, "{n_refused}");
    let model = PathBuf::from(FOLDER).join("llama.gguf");
    assert!(same.restore(&model).unwrap_err().to_string().contains("not a session"));
    // It is as good as new.
    same.restore(&path).unwrap();
    assert_eq!(same.tokens(), first.tokens());
    assert!(Gguf::open(&path).is_ok());
}

fn qkov(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qkov")).args(arguments).output().unwrap()
}

#[test]
fn generate_and_chat_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.session");
    let file = file.to_str().unwrap();
    let model = family::path("softmax");
    let model = model.to_str().unwrap();
    let common = ["generate", "-m", model, "--temp", "0", "-n", "12", "--no-pin"];
    let plain = qkov(&[&common[..], &["-p", "The sea was"]].concat());
    for _ in 0..2 {
        let kept = qkov(&[&common[..], &["-p", "The sea was", "--session", file]].concat());
        assert!(kept.status.success(), "{}", String::from_utf8_lossy(&kept.stderr));
        assert_eq!(kept.stdout, plain.stdout);
    }
    let other = qkov(&[&common[..], &["-p", "The", "--session", file, "--norm", "relu"]].concat());
    assert_eq!(other.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&other.stderr).contains("another plan"));

    let file = folder.path().join("chat.session");
    let file = file.to_str().unwrap();
    let say = |text: &str| {
        let said = qkov(&["chat", "-p", text, "--temp", "0", "-n", "8", "--session", file]);
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    };
    say("Hello");
    say("And the sea?");
    let gguf = Gguf::open(file.as_ref()).unwrap();
    let note = gguf.str("qkov.session.note").unwrap().unwrap();
    let messages: serde_json::Value = serde_json::from_str(note).unwrap();
    let roles: Vec<_> = messages.as_array().unwrap().iter().map(|m| m["role"].clone()).collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
}
