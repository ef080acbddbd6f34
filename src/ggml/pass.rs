//! The graph of a forward pass: the same steps as the engine cpu takes.

use std::ops::Range;
use std::sync::{Arc, RwLock};

use ggml::{Device, Gelu, Graph, Shape, Store, Tensor, Type};

use super::fault;
use super::weights::{FfnWeights, Matrix, Norm, Place, Weights};
use crate::arch::{Activation, NormKind, PostNorm};
use crate::engine::Asked;
use crate::error::Result;
use crate::model::Model;

/// Limits and sharpness of a clamped gate (arXiv 2508.10925).
const CLAMP: f32 = 7.0;
const SWIGLU_SHARPNESS: f32 = 1.702;

/// Where the tokens of a batch are.
#[derive(Debug, Clone, Default)]
pub(super) struct Batch {
    /// Position of the first.
    pub(super) n_past: usize,
    /// Positions of a prompt.
    pub(super) prompt: Range<usize>,
}

/// What a mask's elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MaskKind {
    /// Half-precision floats to be added to scores: the distance, less than 0, where scores lose by
    /// that; minus infinity for keys that are not seen.
    Added,
    /// 1 for keys that are seen, 0 for others.
    Seen,
}

/// A number for each token, of how many keys it sees and its position.
pub(super) struct PerToken {
    /// A layer that it is for.
    pub(super) layer: usize,
    pub(super) f: Box<dyn Fn(usize, usize) -> f32 + Send + Sync>,
    /// `[1, tokens]`
    pub(super) tensor: Tensor,
}

impl MaskKind {
    pub(super) fn shape(self, sizes: &Sizes) -> Shape {
        let ty = if self == MaskKind::Added { Type::F16 } else { Type::F32 };
        Shape::matrix(ty, sizes.n_keys, sizes.n)
    }
}

/// A mask that is filled before the graph runs. `[keys, tokens]`
pub(super) struct Mask {
    /// A layer that has it.
    pub(super) layer: usize,
    pub(super) kind: MaskKind,
    pub(super) tensor: Tensor,
}

/// What is filled before the graph runs.
pub(super) struct Inputs {
    /// Embeddings. `[n_embd, tokens]`
    pub(super) x: Tensor,
    /// Positions, as the rotation and the cache take them. `[tokens]`
    pub(super) positions: Tensor,
    pub(super) rows: Tensor,
    /// Positions of cached keys. `[keys]`
    pub(super) key_positions: Option<Tensor>,
    /// Factors on scores of tokens, where they depend on the position. `[1, 1, tokens]`
    pub(super) scales: Option<Tensor>,
    pub(super) masks: Vec<Mask>,
    pub(super) per_token: Vec<PerToken>,
    /// Floats that do not change while the graph is loaded.
    pub(super) constants: Vec<(Tensor, Vec<f32>)>,
}

/// The cached tensors of a layer: keys, or rows that they are made of, and values.
pub(super) struct LayerCache {
    pub(super) store: Arc<Store>,
    pub(super) keys: usize,
    pub(super) values: Option<usize>,
}

/// Sizes of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Tokens.
    pub(super) n: usize,
    /// Cached keys that they may see.
    pub(super) n_keys: usize,
    /// Tokens of which something is asked.
    pub(super) wanted: Range<usize>,
    pub(super) asked: Asked,
}

/// A graph as it is made.
pub(super) struct Pass<'a> {
    pub(super) graph: Graph,
    pub(super) model: &'a Model,
    pub(super) weights: &'a Weights,
    pub(super) cache: &'a [LayerCache],
    pub(super) sizes: Sizes,
    pub(super) inputs: Inputs,
    pub(super) batch: Arc<RwLock<Batch>>,
    /// Of each layer.
    pub(super) devices: &'a [Device],
    /// Layers in which the processor weighs, whatever their device.
    pub(super) by_rows: Vec<usize>,
}

/// A graph, and what is needed to run it.
pub(super) struct Made {
    pub(super) graph: Graph,
    pub(super) inputs: Inputs,
    pub(super) out: Option<Tensor>,
    pub(super) by_rows: Vec<usize>,
}

