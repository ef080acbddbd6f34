//! Devices of other machines.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, ToSocketAddrs};
use std::ptr::{NonNull, null};
use std::sync::Mutex;
use std::time::Duration;

use crate::{Device, Error, Result, sys};

/// What a worker has to answer in. It answers at once, unless it serves another client.
const PATIENCE: Duration = Duration::from_secs(5);

/// Of `ggml-rpc.cpp`: the first command, and the bytes that go with it each way.
const HELLO: u8 = 14;
const HELLO_BYTES: u64 = 24;
const ANSWER_BYTES: u64 = 4 + HELLO_BYTES;

/// Greets a worker as ggml does. ggml ends the process where no worker answers, so this is done first.
fn greet(address: SocketAddrV4) -> Result<()> {
    let failed = |e| Error(format!("no worker answers at {address}: {e}"));
    let mut stream =
        TcpStream::connect_timeout(&SocketAddr::V4(address), PATIENCE).map_err(failed)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let hello = [&[HELLO][..], &HELLO_BYTES.to_le_bytes(), &[0; HELLO_BYTES as usize]].concat();
    stream.write_all(&hello).map_err(failed)?;
    let mut answer = [0; 8 + ANSWER_BYTES as usize];
    if let Err(e) = stream.read_exact(&mut answer) {
        return Err(Error(format!(
            "what is at {address} does not answer as a worker that is free: {e}"
        )));
    }
    let (size, [major, minor]) = (&answer[..8], [answer[8], answer[9]]);
    let ours = [sys::RPC_PROTO_MAJOR_VERSION, sys::RPC_PROTO_MINOR_VERSION];
    let is_known = u32::from(major) == ours[0] && u32::from(minor) <= ours[1];
    if size != ANSWER_BYTES.to_le_bytes() || !is_known {
        return Err(Error(format!(
            "{address}: version {major}.{minor} of the protocol of workers; expected {}.{}",
            ours[0], ours[1]
        )));
    }
    Ok(())
}

/// Devices of a worker at `HOST:PORT`, which are among [`crate::devices`] from then on.
///
/// A worker serves one client at a time, from the first [`crate::Backend`] or store on one of its
/// devices until the last is gone. What it does not answer ends this process: see [`crate::abort_to`].
pub fn add_server(host_and_port: &str) -> Result<Vec<Device>> {
    let address = resolve(host_and_port)?;
    static KNOWN: Mutex<BTreeMap<SocketAddrV4, Vec<Device>>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().map_err(|e| Error(e.to_string()))?;
    if let Some(devices) = known.get(&address) {
        return Ok(devices.clone());
    }
    greet(address)?;
    let endpoint = endpoint(address)?;
    // SAFETY: the string ends with zero; a registry stays.
    let devices: Vec<_> = unsafe {
        let reg = sys::ggml_backend_rpc_add_server(endpoint.as_ptr());
        if reg.is_null() {
            return Err(Error(format!("the worker at {address} lends no device")));
        }
        sys::ggml_backend_register(reg);
        let n = sys::ggml_backend_reg_dev_count(reg);
        let all = (0..n).map(|i| sys::ggml_backend_reg_dev_get(reg, i));
        all.filter_map(NonNull::new).map(Device).collect()
    };
    known.insert(address, devices.clone());
    Ok(devices)
}

/// The address of `HOST:PORT`, which is of version 4, as ggml knows no other.
fn resolve(host_and_port: &str) -> Result<SocketAddrV4> {
    let all = host_and_port.to_socket_addrs();
    let mut all = all.map_err(|e| Error(format!("\"{host_and_port}\" is no HOST:PORT: {e}")))?;
    let first = all.find_map(|address| match address {
        SocketAddr::V4(address) => Some(address),
        SocketAddr::V6(_) => None,
    });
    first.ok_or_else(|| Error(format!("\"{host_and_port}\" has no address of IPv4")))
}

fn endpoint(address: SocketAddrV4) -> Result<CString> {
    CString::new(address.to_string()).map_err(|e| Error(format!("{address}: {e}")))
}

/// Lends devices to others, one client after the other, until the process ends. It returns only where
/// that cannot begin. ggml tells on stdout who comes and goes.
pub fn serve(address: SocketAddrV4, devices: &[Device], n_threads: usize) -> Result<()> {
    let failed = |e| Error(format!("{address} cannot be listened at: {e}"));
    // ggml would not say why.
    drop(TcpListener::bind(address).map_err(failed)?);
    let endpoint = endpoint(address)?;
    let mut raw: Vec<_> = devices.iter().map(|d| d.0.as_ptr()).collect();
    // SAFETY: the string ends with zero; devices stay.
    unsafe {
        let (cache, n, raw) = (null(), raw.len(), raw.as_mut_ptr());
        sys::ggml_backend_rpc_start_server(endpoint.as_ptr(), cache, n_threads, n, raw);
    }
    Err(Error(format!("{address} is not served any more")))
}
