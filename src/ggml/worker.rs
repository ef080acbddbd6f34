//! Lending devices to other machines.

use std::net::SocketAddrV4;

use ggml::{Device, Kind};

use crate::bad_usage;
use crate::error::{Error, Result};

/// Lends the devices of these names, or without one what is beside the processor, or else that.
/// It returns only where that cannot begin.
pub fn lend(address: SocketAddrV4, names: &[String], n_threads: usize) -> Result<()> {
    let all = ggml::devices();
    let mut devices = Vec::new();
    for name in names {
        let Some(device) = all.iter().find(|d| d.name().eq_ignore_ascii_case(name)) else {
            let known: Vec<_> = all.iter().map(|d| d.name()).collect();
            bad_usage!("--device {name}: not here; allowed {}", known.join(", "));
        };
        devices.push(*device);
    }
    if devices.is_empty() {
        let is_gpu = |d: &&Device| matches!(d.kind(), Kind::Gpu | Kind::IntegratedGpu);
        devices.extend(all.iter().filter(is_gpu));
    }
    if devices.is_empty() {
        devices.extend(Device::cpu().ok());
    }
    ggml::serve(address, &devices, n_threads).map_err(|e| Error::Runtime(e.to_string()))
}
