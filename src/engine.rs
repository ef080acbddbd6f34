//! What engines have in common: how they are set up, and what they are asked.

use crate::bad_usage;
use crate::error::Result;

/// An engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// This program's own kernels.
    #[default]
    Cpu,
    /// ggml, on any of its devices.
    Ggml,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 2] = [Kind::Cpu, Kind::Ggml];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Cpu => "cpu",
            Kind::Ggml => "ggml",
        }
    }

    /// Refuses an engine that is not in this build.
    pub fn check(self) -> Result<()> {
        if self == Kind::Ggml && !cfg!(feature = "ggml") {
            bad_usage!(
                "engine ggml is not in this build; build with --features ggml, or use the engine cpu"
            );
        }
        Ok(())
    }
}

/// Where ggml computes.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    /// Names of devices; none: all that are not the processor, or else that.
    pub names: Vec<String>,
    /// Layers, the last ones, that are not left to the processor; `None`: all.
    pub n_layers: Option<usize>,
    /// Workers whose devices are used too, as `HOST:PORT`.
    pub workers: Vec<String>,
}

/// What is asked of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// The logits of what follows it.
    Logits,
    /// What logits are made of: the last layer's residual stream, normed where the model norms it.
    States,
}

/// Numbers of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threads {
    /// For a token alone.
    pub one: usize,
    /// For tokens that are read together.
    pub batch: usize,
}

impl Threads {
    /// The larger number.
    pub fn most(self) -> usize {
        self.one.max(self.batch)
    }
}

/// The format of cached elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheType {
    /// Full precision.
    F32,
    /// Half precision.
    F16,
    /// Multiples of one scale per 32 elements, 8 bits each.
    Q8_0,
    /// The same, 4 bits each.
    Q4_0,
}

impl CacheType {
    /// All types.
    pub const ALL: [CacheType; 4] =
        [CacheType::F32, CacheType::F16, CacheType::Q8_0, CacheType::Q4_0];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Q8_0 => "q8_0",
            CacheType::Q4_0 => "q4_0",
        }
    }

    /// Whether elements are whole multiples of a scale.
    pub fn is_rounded(self) -> bool {
        matches!(self, CacheType::Q8_0 | CacheType::Q4_0)
    }
}
