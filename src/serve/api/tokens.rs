//! `POST /tokenize` and `/detokenize`, and `GET /tokenizer_info`: with llama-server's names of fields, or
//! with vLLM's, for which lm-evaluation-harness asks.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, StatusCode};
use serde_json::{Value, json};

use super::App;
use super::failure::{Answer, answer};
use super::fields::{Fields, tokens};
use super::reply::shown;

/// Answers with the tokens of a text.
pub(super) async fn tokenize(app: Arc<App>, mut fields: Fields) -> Answer<Response<Body>> {
    let list: Vec<Value> = app
        .prepare(move |app| {
            let content = match fields.text("prompt")? {
                Some(text) => text,
                None => fields.needed_text("content")?,
            };
            let add_special = match fields.flag("add_special_tokens")? {
                Some(flag) => flag,
                None => fields.flag("add_special")?.unwrap_or(false),
            };
            let parse_special = fields.flag("parse_special")?.unwrap_or(true);
            let with_pieces = fields.flag("with_pieces")?.unwrap_or(false);
            fields.end(&["model"])?;
            let tokenizer = &app.model.tokenizer;
            let ids = tokenizer.encode(&content, add_special, parse_special)?;
            let one = |id: u32| match with_pieces {
                true => json!({"id": id, "piece": shown(tokenizer, id)}),
                false => id.into(),
            };
            Ok(ids.into_iter().map(one).collect())
        })
        .await?;
    Ok(answer(StatusCode::OK, &json!({"count": list.len(), "tokens": list})))
}

/// Answers with the text of tokens.
pub(super) async fn detokenize(app: Arc<App>, mut fields: Fields) -> Answer<Response<Body>> {
    let text = app
        .prepare(move |app| {
            let name = "tokens";
            let list = fields.list(name)?.ok_or_else(|| fields.missing(name))?;
            fields.end(&["model"])?;
            let ids = tokens(name, &list, app.model.hparams.n_vocab)?;
            let pieces = ids.iter().map(|id| app.model.tokenizer.piece(*id, true));
            Ok(String::from_utf8_lossy(&pieces.collect::<Vec<_>>().concat()).into_owned())
        })
        .await?;
    Ok(answer(StatusCode::OK, &json!({"content": text, "prompt": text})))
}

/// Tokens with names, and the chat template.
pub(super) async fn info(State(app): State<Arc<App>>) -> Response<Body> {
    let tokenizer = &app.model.tokenizer;
    let text = |id: Option<u32>| id.map(|id| String::from_utf8_lossy(tokenizer.text(id)));
    let template = app.template.as_ref().map(|(_, source)| source);
    let info = json!({
        "bos_token": text(tokenizer.bos()),
        "eos_token": text(tokenizer.eos()),
        "pad_token": text(tokenizer.eos()),
        "add_bos_token": tokenizer.add_bos(),
        "chat_template": template,
    });
    answer(StatusCode::OK, &info)
}
