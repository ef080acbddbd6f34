//! OLMo 2 (arXiv 2501.00656) and 3: outputs of attention and FFN are normed, not what they read, and all
//! queries or keys of a token together. OLMo 3 has layers with a window, whose rotation is not scaled.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "olmo2", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let mut hparams = Hparams {
        attn_norm: None,
        ffn_norm: None,
        post_norm: PostNorm::Outputs,
        qk_norm: Some(QkNorm::Row),
        ffn_bias: Bias::Never,
        ..decoder::decoder(keys, NormKind::Rms, Some(Pairing::Half))?
    };
    keys.windows(&mut hparams.layers, None, 4)?;
    let base = keys.positive_or_none("rope.freq_base_swa")?;
    hparams.rotate_windows(|rope| Rope {
        base: base.unwrap_or(rope.base),
        scaling: Scaling::None,
        attn_factor: 1.0,
        ..rope
    });
    Ok(hparams)
}
