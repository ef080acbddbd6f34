//! `qkov serve`: OpenAI's interface over HTTP, and a page, for many clients at once.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::Run;
use super::memory::{check, memory};
use super::options::RunArgs;
use super::terminal::{note, read_text};
use crate::arch::Pooling;
use crate::bad_usage;
use crate::error::{Result, escaped};
use crate::model::Model;
use crate::serve::api::{Server, Settings, listen};
use crate::session::pool::Pool;

#[derive(Args)]
pub(super) struct Serve {
    #[command(flatten)]
    run: RunArgs,
    /// Address to listen on; others than 127.0.0.1 let other machines in
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0: any that is free
    #[arg(long, value_name = "N", default_value_t = 8080)]
    port: u16,
    /// Texts that are written at once; fewer if memory does not hold all their contexts [default: 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    parallel: Option<u16>,
    /// Requests that may wait; more are told to come again
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    queue: u16,
    /// Another name for the model [default: the file's name]
    #[arg(long, value_name = "NAME")]
    alias: Option<String>,
    /// File with the key that clients must know, alone on its line [default: QKOV_API_KEY, if set]
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Chat template file instead of the model's own
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// What a text's embedding is made of [default: what the file says, else `mean` where all tokens
    /// see each other, `last` elsewhere]
    #[arg(long, value_name = "POOLING")]
    embedding_pooling: Option<Pooling>,
    /// Largest body of a request, in MiB
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    max_body: u16,
    /// Time that running requests have after SIGTERM or Ctrl-C
    #[arg(long, value_name = "N", default_value_t = 10)]
    drain_seconds: u32,
}

/// Texts at once unless asked.
const N_SLOTS: usize = 16;
/// Where a key may be instead of a file.
const KEY: &str = "QKOV_API_KEY";

impl Run for Serve {
    const NAME: &'static str = "serve";
    const ENDS_ITSELF: bool = true;
    const ABOUT: &'static str =
        "Answer requests over HTTP, as OpenAI's servers do, and show a page";

    fn run(self) -> Result<()> {
        if self.embedding_pooling == Some(Pooling::None) {
            bad_usage!("--embedding-pooling none: a text has one vector; allowed mean, cls, last");
        }
        let key = self.key()?;
        let template = self.template.as_deref().map(|path| read_text(Some(path))).transpose()?;
        // Before the model is read: a port that is in use is known at once.
        let listener = listen(&self.host, self.port)?;
        let model = self.run.open_any()?;
        let options = self.run.pool_options()?;
        check(&model, &options)?;
        let pool = Pool::new(model.clone(), &options)?;
        pool.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
        let n_slots = self.n_slots(&pool)?;
        let (id, names) = self.names();
        let has_key = key.is_some();
        let settings = Settings {
            id,
            names,
            template,
            key,
            pooling: self.embedding_pooling,
            n_slots,
            n_queue: self.queue.into(),
            max_body: usize::from(self.max_body) << 20,
            drain_time: Duration::from_secs(self.drain_seconds.into()),
        };
        let server = Server::start(listener, pool, settings)?;
        server.stop_at_signals()?;
        let address = server.address();
        if !has_key && !address.ip().is_loopback() {
            note(&format!(
                "warning: everybody who reaches {address} can use this server; --api-key-file asks for a key"
            ));
        }
        self.tell(&model, n_slots, address.port());
        server.run()
    }
}

impl Serve {
    /// The key that clients must know.
    fn key(&self) -> Result<Option<String>> {
        let (text, place) = match &self.api_key_file {
            Some(path) => (read_text(Some(path))?, path.to_string_lossy().into_owned()),
            None => match std::env::var(KEY) {
                Ok(text) => (text, KEY.to_string()),
                Err(std::env::VarError::NotPresent) => return Ok(None),
                Err(e) => bad_usage!("{KEY}: {e}"),
            },
        };
        let key = text.trim();
        let is_plain = |c: char| c.is_ascii_graphic();
        if key.is_empty() || !key.chars().all(is_plain) {
            bad_usage!(
                "{}: the key must be one word of letters, digits and signs of ASCII",
                escaped(&place)
            );
        }
        Ok(Some(key.into()))
    }

    /// The model's name, and others it goes by.
    fn names(&self) -> (String, Vec<String>) {
        let file = self.run.model.short_name();
        let file = file.split(" (").next().unwrap_or_default().to_string();
        let stem = file.strip_suffix(".gguf").unwrap_or(&file).to_string();
        match &self.alias {
            Some(alias) => (alias.clone(), vec![stem, file]),
            None => (stem, vec![file]),
        }
    }

    /// Texts at once whose contexts memory holds.
    fn n_slots(&self, pool: &Pool) -> Result<usize> {
        let wanted = self.parallel.map_or(N_SLOTS, usize::from);
        let variant = pool.first().clone();
        let bytes = pool.sequence(variant)?.max_cache_bytes().max(1);
        let Ok((_, available)) = memory() else { return Ok(wanted) };
        let available = usize::try_from(available).unwrap_or(usize::MAX);
        let n = wanted.min(available / bytes).max(1);
        if n < wanted {
            let mib = |bytes: usize| bytes >> 20;
            note(&format!(
                "note: {n} instead of {wanted} texts at once: a context of {} tokens takes {} MiB, {} MiB are free; --ctx makes it shorter",
                pool.n_ctx(),
                mib(bytes),
                mib(available)
            ));
        }
        Ok(n)
    }

    /// Says that it is ready, in one line.
    fn tell(&self, model: &Arc<Model>, n_slots: usize, port: u16) {
        let host = match self.host.parse() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            _ => self.host.clone(),
        };
        let (id, _) = self.names();
        note(&format!(
            "{} ({}) is at http://{}:{port}, {n_slots} texts at once",
            escaped(&id),
            model.kind(),
            escaped(&host)
        ));
    }
}
