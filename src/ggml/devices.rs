//! What ggml can compute on.

use ggml::{Device, Kind};

/// A device, as reports show it.
pub struct Found {
    /// The name that chooses it: `CPU`, `CUDA0`.
    pub name: String,
    /// What it is.
    pub description: String,
    /// What kind of thing it is.
    pub kind: &'static str,
    /// Bytes of memory that are free.
    pub memory_free: usize,
    /// Bytes of memory in all.
    pub memory_total: usize,
}

/// All devices.
pub fn devices() -> Vec<Found> {
    ggml::devices().into_iter().map(found).collect()
}

fn found(device: Device) -> Found {
    let kind = match device.kind() {
        Kind::Cpu => "CPU",
        Kind::Gpu => "GPU",
        Kind::IntegratedGpu => "integrated GPU",
        Kind::Accelerator => "accelerator",
    };
    let (memory_free, memory_total) = device.memory();
    let (name, description) = (device.name(), device.description());
    Found { name, description, kind, memory_free, memory_total }
}

/// ggml's version.
pub fn version() -> String {
    ggml::version()
}

/// Who is told of warnings, and of what ends the process. Only the first call counts.
pub fn tell(warning: fn(&str), end: fn(&str) -> !) {
    ggml::log_to(warning);
    ggml::abort_to(end);
}
