//! The server: connections, and how it ends.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;

use super::App;
use super::guard::{Count, Guard};
use super::metrics::Metrics;
use super::page::Page;
use super::reply::now;
use super::routes::routes;
use crate::arch::Pooling;
use crate::error::{Error, Result};
use crate::serve::start;
use crate::session::pool::Pool;
use crate::token::template::{self, Template};

/// Threads that speak with clients; the model has threads of its own.
const N_THREADS: usize = 2;
/// Requests that are taken apart at once.
const N_PREPARED: usize = 2;
/// How long the threads for that wait for more of them.
const KEEP_TIME: Duration = Duration::from_secs(24 * 60 * 60);
/// Time that the head of a request may take, or a connection may say nothing between two.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// Time that a client may take none of what it is sent.
const WRITE_TIME: Duration = Duration::from_secs(60);
/// Largest head of a request, in bytes.
const MAX_HEAD: usize = 64 << 10;
/// Pause after a connection could not be taken, for example because there are too many.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often it is looked whether a template runs on.
const WATCH_TIME: Duration = Duration::from_secs(1);
/// Time for last words when the server ends.
const LAST_TIME: Duration = Duration::from_millis(500);
/// Time that the model may then take to end the step it is in; after it nobody waits for the model.
const STEP_TIME: Duration = Duration::from_secs(5);

/// How a server is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The model's name.
    pub id: String,
    /// Other names it goes by.
    pub names: Vec<String>,
    /// Source of a chat template instead of the model's own.
    pub template: Option<String>,
    /// What clients must know.
    pub key: Option<String>,
    /// How embeddings are made; `None`: as the model was trained to.
    pub pooling: Option<Pooling>,
    /// Texts that are written at once.
    pub n_slots: usize,
    /// Jobs that may wait.
    pub n_queue: usize,
    /// Largest body of a request, in bytes.
    pub max_body: usize,
    /// Time that running requests have when the server ends.
    pub drain_time: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            id: "default".into(),
            names: Vec::new(),
            template: None,
            key: None,
            pooling: None,
            n_slots: 16,
            n_queue: 64,
            max_body: 8 << 20,
            drain_time: Duration::from_secs(10),
        }
    }
}

/// How far the server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Open,
    /// Nothing new is begun.
    Draining,
    /// What still runs is ended.
    Over,
}

/// A server that listens.
pub struct Server {
    runtime: Runtime,
    listener: TcpListener,
    address: SocketAddr,
    app: Arc<App>,
    connections: Count,
    phase: watch::Sender<Phase>,
    thread: JoinHandle<()>,
    drain_time: Duration,
}

/// Tells a server to end.
#[derive(Clone)]
pub struct Stopper(watch::Sender<Phase>);

impl Stopper {
    /// Has nothing new begun; the server ends with what runs, or when the time for that is over.
    pub fn stop(&self) {
        self.0.send_if_modified(|phase| {
            let open = *phase == Phase::Open;
            if open {
                *phase = Phase::Draining;
            }
            open
        });
    }
}

/// Takes a port; 0: any that is free.
pub fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let failed = |e: std::io::Error| {
        let remedy = match e.kind() {
            std::io::ErrorKind::AddrInUse => "; --port takes another one, or 0 for any",
            _ => "",
        };
        Error::Runtime(format!("cannot listen on {host} port {port}: {e}{remedy}"))
    };
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs().map_err(failed)?.collect();
    let listener = TcpListener::bind(&addresses[..]).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

