//! Qwen 3 (arXiv 2505.09388): Llama's shape, heads of queries and keys are normed.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "qwen3", read };

pub(super) fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams {
        qk_norm: Some(QkNorm::Heads),
        ffn_bias: Bias::Never,
        ..decoder::decoder(keys, NormKind::Rms, Some(Pairing::Half))?
    })
}
