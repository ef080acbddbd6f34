//! Opening a model: parse, read hyper-parameters, bind and check every tensor, plan attention.
//!
//! A [`Model`] is plain data. Weights stay in the mapped file in their own format; only norms and
//! biases are read into memory.

mod ffn;
mod latent;
mod lora;
mod rewrite;
mod stock;
mod weight;

pub use lora::{Lora, adapted, is_adapter};
pub use rewrite::NewLayer;
pub use weight::{Linear, Weight};

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use crate::arch::{Bias, Hparams, LayerHparams, QkNorm, Rope, Scaling, rewritten};
use crate::attention::{Attention, together};
use crate::bad_file;
use crate::error::{Result, excerpt};
use crate::gguf::{Fate, Gguf};
use crate::merge::{BLOCK, Geometry};
use crate::plan::{Plan, PlanFile};
use crate::quant;
use crate::simd;
use crate::token::Tokenizer;

/// A model, ready for an engine.
pub struct Model {
    /// Its hyper-parameters.
    pub hparams: Hparams,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// What every layer and head was trained with.
    pub trained: Plan,
    /// What every layer and head uses.
    pub plan: Plan,
    /// Attention of every layer, bound to the plan.
    pub attention: Vec<Attention>,
    /// Embeddings of tokens. `[n_vocab, n_embd]`
    pub token_embd: Weight,
    /// What is added to all embeddings of tokens: that of the first kind of them. `[n_embd]`
    pub type_embd: Option<Vec<f32>>,
    /// Embeddings of positions. `[n_ctx_train, n_embd]`
    pub position_embd: Option<Weight>,
    /// The norm of token embeddings. `[n_embd]`
    pub embedding_norm: Option<NormWeight>,
    /// Divisors of the rotation's frequencies. `[rope.dim / 2]`
    pub rope_freqs: Option<Vec<f32>>,
    /// The same in contexts that are longer than [`Scaling::Long`] says.
    pub long_rope_freqs: Option<Vec<f32>>,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// The norm of the last layer's states. `[n_embd]`
    pub output_norm: Option<NormWeight>,
    /// The output, if there is one; `token_embd` when the file has no other. `[n_vocab, n_embd]`
    pub output: Option<Weight>,
    /// The file's metadata and tensor table.
    pub gguf: Gguf,
    /// Things worth telling that do not prevent use.
    pub warnings: Vec<String>,
}

/// The weights of one layer. `h`: query heads, `k`: kv heads.
pub struct Layer {
    /// Absent where attention reads the residual stream. `[n_embd]`
    pub attn_norm: Option<NormWeight>,
    /// `[h * key_dim, n_embd]`
    pub attn_q: Linear,
    /// `[k * key_dim, n_embd]`
    pub attn_k: Linear,
    /// `[k * value_dim, n_embd]`
    pub attn_v: Linear,
    /// `[n_embd, h * value_dim]`
    pub attn_output: Linear,
    /// What the latents are made with that keys and values, and maybe queries, are made of: then those
    /// have as many columns, and keys only the rows of elements that are not rotated.
    pub latent: Option<LatentLayer>,
    /// Norms of queries and keys. `[h * key_dim]`, `[k * key_dim]`
    pub qk_norm: Option<(NormWeight, NormWeight)>,
    /// After attention, as [`Hparams::post_norm`] says. `[n_embd]`
    pub post_attention_norm: Option<NormWeight>,
    /// Absent where the FFN reads what attention reads, or the residual stream. `[n_embd]`
    pub ffn_norm: Option<NormWeight>,
    /// What all tokens go through; absent where experts are all there is.
    pub ffn: Option<Ffn>,
    /// What each token goes through a few of.
    pub experts: Option<ExpertLayer>,
    /// The same after the FFN. `[n_embd]`
    pub post_ffw_norm: Option<NormWeight>,
}

/// The matrices of an FFN.
pub struct Ffn {
    /// `[n_ff, n_embd]`
    pub gate: Option<Linear>,
    /// `[n_ff, n_embd]`
    pub up: Linear,
    /// `[n_embd, n_ff]`
    pub down: Linear,
    /// Where a token says how much of it is added: scores that. `[1, n_embd]`
    pub share: Option<Linear>,
}

