//! Ministral 3 and Mistral Small 3.1 on (arXiv 2601.08584): Llama's shape, with YaRN and scores that grow
//! with the position.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "mistral3", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let mut hparams = decoder::decoder(keys, NormKind::Rms, Some(Pairing::Adjacent))?;
    hparams.rope_freqs = true;
    let multiplier = keys.positive_or_none("rope.scaling.yarn_log_multiplier")?;
    for rope in &mut hparams.ropes {
        if let (Scaling::Yarn { factor, .. }, Some(multiplier)) = (rope.scaling, multiplier) {
            // YaRN's factor on queries and keys is divided by that of another strength.
            rope.attn_factor /= 0.1 * multiplier * factor.ln() + 1.0;
        }
    }
    if let Some(scale) = keys.positive_or_none("attention.temperature_scale")? {
        let length = keys.n_ctx_orig()?;
        hparams.temperature = Some(Temperature { scale, length });
    }
    Ok(hparams)
}
