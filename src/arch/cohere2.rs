//! Command R7B and A (arXiv 2504.00698): as Command R, but three of four layers see a window, and the
//! others do not rotate.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "cohere2", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let mut hparams = command_r::decoder(keys)?;
    let window = keys.count("attention.sliding_window", 1..=1 << 30)?;
    keys.windows(&mut hparams.layers, Some(window), 4)?;
    hparams.rotate_windows_only();
    Ok(hparams)
}
