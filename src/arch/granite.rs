//! Granite 3 without experts (github.com/ibm-granite/granite-3.0-language-models): Llama's shape, with
//! factors on embeddings, scores, what is added, and logits.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "granite", read };

pub(super) fn read(keys: &Keys) -> Result<Hparams> {
    // In these files the key is a switch.
    let rotates = keys.flag("rope.scaling.finetuned", true)?;
    let pairing = rotates.then_some(Pairing::Adjacent);
    let hparams = decoder::decoder(keys, NormKind::Rms, pairing)?;
    Ok(Hparams {
        attn_scale: keys.positive_or_none("attention.scale")?.unwrap_or(hparams.attn_scale),
        embedding_scale: keys.positive_or_none("embedding_scale")?.unwrap_or(1.0),
        residual_scale: keys.positive_or_none("residual_scale")?.unwrap_or(1.0),
        logit_scale: 1.0 / keys.positive("logit_scale")?,
        rope_freqs: true,
        ..hparams
    })
}
