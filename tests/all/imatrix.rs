//! Importance of columns: against a plain forward pass, and files of it.

use std::sync::{Arc, Mutex};

use qkov::cpu::{Observer, SeenInput};
use qkov::gguf::{Bytes, Gguf};
use qkov::measure::importance::{Entry, Gathered, chunks, gather};
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::cli::{error, ok};
use crate::families::files;
use crate::tiny::Tiny;

const TEXT: &str = "The fox went down to the river, and it was cold.";

fn session(gguf: Gguf) -> Session {
    let options = Options { exact: true, ..Options::default() };
    Session::new(Arc::new(Model::from_gguf(gguf).unwrap()), &options).unwrap()
}

fn parse(tiny: &Tiny) -> Gguf {
    Gguf::parse(Bytes::from(tiny.bytes())).unwrap()
}

/// Everything that matrices read, of two sequences.
fn gathered(gguf: Gguf) -> (Gathered, usize) {
    let mut session = session(gguf);
    let n_vocab = session.model().hparams.n_vocab as u32;
    let tokens: Vec<u32> = (0..24).map(|i| (i * i * 7 + 3 * i) % n_vocab.min(250)).collect();
    let sequences: Vec<Vec<u32>> = tokens.chunks(12).map(<[u32]>::to_vec).collect();
    (gather(&mut session, &sequences, true, &mut |_| {}).unwrap(), tokens.len())
}

fn near(name: &str, found: &[f32], wanted: &[f64]) {
    assert_eq!(found.len(), wanted.len(), "{name}");
    let size = wanted.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
    for (a, b) in found.iter().zip(wanted) {
        assert!((f64::from(*a) - b).abs() < 2e-3 * size, "{name}: {found:?} {wanted:?}");
    }
}

/// The tiny Llama in `f64`, as the paper has it; keeps squares of what its matrices read.
struct Plain {
    tiny: Tiny,
    squares: Vec<(String, Vec<f64>)>,
}

type Rows = Vec<Vec<f64>>;

impl Plain {
    fn tensor(&self, name: &str) -> (usize, Vec<f64>) {
        let tensor = self.tiny.tensors.iter().find(|t| t.name == name).unwrap();
        let number = |b: &[u8; 4]| f64::from(f32::from_le_bytes(*b));
        let numbers = tensor.data.as_chunks::<4>().0.iter().map(number).collect();
        (tensor.dims[0] as usize, numbers)
    }

    fn times(&mut self, name: &str, x: &Rows) -> Rows {
        let (n_in, w) = self.tensor(name);
        let squares = (0..n_in).map(|j| x.iter().map(|row| row[j] * row[j]).sum()).collect();
        self.squares.push((name.to_string(), squares));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
        x.iter().map(|row| w.chunks(n_in).map(|w| dot(w, row)).collect()).collect()
    }

