//! GPT-NeoX (arXiv 2204.06745) and Pythia (arXiv 2304.01373): LayerNorm, biases everywhere, a part of each
//! head is rotated, attention and FFN both read the layer's input through norms of their own.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "gptneox", read };

fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams {
        parallel: keys.flag("use_parallel_residual", true)?,
        activation: Activation::Gelu,
        ..decoder::ungated(keys, Some(Pairing::Half))?
    })
}