/// The experts of a layer.
pub struct ExpertLayer {
    /// Scores them. `[n, n_embd]`
    pub router: Linear,
    /// Added to what those that are used are chosen by. `[n]`
    pub preference: Option<Vec<f32>>,
    /// All of them.
    pub all: Vec<Ffn>,
}

/// What makes latents of a layer's normed input.
pub struct LatentLayer {
    /// That of queries, `[q_rank, n_embd]`, and its norm.
    pub q_a: Option<(Linear, NormWeight)>,
    /// That of keys and values, and rotated elements of all keys after it. `[rank + n_rotated, n_embd]`
    pub kv_a: Linear,
    /// `[rank]`
    pub kv_a_norm: NormWeight,
}

fn attention(hparams: &Hparams, plan: &Plan) -> Vec<Attention> {
    let layers = plan.layers.iter().enumerate();
    layers.map(|(i, layer)| Attention::new(hparams, i, layer.clone())).collect()
}

/// A norm's gain and bias.
pub struct NormWeight {
    /// Factor per element.
    pub weight: Vec<f32>,
    /// Added per element.
    pub bias: Option<Vec<f32>>,
}

impl Model {
    /// Opens the model at `path`.
    pub fn open(path: &Path) -> Result<Model> {
        Model::from_gguf(Gguf::open(path)?).map_err(|e| e.at(path))
    }

    /// Opens the model at `path` with what a plan file says.
    pub fn open_with(path: &Path, plan: &PlanFile) -> Result<Model> {
        let mut model = Model::open(path)?;
        model.apply(plan)?;
        Ok(model)
    }

    /// Replaces normalizers; see [`Plan::set_normalizers`].
    pub fn set_normalizers(&mut self, text: &str) -> Result<()> {
        let mut plan = self.plan.clone();
        plan.set_normalizers(text)?;
        self.check(&plan)?;
        self.set_plan(plan);
        Ok(())
    }

    /// Replaces masks; see [`Plan::set_masks`].
    pub fn set_masks(&mut self, text: &str) -> Result<()> {
        let mut plan = self.plan.clone();
        plan.set_masks(text)?;
        self.set_plan(plan);
        Ok(())
    }

