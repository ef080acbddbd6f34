//! The server under load, by the model that ships: streams at once, clients that go away, and what memory
//! is left after many requests. `cargo bench --bench serve`, or `-- streams`, `-- gone`, `-- memory`.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Tokens of a stream.
const N_TOKENS: usize = 400;
/// Times that each number of streams is measured, in turns.
const ROUNDS: usize = 5;
/// Numbers of streams.
const STREAMS: [usize; 4] = [1, 4, 8, 16];
/// Clients that go away.
const N_GONE: usize = 200;
/// Requests after which memory is looked at.
const N_REQUESTS: usize = 10_000;

/// A server that ends with the bench.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start() -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_qkov"))
            .args(["serve", "--port", "0"])
            .args(std::env::var("QKOV_SERVE").unwrap_or_default().split_whitespace())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().unwrap().unwrap();
            if let Some((_, rest)) = line.split_once("http://") {
                break rest.split([',', '/']).next().unwrap().to_string();
            }
        };
        std::thread::spawn(move || lines.for_each(drop));
        Server { child, address }
    }

    /// Sends a request for a text, and returns what is answered.
    fn ask(&self, stream: bool, prompt: &str, n: usize) -> BufReader<TcpStream> {
        let body = format!(
            "{{\"prompt\":\"{prompt}\",\"max_tokens\":{n},\"temperature\":0,\"ignore_eos\":true,\"stream\":{stream}}}"
        );
        self.send(&format!(
            "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        ))
    }

    fn send(&self, request: &str) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        BufReader::new(stream)
    }

    fn status(&self) -> String {
        let request = format!(
            "GET /qkov/status HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            self.address
        );
        let mut text = String::new();
        self.send(&request).read_to_string(&mut text).unwrap();
        text
    }

    fn n_busy(&self) -> usize {
        self.status().matches("\"busy\":true").count()
    }

    /// Memory that is its own, in KiB.
    fn memory(&self) -> usize {
        let path = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find(|l| l.starts_with("Rss:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// When each token of a stream came.
fn arrivals(answer: BufReader<TcpStream>) -> Vec<Instant> {
    let mut all = Vec::new();
    for line in answer.lines() {
        let line = line.unwrap();
        if line.starts_with("data: {") && line.contains("\"text\":\"") {
            all.push(Instant::now());
        }
    }
    all
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

fn streams(server: &Server) {
    println!("streams  tokens/s  of one  first token ms  p50 ms  p99 ms between tokens");
    let mut all: Vec<(Vec<f64>, Vec<f64>, Vec<f64>)> = vec![Default::default(); STREAMS.len()];
    for round in 0..ROUNDS {
        for (n, (rates, firsts, gaps)) in STREAMS.iter().zip(&mut all) {
            let start = Instant::now();
            let times: Vec<Vec<Instant>> = std::thread::scope(|scope| {
                let ask =
                    |i| server.ask(true, &format!("{round} {i} The sea was calm and"), N_TOKENS);
                let one = |i| scope.spawn(move || arrivals(ask(i)));
                let threads: Vec<_> = (0..*n).map(one).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let seconds = start.elapsed().as_secs_f64();
            let total: usize = times.iter().map(Vec::len).sum();
            // Tokens that are only part of a character come with the next.
            assert!(total > n * N_TOKENS * 9 / 10, "{total} tokens of {n} streams");
            rates.push((n * N_TOKENS) as f64 / seconds);
            let ms = |a: Instant, b: Instant| (b - a).as_secs_f64() * 1e3;
            firsts.extend(times.iter().map(|t| ms(start, t[0])));
            gaps.extend(times.iter().flat_map(|t| t.windows(2).map(|w| ms(w[0], w[1]))));
        }
    }
    let median = |x: &mut Vec<f64>| {
        x.sort_by(f64::total_cmp);
        percentile(x, 0.5)
    };
    let one = median(&mut all[0].0);
    for (n, (rates, firsts, gaps)) in STREAMS.iter().zip(&mut all) {
        let (rate, first) = (median(rates), median(firsts));
        gaps.sort_by(f64::total_cmp);
        println!(
            "{n:7}  {rate:8.0}  {:6.2}  {first:14.1}  {:6.2}  {:6.2}    ({:.0} to {:.0} tokens/s)",
            rate / one,
            percentile(gaps, 0.5),
            percentile(gaps, 0.99),
            rates[0],
            rates[rates.len() - 1],
        );
    }
}

fn gone(server: &Server) {
    let mut waits = Vec::new();
    for batch in 0..N_GONE / 10 {
        let answers: Vec<_> = (0..10)
            .map(|i| server.ask(true, &format!("{batch} {i} Once upon a time"), 900))
            .collect();
        // Some are being written, some are being read.
        std::thread::sleep(Duration::from_millis(batch as u64 * 7 % 60));
        drop(answers);
        let start = Instant::now();
        while server.n_busy() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        waits.push(start.elapsed().as_secs_f64() * 1e3);
    }
    waits.sort_by(f64::total_cmp);
    println!(
        "{N_GONE} clients gone, 10 at a time: all slots free after {:.1} ms (median), {:.1} ms (most)",
        percentile(&waits, 0.5),
        percentile(&waits, 1.0)
    );
}

fn memory(server: &Server) {
    let ask = |from: usize, n: usize| {
        std::thread::scope(|scope| {
            for client in 0..8 {
                scope.spawn(move || {
                    for i in (from + client..from + n).step_by(8) {
                        let prompt =
                            format!("{} and then {}", i * 7919 % 1000, "the sea ".repeat(i % 60));
                        let mut answer = String::new();
                        server
                            .ask(i % 2 == 0, &prompt, 1 + i % 9)
                            .read_to_string(&mut answer)
                            .unwrap();
                        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
                    }
                });
            }
        });
    };
    // Every slot has had a long text, and everything its buffers.
    std::thread::scope(|scope| {
        for i in 0..16 {
            let prompt = format!("{i} {}", "the sea ".repeat(300));
            scope.spawn(move || arrivals(server.ask(true, &prompt, 300)));
        }
    });
    ask(0, 4000);
    let start = Instant::now();
    let mut sizes = vec![server.memory()];
    for part in 0..5 {
        ask(4000 + part * N_REQUESTS / 5, N_REQUESTS / 5);
        sizes.push(server.memory());
    }
    let (before, after) = (sizes[0], sizes[sizes.len() - 1]);
    println!(
        "{N_REQUESTS} requests in {:.0} s: {sizes:?} KiB, {:+.2} %",
        start.elapsed().as_secs_f64(),
        (after as f64 / before as f64 - 1.0) * 100.0
    );
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    type Part = fn(&Server);
    let parts: [(&str, Part); 3] = [("streams", streams), ("gone", gone), ("memory", memory)];
    for (name, part) in parts {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            part(&Server::start());
        }
    }
}
