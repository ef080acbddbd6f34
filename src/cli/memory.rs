//! Whether a model and its context fit memory, told before anything is loaded.

use sysinfo::System;

use crate::cpu::{KvCache, Needs};
use crate::engine::{CacheType, Kind};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::session::{Options, context};

/// Bytes of memory, and those that are free or can be made so, also where a control group or a limit of
/// this process says less.
pub(super) fn memory() -> Result<(u64, u64)> {
    let mut system = system()?;
    system.refresh_memory();
    let (mut total, mut available) = (system.total_memory(), system.available_memory());
    if let Some(group) = system.cgroup_limits() {
        total = total.min(group.total_memory);
        // What it calls free is without pages of files, which can be given back.
        available = available.min(total.saturating_sub(group.rss));
    }
    if let Some((limit, left)) = addresses() {
        (total, available) = (total.min(limit), available.min(left));
    }
    Ok((total, available))
}

/// What the system tells of itself.
pub(super) fn system() -> Result<System> {
    System::new().map_err(|e| Error::Runtime(format!("the system does not tell what it has: {e}")))
}

/// Bytes of addresses that this process may have, and those that are left of them, where there is a limit
/// and the system tells.
fn addresses() -> Option<(u64, u64)> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"))?;
    let taken = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10;
    Some((limit, limit.saturating_sub(taken)))
}

/// What a model takes in memory, in bytes.
pub(super) struct Footprint {
    /// Weights that are copied: these have to fit.
    pub(super) copied: u64,
    /// Weights that are read where the file is mapped, which the system may drop and read again.
    pub(super) mapped: u64,
    /// The cache, for each token of the context.
    pub(super) per_token: f64,
}

impl Footprint {
    /// Of a model on the engine cpu, with a cache of these types.
    pub(super) fn new(
        model: &Model,
        needs: &Needs,
        types: (CacheType, CacheType),
    ) -> Result<Footprint> {
        /// Positions of a cache that is made to be looked at.
        const N: usize = 1024;
        let geometry = model.attention.iter().map(|a| a.geometry.clone());
        let cache = KvCache::new(geometry, N, types)?;
        Ok(Footprint {
            copied: needs.copied_bytes as u64,
            mapped: needs.mapped_bytes as u64,
            per_token: cache.n_bytes() as f64 / N as f64,
        })
    }

    pub(super) fn weights(&self) -> u64 {
        self.copied + self.mapped
    }

    pub(super) fn cache(&self, n_ctx: usize) -> u64 {
        (self.per_token * n_ctx as f64) as u64
    }

    /// Tokens whose keys and values fit beside all weights.
    pub(super) fn room(&self, available: u64) -> u64 {
        let free = available.saturating_sub(self.weights());
        (free as f64 / self.per_token.max(1.0)) as u64
    }

    /// Refuses what is certain not to fit.
    fn check(&self, n_ctx: usize, available: u64) -> Result<()> {
        let cache = self.cache(n_ctx);
        let needed = self.copied.saturating_add(cache);
        if needed <= available {
            return Ok(());
        }
        let sizes = format!(
            "not enough memory: {needed} bytes are needed, {} for weights and {cache} for a context of \
             {n_ctx} tokens; {available} are available",
            self.copied
        );
        match self.room(available) {
            0 => Err(Error::Runtime(sizes)),
            room => Err(Error::Usage(format!("{sizes}, which hold --ctx {room} at most"))),
        }
    }
}

/// Refuses to make a model of so many bytes that is certain not to fit.
pub(super) fn check_made(n_bytes: u64) -> Result<()> {
    match memory() {
        Ok((_, available)) if n_bytes > available => Err(Error::Runtime(format!(
            "not enough memory: {n_bytes} bytes are needed for the model; {available} are available"
        ))),
        _ => Ok(()),
    }
}

/// Refuses a model and a context that are certain not to fit, before any memory is taken for them.
pub(super) fn check(model: &Model, options: &Options) -> Result<()> {
    // Another engine may have memory elsewhere.
    if options.engine != Kind::Cpu {
        return Ok(());
    }
    let Ok((_, available)) = memory() else { return Ok(()) };
    let n_ctx = context(model, options.n_ctx, &mut Vec::new())?;
    let needs = Needs::of(model, options.exact)?;
    Footprint::new(model, &needs, options.cache)?.check(n_ctx, available)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_told_with_its_sizes() {
        let footprint = Footprint { copied: 1000, mapped: 500, per_token: 10.0 };
        assert_eq!(footprint.check(100, 2000), Ok(()), "mapped weights may be dropped");
        let error = footprint.check(101, 2000).unwrap_err();
        assert_eq!(
            error,
            Error::Usage(
                "not enough memory: 2010 bytes are needed, 1000 for weights and 1010 for a context of \
                 101 tokens; 2000 are available, which hold --ctx 50 at most"
                    .into()
            )
        );
        let error = footprint.check(1, 900).unwrap_err();
        assert_eq!(
            error,
            Error::Runtime(
                "not enough memory: 1010 bytes are needed, 1000 for weights and 10 for a context of \
                 1 tokens; 900 are available"
                    .into()
            )
        );
        assert!(footprint.check(usize::MAX, u64::MAX - 1).is_err());
    }
}
