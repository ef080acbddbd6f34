//! Gemma 3 (arXiv 2503.19786): five layers with a window and a rotation of their own before each that
//! sees everything, and normed heads of queries and keys in place of Gemma 2's caps.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "gemma3", read };

/// As Gemma 2's.
const N_LAYER_27B: usize = 62;

fn read(keys: &Keys) -> Result<Hparams> {
    let mut hparams = Hparams {
        final_softcap: keys.positive_or_none("final_logit_softcapping")?,
        qk_norm: Some(QkNorm::Heads),
        ..gemma2::decoder(keys, N_LAYER_27B)?
    };
    keys.windows(&mut hparams.layers, None, 6)?;
    let base = keys.positive_or_none("rope.freq_base_swa")?.unwrap_or(10_000.0);
    hparams.rotate_windows(|rope| Rope { base, scaling: Scaling::None, ..rope });
    Ok(hparams)
}
