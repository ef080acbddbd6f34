//! StableLM 3B, 2 and Code (arXiv 2402.17834): LayerNorm and a gate; a part of each head is rotated. The
//! model of 12B norms heads of queries and keys, and its FFN reads what attention reads.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "stablelm", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let ffn_norm = keys.has_tensor("blk.0.ffn_norm.weight").then_some("ffn_norm");
    Ok(Hparams {
        ffn_norm,
        parallel: ffn_norm.is_none(),
        qk_norm: keys.has_tensor("blk.0.attn_q_norm.weight").then_some(QkNorm::Heads),
        attn_output_bias: Bias::Never,
        ffn_bias: Bias::Never,
        ..decoder::decoder(keys, NormKind::Layer, Some(Pairing::Half))?
    })
}
