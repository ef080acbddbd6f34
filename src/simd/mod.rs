//! What this processor can do, and elementary functions on vectors of `f32`.
//!
//! The functions are written once in plain Rust and compiled once per level, so they give the same
//! bits on every level: additions and multiplications are never fused, sums are taken in lanes
//! that are added up as a tree.
#![allow(unsafe_code)]

mod functions;
mod sparse;

pub use functions::*;
pub use sparse::*;

use std::sync::atomic::{AtomicU8, Ordering};

/// Instruction sets that have code of their own, from the weakest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// What every processor of the architecture has.
    Scalar = 1,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64: and 8-bit products summed in fours, in the encoding of AVX.
    AvxVnni,
    /// x86-64: the same with 512 bits, in the encoding of AVX-512.
    Avx512,
    /// x86-64: and products of BF16, summed in pairs.
    Avx512Bf16,
    /// aarch64: what every such processor has.
    Neon,
    /// aarch64 with dot products of 8-bit integers.
    Dotprod,
    /// aarch64 with matrix products of 8-bit integers.
    I8mm,
}

impl Level {
    /// All levels, in their order.
    pub const ALL: [Level; 8] = [
        Level::Scalar,
        Level::Avx2,
        Level::AvxVnni,
        Level::Avx512,
        Level::Avx512Bf16,
        Level::Neon,
        Level::Dotprod,
        Level::I8mm,
    ];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            Level::Avx2 => "avx2",
            Level::AvxVnni => "avxvnni",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512bf16",
            Level::Neon => "neon",
            Level::Dotprod => "dotprod",
            Level::I8mm => "i8mm",
        }
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Level::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => Level::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                Level::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => {
                Level::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "aarch64")]
            Level::Neon => true,
            #[cfg(target_arch = "aarch64")]
            Level::Dotprod => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Level::I8mm => {
                Level::Dotprod.is_available() && std::arch::is_aarch64_feature_detected!("i8mm")
            }
            // Of another architecture.
            _ => false,
        }
    }

    fn best() -> Level {
        Level::ALL.into_iter().rev().find(|l| l.is_available()).unwrap_or(Level::Scalar)
    }
}

/// The level in use; 0: not yet known.
static LEVEL: AtomicU8 = AtomicU8::new(0);

/// The level in use: the best that this processor has, unless another was set.
pub fn level() -> Level {
    let known = LEVEL.load(Ordering::Relaxed).checked_sub(1);
    match known.and_then(|at| Level::ALL.get(usize::from(at))) {
        Some(level) => *level,
        None => {
            let best = Level::best();
            LEVEL.store(best as u8, Ordering::Relaxed);
            best
        }
    }
}

/// Uses a level from now on; false, and nothing changes, where the processor does not have it.
pub fn set_level(level: Level) -> bool {
    let available = level.is_available();
    if available {
        LEVEL.store(level as u8, Ordering::Relaxed);
    }
    available
}

/// Defines a function once and compiles it for every level.
macro_rules! per_level {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        pub fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,f16c")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                if $crate::simd::level() >= $crate::simd::Level::Avx2 {
                    // SAFETY: the level is in use, so the processor has it.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
    ($(#[$doc:meta])* pub fn $name:ident<F: Function>($($arg:ident: $ty:ty),*) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        pub fn $name<F: Function>($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<F: Function>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,f16c")]
                fn avx2<F: Function>($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                if $crate::simd::level() >= $crate::simd::Level::Avx2 {
                    // SAFETY: the level is in use, so the processor has it.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}

pub(crate) use per_level;

/// A function of one element, small enough to be inlined into a loop.
pub trait Function: Fn(f32) -> f32 + Copy {}

impl<F: Fn(f32) -> f32 + Copy> Function for F {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_in_order() {
        for (i, level) in Level::ALL.into_iter().enumerate() {
            assert_eq!(level as usize, i + 1);
        }
        assert!(Level::best().is_available());
        assert_eq!(Level::Neon.is_available(), cfg!(target_arch = "aarch64"));
    }

    /// Tests skip levels that the processor lacks; whoever names one wants it tested.
    #[test]
    fn the_level_that_was_asked_for_is_there() {
        if let Ok(name) = std::env::var("QKOV_SIMD") {
            let level = Level::ALL.into_iter().find(|l| l.name() == name);
            assert!(level.is_some_and(Level::is_available), "no {name}");
        }
    }
}
