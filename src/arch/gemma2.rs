//! Gemma 2 (arXiv 2408.00118): caps on scores and logits, every other layer sees a window, norms on
//! both sides of attention and FFN. Files hold the gains of norms with 1 added.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "gemma2", read };

/// Files do not say that the largest model, and no other, has `n_embd / n_head` under the root that
/// scores are divided by; it has this many layers.
const N_LAYER_27B: usize = 46;

fn read(keys: &Keys) -> Result<Hparams> {
    let mut hparams = Hparams {
        attn_softcap: keys.positive_or_none("attn_logit_softcapping")?.or(Some(50.0)),
        final_softcap: keys.positive_or_none("final_logit_softcapping")?.or(Some(30.0)),
        ..decoder(keys, N_LAYER_27B)?
    };
    keys.windows(&mut hparams.layers, Some(4096), 2)?;
    Ok(hparams)
}

/// What the families of Gemma have in common.
pub(super) fn decoder(keys: &Keys, n_layer_27b: usize) -> Result<Hparams> {
    let hparams = decoder::decoder(keys, NormKind::Rms, Some(Pairing::Half))?;
    let under_root = match &hparams.layers[..] {
        layers if layers.len() == n_layer_27b => hparams.n_embd / layers[0].n_head,
        _ => hparams.key_dim,
    };
    Ok(Hparams {
        attn_scale: 1.0 / (under_root as f32).sqrt(),
        embedding_scale: (hparams.n_embd as f32).sqrt(),
        post_norm: PostNorm::Outputs,
        activation: Activation::GeluTanh,
        ..hparams
    })
}
