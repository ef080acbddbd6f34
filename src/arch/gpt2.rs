//! GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases everywhere, GELU.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "gpt2", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let n_embd = keys.width("embedding_length")?;
    let layers = keys.layers()?;
    let (key_dim, value_dim) = keys.head_dims(n_embd, &layers)?;
    Ok(Hparams {
        arch: keys.arch,
        n_vocab: 0,
        n_embd,
        n_ctx_train: keys.n_ctx_train()?,
        layers,
        key_dim,
        value_dim,
        attn_scale: 1.0 / (key_dim as f32).sqrt(),
        attn_softcap: None,
        final_softcap: None,
        norm: Norm {
            kind: NormKind::Layer,
            eps: keys.positive("attention.layer_norm_epsilon")?,
            bias: true,
        },
        qk_norm: false,
        post_norm: false,
        parallel: false,
        learned_positions: true,
        rope: None,
        fused_qkv: true,
        qkv_bias: Bias::Required,
        attn_output_bias: Bias::Required,
        ffn_bias: Bias::Required,
        activation: Activation::GeluTanh,
        ffn_gated: false,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logit_scale: 1.0,
    })
}
