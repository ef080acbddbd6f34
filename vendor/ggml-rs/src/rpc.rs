//! Devices of other machines.

use std::ffi::CString;
use std::ptr::{NonNull, null};

use crate::{Device, Error, Result, sys};

fn endpoint(host_and_port: &str) -> Result<CString> {
    CString::new(host_and_port).map_err(|e| Error(format!("\"{host_and_port}\": {e}")))
}

/// Devices of a worker at `HOST:PORT`, which are among [`crate::devices`] from then on.
pub fn add_server(host_and_port: &str) -> Result<Vec<Device>> {
    let endpoint = endpoint(host_and_port)?;
    // SAFETY: the string ends with zero; a registry stays.
    unsafe {
        let reg = sys::ggml_backend_rpc_add_server(endpoint.as_ptr());
        if reg.is_null() {
            return Err(Error(format!("no worker answers at {host_and_port}")));
        }
        sys::ggml_backend_register(reg);
        let n = sys::ggml_backend_reg_dev_count(reg);
        let all = (0..n).map(|i| sys::ggml_backend_reg_dev_get(reg, i));
        Ok(all.filter_map(NonNull::new).map(Device).collect())
    }
}

/// Lends devices to others at `HOST:PORT`, until the process ends or the address cannot be had.
pub fn serve(host_and_port: &str, devices: &[Device], n_threads: usize) -> Result<()> {
    let endpoint = endpoint(host_and_port)?;
    let mut raw: Vec<_> = devices.iter().map(|d| d.0.as_ptr()).collect();
    // SAFETY: the string ends with zero; devices stay.
    unsafe {
        let (cache, n) = (null(), raw.len());
        sys::ggml_backend_rpc_start_server(
            endpoint.as_ptr(),
            cache,
            n_threads,
            n,
            raw.as_mut_ptr(),
        );
    }
    Err(Error(format!("{host_and_port}: the address cannot be had")))
}
