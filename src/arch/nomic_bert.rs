//! Nomic BERT (arXiv 2402.01613): an encoder as BERT, but rotated, with a gated SiLU, and without biases in
//! matrices.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "nomic-bert", read };

fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams {
        fused_qkv: true,
        qkv_bias: Bias::Never,
        attn_output_bias: Bias::Never,
        ffn_bias: Bias::Never,
        ..decoder::encoder(keys, Some(Pairing::Half))?
    })
}
