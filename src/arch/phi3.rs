//! Phi-3, 3.5 and 4 (arXiv 2404.14219): queries, keys and values in one matrix, gate and up in another,
//! divisors of frequencies for short contexts and for long ones.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "phi3", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let mut hparams = Hparams {
        fused_qkv: true,
        ffn_gate: Gate::Fused,
        ffn_bias: Bias::Never,
        ..decoder::decoder(keys, NormKind::Rms, Some(Pairing::Half))?
    };
    // Of all layers, where there is one; llama.cpp leaves it out.
    keys.windows(&mut hparams.layers, None, 0)?;
    Ok(hparams)
}