/// Nodes of a graph, at most: some for each layer, and some for each head that has its own shape.
pub(super) fn n_nodes(model: &Model) -> usize {
    let heads: usize = model.attention.iter().map(|a| a.geometry.n_head_kv()).sum();
    1024 + 128 * model.layers.len() + 64 * heads
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        (model, weights, cache): (&'a Model, &'a Weights, &'a [LayerCache]),
        sizes: Sizes,
        batch: &Arc<RwLock<Batch>>,
        devices: &'a [Device],
    ) -> Result<Pass<'a>> {
        let mut graph = Graph::new(n_nodes(model)).map_err(fault)?;
        let vector = |ty| Shape { ty, dims: [sizes.n, 1, 1, 1] };
        let inputs = Inputs {
            x: graph.input(Shape::matrix(Type::F32, model.hparams.n_embd, sizes.n)),
            positions: graph.input(vector(Type::I32)),
            rows: graph.input(vector(Type::I64)),
            key_positions: None,
            scales: None,
            masks: Vec::new(),
            per_token: Vec::new(),
            constants: Vec::new(),
        };
        let batch = batch.clone();
        let by_rows = Vec::new();
        Ok(Pass { graph, model, weights, cache, sizes, inputs, batch, devices, by_rows })
    }

    /// The graph.
    pub(super) fn make(mut self) -> Result<Made> {
        let mut x = self.inputs.x;
        if let Some(norm) = &self.weights.embedding_norm {
            x = self.norm(x, Some(norm));
        }
        let last = self.model.layers.len() - 1;
        let mut out = Some(x);
        for i in 0..=last {
            let rest = if i == last { self.sizes.wanted.clone() } else { 0..self.sizes.n };
            out = self.layer(i, x, rest)?;
            x = out.unwrap_or(x);
        }
        let out = out.map(|x| self.out(x));
        if let Some(out) = out {
            self.graph.output(out);
        }
        Ok(Made { graph: self.graph, inputs: self.inputs, out, by_rows: self.by_rows })
    }

    /// What is asked of tokens.
    fn out(&mut self, x: Tensor) -> Tensor {
        let hp = &self.model.hparams;
        let x = self.norm(x, self.weights.output_norm.as_ref());
        let (Asked::Logits, Some(w)) = (self.sizes.asked, &self.weights.output) else { return x };
        let mut logits = self.product(w, x);
        if hp.logit_scale != 1.0 {
            logits = self.graph.scale(logits, hp.logit_scale, 0.0);
        }
        match hp.final_softcap {
            Some(cap) => self.softcap(logits, cap),
            None => logits,
        }
    }

    pub(super) fn softcap(&mut self, x: Tensor, cap: f32) -> Tensor {
        let x = self.graph.scale(x, 1.0 / cap, 0.0);
        let x = self.graph.tanh(x);
        self.graph.scale(x, cap, 0.0)
    }

    /// `x + attention(norm(x))`, then `x + ffn(norm(x))`, or both from one `x` where the model says so,
    /// of the tokens in `rest`; none of no tokens.
    fn layer(&mut self, i: usize, x: Tensor, rest: Range<usize>) -> Result<Option<Tensor>> {
        let (hp, w) = (&self.model.hparams, &self.weights.layers[i]);
        let normed = self.norm(x, w.attn_norm.as_ref());
        let Some(heads) = self.attention(i, normed, rest.clone())? else { return Ok(None) };
        let x = self.rows_of(x, &rest);
        // In a parallel layer before `x` changes, unless the FFN reads what attention has read.
        let input = match &w.ffn_norm {
            None if hp.parallel => Some(self.rows_of(normed, &rest)),
            Some(norm) if hp.parallel => Some(self.norm(x, Some(norm))),
            _ => None,
        };
        let made = self.product(&w.attn_output, heads);
        let mut x = self.added(x, made, w.post_attention_norm.as_ref());
        let input = match input {
            Some(input) => input,
            None => self.norm(x, w.ffn_norm.as_ref()),
        };
        if let Some(ffn) = &w.ffn {
            let made = self.ffn(ffn, input);
            x = self.added(x, made, w.post_ffw_norm.as_ref());
        }
        if let (Some(experts), Some(all)) = (&w.experts, &hp.experts) {
            let made = self.experts((experts, all), input);
            x = self.added(x, made, None);
        }
        Ok(Some(x))
    }

    /// The sum of the residual stream and what is added to it; either is normed where the model norms it.
    fn added(&mut self, x: Tensor, mut made: Tensor, post: Option<&Norm>) -> Tensor {
        let hp = &self.model.hparams;
        if post.is_some() && hp.post_norm == PostNorm::Outputs {
            made = self.norm(made, post);
        }
        if hp.residual_scale != 1.0 {
            made = self.graph.scale(made, hp.residual_scale, 0.0);
        }
        let sum = self.graph.add(x, made);
        match hp.post_norm {
            PostNorm::Sums if post.is_some() => self.norm(sum, post),
            _ => sum,
        }
    }

    pub(super) fn tensor(&mut self, at: Place) -> Tensor {
        self.weights.tensor(&mut self.graph, at)
    }

    /// A constant of the loaded graph.
    pub(super) fn constant(&mut self, x: Vec<f32>, dims: [usize; 4]) -> Tensor {
        let tensor = self.graph.input(Shape { ty: Type::F32, dims });
        self.inputs.constants.push((tensor, x));
        tensor
    }

    /// Rows normed, if there is a norm.
    pub(super) fn norm(&mut self, x: Tensor, norm: Option<&Norm>) -> Tensor {
        let Some(norm) = norm else { return x };
        let x = self.normed(x);
        let weight = self.tensor(norm.weight);
        let x = self.graph.mul(x, weight);
        match norm.bias {
            Some(bias) => {
                let bias = self.tensor(bias);
                self.graph.add(x, bias)
            }
            None => x,
        }
    }

    /// The same without gain and bias.
    pub(super) fn normed(&mut self, x: Tensor) -> Tensor {
        let norm = self.model.hparams.norm;
        match norm.kind {
            NormKind::Rms => self.graph.rms_norm(x, norm.eps),
            NormKind::Layer => self.graph.norm(x, norm.eps),
        }
    }

    /// Products with a matrix, and with its adapters.
    pub(super) fn product(&mut self, w: &Matrix, x: Tensor) -> Tensor {
        let at = self.tensor(w.at);
        let mut out = self.graph.mul_mat(at, x);
        for lora in &w.loras {
            let (down, up) = (self.tensor(lora.down), self.tensor(lora.up));
            let low = self.graph.mul_mat(down, x);
            let low = self.graph.scale(low, lora.factor, 0.0);
            let more = self.graph.mul_mat(up, low);
            out = self.graph.add(out, more);
        }
        match w.bias {
            Some(bias) => {
                let bias = self.tensor(bias);
                self.graph.add(out, bias)
            }
            None => out,
        }
    }

    /// Some rows of `[width, tokens]`.
    pub(super) fn rows_of(&mut self, x: Tensor, rows: &Range<usize>) -> Tensor {
        let [width, n, ..] = self.graph.shape(x).dims;
        if *rows == (0..n) {
            return x;
        }
        let [_, stride, ..] = self.graph.strides(x);
        let [_, _, s2, s3] = self.graph.strides(x);
        self.graph.view(x, [width, rows.len(), 1, 1], [stride, s2, s3], rows.start * stride)
    }

    fn ffn(&mut self, w: &FfnWeights, x: Tensor) -> Tensor {
        let up = self.product(&w.up, x);
        let gate = w.gate.as_ref().map(|gate| self.product(gate, x));
        let mut made = self.activated(gate, up);
        if let Some(share) = &w.share {
            let share = self.product(share, x);
            let share = self.graph.sigmoid(share);
            made = self.graph.mul(made, share);
        }
        self.product(&w.down, made)
    }

    /// `act(gate) up`, or `act(up)`.
    pub(super) fn activated(&mut self, gate: Option<Tensor>, up: Tensor) -> Tensor {
        let graph = &mut self.graph;
        let x = gate.unwrap_or(up);
        let active = match self.model.hparams.activation {
            Activation::Silu => match gate {
                Some(gate) => return graph.swiglu(gate, up),
                None => graph.silu(up),
            },
            Activation::Gelu => graph.gelu(x, Gelu::Erf),
            Activation::GeluTanh => graph.gelu(x, Gelu::Tanh),
            Activation::ClampedSwiglu => {
                let gate = graph.clamp(x, f32::NEG_INFINITY, CLAMP);
                let sharp = graph.scale(gate, SWIGLU_SHARPNESS, 0.0);
                let share = graph.sigmoid(sharp);
                let gate = graph.mul(gate, share);
                let up = graph.clamp(up, -CLAMP, CLAMP);
                let up = graph.scale(up, 1.0, 1.0);
                return graph.mul(gate, up);
            }
        };
        match gate {
            Some(_) => graph.mul(active, up),
            None => active,
        }
    }
}
