//! What the server is and does: `GET /health`, `/v1/models`, `/qkov/model` and `/qkov/status`.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::http::{Response, StatusCode};
use serde_json::{Value, json};

use super::failure::{Answer, answer};
use super::{App, metrics, sampling};
use crate::mask::MASKS;
use crate::merge::FORMS;
use crate::normalizer::{self, COMMON};
use crate::param::Param;
use crate::serve::SlotStatus;

/// Whether it answers.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response<Body> {
    match app.handle.is_stopping() {
        true => answer(StatusCode::SERVICE_UNAVAILABLE, &json!({"status": "stopping"})),
        false => answer(StatusCode::OK, &json!({"status": "ok"})),
    }
}

/// What is counted.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response<Body> {
    let mut response = Response::new(Body::from(metrics::text(&app)));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// The one model that is here.
pub(super) async fn models(State(app): State<Arc<App>>) -> Response<Body> {
    answer(StatusCode::OK, &json!({"object": "list", "data": [entry(&app)]}))
}

/// The model of this name.
pub(super) async fn named(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Answer<Response<Body>> {
    app.check_name(&name)?;
    Ok(answer(StatusCode::OK, &entry(&app)))
}

fn entry(app: &App) -> Value {
    json!({"id": app.id, "object": "model", "created": app.created, "owned_by": "qkov"})
}

/// What can be asked of the model.
pub(super) async fn model(State(app): State<Arc<App>>) -> Response<Body> {
    let model = &app.model;
    let [norm, form, mask] = model.plan.names();
    let layers = &model.hparams.layers;
    let params = |params: &mut dyn Iterator<Item = &Param>| -> Vec<Value> {
        let one = |param: &Param| {
            let default = param.domain.show(param.default);
            let default = default.parse::<f64>().map_or(json!(default), |number| json!(number));
            json!({"name": param.name, "default": default, "about": param.what,
                   "allowed": param.domain.to_string()})
        };
        params.map(one).collect()
    };
    let entry = |name: &str, about: &str, parameters: Vec<Value>| json!({"name": name, "about": about, "parameters": parameters});
    let norms = normalizer::kinds().into_iter().map(|kind| {
        let parameters = params(&mut kind.params.iter().chain(COMMON));
        entry(kind.name, kind.formula, parameters)
    });
    let forms = FORMS.iter().map(|f| entry(f.name(), f.what(), params(&mut f.params().iter())));
    let masks = MASKS.iter().map(|m| entry(m.name, m.what, params(&mut m.params.iter())));
    let body = json!({
        "id": app.id,
        "kind": model.kind(),
        "n_params": model.n_params(),
        "n_ctx": app.n_ctx,
        "n_vocab": model.hparams.n_vocab,
        "n_layers": layers.len(),
        "n_heads": layers.iter().map(|layer| layer.n_head).max().unwrap_or(0),
        "n_slots": app.n_slots,
        "chat": app.template.is_some(),
        "plan": {"norm": norm, "form": form, "mask": mask},
        "norms": norms.collect::<Vec<_>>(),
        "forms": forms.collect::<Vec<_>>(),
        "masks": masks.collect::<Vec<_>>(),
        "sampling": sampling::defaults(),
    });
    answer(StatusCode::OK, &body)
}

/// What it does now.
pub(super) async fn status(State(app): State<Arc<App>>) -> Response<Body> {
    let status = app.handle.status();
    let slot = |slot: &SlotStatus| {
        let [norm, form, mask] = &slot.names;
        json!({"busy": slot.is_busy, "n_tokens": slot.n_tokens,
               "norm": norm, "form": form, "mask": mask})
    };
    let body = json!({
        "slots": status.slots.iter().map(slot).collect::<Vec<_>>(),
        "queued": status.n_queued,
        "n_ctx": app.n_ctx,
        "cache_bytes": status.cache_bytes,
        "tokens_per_second": status.tokens_per_second,
        "model_file": app.model.fate().name(),
    });
    answer(StatusCode::OK, &body)
}
