//! gpt-oss (arXiv 2508.10925): sinks, windows in every other layer, biases everywhere, experts.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "gpt-oss", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let mut hparams = Hparams {
        needs_sinks: true,
        // Which stands before the experts, whatever its name.
        ffn_norm: Some("post_attention_norm"),
        qkv_bias: Bias::Required,
        attn_output_bias: Bias::Required,
        activation: Activation::ClampedSwiglu,
        ..decoder::decoder(keys, NormKind::Rms, Some(Pairing::Half))?
    };
    keys.windows(&mut hparams.layers, None, 2)?;
    let mut hparams = decoder::with_experts(keys, hparams, (true, 0))?;
    let Some(experts) = &mut hparams.experts else {
        bad_file!("missing key \"gpt-oss.expert_count\"; allowed 1 or more");
    };
    experts.bias = Bias::Required;
    Ok(hparams)
}
