//! Attention as numbers, and the model with other numbers in its place.

use super::{Linear, Model, Weight};
use crate::arch::rewritten;
use crate::attention::Attention;
use crate::bad_usage;
use crate::error::Result;
use crate::gguf::{Bytes, Data, Gguf, Value, Writer};
use crate::merge::{self, BLOCK, Dense, Kept, Site, Weights};
use crate::normalizer;
use crate::plan::Plan;
use crate::quant::{self, FORMATS, Format};

/// What becomes of a layer.
pub struct NewLayer {
    /// Its form.
    pub form: merge::Choice,
    /// Its matrices, if they change.
    pub rewritten: Option<merge::Rewritten>,
}

impl Linear {
    /// Its numbers, with what is added to them.
    fn dense(&self) -> Dense {
        let w = &self.weight;
        let mut data = vec![0.0; w.n_in * w.n_out];
        for (i, out) in data.chunks_exact_mut(w.n_in).enumerate() {
            w.dequantize_row(i, out);
        }
        Dense { n_in: w.n_in, data, bias: self.bias.clone() }
    }

    /// Numbers in a format.
    fn of(numbers: &Dense, format: &'static Format) -> Linear {
        let (n_in, n_out) = (numbers.n_in, numbers.data.len() / numbers.n_in);
        let bytes = Bytes::from(rows(numbers, format));
        Linear { weight: Weight::new(format, [n_in, n_out], bytes), bias: numbers.bias.clone() }
    }
}

impl Model {
    /// The matrices of a layer's attention.
    pub fn weights(&self, layer: usize) -> Weights {
        let l = &self.layers[layer];
        let [q, k, v, o] = [&l.attn_q, &l.attn_k, &l.attn_v, &l.attn_output].map(Linear::dense);
        Weights { q, k, v, o }
    }