    fn norm(&self, name: &str, x: &Rows) -> Rows {
        let (_, w) = self.tensor(name);
        let normed = |row: &Vec<f64>| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            row.iter().zip(&w).map(|(x, w)| x / (mean + 1e-5).sqrt() * w).collect()
        };
        x.iter().map(normed).collect()
    }

    /// Two query heads, one kv head, of four elements.
    fn attention(&mut self, blk: &str, x: &Rows) -> Rows {
        let [q, k, v] =
            ["q", "k", "v"].map(|name| self.times(&format!("{blk}.attn_{name}.weight"), x));
        let rotated = |t: usize, head: &[f64]| -> Vec<f64> {
            let pair = |i: usize| {
                let (sin, cos) = (t as f64 * 10_000f64.powf(-(i as f64) / 2.0)).sin_cos();
                let (a, b) = (head[2 * i], head[2 * i + 1]);
                [a * cos - b * sin, a * sin + b * cos]
            };
            [pair(0), pair(1)].concat()
        };
        let k: Rows = k.iter().enumerate().map(|(t, k)| rotated(t, k)).collect();
        let head = |t: usize, q: &[f64]| {
            let q = rotated(t, q);
            let score = |k: &Vec<f64>| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / 2.0;
            let weights: Vec<f64> = k[..=t].iter().map(|k| score(k).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mixed = |i: usize| weights.iter().zip(&v).map(|(w, v)| w * v[i]).sum::<f64>() / sum;
            (0..4).map(mixed).collect::<Vec<f64>>()
        };
        let heads = |(t, q): (usize, &Vec<f64>)| [head(t, &q[..4]), head(t, &q[4..])].concat();
        let heads = q.iter().enumerate().map(heads).collect();
        self.times(&format!("{blk}.attn_output.weight"), &heads)
    }

    fn read(&mut self, tokens: &[u32]) {
        let (n, embd) = self.tensor("token_embd.weight");
        let mut x: Rows = tokens.iter().map(|t| embd[*t as usize * n..][..n].to_vec()).collect();
        let add = |x: &mut Rows, y: Rows| {
            let pairs = x.iter_mut().flatten().zip(y.into_iter().flatten());
            pairs.for_each(|(x, y)| *x += y);
        };
        for i in 0..2 {
            let blk = format!("blk.{i}");
            let normed = self.norm(&format!("{blk}.attn_norm.weight"), &x);
            let made = self.attention(&blk, &normed);
            add(&mut x, made);
            let normed = self.norm(&format!("{blk}.ffn_norm.weight"), &x);
            let gate = self.times(&format!("{blk}.ffn_gate.weight"), &normed);
            let mut hidden = self.times(&format!("{blk}.ffn_up.weight"), &normed);
            for (up, gate) in hidden.iter_mut().flatten().zip(gate.iter().flatten()) {
                *up *= gate / (1.0 + (-gate).exp());
            }
            let made = self.times(&format!("{blk}.ffn_down.weight"), &hidden);
            add(&mut x, made);
        }
        let normed = self.norm("output_norm.weight", &x);
        // The output is made of embeddings.
        self.times("token_embd.weight", &normed);
    }
}

#[test]
fn importance_is_the_mean_square_of_what_is_read() {
    let (gathered, n) = gathered(parse(&Tiny::llama()));
    let mut plain = Plain { tiny: Tiny::llama(), squares: Vec::new() };
    let tokens: Vec<u32> = (0..24).map(|i| (i * i * 7 + 3 * i) % 250).collect();
    tokens.chunks(12).for_each(|tokens| plain.read(tokens));
    let (first, second) = plain.squares.split_at(plain.squares.len() / 2);
    assert_eq!(gathered.entries.len(), first.len());
    for ((name, a), (_, b)) in first.iter().zip(second) {
        let Entry { squares, counts } = &gathered.entries[name];
        let sums: Vec<f64> = a.iter().zip(b).map(|(a, b)| a + b).collect();
        near(name, squares, &sums);
        assert_eq!(*counts, [n as f32], "{name}");
        let means: Vec<f64> = sums.iter().map(|x| x / n as f64).collect();
        near(name, &gathered.entries[name].means(), &means);
    }
    assert_eq!((gathered.n_chunks, gathered.chunk), (2, 12));
}

