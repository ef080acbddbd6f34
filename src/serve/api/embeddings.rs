//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Response, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use super::App;
use super::failure::{Answer, Failure, answer, lost};
use super::fields::{Fields, tokens, wrong};
use super::wanted::{ask, check_model, check_prompt};
use crate::error::excerpt;
use crate::serve::job::Job;
use crate::session::embed::normalize;
use crate::session::pool::Ask;

/// Most texts of a request, as OpenAI has it.
const MAX_TEXTS: usize = 2048;

/// A request, checked.
struct Ready {
    texts: Vec<Vec<u32>>,
    ask: Ask,
    as_base64: bool,
}

#[derive(Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

/// Answers a request.
pub(super) async fn run(app: Arc<App>, fields: Fields) -> Answer<Response<Body>> {
    let Ready { texts, ask, as_base64 } = app.prepare(move |app| Ready::new(fields, app)).await?;
    let n_texts = texts.len();
    let n_tokens: usize = texts.iter().map(Vec::len).sum();
    let (sender, mut vectors) = unbounded_channel();
    app.handle.submit(Job::Embed { texts, ask, pooling: app.pooling, answer: sender })?;
    let mut data = Vec::new();
    while data.len() < n_texts {
        let mut vector = vectors.recv().await.ok_or_else(lost)??;
        normalize(&mut vector);
        let embedding = match as_base64 {
            true => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                Vector::Base64(STANDARD.encode(bytes))
            }
            false => Vector::Numbers(vector),
        };
        data.push(Item { object: "embedding", index: data.len(), embedding });
    }
    let usage = json!({"prompt_tokens": n_tokens, "total_tokens": n_tokens});
    let body = json!({"object": "list", "data": data, "model": app.id, "usage": usage});
    Ok(answer(StatusCode::OK, &body))
}

impl Ready {
    fn new(mut fields: Fields, app: &Arc<App>) -> Answer<Ready> {
        check_model(&mut fields, app)?;
        let (ask, _) = ask(&mut fields, "qkov", app)?;
        let texts = texts(&mut fields, app)?;
        let as_base64 = match fields.text("encoding_format")?.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(other) => {
                let name = "encoding_format";
                let text = format!("{name} = \"{}\"; allowed float, base64", excerpt(other));
                return Err(Failure::field(name, text));
            }
        };
        let n_embd = app.model.hparams.n_embd;
        if let Some(n) = fields.whole("dimensions", 0..=usize::MAX)?.filter(|n| *n != n_embd) {
            let text = format!("dimensions = {n}; this model has {n_embd}");
            return Err(Failure::field("dimensions", text));
        }
        fields.end(&["user"])?;
        Ok(Ready { texts, ask, as_base64 })
    }
}

/// A text, tokens, or an array of either.
fn texts(fields: &mut Fields, app: &App) -> Answer<Vec<Vec<u32>>> {
    let name = "input";
    let needed = "a string, an array of strings, of tokens, or of arrays of tokens";
    let list = match fields.take(name) {
        Some(text @ Value::String(_)) => vec![text],
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_number) => {
            vec![Value::Array(list)]
        }
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(name, &other, needed)),
        None => return Err(fields.missing(name)),
    };
    if list.is_empty() || list.len() > MAX_TEXTS {
        let text = format!("{name}: an array of {}; allowed 1 to {MAX_TEXTS}", list.len());
        return Err(Failure::field(name, text));
    }
    let one = |(i, value)| {
        let name = format!("{name}[{i}]");
        let ids = match value {
            Value::String(text) => app.model.tokenizer.encode(&text, true, false)?,
            Value::Array(ids) => tokens(&name, &ids, app.model.hparams.n_vocab)?,
            other => return Err(wrong(&name, &other, "a string or an array of tokens")),
        };
        if ids.is_empty() {
            let text = format!("{name} has no tokens; an embedding needs 1 or more");
            return Err(Failure::field(name, text));
        }
        check_prompt(app, ids.len()).map_err(|e| e.about(name))?;
        Ok(ids)
    };
    list.into_iter().enumerate().map(one).collect()
}
