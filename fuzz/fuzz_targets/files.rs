//! Files beside models. The first byte says which: an importance matrix (its bytes, or a GGUF that is
//! damaged), base log-probabilities, an adapter, or Grams.

#![no_main]

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use qkov::gguf::Bytes;
use qkov::measure::grams_file;
use qkov::measure::importance::{Entry, Gathered};
use qkov::measure::quality::{Base, Windows, evaluate};
use qkov::model::{Model, adapted};
use qkov::session::Session;
use qkov_fuzz::tiny::Tiny;
use qkov_fuzz::{File, Input, model, parse, session};
use tempfile::TempDir;

struct Bench {
    _folder: TempDir,
    path: PathBuf,
    session: Session,
    /// Base log-probabilities of one window.
    base: Vec<u8>,
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(bench());
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let mut session = session(model()).unwrap();
    let windows = Windows::new(vec![1, 2, 3, 4, 5, 6, 7, 8], 4).unwrap();
    let mut base = Vec::new();
    let mut save = |bytes: &[u8]| {
        base.extend_from_slice(bytes);
        Ok(())
    };
    evaluate(&mut session, &windows, None, Some(&mut save), &mut |_| ()).unwrap();
    Bench { path: folder.path().join("file"), _folder: folder, session, base }
}

static IMPORTANCE: LazyLock<File> = LazyLock::new(|| {
    let mut gathered = Gathered { n_chunks: 2, chunk: 4, ..Gathered::default() };
    gathered.datasets.push("text".into());
    for (name, n) in [("blk.0.attn_q.weight", 1), ("blk.0.ffn_up_exps.weight", 2)] {
        let entry = Entry { squares: vec![0.5; 8 * n], counts: vec![3.0; n] };
        gathered.entries.insert(name.into(), entry);
    }
    File::of(&parse(gathered.writer().unwrap().to_bytes().unwrap()).unwrap())
});

static ADAPTER: LazyLock<File> = LazyLock::new(|| {
    let mut tiny = Tiny::default()
        .set("general.type", "adapter")
        .set("general.architecture", "llama")
        .set("adapter.type", "lora")
        .set("adapter.lora.alpha", 5.0);
    for (name, n_in, n_out) in
        [("blk.0.attn_q", 8, 8), ("blk.0.attn_v", 8, 4), ("blk.1.ffn_down", 16, 8)]
    {
        tiny = tiny
            .tensor(&format!("{name}.weight.lora_a"), &[n_in, 2])
            .tensor(&format!("{name}.weight.lora_b"), &[2, n_out]);
    }
    File::of(&parse(tiny.bytes()).unwrap())
});

fn importance(bytes: Vec<u8>) {
    let Ok(gathered) = Gathered::parse(Bytes::from(bytes)) else { return };
    gathered.means().for_each(drop);
    let again = gathered.writer().and_then(|writer| writer.to_bytes());
    if let Ok(bytes) = again {
        let _ = Gathered::parse(Bytes::from(bytes)).unwrap();
    }
}

fn adapter(bytes: Vec<u8>) {
    let whole = parse(Tiny::llama().bytes()).unwrap();
    let Ok(gguf) = parse(bytes).and_then(|adapter| adapted(whole, adapter, 0.5)) else { return };
    let mut session = session(Model::from_gguf(gguf).unwrap()).unwrap();
    let _ = session.feed_prompt(&[1, 2, 3]);
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let kind = input.byte();
    let damaged = |file: &File, input: &mut Input| {
        let mut file = file.clone();
        file.damage(input, &[]);
        file.bytes()
    };
    BENCH.with_borrow_mut(|Bench { path, session, base, .. }| match kind % 5 {
        0 => importance(input.0.to_vec()),
        1 => importance(damaged(&IMPORTANCE, &mut input)),
        2 => adapter(damaged(&ADAPTER, &mut input)),
        3 => {
            let mut bytes = base.clone();
            while !input.is_empty() {
                input.overwrite(&mut bytes);
            }
            std::fs::write(&*path, bytes).unwrap();
            if let Ok(mut base) = Base::open(path, session.model().hparams.n_vocab) {
                let windows = base.windows.clone();
                let _ = evaluate(session, &windows, Some(&mut base), None, &mut |_| ());
            }
        }
        _ => {
            std::fs::write(&*path, damaged(&ADAPTER, &mut input)).unwrap();
            let layers = session.model().attention.iter().map(|attention| &attention.geometry);
            let _ = grams_file::read(path, "", layers);
        }
    });
});
