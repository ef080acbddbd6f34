//! What this machine can do at most: the lines that speeds are compared with.

use std::time::Instant;

use memmap2::MmapMut;

use super::kernels;
use super::threads::Team;
use crate::error::{Error, Result};
use crate::simd;

/// Limits of a number of threads together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes per second that can be read from memory.
    pub read_bytes: f64,
    /// Operations per second (multiplications and additions) on 8-bit integers, in registers.
    pub int8_ops: f64,
}

/// Far more than any cache.
const READ_BYTES: usize = 512 << 20;
/// Streams that a thread reads side by side, and bytes of each at a time.
const STREAMS: usize = 4;
const PIECE: usize = 4096;
/// Rounds of the arithmetic loop: about 20 ms.
const ROUNDS: usize = 4_000_000;
const REPETITIONS: usize = 5;

impl Limits {
    /// Measures with `n_threads` threads; the best of several runs counts.
    pub fn measure(n_threads: usize, pin: bool) -> Result<Limits> {
        Ok(Limits::measure_each([n_threads], pin)?[0])
    }

    /// The same for several numbers of threads, of one team.
    pub fn measure_each<const N: usize>(counts: [usize; N], pin: bool) -> Result<[Limits; N]> {
        let team = Team::new(counts.into_iter().max().unwrap_or(1), pin)?;
        let failed = |e| Error::Runtime(format!("no memory to measure its speed: {e}"));
        let mut memory = MmapMut::map_anon(READ_BYTES).map_err(failed)?;
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        team.enter(team.n_threads(), |crew| {
            let share = READ_BYTES / crew.n_threads();
            crew.chunks(&mut memory, share, |_, _, part| part.fill(1));
        });
        Ok(counts.map(|n| Limits::of(&team, n, &memory)))
    }

    fn of(team: &Team, n_threads: usize, memory: &[u8]) -> Limits {
        let share = READ_BYTES / n_threads / (STREAMS * PIECE) * (STREAMS * PIECE);
        let mut limits = Limits { read_bytes: 0.0, int8_ops: 0.0 };
        team.enter(n_threads, |crew| {
            for _ in 0..REPETITIONS {
                let start = Instant::now();
                crew.run(|thread| {
                    let part = &memory[thread * share..(thread + 1) * share];
                    let length = share / STREAMS;
                    let mut sum = 0;
                    for at in (0..length).step_by(PIECE) {
                        for stream in 0..STREAMS {
                            let from = stream * length + at;
                            sum ^= simd::xor(&part[from..from + PIECE]);
                        }
                    }
                    std::hint::black_box(sum);
                });
                let rate = (share * n_threads) as f64 / start.elapsed().as_secs_f64();
                limits.read_bytes = limits.read_bytes.max(rate);
                let start = Instant::now();
                crew.run(|_| kernels::products_in_registers(ROUNDS));
                let ops = (ROUNDS * kernels::ops_per_round() * n_threads) as f64;
                limits.int8_ops = limits.int8_ops.max(ops / start.elapsed().as_secs_f64());
            }
        });
        limits
    }
}
