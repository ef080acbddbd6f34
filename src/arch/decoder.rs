//! What decoders have in common, and encoders; an entry says where its family is different.

use super::*;

/// Decoders as since Llama: norms before attention and FFN, no biases needed, a gated SiLU.
pub(super) fn decoder(keys: &Keys, kind: NormKind, pairing: Option<Pairing>) -> Result<Hparams> {
    let n_embd = keys.width("embedding_length")?;
    let mut layers = keys.layers()?;
    let (key_dim, value_dim) = keys.head_dims(n_embd, &layers)?;
    let rope = pairing.map(|pairing| keys.rope(pairing, key_dim)).transpose()?;
    layers.iter_mut().for_each(|layer| layer.rope = rope.as_ref().map(|_| 0));
    let (eps, bias) = match kind {
        NormKind::Rms => ("attention.layer_norm_rms_epsilon", false),
        NormKind::Layer => ("attention.layer_norm_epsilon", true),
    };
    Ok(Hparams {
        arch: keys.arch,
        n_vocab: 0,
        n_embd,
        n_ctx_train: keys.n_ctx_train()?,
        causal: keys.flag("attention.causal", true)?,
        pooling: keys.pooling()?,
        layers,
        key_dim,
        value_dim,
        attn_scale: 1.0 / (key_dim as f32).sqrt(),
        attn_softcap: None,
        final_softcap: None,
        norm: Norm { kind, eps: keys.positive(eps)?, bias },
        embedding_norm: false,
        attn_norm: Some("attn_norm"),
        ffn_norm: Some("ffn_norm"),
        qk_norm: None,
        post_norm: PostNorm::None,
        output_norm: true,
        output: true,
        parallel: false,
        needs_sinks: false,
        learned_positions: false,
        token_types: None,
        max_alibi_bias: None,
        temperature: None,
        qkv_limit: None,
        latent: None,
        ropes: rope.into_iter().collect(),
        rope_freqs: false,
        fused_qkv: keys.has_tensor("blk.0.attn_qkv.weight"),
        qkv_bias: Bias::Optional,
        attn_output_bias: Bias::Optional,
        ffn_bias: Bias::Optional,
        activation: Activation::Silu,
        ffn_gate: Gate::Own,
        experts: None,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logit_scale: 1.0,
    })
}

/// Decoders as since GPT-2: LayerNorm, biases everywhere, queries, keys and values in one matrix, GELU
/// without a gate.
pub(super) fn ungated(keys: &Keys, pairing: Option<Pairing>) -> Result<Hparams> {
    Ok(Hparams {
        fused_qkv: true,
        qkv_bias: Bias::Required,
        attn_output_bias: Bias::Required,
        ffn_bias: Bias::Required,
        activation: Activation::GeluTanh,
        ffn_gate: Gate::None,
        ..decoder(keys, NormKind::Layer, pairing)?
    })
}

/// Encoders as since BERT: all tokens see each other and none is predicted, embeddings of tokens have a
/// norm and their kind's embedding added, and the residual stream is normed after each addition.
pub(super) fn encoder(keys: &Keys, pairing: Option<Pairing>) -> Result<Hparams> {
    Ok(Hparams {
        causal: keys.flag("attention.causal", false)?,
        embedding_norm: true,
        token_types: keys.token_types()?,
        attn_norm: None,
        ffn_norm: None,
        post_norm: PostNorm::Sums,
        output_norm: false,
        output: false,
        ..decoder(keys, NormKind::Layer, pairing)?
    })
}

/// A decoder with experts in place of every FFN, if the file has them, and with what all tokens go
/// through beside them, if `n_shared` is not 0.
pub(super) fn with_experts(
    keys: &Keys,
    mut hparams: Hparams,
    (norm, n_shared): (bool, usize),
) -> Result<Hparams> {
    hparams.experts = keys.experts(Gating::Softmax, norm)?;
    for layer in hparams.layers.iter_mut().filter(|layer| layer.has_experts) {
        layer.n_ff = n_shared;
    }
    Ok(hparams)
}
