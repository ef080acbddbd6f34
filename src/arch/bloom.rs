//! BLOOM (arXiv 2211.05100): LayerNorm, also of embeddings, biases everywhere, no gate, and linear biases on
//! scores in place of positions.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "bloom", read };

fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams { embedding_norm: true, max_alibi_bias: Some(8.0), ..decoder::ungated(keys, None)? })
}
