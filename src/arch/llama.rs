//! Llama 1 to 3.x (arXiv 2302.13971, 2407.21783), Mistral, SmolLM2, TinyLlama.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "llama", read };

fn read(keys: &Keys) -> Result<Hparams> {
    keys.no_experts()?;
    decoder(keys, Pairing::Adjacent)
}

/// The common shape of decoders since Llama: RMS norms, rotation, gated SiLU, no biases.
pub(super) fn decoder(keys: &Keys, pairing: Pairing) -> Result<Hparams> {
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
            kind: NormKind::Rms,
            eps: keys.positive("attention.layer_norm_rms_epsilon")?,
            bias: false,
        },
        qk_norm: false,
        post_norm: false,
        parallel: false,
        learned_positions: false,
        rope: Some(keys.rope(pairing, key_dim)?),
        fused_qkv: false,
        qkv_bias: Bias::Optional,
        attn_output_bias: Bias::Optional,
        ffn_bias: Bias::Optional,
        activation: Activation::Silu,
        ffn_gated: true,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logit_scale: 1.0,
    })
}
