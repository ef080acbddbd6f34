//! Command R and R+, Aya 23: attention and FFN read one LayerNorm without bias, logits have a factor. The
//! larger model norms heads of queries and keys.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "command-r", read };

fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams {
        qk_norm: keys.has_tensor("blk.0.attn_q_norm.weight").then_some(QkNorm::Heads),
        ..decoder(keys)?
    })
}

/// What the families of Cohere have in common.
pub(super) fn decoder(keys: &Keys) -> Result<Hparams> {
    let hparams = decoder::decoder(keys, NormKind::Layer, Some(Pairing::Adjacent))?;
    Ok(Hparams {
        norm: Norm { bias: false, ..hparams.norm },
        ffn_norm: None,
        parallel: true,
        ffn_bias: Bias::Never,
        logit_scale: keys.positive_or_none("logit_scale")?.unwrap_or(1.0),
        ..hparams
    })
}
