//! GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases everywhere, GELU.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "gpt2", read };

fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams {
        learned_positions: true,
        fused_qkv: true,
        qkv_bias: Bias::Required,
        attn_output_bias: Bias::Required,
        ffn_bias: Bias::Required,
        activation: Activation::GeluTanh,
        ffn_gate: Gate::None,
        ..decoder::decoder(keys, NormKind::Layer, None)?
    })
}
