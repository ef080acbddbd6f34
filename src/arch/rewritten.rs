//! Keys of a file whose attention has been rewritten: widths of every kv head of every layer, and
//! the planes of the rotation that are left of each.

use super::{Hparams, KvHead};
use crate::bad_file;
use crate::error::Result;
use crate::gguf::{Gguf, Value, ValueType, Writer};

/// What every layer is, as plans have forms.
pub const FORM: &str = "qkov.attention.form";
/// Widths of keys and of values, of all kv heads of the first layer, then of the second, ..
const KEY_LENGTHS: &str = "qkov.attention.key_lengths";
const VALUE_LENGTHS: &str = "qkov.attention.value_lengths";
/// Of the same heads how many planes are left, and which, head after head.
const PLANE_COUNTS: &str = "qkov.rope.plane_counts";
const PLANES: &str = "qkov.rope.planes";

/// Whether a key is one of these.
pub fn is_own(key: &str) -> bool {
    [FORM, KEY_LENGTHS, VALUE_LENGTHS, PLANE_COUNTS, PLANES].contains(&key)
}

/// Numbers of an array; none without it.
fn numbers(gguf: &Gguf, key: &str) -> Result<Option<Vec<usize>>> {
    let Some(array) = gguf.array(key)? else { return Ok(None) };
    let number = |value: Value| value.integer().and_then(|n| usize::try_from(n).ok());
    match array.iter().map(number).collect() {
        Some(numbers) => Ok(Some(numbers)),
        None => bad_file!("key \"{key}\": every element must be a whole number from 0 on"),
    }
}

/// Takes what a file says of rewritten layers.
pub(super) fn read(gguf: &Gguf, hparams: &mut Hparams) -> Result<()> {
    let n_heads: usize = hparams.layers.iter().map(|l| l.n_head_kv).sum();
    let (key_dim, value_dim) = (hparams.key_dim, hparams.value_dim);
    let per_head = |key: &str, most: usize, default: usize| -> Result<Vec<usize>> {
        let Some(all) = numbers(gguf, key)? else { return Ok(vec![default; n_heads]) };
        if all.len() != n_heads {
            bad_file!(
                "key \"{key}\" has {} elements; this model has {n_heads} kv heads",
                all.len()
            );
        }
        if let Some(n) = all.iter().find(|n| **n > most || (**n == 0 && default > 0)) {
            bad_file!("key \"{key}\": {n}; allowed 1..={most}");
        }
        Ok(all)
    };
    if gguf.array(KEY_LENGTHS)?.is_none() && gguf.array(VALUE_LENGTHS)?.is_none() {
        return Ok(());
    }
    let keys = per_head(KEY_LENGTHS, key_dim, key_dim)?;
    let values = per_head(VALUE_LENGTHS, value_dim, value_dim)?;
    let all_planes = hparams.ropes.first().map_or(0, |rope| rope.dim / 2);
    let planes = match numbers(gguf, PLANES)? {
        None => None,
        Some(all) => {
            let counts = per_head(PLANE_COUNTS, all_planes, 0)?;
            if counts.iter().sum::<usize>() != all.len() || all.iter().any(|p| *p >= all_planes) {
                bad_file!(
                    "key \"{PLANES}\": {} elements; expected {}, each below {all_planes}",
                    all.len(),
                    counts.iter().sum::<usize>()
                );
            }
            Some((counts, all))
        }
    };
    let mut at = 0;
    let mut rest = planes.as_ref().map_or(&[][..], |(_, all)| all);
    for layer in &mut hparams.layers {
        let mut heads = Vec::new();
        for _ in 0..layer.n_head_kv {
            let own = planes.as_ref().map(|(counts, _)| {
                let (own, next) = rest.split_at(counts[at]);
                rest = next;
                own.to_vec()
            });
            // A head that has all of them is as it was.
            let own = own.filter(|own| !own.iter().copied().eq(0..all_planes));
            let rotated = 2 * own.as_ref().map_or(all_planes, Vec::len);
            let head = KvHead { score_dim: keys[at], value_dim: values[at], planes: own };
            if layer.rope.is_some() && rotated > head.score_dim {
                bad_file!(
                    "key \"{KEY_LENGTHS}\", kv head {at}: {}; its planes need {rotated}",
                    head.score_dim
                );
            }
            heads.push(head);
            at += 1;
        }
        let is_trained =
            |h: &KvHead| (h.score_dim, h.value_dim) == (key_dim, value_dim) && h.planes.is_none();
        layer.rewritten = (!heads.iter().all(is_trained)).then_some(heads);
    }
    Ok(())
}

/// Writes what is read back: the kv heads of every layer.
pub fn write(writer: &mut Writer, hparams: &Hparams, layers: &[Vec<KvHead>]) -> Result<()> {
    let all_planes: Vec<usize> = (0..hparams.ropes.first().map_or(0, |r| r.dim / 2)).collect();
    let heads = || layers.iter().flatten();
    let planes = |head: &'_ KvHead| head.planes.clone().unwrap_or_else(|| all_planes.clone());
    let mut put = |key: &str, numbers: Vec<usize>| {
        writer.remove(key);
        writer.set_array(key, ValueType::U32, numbers.into_iter().map(|n| Value::U32(n as u32)))
    };
    put(KEY_LENGTHS, heads().map(|h| h.score_dim).collect())?;
    put(VALUE_LENGTHS, heads().map(|h| h.value_dim).collect())?;
    if heads().any(|h| h.planes.is_some()) {
        put(PLANE_COUNTS, heads().map(|h| planes(h).len()).collect())?;
        put(PLANES, heads().flat_map(planes).collect())?;
    }
    Ok(())
}
