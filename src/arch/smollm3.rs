//! SmolLM3: Llama's shape, but every fourth layer does not rotate (after Yang et al. 2025,
//! arXiv 2501.18795).

use super::*;

pub(super) const ARCH: Arch = Arch { name: "smollm3", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let mut hparams = decoder::decoder(keys, NormKind::Rms, Some(Pairing::Adjacent))?;
    hparams.layers.iter_mut().skip(3).step_by(4).for_each(|layer| layer.rope = None);
    Ok(hparams)
}
