//! Granite 3 with experts, and maybe an FFN that all tokens share beside them.

use super::*;

pub(super) const ARCH: Arch = Arch { name: "granitemoe", read };

fn read(keys: &Keys) -> Result<Hparams> {
    let shared = keys.count_or_none("expert_shared_feed_forward_length", 0..=1 << 20)?;
    decoder::with_experts(keys, granite::read(keys)?, (true, shared.unwrap_or(0)))
}
