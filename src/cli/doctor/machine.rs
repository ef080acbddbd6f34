//! What the machine has, and what it does with it.

use serde_json::{Value, json};
use sysinfo::{CpuRefreshKind, System};

use super::Check;
use crate::cli::memory::{memory, system};
use crate::cpu::Limits;
use crate::cpu::threads::{can_pin, cores};
use crate::engine::Threads;
use crate::error::Result;
use crate::simd::{self, Level};

/// Below this share of what as many threads as one would do, something keeps them from their cores.
const SCALING: f64 = 0.75;
/// Above this share of the cores, other programs are in the way.
const BUSY: f64 = 0.3;

/// The machine, as this process sees it. Memory in bytes.
pub(super) struct Machine {
    processor: String,
    n_cores: usize,
    n_threads: usize,
    /// Cores that affinity and quota leave.
    n_usable: usize,
    pub(super) memory_total: u64,
    pub(super) memory_available: u64,
    /// The last cache before memory.
    pub(super) cache: Option<u64>,
    /// Programs that computed, on average over the last minute.
    load: Option<f64>,
    /// How the system gives large pages, where it tells.
    huge_pages: Option<String>,
    /// Of one thread, and of all that have a core.
    pub(super) limits: [(usize, Limits); 2],
    is_pinned: bool,
}

impl Machine {
    /// Looks at the machine, and measures it with so many threads.
    pub(super) fn look(n: usize, pin: bool) -> Result<Machine> {
        let mut system = system()?;
        system.refresh_cpu_list(CpuRefreshKind::nothing());
        // Before anything is measured.
        let load = System::load_average().ok().map(|load| load.one);
        let brand = system.cpus().first().map_or("", |cpu| cpu.brand().trim());
        let (total, available) = memory()?;
        let n_usable = num_cpus::get().min(cores().len().max(1));
        let is_pinned = pin && n <= cores().len() && can_pin();
        // More threads than cores do no more.
        let n = n.min(n_usable);
        let [one, all] = Limits::measure_each([1, n], pin)?;
        Ok(Machine {
            processor: if brand.is_empty() { "unknown".into() } else { brand.into() },
            n_cores: num_cpus::get_physical(),
            n_threads: system.cpus().len(),
            n_usable,
            memory_total: total,
            memory_available: available,
            cache: last_cache(),
            load,
            huge_pages: huge_pages(),
            limits: [(1, one), (n, all)],
            is_pinned,
        })
    }

    /// Limits of all threads.
    pub(super) fn most(&self) -> Limits {
        self.limits[1].1
    }

    pub(super) fn checks(&self, threads: Threads, pin: bool) -> Vec<Check> {
        let cores = Check::ok(
            "processor",
            format!(
                "{}, {}: {} cores, {} threads, of which {} may be used",
                self.processor,
                std::env::consts::ARCH,
                self.n_cores,
                self.n_threads,
                self.n_usable
            ),
        );
        let mut checks = vec![cores, self.instructions(), self.threads(threads, pin)];
        checks.extend(self.load.map(|load| self.busy(load)));
        checks.extend(self.speeds());
        let memory =
            format!("{} MB, {} available", mb(self.memory_total), mb(self.memory_available));
        checks.push(Check::ok("memory", memory));
        checks.extend(self.huge_pages.as_ref().map(|mode| match mode.as_str() {
            "never" => Check::warning(
                "huge pages",
                "never: weights are spread over small pages, which takes more look-ups",
                "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
            ),
            mode => Check::ok("huge pages", mode),
        }));
        checks
    }

    fn instructions(&self) -> Check {
        let here: Vec<Level> = Level::ALL.into_iter().filter(|l| l.is_available()).collect();
        let names: Vec<&str> = here.iter().map(|level| level.name()).collect();
        let used = simd::level();
        let text = format!("{}, of {}", used.name(), names.join(", "));
        match here.last() {
            Some(best) if *best != used => Check::warning(
                "instructions",
                text,
                format!("--simd {}, or QKOV_SIMD unset, is the fastest", best.name()),
            ),
            _ if used == Level::Scalar => Check::warning(
                "instructions",
                text,
                "without AVX2 or NEON, kernels are portable ones, and slow; a small model helps",
            ),
            _ => Check::ok("instructions", text),
        }
    }

