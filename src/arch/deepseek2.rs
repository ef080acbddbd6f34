//! DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437) and others of their shape: keys and values made of a
//! latent, experts after the first layers.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "deepseek2", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let base = decoder::decoder(keys, NormKind::Rms, Some(Pairing::Adjacent))?;
    let n_rotated = base.ropes[0].dim;
    // Newer files say under the plain names what is cached when keys are never made.
    let key_dim =
        keys.count_or_none("attention.key_length_mla", 1..=1 << 20)?.unwrap_or(base.key_dim);
    let value_dim =
        keys.count_or_none("attention.value_length_mla", 1..=1 << 20)?.unwrap_or(base.value_dim);
    if n_rotated >= key_dim {
        bad_file!("rope.dimension_count = {n_rotated}; must be less than the head width {key_dim}");
    }
    let latent = Latent {
        rank: keys.width("attention.kv_lora_rank")?,
        query_rank: keys.count_or_none("attention.q_lora_rank", 1..=1 << 20)?,
        n_rotated,
    };
    let mut hparams = Hparams {
        key_dim,
        value_dim,
        latent: Some(latent),
        attn_scale: 1.0 / (key_dim as f32).sqrt(),
        fused_qkv: false,
        qkv_bias: Bias::Never,
        attn_output_bias: Bias::Never,
        ffn_bias: Bias::Never,
        ..base
    };
    hparams.layers.iter_mut().for_each(|layer| layer.n_head_kv = layer.n_head);
    if let Some(experts) = keys.experts(Gating::Softmax, false)? {
        let n_dense = keys.count_or_none("leading_dense_block_count", 0..=1 << 16)?.unwrap_or(0);
        let n_shared = keys.count_or_none("expert_shared_count", 0..=1 << 10)?.unwrap_or(0);
        for (i, layer) in hparams.layers.iter_mut().enumerate() {
            layer.has_experts = i >= n_dense;
            if layer.has_experts {
                layer.n_ff = n_shared * experts.n_ff;
            }
        }
        hparams.experts = Some(experts);
    }
    // The factor that YaRN has for queries and keys is on whole scores, with a share of its own.
    if let Scaling::Yarn { factor, .. } = hparams.ropes[0].scaling {
        let log = libm::log(f64::from(factor)) as f32;
        let share = keys.positive_or_none("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
        hparams.ropes[0].attn_factor /= 0.1 * log + 1.0;
        hparams.attn_scale *= (share * log + 1.0) * (share * log + 1.0);
    }
    Ok(hparams)
}
