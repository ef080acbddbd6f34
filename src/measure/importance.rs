//! What columns of matrices matter: means of their squared inputs over a text, as llama.cpp's `imatrix`
//! tool gathers them.
//!
//! Rounding `W` to `W + E` changes products by `E x`, whose expected square is `sum_j E_j^2 mean(x_j^2)` if
//! errors of columns have nothing to do with each other: so much an error in column `j` matters.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::bad_usage;
use crate::cpu::{Input, Observer, SeenInput};
use crate::error::Result;
use crate::gguf::Tensor;
use crate::session::Session;
use crate::token::Tokenizer;

pub use super::importance_file::{Entry, Gathered};

/// What matrices of a layer read, by the middle of their names.
const INPUTS: &[(&str, Input)] = &[
    ("attn_q", Input::Attention),
    ("attn_k", Input::Attention),
    ("attn_v", Input::Attention),
    ("attn_qkv", Input::Attention),
    ("attn_q_a", Input::Attention),
    ("attn_kv_a_mqa", Input::Attention),
    ("attn_q_b", Input::Queries),
    ("attn_kv_b", Input::Latent),
    ("attn_output", Input::Heads),
    ("ffn_gate", Input::Ffn),
    ("ffn_up", Input::Ffn),
    ("ffn_gate_shexp", Input::Ffn),
    ("ffn_up_shexp", Input::Ffn),
    ("ffn_gate_inp", Input::Ffn),
    ("ffn_gate_inp_shexp", Input::Ffn),
    ("ffn_down", Input::Hidden),
    ("ffn_down_shexp", Input::Hidden),
    ("ffn_gate_exps", Input::Expert(0)),
    ("ffn_up_exps", Input::Expert(0)),
    ("ffn_down_exps", Input::ExpertHidden(0)),
];

/// Sums of squares, and of how many rows.
#[derive(Default)]
struct Sum {
    /// `[n_in]`
    squares: Vec<f64>,
    n: usize,
}

/// Sums of everything that matrices read, by layer.
#[derive(Default)]
struct Gatherer(Mutex<BTreeMap<(usize, Input), Sum>>);

impl Observer for Gatherer {
    fn wants(&self, _: usize) -> bool {
        false
    }

    fn wants_inputs(&self) -> bool {
        true
    }

    fn see_input(&self, seen: &SeenInput) {
        let Ok(mut sums) = self.0.lock() else { return };
        let sum = sums.entry((seen.layer, seen.input)).or_default();
        for row in seen.rows.iter() {
            sum.squares.resize(row.len(), 0.0);
            sum.squares.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
            sum.n += 1;
        }
    }
}

/// Whole chunks of a text's tokens, each begun by BOS where the model uses one.
pub fn chunks(tokens: &[u32], n_ctx: usize, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>> {
    if n_ctx == 0 || tokens.len() < n_ctx {
        bad_usage!("the text has {} tokens; a chunk of {n_ctx} is needed", tokens.len());
    }
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let chunk = |tokens: &[u32]| [&[bos.unwrap_or(tokens[0])], &tokens[1..]].concat();
    Ok(tokens.chunks_exact(n_ctx).map(chunk).collect())
}

/// Gathers what the matrices in a session's file read of sequences of tokens, each from position 0 on;
/// `output`: also what the output reads. The session forgets all tokens. `progress` gets the number of
/// sequences read.
pub fn gather(
    session: &mut Session,
    sequences: &[Vec<u32>],
    output: bool,
    progress: &mut dyn FnMut(usize),
) -> Result<Gathered> {
    let gatherer = Gatherer::default();
    for (i, tokens) in sequences.iter().enumerate() {
        session.rewind(0);
        session.feed_observed(tokens, 0..0, &gatherer)?;
        progress(i + 1);
    }
    session.rewind(0);
    let sums = gatherer.0.into_inner().unwrap_or_default();
    let gguf = &session.model().gguf;
    let output_name = match gguf.tensor("output.weight") {
        Some(_) => "output.weight",
        None => "token_embd.weight",
    };
    let entry = |tensor: &Tensor| {
        let (layer, input) = match tensor.name == output_name {
            true => (0, output.then_some(Input::Output)?),
            false => place(&tensor.name)?,
        };
        entry(tensor, |matrix| {
            let input = match input {
                Input::Expert(_) => Input::Expert(matrix),
                Input::ExpertHidden(_) => Input::ExpertHidden(matrix),
                input => input,
            };
            sums.get(&(layer, input))
        })
    };
    let entries = gguf.tensors().iter().filter_map(|t| Some((t.name.clone(), entry(t)?)));
    Ok(Gathered {
        datasets: Vec::new(),
        n_chunks: sequences.len().try_into().unwrap_or(u32::MAX),
        chunk: sequences.first().map_or(0, Vec::len).try_into().unwrap_or(u32::MAX),
        entries: entries.collect(),
    })
}

/// The layer of a matrix, and what it reads.
fn place(name: &str) -> Option<(usize, Input)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let name = rest.strip_suffix(".weight")?;
    let (_, input) = INPUTS.iter().find(|(known, _)| *known == name)?;
    Some((layer.parse().ok()?, *input))
}

/// What is known of a tensor, a matrix or several; none if nothing has been read by any of them.
fn entry<'a>(tensor: &Tensor, sum: impl Fn(usize) -> Option<&'a Sum>) -> Option<Entry> {
    let n_in = usize::try_from(*tensor.dims.first()?).ok()?;
    let n_matrices = usize::try_from(tensor.dims.iter().skip(2).product::<u64>()).ok()?;
    let (mut squares, mut counts) = (Vec::new(), Vec::new());
    for matrix in 0..n_matrices {
        let sum = sum(matrix).filter(|sum| sum.squares.len() == n_in);
        squares.extend((0..n_in).map(|i| sum.map_or(0.0, |sum| sum.squares[i] as f32)));
        counts.push(sum.map_or(0.0, |sum| sum.n as f32));
    }
    counts.iter().any(|n| *n > 0.0).then_some(Entry { squares, counts })
}
