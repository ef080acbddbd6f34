//! InternLM 2 and 2.5 (arXiv 2403.17297): Llama's shape.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "internlm2", read };

fn read(keys: &Keys) -> Result<Hparams> {
    decoder::decoder(keys, NormKind::Rms, Some(Pairing::Adjacent))
}