#[test]
fn matrices_of_every_family_are_known_by_their_names() {
    // Those that rows are looked up in, and keys and values of latents that are stored apart.
    let lookups =
        ["token_embd", "position_embd", "token_types", "attn_k_b", "attn_v_b", "norm", ".bias"];
    for (file, gguf) in files() {
        let matrices = gguf.tensors().iter().filter(|t| t.dims.len() > 1);
        let matrices: Vec<(String, Vec<u64>)> =
            matrices.map(|t| (t.name.clone(), t.dims.clone())).collect();
        let (gathered, n) = gathered(gguf);
        for (name, dims) in &matrices {
            if lookups.iter().any(|part| name.contains(part)) {
                continue;
            }
            let entry = gathered.entries.get(name);
            let Entry { squares, counts } = entry.unwrap_or_else(|| panic!("{file}: {name}"));
            let n_matrices = dims[2..].iter().product::<u64>();
            assert_eq!(
                (counts.len() as u64, squares.len() as u64),
                (n_matrices, n_matrices * dims[0])
            );
            if n_matrices == 1 {
                assert_eq!(*counts, [n as f32], "{file}: {name}");
            }
            assert!(squares.iter().any(|x| *x > 0.0), "{file}: {name}");
        }
        // Every token goes through as many experts, which read what the router reads.
        for (name, entry) in gathered.entries.iter().filter(|(n, _)| n.contains("ffn_gate_exps")) {
            let router = &gathered.entries[&name.replace("gate_exps", "gate_inp")];
            let n_used = entry.counts.iter().sum::<f32>() / n as f32;
            assert_eq!(n_used, n_used.round(), "{file}");
            let n_in = router.squares.len();
            let sums: Vec<f64> = router.squares.iter().map(|x| f64::from(x * n_used)).collect();
            let found = |j: usize| entry.squares.iter().skip(j).step_by(n_in).sum::<f32>();
            near(name, &(0..n_in).map(found).collect::<Vec<f32>>(), &sums);
            let down = &gathered.entries[&name.replace("gate", "down")];
            assert_eq!(down.counts, entry.counts, "{file}");
        }
    }
}

