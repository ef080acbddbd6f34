//! `qkov rpc-worker`: lends this machine's devices to others.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::num::NonZeroUsize;

use clap::Args;

use super::Run;
use super::terminal::note;
use crate::cpu::threads::default_threads;
use crate::error::Result;
use crate::ggml::worker::lend;

#[derive(Args)]
#[command(after_help = "\
A worker serves one client at a time; another is refused after five seconds. It keeps nothing when a
client leaves.
Where a worker dies or its network does, the client's process ends with an error and exit code 1, in
the middle of whatever it does: ggml has no way to go on. A worker goes on when a client dies.
The protocol has no password and no encryption, and trusts its peers: who reaches the port can read
and write memory of this process and crash it. Lend to machines that you trust, in a network of
their own, or through `ssh -L 50052:127.0.0.1:50052 MACHINE`.")]
pub(super) struct RpcWorker {
    /// Address to listen at; any but a loopback address lets other machines in
    #[arg(long, value_name = "ADDRESS", default_value_t = Ipv4Addr::LOCALHOST)]
    host: Ipv4Addr,
    /// Port to listen at
    #[arg(long, default_value_t = 50052, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// Devices to lend, of those that `inspect --devices` lists [default: all GPUs, or else the CPU]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    device: Vec<String>,
    /// Threads of the CPU, if that is lent [default: one per physical core]
    #[arg(short, long, value_name = "N")]
    threads: Option<NonZeroUsize>,
}

impl Run for RpcWorker {
    const NAME: &'static str = "rpc-worker";
    const ABOUT: &'static str = "Lend this machine's devices to others";

    fn run(self) -> Result<()> {
        if !self.host.is_loopback() {
            note(&format!(
                "warning: whoever reaches {}:{} can read and write this process's memory and crash it",
                self.host, self.port
            ));
        }
        let n_threads = self.threads.map_or_else(default_threads, usize::from);
        lend(SocketAddrV4::new(self.host, self.port), &self.device, n_threads)
    }
}
