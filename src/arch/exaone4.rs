//! EXAONE 4 (arXiv 2507.11407): outputs of attention and FFN are normed, not what they read, and heads of
//! queries and keys. Where three of four layers see a window, the others do not rotate.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "exaone4", read };

/// Layers of the model whose files may leave its window out; llama.cpp reads one with no other number.
const N_LAYER_32B: usize = 64;

fn read(keys: &Keys) -> Result<Hparams> {
    let mut hparams = Hparams {
        attn_norm: None,
        ffn_norm: None,
        post_norm: PostNorm::Outputs,
        qk_norm: Some(QkNorm::Heads),
        ffn_bias: Bias::Never,
        rope_freqs: true,
        ..decoder::decoder(keys, NormKind::Rms, Some(Pairing::Half))?
    };
    let window = (hparams.n_layer() == N_LAYER_32B).then_some(4096);
    keys.windows(&mut hparams.layers, window, 4)?;
    if hparams.layers.iter().any(|layer| layer.window.is_some()) {
        hparams.rotate_windows_only();
    }
    Ok(hparams)
}
