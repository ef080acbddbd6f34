//! Qwen 1.5 and 2 with experts (arXiv 2407.10671, section 2.2.2): weights of experts as they are, and
//! beside them an FFN of which a token says how much it takes.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "qwen2moe", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let base = qwen2::read(keys)?;
    let n_ff = base.layers[0].n_ff;
    let n_shared = keys.count_or_none("expert_shared_feed_forward_length", 1..=1 << 20)?;
    let mut hparams = decoder::with_experts(keys, base, (false, n_shared.unwrap_or(n_ff)))?;
    let Some(experts) = &mut hparams.experts else {
        bad_file!("missing key \"qwen2moe.expert_count\"; allowed 1 or more");
    };
    if keys.count_or_none("expert_feed_forward_length", 1..=1 << 20)?.is_none() {
        // What older files say is the width of all that a token goes through.
        experts.n_ff /= experts.n_used;
    }
    experts.shared_gate = true;
    Ok(hparams)
}