    /// What a form needs to know of a layer with these normalizers.
    pub fn site(&self, layer: usize, normalizers: &[normalizer::Choice]) -> Site<'_> {
        // A cap on scores sees constants that are added to them.
        let is_capped = self.hparams.attn_softcap.is_some();
        let rope = self.hparams.rope(layer);
        Site {
            hparams: &self.hparams,
            layer,
            shift_invariant: !is_capped && normalizers.iter().all(|n| n.is_shift_invariant()),
            unit_sum: normalizers.iter().all(|n| n.sums_to_one()),
            frequencies: rope.map_or(Vec::new(), |r| r.frequencies(self.rope_freqs.as_deref()).0),
        }
    }

    /// What makes values of what is cached in a layer that attends so, where that are keys alone.
    /// `exact`: not rounded.
    pub fn value_map(
        &self,
        layer: usize,
        attention: &Attention,
        exact: bool,
    ) -> Result<Option<Linear>> {
        let Kept::Keys { .. } = attention.geometry.kept else { return Ok(None) };
        let choice = attention.form();
        let map = match choice.form().values(choice, &self.weights(layer)) {
            Ok(map) => map,
            Err(reason) => bad_usage!("form {}, layer {layer}: {reason}", choice.text()),
        };
        // What is rounded in it is rounded in every value, so 8 bits at least.
        let name = match self.layers[layer].attn_v.weight.format.ty.name {
            _ if exact => "F32",
            "F32" => "F32",
            "F16" | "BF16" => "F16",
            _ if self.hparams.n_embd.is_multiple_of(BLOCK) => "Q8_0",
            _ => "F16",
        };
        Ok(map.zip(quant::format_named(name)).map(|(map, format)| Linear::of(&map, format)))
    }

    /// Whether a plan has other forms than this model's; refuses those that need other matrices.
    pub fn check_forms(&self, plan: &Plan) -> Result<bool> {
        let changed = plan.other_forms(&self.plan);
        for i in &changed {
            let (new, old) = (&plan.layers[*i], &self.plan.layers[*i].form);
            let reason = match new.form.form().rewrites() || old.form().rewrites() {
                true => {
                    Err("weights have to be rewritten, which is done when a model is opened".into())
                }
                false => new.form.form().applies(&new.form, &self.site(*i, &new.normalizers)),
            };
            if let Err(reason) = reason {
                let (new, old) = (new.form.text(), old.text());
                bad_usage!("form {new} in place of {old}, layer {i}: {reason}");
            }
        }
        Ok(!changed.is_empty())
    }

    /// Refuses a plan with normalizers that the forms of this model's layers do not go with.
    pub fn check(&self, plan: &Plan) -> Result<()> {
        for (i, layer) in plan.layers.iter().enumerate() {
            let form = &self.plan.layers[i].form;
            if let Err(reason) = form.form().applies(form, &self.site(i, &layer.normalizers)) {
                bad_usage!("layer {i} has the form {}: {reason}", form.text());
            }
        }
        Ok(())
    }

    /// The file with other layers in place of its own, in memory; what stays is not copied. Matrices
    /// get the format `round`, or, without it, formats of about as many bits as they had.
    pub fn rewritten(&self, layers: &[NewLayer], round: Option<&'static Format>) -> Result<Gguf> {
        let mut writer = Writer::new();
        writer.copy_metadata(&self.gguf)?;
        writer.remove(rewritten::FORM);
        let forms = layers.iter().enumerate().map(|(i, l)| format!("{i}={}", l.form.text()));
        let forms = forms.collect::<Vec<_>>().join(";");
        writer.set(rewritten::FORM, Value::String(forms.as_bytes()))?;
        let heads = layers.iter().zip(&self.attention).map(|(new, old)| match &new.rewritten {
            Some(new) => new.geometry.kv.clone(),
            None => old.geometry.kv.clone(),
        });
        rewritten::write(&mut writer, &self.hparams, &heads.collect::<Vec<_>>())?;
        for (i, new) in layers.iter().enumerate() {
            if let Some(new) = &new.rewritten {
                self.put_layer(&mut writer, i, &new.weights, (new.error(), round))?;
            }
        }
        Ok(self.gguf.overlaid(Gguf::parse(Bytes::from(writer.to_bytes()?))?))
    }

    fn put_layer(
        &self,
        writer: &mut Writer,
        i: usize,
        new: &Weights,
        (error, round): (f64, Option<&'static Format>),
    ) -> Result<()> {
        let old = &self.layers[i];
        let format = |new: &Dense, old: &[&Linear]| match round {
            Some(format) if new.n_in.is_multiple_of(format.ty.block_len) => Ok(Some(format)),
            Some(format) => {
                bad_usage!(
                    "type {}: layer {i} has rows of {} elements, not whole blocks of {}",
                    format.ty.name,
                    new.n_in,
                    format.ty.block_len
                )
            }
            // What stays as it is is not rounded again.
            None if is_same(new, old) => Ok(None),
            None => Ok(Some(format_for(new, &old[0].weight, error))),
        };
        let (q, k, v, o) = (&new.q, &new.k, &new.v, &new.o);
        if self.hparams.fused_qkv {
            let parts = [q, k, v];
            let n_out = |d: &Dense| d.data.len() / d.n_in;
            let bias = |d: &Dense| d.bias.clone().unwrap_or_else(|| vec![0.0; n_out(d)]);
            let all = Dense {
                n_in: q.n_in,
                data: parts.map(|d| &d.data[..]).concat(),
                bias: parts.iter().any(|d| d.bias.is_some()).then(|| parts.map(bias).concat()),
            };
            let olds = [&old.attn_q, &old.attn_k, &old.attn_v];
            put(writer, &format!("blk.{i}.attn_qkv"), &all, format(&all, &olds)?)?;
        } else {
            for (name, new, old) in
                [("q", q, &old.attn_q), ("k", k, &old.attn_k), ("v", v, &old.attn_v)]
            {
                put(writer, &format!("blk.{i}.attn_{name}"), new, format(new, &[old])?)?;
            }
        }
        put(writer, &format!("blk.{i}.attn_output"), o, format(o, &[&old.attn_output])?)
    }
}

