//! A rewritten model as a plain file, which programs that know nothing of rewriting can read.

use super::{MASK_KEY, Model, NORMALIZER_KEY, NewLayer};
use crate::arch::{Hparams, Scaling, rewritten};
use crate::bad_usage;
use crate::error::{Result, excerpt};
use crate::gguf::{Bytes, Data, Gguf, Value, Writer};
use crate::merge::{BLOCK, KvHead};
use crate::quant::{self, Format};
use crate::simd;

impl Model {
    /// What [`Model::rewritten`] gives, without keys of this program: heads have one width, of keys and
    /// values, in the keys for it; queries are scaled for the width that scores are divided by the root
    /// of; and divisors of the frequencies stand for the planes that are left. Refused where the layers
    /// are not alike enough for that.
    pub fn stock(&self, mut layers: Vec<NewLayer>, round: Option<&'static Format>) -> Result<Gguf> {
        for (key, plain) in [(NORMALIZER_KEY, "softmax"), (MASK_KEY, "causal")] {
            if let Some(text) = self.gguf.str(key)?
                && text != plain
            {
                let text = excerpt(text);
                bad_usage!("--stock: {key} = \"{text}\", which other programs do not read");
            }
        }
        let head = self.one_head(&layers)?;
        let (dim, old_dim) = (head.score_dim, self.hparams.key_dim);
        let scale = (dim as f32 / old_dim as f32).sqrt();
        for weights in layers.iter_mut().filter_map(|l| Some(&mut l.rewritten.as_mut()?.weights)) {
            simd::scale(&mut weights.q.data, scale);
            weights.q.bias.iter_mut().for_each(|bias| simd::scale(bias, scale));
        }
        let gguf = self.rewritten(&layers, round)?;
        let arch = self.hparams.arch;
        let mut writer = Writer::new();
        writer.copy_metadata(&gguf)?;
        let own: Vec<&str> = gguf.metadata().map(|(key, _)| key).collect();
        let is_ours =
            |key: &&str| rewritten::is_own(key) || [NORMALIZER_KEY, MASK_KEY].contains(key);
        own.into_iter().filter(is_ours).for_each(|key| {
            writer.remove(key);
        });
        for key in ["attention.key_length", "attention.value_length", "rope.dimension_count"] {
            let key = format!("{arch}.{key}");
            writer.remove(&key);
            writer.set(&key, Value::U32(dim as u32))?;
        }
        if let (Some(planes), Some(floats)) = (&head.planes, quant::format_named("F32")) {
            let divisors: Vec<u8> =
                self.divisors(planes)?.iter().flat_map(|x| x.to_le_bytes()).collect();
            let n = [planes.len() as u64];
            writer.tensor("rope_freqs.weight", floats.ty, &n, Data::View(Bytes::from(divisors)))?;
        }
        let gguf = gguf.overlaid(Gguf::parse(Bytes::from(writer.to_bytes()?))?);
        let read = Hparams::read(&gguf, self.hparams.n_vocab)?;
        if (read.attn_scale * scale / self.hparams.attn_scale - 1.0).abs() > 1e-5 {
            bad_usage!("--stock: scores of this model have a factor that is not one by width");
        }
        Ok(gguf)
    }

    /// What all heads of all layers are, if it is one thing, and such that a plain file can say it.
    fn one_head(&self, layers: &[NewLayer]) -> Result<KvHead> {
        let hp = &self.hparams;
        if hp.ropes.first().is_none_or(|rope| rope.dim != hp.key_dim) || hp.qk_norm.is_some() {
            bad_usage!(
                "--stock: a plain file of the architecture {} has no other widths of heads; allowed \
                 where whole heads are rotated, and not normed",
                hp.arch
            );
        }
        if !hp.rope_freqs {
            bad_usage!(
                "--stock: other programs read no divisors of frequencies from files of the architecture {}",
                hp.arch
            );
        }
        let heads = layers.iter().map(|l| l.rewritten.as_ref().map(|r| &r.geometry.kv));
        let Some(heads) = heads.collect::<Option<Vec<_>>>() else {
            bad_usage!("--stock: every layer has to be rewritten");
        };
        let mut heads = heads.into_iter().flatten();
        let Some(first) = heads.next() else { bad_usage!("--stock: there are no heads") };
        let all = first.planes.as_ref().map_or(first.score_dim, |p| 2 * p.len());
        if let Some(other) = heads.find(|head| *head != first) {
            bad_usage!(
                "--stock: all heads must keep the same planes and widths, as with \
                 lowrank:qk=R,ov=R,shared=yes; one has {} and {}, another {} and {}",
                first.score_dim,
                first.value_dim,
                other.score_dim,
                other.value_dim
            );
        }
        if first.score_dim != first.value_dim || all != first.score_dim {
            bad_usage!(
                "--stock: keys and values need the same width, rotated as a whole; these have {} ({all} \
                 rotated) and {}",
                first.score_dim,
                first.value_dim
            );
        }
        let width = self.hparams.layers.iter().map(|l| l.n_head * first.value_dim);
        if let Some(width) = width.into_iter().find(|n| !n.is_multiple_of(BLOCK)) {
            bad_usage!(
                "--stock: outputs of all heads have {width} elements, not whole blocks of {}",
                BLOCK
            );
        }
        Ok(first.clone())
    }

    /// What frequencies of a rotation of as many planes have to be divided by to be those of `planes`.
    fn divisors(&self, planes: &[usize]) -> Result<Vec<f32>> {
        let Some(rope) = self.hparams.ropes.first() else { return Ok(Vec::new()) };
        if matches!(rope.scaling, Scaling::Yarn { .. } | Scaling::Long { .. })
            || self.hparams.ropes.len() > 1
        {
            bad_usage!(
                "--stock: planes of a rotation that is scaled by YaRN or LongRoPE, or differs between \
                 layers, cannot be dropped in a plain file"
            );
        }
        let rotation = |dim: usize, divisors: Option<&[f32]>| {
            let plain = crate::arch::Rope { dim, scaling: Scaling::None, ..rope.clone() };
            plain.frequencies(divisors).0
        };
        let (new, old) =
            (rotation(2 * planes.len(), None), rotation(rope.dim, self.rope_freqs.as_deref()));
        Ok(planes.iter().zip(new).map(|(plane, new)| (new / old[*plane]) as f32).collect())
    }
}
