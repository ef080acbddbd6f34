//! Qwen 3 with experts (arXiv 2505.09388).

use super::*;

pub(super) const ARCH: Arch = Arch { name: "qwen3moe", read };

fn read(keys: &Keys) -> Result<Hparams> {
    decoder::with_experts(keys, qwen3::read(keys)?, (true, 0))
}
