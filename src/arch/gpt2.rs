//! GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases everywhere, GELU.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "gpt2", read };

fn read(keys: &Keys) -> Result<Hparams> {
    Ok(Hparams { learned_positions: true, ..decoder::ungated(keys, None)? })
}
