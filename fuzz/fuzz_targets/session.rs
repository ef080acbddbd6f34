//! Session files: one that is sound, damaged; its checksum is mended unless the first byte says otherwise.
//!
//! What is taken must go on, and so must the session that refused it.

#![no_main]

use std::cell::RefCell;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use qkov::session::Session;
use qkov_fuzz::{File, Input, N_CTX, model, parse, session};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const CHECKSUM: &str = "qkov.session.sha256";
const PROMPT: [u32; 5] = [3, 5, 7, 9, 11];

struct Bench {
    _folder: TempDir,
    path: PathBuf,
    /// Under different masks, each with a file that it saved.
    sessions: Vec<(Session, File)>,
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(bench());
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session");
    let sessions = ["causal", "prefix", "repeat"].map(|mask| {
        let mut model = model();
        model.set_masks(mask).unwrap();
        let mut session = session(model).unwrap();
        session.feed_prompt(&PROMPT).unwrap();
        session.feed(&[2]).unwrap();
        session.save(&path, "note").unwrap();
        let file = File::of(&parse(std::fs::read(&path).unwrap()).unwrap());
        (session, file)
    });
    Bench { _folder: folder, path, sessions: sessions.into() }
}

/// The checksum that the file should have: of two texts and all tensors, each after its length.
fn mend(file: &mut File) {
    let mut hash = Sha256::new();
    let texts =
        ["qkov.session.prompts", "qkov.session.note"].map(|key| file.text(key).unwrap_or(""));
    let parts = file.tensors.iter().map(|tensor| &tensor.data[..]);
    for part in texts.map(str::as_bytes).into_iter().chain(parts) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let sum: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    file.set_text(CHECKSUM, &sum);
}

fuzz_target!(|data: &[u8]| {
    BENCH.with_borrow_mut(|Bench { path, sessions, .. }| {
        let mut input = Input(data);
        let way = input.byte();
        let (session, file) = &mut sessions[usize::from(way >> 1) % 3];
        let mut file = file.clone();
        let n_tokens = usize::from(input.byte()) % (2 * N_CTX);
        if way & 1 > 0 && n_tokens > 0 {
            // As many tokens and as much of a cache as fit each other.
            for tensor in &mut file.tensors {
                let n = tensor.data.len() / 6 * n_tokens;
                tensor.data.resize(n, 1);
                tensor.dims = vec![if tensor.ty == 26 { n / 4 } else { n } as u64];
            }
        }
        file.damage(&mut input, &[]);
        if way & 128 == 0 {
            mend(&mut file);
        }
        std::fs::write(&*path, file.bytes()).unwrap();
        if session.restore(path).is_ok() {
            let tokens = session.tokens().to_vec();
            assert!(tokens.len() <= N_CTX);
            if tokens.len() < N_CTX {
                session.feed(&[1]).unwrap();
            }
            session.rewind(tokens.len() / 2);
        }
        if session.n_positions(&PROMPT, &[2, 4]) <= N_CTX {
            session.become_tokens(&PROMPT, &[2, 4], &mut |_| true).unwrap();
        }
    });
});
