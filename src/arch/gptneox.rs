//! GPT-NeoX (arXiv 2204.06745) and Pythia (arXiv 2304.01373): LayerNorm, biases everywhere, a part of each
//! head is rotated, attention and FFN both read the layer's input through norms of their own.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "gptneox", read };

fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams {
        parallel: keys.flag("use_parallel_residual", true)?,
        fused_qkv: true,
        qkv_bias: Bias::Required,
        attn_output_bias: Bias::Required,
        ffn_bias: Bias::Required,
        activation: Activation::Gelu,
        ffn_gate: Gate::None,
        ..decoder::decoder(keys, NormKind::Layer, Some(Pairing::Half))?
    })
}