impl Server {
    /// Starts the model's thread. Connections wait until [`Server::run`].
    pub fn start(listener: TcpListener, pool: Pool, settings: Settings) -> Result<Server> {
        let failed = |e: std::io::Error| Error::Runtime(format!("cannot start the server: {e}"));
        let address = listener.local_addr().map_err(failed)?;
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(N_THREADS).thread_name("qkov-http").enable_all();
        // Threads that come and go leave memory behind.
        builder.max_blocking_threads(N_PREPARED).thread_keep_alive(KEEP_TIME);
        let runtime = builder.build().map_err(failed)?;
        let model = pool.model().clone();
        let own = model.gguf.str("tokenizer.chat_template")?;
        let template = match settings.template.as_deref().or(own) {
            Some(source) => Some((Template::new(source)?, source.to_string())),
            None => None,
        };
        let (phase, receiver) = watch::channel(Phase::Open);
        let n_ctx = pool.n_ctx();
        let pooling = settings.pooling.unwrap_or(match model.hparams.pooling() {
            Pooling::None => Pooling::Mean,
            pooling => pooling,
        });
        let page = Page::new()?;
        let (handle, thread) = start(pool, settings.n_slots, settings.n_queue)?;
        let app = App {
            model,
            handle,
            id: settings.id,
            names: settings.names,
            template,
            vocabulary: OnceLock::new(),
            pooling,
            n_ctx,
            n_slots: settings.n_slots,
            max_body: settings.max_body,
            preparing: Arc::new(Semaphore::new(N_PREPARED)),
            metrics: Metrics::default(),
            guard: Guard::new(address.ip().is_loopback(), settings.key.as_deref()),
            requests: Count::default(),
            phase: receiver,
            page,
            created: now(),
        };
        Ok(Server {
            runtime,
            listener,
            address,
            app: Arc::new(app),
            connections: Count::default(),
            phase,
            thread,
            drain_time: settings.drain_time,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What answers requests, for those who have other connections than those of [`Server::run`].
    pub fn router(&self) -> Router {
        routes(self.app.clone())
    }

    /// What ends it.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.phase.clone())
    }

    /// Ends it at SIGINT or SIGTERM; at the second of them the process ends at once.
    #[cfg(unix)]
    pub fn stop_at_signals(&self) -> Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let failed = |e| Error::Runtime(format!("cannot watch for signals: {e}"));
        let _inside = self.runtime.enter();
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let stopper = self.stopper();
        self.runtime.spawn(async move {
            for is_first in [true, false] {
                let kind = tokio::select! {
                    _ = interrupt.recv() => SignalKind::interrupt(),
                    _ = terminate.recv() => SignalKind::terminate(),
                };
                if is_first {
                    stopper.stop();
                } else {
                    // As shells have it.
                    std::process::exit(128 + kind.as_raw_value());
                }
            }
        });
        Ok(())
    }

    /// Ends it at Ctrl-C; at the second one the process ends at once.
    #[cfg(not(unix))]
    pub fn stop_at_signals(&self) -> Result<()> {
        let stopper = self.stopper();
        self.runtime.spawn(async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                stopper.stop();
                let _ = tokio::signal::ctrl_c().await.is_ok();
                std::process::exit(130);
            }
        });
        Ok(())
    }

    /// Serves until it is told to end and what runs has ended.
    pub fn run(self) -> Result<()> {
        let Server { runtime, listener, app, connections, phase, thread, drain_time, .. } = self;
        let result = runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener);
            let listener = listener.map_err(|e| Error::Runtime(format!("cannot listen: {e}")))?;
            let accepting = accept(listener, routes(app.clone()), app.clone(), connections.clone());
            let accepting = tokio::spawn(accepting);
            let mut receiver = phase.subscribe();
            let runs_on = tokio::select! {
                _ = receiver.wait_for(|phase| *phase != Phase::Open) => false,
                () = template_runs_on() => true,
            };
            app.handle.stop();
            if runs_on {
                let text =
                    "the chat template runs on after its time, which only the server's end ends";
                return Err(Error::File(text.into()));
            }
            // New requests are still told that it is too late for them.
            let _ = timeout(drain_time, app.requests.none()).await;
            phase.send_replace(Phase::Over);
            let _ = timeout(2 * LAST_TIME, app.requests.none()).await;
            accepting.abort();
            let _ = timeout(LAST_TIME, connections.none()).await;
            Ok(())
        });
        // What still waits for the model does not any more, and its thread ends.
        runtime.shutdown_timeout(LAST_TIME);
        app.handle.stop();
        let start = Instant::now();
        while !thread.is_finished() && start.elapsed() < STEP_TIME {
            std::thread::sleep(Duration::from_millis(5));
        }
        if thread.is_finished() && thread.join().is_err() {
            return Err(Error::Runtime("the model's thread failed".into()));
        }
        result
    }
}

/// Waits until a template has not ended in its time.
async fn template_runs_on() {
    while !template::runs_on() {
        sleep(WATCH_TIME).await;
    }
}

/// Takes connections.
async fn accept(
    listener: tokio::net::TcpListener,
    routes: Router,
    app: Arc<App>,
    connections: Count,
) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (routes, phase) = (routes.clone(), app.phase.clone());
                let counted = connections.begin();
                tokio::spawn(async move {
                    speak(stream, routes, phase).await;
                    drop(counted);
                });
            }
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Answers what comes over a connection.
async fn speak(stream: TcpStream, routes: Router, mut phase: watch::Receiver<Phase>) {
    // Tokens are sent as they come.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIME));
    let is_open = *phase.borrow() == Phase::Open;
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(MAX_HEAD)
        .keep_alive(is_open)
        .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(routes));
    let mut connection = std::pin::pin!(connection);
    // Clients go away as they like, which is no error of anybody.
    if is_open {
        tokio::select! {
            _ = connection.as_mut() => return,
            _ = phase.wait_for(|phase| *phase != Phase::Open) => {}
        }
        connection.as_mut().graceful_shutdown();
    }
    let _ = connection.await;
}
