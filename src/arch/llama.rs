//! Llama 1 to 3.x (arXiv 2302.13971, 2407.21783), Mistral, SmolLM2, TinyLlama.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "llama", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let hparams = decoder::decoder(keys, NormKind::Rms, Some(Pairing::Adjacent))?;
    decoder::with_experts(keys, Hparams { rope_freqs: true, ..hparams }, (true, 0))
}
