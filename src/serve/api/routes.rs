//! Which path is answered by what.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, get, post};

use super::failure::{Answer, Failure};
use super::fields::{self, Fields};
use super::{App, chat, completions, embeddings, guard, insight, page, state, tokens};
use crate::error::excerpt;

/// All paths.
pub(super) fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/health", get(state::health))
        .route("/metrics", get(state::metrics))
        .route("/v1/models", get(state::models))
        .route("/v1/models/{*name}", get(state::named))
        .route("/v1/chat/completions", with_body(chat::run))
        .route("/v1/completions", with_body(completions::run))
        .route("/v1/embeddings", with_body(embeddings::run))
        .route("/tokenize", with_body(tokens::tokenize))
        .route("/tokenizer_info", get(tokens::info))
        .route("/detokenize", with_body(tokens::detokenize))
        .route("/qkov/model", get(state::model))
        .route("/qkov/status", get(state::status))
        .route("/qkov/compare", with_body(insight::compare))
        .route("/qkov/attention", with_body(insight::attention))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), guard::pass))
        .with_state(app)
}

/// What takes JSON.
fn with_body<R, F>(run: R) -> MethodRouter<Arc<App>>
where
    R: Fn(Arc<App>, Fields) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer<Response<Body>>> + Send,
{
    post(async move |State(app): State<Arc<App>>, request: Request| -> Answer<Response<Body>> {
        let fields = fields::read(request, app.max_body).await?;
        run(app, fields).await
    })
}

async fn unknown(request: Request) -> Failure {
    let path = excerpt(request.uri().path());
    Failure::new(StatusCode::NOT_FOUND, format!("{path}: unknown path")).code("unknown_path")
}

async fn wrong_method(request: Request) -> Failure {
    let (method, path) = (excerpt(request.method().as_str()), excerpt(request.uri().path()));
    Failure::new(StatusCode::METHOD_NOT_ALLOWED, format!("{path}: not with the method {method}"))
}
