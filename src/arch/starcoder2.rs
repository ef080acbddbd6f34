//! StarCoder 2 (arXiv 2402.19173): LayerNorm, biases everywhere, no gate, rotation.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "starcoder2", read };

fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams {
        attn_output_bias: Bias::Required,
        ffn_bias: Bias::Required,
        activation: Activation::GeluTanh,
        ffn_gate: Gate::None,
        ..decoder::decoder(keys, NormKind::Layer, Some(Pairing::Half))?
    })
}
