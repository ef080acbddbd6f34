//! MPT (MosaicML 2023): LayerNorm, queries, keys and values in one matrix and maybe kept within bounds, no
//! gate, and linear biases on scores or learned positions.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "mpt", read };

fn read(keys: &Keys) -> Result<Hparams> {
    for name in ["blk.0.attn_q_norm.bias", "blk.0.ffn_act.scales"] {
        if keys.has_tensor(name) {
            bad_file!("tensor \"{name}\": mpt with it is not supported; expected none");
        }
    }
    let base = decoder::decoder(keys, NormKind::Layer, None)?;
    let max_alibi_bias = keys.not_negative_or_none("attention.max_alibi_bias")?;
    let n_head = base.layers.iter().map(|layer| layer.n_head).find(|n| !n.is_power_of_two());
    if let (Some(_), Some(n)) = (max_alibi_bias, n_head) {
        bad_file!(
            "key \"mpt.attention.head_count\" = {n}: linear biases of so many heads have another order in \
             this family; allowed powers of two"
        );
    }
    Ok(Hparams {
        norm: Norm { bias: keys.has_tensor("output_norm.bias"), ..base.norm },
        learned_positions: keys.has_tensor("position_embd.weight"),
        max_alibi_bias,
        fused_qkv: true,
        qkv_limit: keys.not_negative_or_none("attention.clamp_kqv")?,
        qk_norm: keys.has_tensor("blk.0.attn_q_norm.weight").then_some(QkNorm::Row),
        activation: Activation::Gelu,
        ffn_gate: Gate::None,
        ..base
    })
}
