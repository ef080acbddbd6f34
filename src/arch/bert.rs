//! BERT (arXiv 1810.04805) and encoders of its shape: learned positions, LayerNorm of embeddings and of the
//! residual stream after each addition, biases everywhere, GELU, and no output.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "bert", read };

fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams {
        learned_positions: true,
        qkv_bias: Bias::Required,
        attn_output_bias: Bias::Required,
        ffn_bias: Bias::Required,
        activation: Activation::Gelu,
        ffn_gate: Gate::None,
        ..decoder::encoder(keys, None)?
    })
}