    fn threads(&self, threads: Threads, pin: bool) -> Check {
        let n = threads.most();
        let text = match threads.one == threads.batch {
            true => n.to_string(),
            false => format!("{}, {} for prompts", threads.one, threads.batch),
        };
        if n > self.n_usable {
            return Check::warning(
                "threads",
                format!("{text}: more than cores that may be used, so they wait for each other"),
                format!("-t {}", self.n_usable.min(self.n_cores).max(1)),
            );
        }
        match (self.is_pinned, pin) {
            (true, _) => Check::ok("threads", format!("{text}, each stays on a core of its own")),
            (false, false) => Check::warning(
                "threads",
                format!("{text}, left to the system, which may have two of them share a core"),
                "leave out --no-pin",
            ),
            (false, true) => Check::ok(
                "threads",
                format!("{text}, left to the system, which does not let them stay on cores"),
            ),
        }
    }

    fn busy(&self, load: f64) -> Check {
        let text = format!("{load:.1} threads of all programs computed over the last minute");
        match load > BUSY * self.n_usable as f64 {
            true => Check::warning(
                "load",
                format!("{text}: what is measured below is less than the machine can do"),
                "end other programs that compute, and look again",
            ),
            false => Check::ok("load", text),
        }
    }

    /// Reading and computing, with one thread and with all.
    fn speeds(&self) -> Vec<Check> {
        let [(_, one), (n, all)] = self.limits;
        let reads = |l: Limits| l.read_bytes / 1e9;
        let computes = |l: Limits| l.int8_ops / 1e9;
        let line = |of: fn(Limits) -> f64, unit: &str| match n {
            1 => format!("{:.1} {unit}", of(all)),
            _ => format!(
                "{:.1} {unit} with {n} threads, {:.1} with one: {:.2} times as much",
                of(all),
                of(one),
                of(all) / of(one)
            ),
        };
        let busy = "end other programs that compute, or take fewer threads (-t)";
        let (read, computed) = (line(reads, "GB/s"), line(computes, "GOP/s of 8-bit integers"));
        let mut checks = vec![match n > 1 && reads(all) < reads(one) {
            true => Check::warning("reading", read, busy),
            false => Check::ok("reading", read),
        }];
        checks.push(match computes(all) < SCALING * n as f64 * computes(one) {
            true => Check::warning("computing", computed, busy),
            false => Check::ok("computing", computed),
        });
        checks
    }

    pub(super) fn json(&self, threads: Threads) -> Value {
        let levels = Level::ALL.into_iter().filter(|l| l.is_available());
        let limits = self.limits.map(|(n, l)| {
            json!({"n_threads": n, "limit_read_gb_s": l.read_bytes / 1e9,
                   "limit_int8_gop_s": l.int8_ops / 1e9})
        });
        json!({
            "processor": self.processor,
            "arch": std::env::consts::ARCH,
            "n_cores": self.n_cores,
            "n_logical": self.n_threads,
            "n_usable": self.n_usable,
            "simd": simd::level().name(),
            "simd_available": levels.map(Level::name).collect::<Vec<_>>(),
            "n_threads": threads.one,
            "n_threads_batch": threads.batch,
            "pinned": self.is_pinned,
            "memory_total": self.memory_total,
            "memory_available": self.memory_available,
            "cache_bytes": self.cache,
            "load": self.load,
            "huge_pages": self.huge_pages,
            "limits": limits,
        })
    }
}

/// Bytes as whole megabytes.
pub(super) fn mb(bytes: u64) -> String {
    format!("{:.0}", bytes as f64 / 1e6)
}

/// Size of the largest cache of the first core, where the system tells.
fn last_cache() -> Option<u64> {
    let size = |i: usize| -> Option<u64> {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{i}/size");
        let text = std::fs::read_to_string(path).ok()?;
        Some(text.trim().strip_suffix('K')?.parse::<u64>().ok()? << 10)
    };
    (0..8).filter_map(size).max()
}

/// The word in brackets of `always [madvise] never`.
fn huge_pages() -> Option<String> {
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_string())
}