    /// Splits `n` tokens at positions from `n_past` on into batches of about `n_batch`, each with the
    /// tokens that it must be read together with: indices of its tokens, and of those of `wanted` that
    /// are in it, from the batch's first.
    pub fn batches(
        &self,
        (n, n_batch): (usize, usize),
        (n_past, prompt): (usize, &Range<usize>),
        wanted: Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let end = n_past + n.min(start + n_batch);
            let batch = start..together(&self.attention, n_past + start..end, prompt) - n_past;
            let part = |at: usize| at.clamp(batch.start, batch.end) - batch.start;
            let wanted = part(wanted.start)..part(wanted.end).max(part(wanted.start));
            start = batch.end;
            (!batch.is_empty()).then_some((batch, wanted))
        })
    }

    /// Changes the plan as a file says.
    pub fn apply(&mut self, file: &PlanFile) -> Result<()> {
        let plan = self.planned(&self.plan, file)?;
        self.set_plan(plan);
        Ok(())
    }

    /// A plan for this model, changed as a file says.
    pub fn planned(&self, plan: &Plan, file: &PlanFile) -> Result<Plan> {
        let mut plan = plan.clone();
        file.apply(&mut plan, &self.gguf.hash(), &self.hparams)?;
        self.check(&plan)?;
        Ok(plan)
    }

    /// The attention of every layer, bound to a plan for this model.
    pub fn bind(&self, plan: &Plan) -> Vec<Attention> {
        attention(&self.hparams, plan)
    }

    /// Uses another plan, which must be one for this model.
    pub fn set_plan(&mut self, plan: Plan) {
        self.attention = attention(&self.hparams, &plan);
        self.plan = plan;
    }

    /// Builds the model of an open file, with the adapters beside it.
    pub fn from_gguf(gguf: Gguf) -> Result<Model> {
        // Metadata lies in front of them, and so is there as well.
        gguf.tensors().iter().try_for_each(|tensor| gguf.data(tensor).check())?;
        if is_adapter(&gguf)? {
            bad_file!("this is an adapter, which goes with a model: as --lora beside --model");
        }
        let n_vocab = gguf.array("tokenizer.ggml.tokens")?.map_or(0, |tokens| tokens.len);
        // Before the tokenizer, so that an unknown architecture is what the user reads.
        let hparams = Hparams::read(&gguf, n_vocab)?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        if let Some(stated) = gguf.u32(&format!("{}.vocab_size", hparams.arch))?
            && stated as usize != n_vocab
        {
            bad_file!(
                "{}.vocab_size = {stated}, but the vocabulary has {n_vocab} tokens",
                hparams.arch
            );
        }
        let mut bind = Binder { gguf: &gguf, used: HashSet::new() };
        let (e, hp) = (hparams.n_embd, &hparams);
        let token_embd = bind.matrix("token_embd.weight", e, n_vocab)?;
        let types = hp.token_types.map(|n| bind.first_row("token_types.weight", e, n));
        let type_embd = types.transpose()?;
        let position_embd = match hp.learned_positions {
            true => Some(bind.matrix("position_embd.weight", e, hp.n_ctx_train)?),
            false => None,
        };
        let embedding_norm = bind.norm_if(hp.embedding_norm, "token_embd_norm", hp)?;
        let output_norm = bind.norm_if(hp.output_norm, "output_norm", hp)?;
        let output = match hp.output {
            true if bind.has("output.weight") => Some(bind.matrix("output.weight", e, n_vocab)?),
            true => Some(token_embd.clone()),
            false => None,
        };
        let [rope_freqs, long_rope_freqs] = bind.rope_freqs(hp)?;
        let mut layers = Vec::new();
        for (i, layer) in hp.layers.iter().enumerate() {
            layers.push(bind.layer(i, layer, hp)?);
        }
        let trained = bind.plan(hp)?;
        let mut warnings = [gguf.warnings.clone(), tokenizer.warnings.clone()].concat();
        warnings.extend(bind.unknown());
        let plan = trained.clone();
        let attention = attention(hp, &plan);
        let model = Model {
            tokenizer,
            trained,
            plan,
            attention,
            token_embd,
            type_embd,
            position_embd,
            embedding_norm,
            rope_freqs,
            long_rope_freqs,
            layers,
            output_norm,
            output,
            warnings,
            hparams,
            gguf,
        };
        match model.check(&model.plan) {
            Err(e) => bad_file!("key \"{}\": {e}", rewritten::FORM),
            Ok(()) => Ok(model),
        }
    }

    /// Refuses a model whose file has been shortened since it was opened.
    pub fn check_file(&self) -> Result<()> {
        self.gguf.tensors().iter().try_for_each(|tensor| {
            let data = self.gguf.data(tensor);
            data.check().map_err(|e| data.at(e))
        })
    }

    /// What has become of the model's file since it was opened; of the first of its parts that something
    /// became of.
    pub fn fate(&self) -> Fate {
        let mut parts = HashSet::new();
        let firsts = self.gguf.tensors().iter().filter(|tensor| parts.insert(tensor.place().0));
        let mut fates = firsts.map(|tensor| self.gguf.data(tensor).fate());
        fates.find(|fate| *fate != Fate::Same).unwrap_or(Fate::Same)
    }

    /// Divisors of the rotation's frequencies in a context of `n_ctx` tokens.
    pub fn rope_divisors(&self, n_ctx: usize) -> Option<&[f32]> {
        let is_long = |rope: &Rope| matches!(rope.scaling, Scaling::Long { n_ctx_orig } if n_ctx > n_ctx_orig);
        match self.hparams.ropes.first().is_some_and(is_long) {
            true => self.long_rope_freqs.as_deref(),
            false => self.rope_freqs.as_deref(),
        }
    }

    /// The embedding of a token at a position, before any norm. `[n_embd]`
    pub fn embed(&self, token: u32, position: usize, x: &mut [f32]) {
        self.token_embd.dequantize_row(token as usize, x);
        simd::scale(x, self.hparams.embedding_scale);
        if let Some(embd) = &self.type_embd {
            simd::add(x, embd);
        }
        if let Some(embd) = &self.position_embd {
            let mut own = vec![0.0; x.len()];
            embd.dequantize_row(position, &mut own);
            simd::add(x, &own);
        }
    }

    /// Number of weights.
    pub fn n_params(&self) -> u64 {
        self.gguf.tensors().iter().map(|t| t.n_elements()).sum()
    }

    /// Size of all weights in the file.
    pub fn n_bytes(&self) -> u64 {
        self.gguf.tensors().iter().map(|t| t.n_bytes() as u64).sum()
    }

    /// Architecture and most frequent format, by elements: `llama Q8_0`.
    pub fn kind(&self) -> String {
        kind(&self.gguf, self.hparams.arch)
    }
}

