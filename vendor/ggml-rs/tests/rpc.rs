//! Workers on this machine, in processes of their own: what they compute, and what happens without them.
#![cfg(feature = "rpc")]
#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::env;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use ggml::{Backend, Device, Graph, Result, Scheduler, Shape, Store, Type};

/// Says where a process that this test starts listens, or whom it calls.
const AT: &str = "QKOV_TEST_WORKERS";

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a test of this file in a process of its own.
fn start(test: &str, at: &str) -> Process {
    let child = Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--ignored", "--nocapture"])
        .env(AT, at)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    Process(child.unwrap())
}

/// A free address.
fn address() -> SocketAddrV4 {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

/// A worker that listens, and where.
fn lent() -> (Process, String) {
    let at = address().to_string();
    let process = start("worker", &at);
    // A connection that says nothing is a client that leaves.
    while TcpStream::connect(&at).is_err() {
        sleep(Duration::from_millis(20));
    }
    (process, at)
}

#[test]
#[ignore = "runs in a process of its own"]
fn worker() -> Result<()> {
    let Ok(at) = env::var(AT) else { return Ok(()) };
    ggml::serve(at.parse().unwrap(), &[Device::cpu()?], 1)
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn floats(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7 % 17) as f32 - 8.0) / 8.0).collect()
}

/// Two products, one after the other, each with weights on a device of its own; what runs it, `x` and
/// the result.
struct Chain {
    scheduler: Scheduler,
    x: ggml::Tensor,
    products: [ggml::Tensor; 2],
}

impl Chain {
    fn new(devices: [Device; 2]) -> Result<Chain> {
        let mut graph = Graph::new(16)?;
        let x = graph.input(Shape::matrix(Type::F32, 64, 3));
        let (mut y, mut products) = (x, Vec::new());
        for device in devices {
            let shape = Shape::matrix(Type::F32, 64, 64);
            let mut store = Store::new(device.buffer_type()?, &[shape], true)?;
            store.set(0, 0, &bytes(&floats(64 * 64)));
            let w = graph.stored(&Arc::new(store), 0);
            y = graph.mul_mat(w, y);
            products.push(y);
        }
        graph.output(y);
        let mut all = devices.to_vec();
        all.push(Device::cpu()?);
        all.dedup();
        let backends = all.into_iter().map(Backend::new).collect::<Result<_>>()?;
        let mut scheduler = Scheduler::new(backends, 64)?;
        scheduler.load(graph)?;
        Ok(Chain { scheduler, x, products: [products[0], products[1]] })
    }

    fn run(&mut self, shift: f32) -> Result<Vec<f32>> {
        let x: Vec<f32> = floats(64 * 3).into_iter().map(|x| x + shift).collect();
        self.scheduler.set(self.x, &bytes(&x))?;
        self.scheduler.run()?;
        let mut out = Vec::new();
        self.scheduler.get(self.products[1], &mut out)?;
        Ok(out)
    }
}

#[test]
fn two_workers_compute_what_the_processor_does() -> Result<()> {
    let (_first, a) = lent();
    let (_second, b) = lent();
    let (a, b) = (ggml::add_server(&a)?, ggml::add_server(&b)?);
    assert_eq!((a.len(), b.len()), (1, 1));
    assert!(a[0] != b[0] && [a[0], b[0]].iter().all(|d| ggml::devices().contains(d)));
    assert!(a[0].memory().1 > 0, "{:?}", a[0].memory());
    let mut remote = Chain::new([a[0], b[0]])?;
    for (tensor, device) in remote.products.into_iter().zip([a[0], b[0]]) {
        assert_eq!(remote.scheduler.device_of(tensor), Some(device));
    }
    let cpu = Device::cpu()?;
    let mut local = Chain::new([cpu, cpu])?;
    for shift in [0.0, 0.5, -1.0] {
        let (ours, wanted) = (remote.run(shift)?, local.run(shift)?);
        assert!(wanted.iter().any(|x| x.abs() > 1.0));
        assert_eq!(ours, wanted);
    }
    Ok(())
}

#[test]
fn no_worker_is_an_error() {
    let says = |at: &str, part: &str| {
        let e = ggml::add_server(at).unwrap_err().to_string();
        assert!(e.contains(part) && !e.contains('\n'), "{e}");
    };
    says(&address().to_string(), "no worker answers at 127.0.0.1:");
    says("127.0.0.1", "is no HOST:PORT");
    says("[::1]:50052", "has no address of IPv4");
    // One that listens and never answers, as a worker with a client, and one that is something else.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    says(&silent.local_addr().unwrap().to_string(), "does not answer as a worker that is free");
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = other.local_addr().unwrap().to_string();
    std::thread::spawn(move || drop(other.accept()));
    says(&at, "does not answer as a worker that is free");
}

#[test]
fn an_address_in_use_is_an_error() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = taken.local_addr().unwrap().to_string();
    let e = ggml::serve(at.parse().unwrap(), &[Device::cpu()?], 1).unwrap_err();
    assert!(e.to_string().starts_with(&format!("{at} cannot be listened at")), "{e}");
    Ok(())
}

/// Computes until the worker is gone.
#[test]
#[ignore = "runs in a process of its own"]
fn client() -> Result<()> {
    let Ok(at) = env::var(AT) else { return Ok(()) };
    ggml::abort_to(|last| {
        eprintln!("last words: {last}");
        std::process::exit(7)
    });
    let device = ggml::add_server(&at)?[0];
    let mut chain = Chain::new([device, device])?;
    loop {
        chain.run(0.0)?;
        eprintln!("computed");
    }
}

/// What the documentation says of it: the client ends, with its last words, and nothing hangs.
#[test]
fn a_client_ends_when_its_worker_does() {
    let (worker, at) = lent();
    let mut client = start("client", &at);
    let mut stderr = client.0.stderr.take().unwrap();
    let mut begin = [0; 9];
    stderr.read_exact(&mut begin).unwrap();
    assert_eq!(&begin, b"computed\n");
    drop(worker);
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    let last = rest.lines().last().unwrap();
    assert!(last.starts_with("last words: Remote RPC server crashed"), "{last}");
    assert_eq!(client.0.wait().unwrap().code(), Some(7));
}

/// The other way round, a worker goes on.
#[test]
fn a_worker_outlives_its_client() -> Result<()> {
    let (_worker, at) = lent();
    let mut client = start("client", &at);
    let mut begin = [0; 9];
    client.0.stderr.take().unwrap().read_exact(&mut begin).unwrap();
    drop(client);
    let device = ggml::add_server(&at)?[0];
    let cpu = Device::cpu()?;
    assert_eq!(Chain::new([device, device])?.run(1.0)?, Chain::new([cpu, cpu])?.run(1.0)?);
    Ok(())
}
