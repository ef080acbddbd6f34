//! What speaks HTTP: OpenAI's endpoints, and some of this server's own.
//!
//! A request is taken apart and checked on threads that may be busy for a while, and becomes jobs of the
//! model's thread. What that answers is tokens; here they become text, and end where a stop is found. Who
//! asks and goes away drops the receiving end of the answer, and the job ends.

mod calls;
mod chat;
mod completions;
mod conversation;
mod embeddings;
mod failure;
mod fields;
mod guard;
mod insight;
mod metrics;
mod page;
mod reply;
mod routes;
mod sampling;
mod server;
mod state;
mod stops;
mod stream;
mod texts;
mod tokens;
mod wanted;

pub use server::{Server, Settings, Stopper, listen};

use std::sync::{Arc, OnceLock};

use axum::http::StatusCode;
use tokio::sync::{Semaphore, watch};

use self::failure::{Answer, Failure, lost};
use self::guard::{Count, Guard};
use self::metrics::Metrics;
use self::page::Page;
use self::server::Phase;
use super::Handle;
use crate::arch::Pooling;
use crate::error::{Result, excerpt};
use crate::model::Model;
use crate::session::grammar::Vocabulary;
use crate::token::template::Template;

/// What every request is answered with.
struct App {
    model: Arc<Model>,
    handle: Handle,
    /// The model's name, and others it goes by.
    id: String,
    names: Vec<String>,
    /// With its source.
    template: Option<(Template, String)>,
    /// Made when a grammar is asked for.
    vocabulary: OnceLock<Result<Vocabulary>>,
    pooling: Pooling,
    n_ctx: usize,
    n_slots: usize,
    max_body: usize,
    /// Requests that are taken apart at once.
    preparing: Arc<Semaphore>,
    metrics: Metrics,
    guard: Guard,
    /// Those that are being answered.
    requests: Count,
    phase: watch::Receiver<Phase>,
    page: Page,
    /// Seconds since 1970 when the server was started.
    created: u64,
}

impl App {
    /// Runs what may take long where it holds up nobody.
    async fn prepare<T: Send + 'static>(
        self: &Arc<App>,
        work: impl FnOnce(&Arc<App>) -> Answer<T> + Send + 'static,
    ) -> Answer<T> {
        let Ok(permit) = self.preparing.clone().acquire_owned().await else { return Err(lost()) };
        let app = self.clone();
        let work = move || {
            let result = work(&app);
            // The work goes on after whoever asked has gone away.
            drop(permit);
            result
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(_) => Err(Failure::new(StatusCode::INTERNAL_SERVER_ERROR, "the request failed")),
        }
    }

    fn vocabulary(&self) -> Result<&Vocabulary> {
        let n_vocab = self.model.hparams.n_vocab;
        let made = self.vocabulary.get_or_init(|| Vocabulary::new(&self.model.tokenizer, n_vocab));
        made.as_ref().map_err(Clone::clone)
    }

    /// Refuses a model that is not here.
    fn check_name(&self, name: &str) -> Answer<()> {
        if name == self.id || self.names.iter().any(|known| known == name) {
            return Ok(());
        }
        let text = format!("model \"{}\" is not here; this is \"{}\"", excerpt(name), self.id);
        Err(Failure::new(StatusCode::NOT_FOUND, text).about("model").code("model_not_found"))
    }

    /// The program and what a request attends with.
    fn fingerprint(&self, [norm, form, mask]: &[String; 3]) -> String {
        let (version, revision) = (env!("CARGO_PKG_VERSION"), env!("QKOV_REVISION"));
        format!("qkov-{version}-{revision} {norm} / {form} / {mask}")
    }
}
