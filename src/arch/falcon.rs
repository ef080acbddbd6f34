//! Falcon (arXiv 2311.16867): LayerNorm, no biases in matrices, attention and FFN both read the layer's
//! input, through one norm or, in the model of 40B, one each.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "falcon", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let (attn_norm, ffn_norm) = match keys.has_tensor("blk.0.attn_norm_2.weight") {
        true => ("attn_norm_2", Some("attn_norm")),
        false => ("attn_norm", None),
    };
    Ok(Hparams {
        attn_norm: Some(attn_norm),
        ffn_norm,
        parallel: true,
        fused_qkv: true,
        qkv_bias: Bias::Never,
        attn_output_bias: Bias::Never,
        ffn_bias: Bias::Never,
        activation: Activation::Gelu,
        ffn_gate: Gate::None,
        ..decoder::decoder(keys, NormKind::Layer, Some(Pairing::Half))?
    })
}