/// The same of a file that may be of any kind.
pub fn kind(gguf: &Gguf, arch: &str) -> String {
    let count = |ty: &quant::Type| -> u64 {
        gguf.tensors().iter().filter(|t| t.ty == ty).map(|t| t.n_elements()).sum()
    };
    let format = quant::TYPES.iter().max_by_key(|ty| count(ty)).map_or("", |ty| ty.name);
    format!("{arch} {format}")
}

/// Normalizers that a model was trained with, as [`Plan::set_normalizers`] reads them.
pub const NORMALIZER_KEY: &str = "qkov.attention.normalizer";

/// Masks that a model was trained with, as [`Plan::set_masks`] reads them.
pub const MASK_KEY: &str = "qkov.attention.mask";

/// Finds tensors by name, checks their shapes, and remembers which were asked for.
struct Binder<'a> {
    gguf: &'a Gguf,
    used: HashSet<String>,
}

impl Binder<'_> {
    fn has(&self, name: &str) -> bool {
        self.gguf.tensor(name).is_some()
    }

    fn matrix(&mut self, name: &str, n_in: usize, n_out: usize) -> Result<Weight> {
        self.shaped(name, &[n_in, n_out])
    }

    /// A matrix, or several one after the other.
    fn shaped(&mut self, name: &str, shape: &[usize]) -> Result<Weight> {
        let wanted: Vec<u64> = shape.iter().map(|n| *n as u64).collect();
        let Some(tensor) = self.gguf.tensor(name) else {
            bad_file!("missing tensor \"{name}\" of shape {wanted:?}");
        };
        let (n_in, n_out) = (shape[0], shape[1..].iter().product());
        let is_vector = n_out == 1 && tensor.dims == wanted[..1];
        if tensor.dims != wanted && !is_vector {
            bad_file!("tensor \"{name}\" has shape {:?}; expected {wanted:?}", tensor.dims);
        }
        let format = weight::format_of(tensor)?;
        self.used.insert(name.to_string());
        let data = self.gguf.data(tensor);
        data.check()?;
        let weight = Weight::new(format, [n_in, n_out], data);
        Ok(Weight { loras: self.loras(name)?, ..weight })
    }

    fn vector(&mut self, name: &str, n: usize) -> Result<Vec<f32>> {
        self.first_row(name, n, 1)
    }

    /// The first row of a matrix.
    fn first_row(&mut self, name: &str, n_in: usize, n_out: usize) -> Result<Vec<f32>> {
        let rows = self.matrix(name, n_in, n_out)?;
        let mut out = vec![0.0; n_in];
        rows.dequantize_row(0, &mut out);
        Ok(out)
    }

    fn norm(&mut self, name: &str, n: usize, hp: &Hparams) -> Result<NormWeight> {
        let weight = self.vector(&format!("{name}.weight"), n)?;
        let bias = match hp.norm.bias {
            true => Some(self.vector(&format!("{name}.bias"), n)?),
            false => None,
        };
        Ok(NormWeight { weight, bias })
    }

    fn norm_if(&mut self, has: bool, name: &str, hp: &Hparams) -> Result<Option<NormWeight>> {
        has.then(|| self.norm(name, hp.n_embd, hp)).transpose()
    }

    fn optional_norm(
        &mut self,
        (blk, name): (&str, Option<&str>),
        hp: &Hparams,
    ) -> Result<Option<NormWeight>> {
        name.map(|name| self.norm(&format!("{blk}.{name}"), hp.n_embd, hp)).transpose()
    }

    /// The gains of a norm of `n` heads of queries or keys, one for all of them or one for each.
    fn head_norm(&mut self, name: &str, n: usize, hp: &Hparams) -> Result<NormWeight> {
        let name = format!("{name}.weight");
        let weight = match hp.qk_norm {
            Some(QkNorm::Row) => self.vector(&name, n * hp.key_dim)?,
            _ if self.gguf.tensor(&name).is_some_and(|t| t.dims.len() > 1) => {
                let rows = self.matrix(&name, hp.key_dim, n)?;
                let mut all = vec![0.0; n * hp.key_dim];
                for (i, row) in all.chunks_exact_mut(hp.key_dim).enumerate() {
                    rows.dequantize_row(i, row);
                }
                all
            }
            _ => self.vector(&name, hp.key_dim)?.repeat(n),
        };
        Ok(NormWeight { weight, bias: None })
    }

    /// Divisors of frequencies, and those in long contexts.
    fn rope_freqs(&mut self, hp: &Hparams) -> Result<[Option<Vec<f32>>; 2]> {
        let Some(rope) = hp.ropes.first() else { return Ok([None, None]) };
        let has_divisors = hp.rope_freqs && self.has("rope_freqs.weight");
        let mut read = |name: &str| -> Result<Option<Vec<f32>>> {
            let divisors = self.vector(name, rope.dim / 2)?;
            if divisors.iter().any(|f| !f.is_finite() || *f <= 0.0) {
                bad_file!("tensor \"{name}\": every divisor must be finite and > 0");
            }
            Ok(Some(divisors))
        };
        match rope.scaling {
            Scaling::Long { .. } => {
                Ok([read("rope_factors_short.weight")?, read("rope_factors_long.weight")?])
            }
            _ if has_divisors => Ok([read("rope_freqs.weight")?, None]),
            _ => Ok([None, None]),
        }
    }

    fn bias(&mut self, name: &str, n: usize, rule: Bias) -> Result<Option<Vec<f32>>> {
        let name = format!("{name}.bias");
        match rule {
            Bias::Never => Ok(None),
            Bias::Optional if !self.has(&name) => Ok(None),
            Bias::Optional | Bias::Required => self.vector(&name, n).map(Some),
        }
    }

    fn linear(&mut self, name: &str, n_in: usize, n_out: usize, bias: Bias) -> Result<Linear> {
        let weight = self.matrix(&format!("{name}.weight"), n_in, n_out)?;
        Ok(Linear { weight, bias: self.bias(name, n_out, bias)? })
    }

    /// What a matrix of attention has by the architecture's rule: forms may have given it a bias.
    fn attention_bias(&self, rule: Bias) -> Result<Bias> {
        let is_formed = self.gguf.str(rewritten::FORM)?.is_some();
        Ok(if is_formed && rule == Bias::Never { Bias::Optional } else { rule })
    }

    /// Queries, keys and values, cut out of `attn_qkv` where the model fuses them.
    fn qkv(&mut self, blk: &str, widths: [usize; 3], hp: &Hparams) -> Result<[Linear; 3]> {
        let e = hp.n_embd;
        let bias = self.attention_bias(hp.qkv_bias)?;
        if !hp.fused_qkv {
            let mut one = |name: &str, n| self.linear(&format!("{blk}.{name}"), e, n, bias);
            let [q, k, v] = widths;
            return Ok([one("attn_q", q)?, one("attn_k", k)?, one("attn_v", v)?]);
        }
        let all = self.linear(&format!("{blk}.attn_qkv"), e, widths.iter().sum(), bias)?;
        let [q, k, v] = widths;
        Ok([all.rows(0, q)?, all.rows(q, k)?, all.rows(q + k, v)?])
    }

    fn layer(&mut self, i: usize, layer: &LayerHparams, hp: &Hparams) -> Result<Layer> {
        let e = hp.n_embd;
        let dk = hp.key_dim;
        let g = Geometry::new(layer.n_head, hp.kv_heads(layer));
        let blk = format!("blk.{i}");
        let at = |name: &str| format!("{blk}.{name}");
        let output_bias = self.attention_bias(hp.attn_output_bias)?;
        // Norms of heads need what a form leaves out of the cache.
        let [q, k] = match hp.qk_norm {
            Some(_) => [layer.n_head * dk, layer.n_head_kv * dk],
            None => [g.query_width(), g.key_width()],
        };
        let widths = [q, k, g.value_width()];
        let mut n_heads_out = g.output_width();
        if layer.rewritten.is_some() {
            n_heads_out = n_heads_out.next_multiple_of(BLOCK);
        }
        let ([attn_q, attn_k, attn_v], latent) = match &hp.latent {
            Some(latent) => {
                let (qkv, latent) = self.of_latents(&blk, (layer, latent), hp)?;
                (qkv, Some(latent))
            }
            None => (self.qkv(&blk, widths, hp)?, None),
        };
        Ok(Layer {
            attn_norm: self.optional_norm((&blk, hp.attn_norm), hp)?,
            attn_q,
            attn_k,
            attn_v,
            latent,
            attn_output: self.linear(&at("attn_output"), n_heads_out, e, output_bias)?,
            qk_norm: match hp.qk_norm {
                Some(_) => Some((
                    self.head_norm(&at("attn_q_norm"), layer.n_head, hp)?,
                    self.head_norm(&at("attn_k_norm"), layer.n_head_kv, hp)?,
                )),
                None => None,
            },
            post_attention_norm: self
                .optional_norm((&blk, hp.post_norm.tensors().map(|t| t[0])), hp)?,
            ffn_norm: self.optional_norm((&blk, hp.ffn_norm), hp)?,
            ffn: self.ffn(&blk, layer, hp)?,
            experts: match &hp.experts {
                Some(experts) if layer.has_experts => Some(self.experts(&blk, experts, hp)?),
                _ => None,
            },
            post_ffw_norm: self.optional_norm((&blk, hp.post_norm.tensors().map(|t| t[1])), hp)?,
        })
    }

    /// What the model was trained with: softmax, unless its file has sinks or names a normalizer.
    fn plan(&mut self, hp: &Hparams) -> Result<Plan> {
        let mut plan = Plan::trained(hp)?;
        for (i, layer) in hp.layers.iter().enumerate() {
            let name = format!("blk.{i}.attn_sinks.weight");
            if hp.needs_sinks || self.has(&name) {
                let sinks = self.vector(&name, layer.n_head)?;
                for (head, s) in sinks.iter().enumerate() {
                    if !s.is_finite() {
                        bad_file!("tensor \"{name}\", head {head}: {s}; must be finite");
                    }
                    plan.set_normalizers(&format!("{i}.{head}=sink:s={s}"))?;
                }
            }
        }
        type Set = fn(&mut Plan, &str) -> Result<()>;
        let keys: [(&str, Set); 3] = [
            (rewritten::FORM, Plan::set_forms),
            (MASK_KEY, Plan::set_masks),
            (NORMALIZER_KEY, Plan::set_normalizers),
        ];
        for (key, set) in keys {
            if let Some(text) = self.gguf.str(key)?
                && let Err(e) = set(&mut plan, text)
            {
                bad_file!("key \"{key}\": {}", excerpt(&e.to_string()));
            }
        }
        Ok(plan)
    }

    /// A warning about tensors that nothing asked for.
    fn unknown(&self) -> Option<String> {
        let names: Vec<&str> = self
            .gguf
            .tensors()
            .iter()
            .map(|t| t.name.as_str())
            // Old converters wrote the rotation's frequencies, which follow from the metadata.
            .filter(|n| {
                !self.used.contains(*n) && !n.ends_with("rot_embd") && !n.ends_with("attn_rot_embd")
            })
            .collect();
        let shown: Vec<String> =
            names.iter().take(3).map(|n| format!("\"{}\"", excerpt(n))).collect();
        let more = if names.len() > 3 { ", ..." } else { "" };
        (!names.is_empty()).then(|| {
            format!("{} unknown tensors are ignored: {}{more}", names.len(), shown.join(", "))
        })
    }
}
