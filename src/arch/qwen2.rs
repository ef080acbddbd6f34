//! Qwen 1.5, 2 and 2.5 (arXiv 2407.10671): Llama's shape, biases on queries, keys and values.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "qwen2", read };

pub(super) fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams {
        qkv_bias: Bias::Required,
        attn_output_bias: Bias::Never,
        ffn_bias: Bias::Never,
        ..decoder::decoder(keys, NormKind::Rms, Some(Pairing::Half))?
    })
}