#[test]
fn what_tokens_take_of_an_ffn_is_no_part_of_its_product() {
    let (_, gguf) = files().into_iter().find(|(name, _)| name == "qwen2moe").unwrap();
    let (name, gate) = ("blk.0.ffn_down_shexp.weight", "blk.0.ffn_gate_inp_shexp.weight");
    let tensor = gguf.tensor(gate).unwrap();
    let zeros = vec![0; tensor.n_bytes()];
    let mut writer = qkov::gguf::Writer::new();
    writer.copy_metadata(&gguf).unwrap();
    writer.tensor(gate, tensor.ty, &tensor.dims, &zeros[..]).unwrap();
    let over = Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap();
    let zeros = gguf.overlaid(over);
    let [a, b] = [gguf, zeros].map(|gguf| gathered(gguf).0.entries[name].squares.clone());
    near(name, &a, &b.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
}

/// Counts what it sees.
struct Counter(Mutex<usize>);

impl Observer for Counter {
    fn wants(&self, _: usize) -> bool {
        false
    }

    fn wants_inputs(&self) -> bool {
        true
    }

    fn see_input(&self, seen: &SeenInput) {
        *self.0.lock().unwrap() += seen.rows.iter().count();
    }
}

#[test]
fn looking_changes_no_bit() {
    for (file, gguf) in files() {
        let model = Arc::new(Model::from_gguf(gguf).unwrap());
        if model.output.is_none() {
            continue;
        }
        let mut session = Session::new(model, &Options::default()).unwrap();
        let tokens: Vec<u32> = (1..20).collect();
        let plain = session.feed_wanting(&tokens, 10..19).unwrap().to_vec();
        session.rewind(0);
        let counter = Counter(Mutex::new(0));
        let seen = session.feed_observed(&tokens, 10..19, &counter).unwrap();
        assert!(plain == seen, "{file}");
        assert!(*counter.0.lock().unwrap() > 19 * 4, "{file}");
    }
}

#[test]
fn files_keep_everything() {
    let (_, gguf) = files().into_iter().find(|(name, _)| name == "mixtral").unwrap();
    let (mut gathered, _) = gathered(gguf);
    gathered.datasets = vec!["a text".into()];
    // An expert that nothing has gone through.
    let entry = gathered.entries.get_mut("blk.0.ffn_down_exps.weight").unwrap();
    entry.counts[1] = 0.0;
    let n_in = entry.squares.len() / entry.counts.len();
    assert_eq!(entry.means()[n_in..2 * n_in], vec![1.0; n_in]);
    let bytes = gathered.writer().unwrap().to_bytes().unwrap();
    assert_eq!(Gathered::parse(Bytes::from(bytes.clone())).unwrap(), gathered);
    let gguf = Gguf::parse(Bytes::from(bytes)).unwrap();
    assert_eq!(gguf.str("general.type").unwrap(), Some("imatrix"));
    assert_eq!(gguf.tensor("blk.0.attn_q.weight.counts").unwrap().dims, [1]);
    let down = gguf.tensor("blk.0.ffn_down_exps.weight.in_sum2").unwrap();
    assert_eq!(
        down.dims,
        [n_in as u64, gathered.entries["blk.0.ffn_down_exps.weight"].counts.len() as u64]
    );

    let mut list = 1i32.to_le_bytes().to_vec();
    let mut put = |n: i32, bytes: &[u8]| {
        list.extend(n.to_le_bytes());
        list.extend(bytes);
    };
    put(3, b"abc");
    put(4, &2i32.to_le_bytes());
    [6.0f32, 8.0].iter().for_each(|x| put(x.to_bits() as i32, b""));
    put(4, b"");
    put(6, b"a text");
    let old = Gathered::parse(Bytes::from(list.clone())).unwrap();
    assert_eq!(old.entries["abc"].means(), [1.5, 2.0]);
    assert_eq!((old.n_chunks, &old.datasets[..]), (4, &["a text".to_string()][..]));
    for end in 1..list.len() - 14 {
        let error = Gathered::parse(Bytes::from(list[..end].to_vec())).unwrap_err().to_string();
        assert!(error.contains("not an importance matrix, or truncated"), "{error}");
    }
    let model = Gathered::parse(Bytes::from(Tiny::llama().bytes())).unwrap_err().to_string();
    assert!(model.contains("not an importance matrix"), "{model}");
}

#[test]
fn the_command() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let [text, model, out] = [path("text"), path("model.gguf"), path("out.gguf")];
    std::fs::write(&text, TEXT.repeat(4)).unwrap();
    Tiny::gpt2().writer().write(model.as_ref()).unwrap();
    let args = ["imatrix", "-m", &model, "-f", &text, "-o", &out];
    let said = ok(&[&args[..], &["-c", "16", "--chunks", "3"]].concat(), "");
    assert_eq!(said, "48 tokens in 3 chunks, 8 matrices\n");
    let gathered = Gathered::open(out.as_ref()).unwrap();
    let names: Vec<_> = gathered.entries.keys().map(String::as_str).collect();
    assert!(names.contains(&"blk.1.attn_qkv.weight") && !names.contains(&"blk.1.attn_q.weight"));
    assert_eq!((gathered.datasets, gathered.n_chunks), (vec![text.clone()], 3));
    assert!(error(&args, 2).contains("the file exists; --force replaces it"));
    let forced = [&args[..], &["-c", "16", "--force", "--process-output"]].concat();
    assert!(ok(&forced, "").ends_with(" 9 matrices\n"));
    let formed = ["imatrix", "-f", &text, "-o", "x.gguf", "--form", "lowrank:ratio=0.5"];
    assert!(error(&formed, 2).contains("importance is that of matrices in a file"));
    let long = [&args[..], &["-c", "60", "--force"]].concat();
    std::fs::write(&text, "short").unwrap();
    assert!(error(&long, 2).contains("the text has 5 tokens; a chunk of 60 is needed"));
}

#[test]
fn chunks_begin_as_the_model_was_trained() {
    let (_, gguf) = files().into_iter().find(|(name, _)| name == "llama").unwrap();
    let tokenizer = Model::from_gguf(gguf).unwrap().tokenizer;
    let tokens: Vec<u32> = (5..15).collect();
    let found = chunks(&tokens, 4, &tokenizer).unwrap();
    let first = |own: u32| tokenizer.bos().filter(|_| tokenizer.add_bos()).unwrap_or(own);
    assert_eq!(found, [[first(5), 6, 7, 8], [first(9), 10, 11, 12]]);
}