/// Whether numbers are those of matrices one over the other, with what is added to them.
fn is_same(new: &Dense, old: &[&Linear]) -> bool {
    let n = new.n_in;
    if old.iter().any(|l| l.weight.n_in != n)
        || old.iter().map(|l| l.weight.n_out * n).sum::<usize>() != new.data.len()
    {
        return false;
    }
    let mut numbers = vec![0.0; n];
    let rows = old.iter().flat_map(|l| (0..l.weight.n_out).map(|r| (&l.weight, r)));
    rows.zip(new.data.chunks_exact(n)).all(|((w, r), new)| {
        w.dequantize_row(r, &mut numbers);
        numbers == new
    })
}

/// Relative error of rounding numbers to a format.
fn rounding_error(numbers: &Dense, format: &Format) -> f64 {
    let n = numbers.n_in;
    let (mut bytes, mut back) = (vec![0; format.row_bytes(n)], vec![0.0; n]);
    let (mut error, mut size) = (0.0, 0.0);
    // Some rows say enough.
    let step = (numbers.data.len() / n / 64).max(1);
    for row in numbers.data.chunks_exact(n).step_by(step) {
        format.quantize(row, &mut bytes);
        format.dequantize(&bytes, &mut back);
        for (x, y) in row.iter().zip(&back) {
            error += f64::from(x - y).powi(2);
            size += f64::from(*x).powi(2);
        }
    }
    if size > 0.0 { (error / size).sqrt() } else { 0.0 }
}

/// The format for rewritten numbers: that of the old ones, or where it cannot be written or its blocks
/// do not fit, the next with as many bits. A larger one, up to the size that the old matrix had, where
/// rounding to it would change more than the form does.
fn format_for(new: &Dense, old: &Weight, error: f64) -> &'static Format {
    let (n_old, old) = (old.n_in * old.n_out, old.format);
    let fits = |f: &&Format| f.can_quantize() && new.n_in.is_multiple_of(f.ty.block_len);
    let mut ladder: Vec<&Format> =
        FORMATS.iter().filter(fits).filter(|f| f.bits() >= old.bits()).collect();
    ladder.sort_by(|a, b| {
        a.bits().total_cmp(&b.bits()).then((b.ty == old.ty).cmp(&(a.ty == old.ty)))
    });
    let Some(first) = ladder.first().copied() else { return old };
    let room = old.bits() * n_old as f64 / new.data.len() as f64;
    let is_coarse = |f: &Format| rounding_error(new, f) > error;
    let mut best = first;
    for format in ladder.into_iter().filter(|f| f.bits() <= room.min(8.5)) {
        best = format;
        if !is_coarse(format) {
            break;
        }
    }
    best
}

/// Rows in a format, one after the other.
fn rows(numbers: &Dense, format: &Format) -> Vec<u8> {
    let n = numbers.n_in;
    let mut bytes = vec![0; format.row_bytes(n) * (numbers.data.len() / n)];
    let rows = numbers.data.chunks_exact(n).zip(bytes.chunks_exact_mut(format.row_bytes(n)));
    rows.for_each(|(row, out)| format.quantize(row, out));
    bytes
}

/// Writes a matrix in a format, and its bias; without a format only that.
fn put(
    writer: &mut Writer,
    name: &str,
    numbers: &Dense,
    format: Option<&'static Format>,
) -> Result<()> {
    let n = numbers.n_in;
    if let Some(format) = format {
        let bytes = Data::View(Bytes::from(rows(numbers, format)));
        let dims = [n as u64, (numbers.data.len() / n) as u64];
        writer.tensor(&format!("{name}.weight"), format.ty, &dims, bytes)?;
    }
    let Some(bias) = &numbers.bias else { return Ok(()) };
    let Some(floats) = quant::format_named("F32") else { return Ok(()) };
    let bytes: Vec<u8> = bias.iter().flat_map(|x| x.to_le_bytes()).collect();
    let name = format!("{name}.bias");
    writer.tensor(&name, floats.ty, &[bias.len() as u64], Data::View(Bytes::from(bytes)))
}
