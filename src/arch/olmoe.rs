//! OLMoE (arXiv 2409.02060): norms of whole rows of queries and keys, weights of experts as they are.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "olmoe", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let hparams = Hparams {
        qk_norm: Some(QkNorm::Row),
        ffn_bias: Bias::Never,
        ..decoder::decoder(keys, NormKind::Rms, Some(Pairing::Half))?
    };
    decoder::with_experts(keys, hparams, (false, 0))
}
