//! `POST /tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::body::Body;
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
            let content = fields.needed_text("content")?;
            let add_special = fields.flag("add_special")?.unwrap_or(false);
            let parse_special = fields.flag("parse_special")?.unwrap_or(true);
            let with_pieces = fields.flag("with_pieces")?.unwrap_or(false);
            fields.end(&[])?;
            let tokenizer = &app.model.tokenizer;
            let ids = tokenizer.encode(&content, add_special, parse_special)?;
            let one = |id: u32| match with_pieces {
                true => json!({"id": id, "piece": shown(tokenizer, id)}),
                false => id.into(),
            };
            Ok(ids.into_iter().map(one).collect())
        })
        .await?;
    Ok(answer(StatusCode::OK, &json!({"tokens": list})))
}

/// Answers with the text of tokens.
pub(super) async fn detokenize(app: Arc<App>, mut fields: Fields) -> Answer<Response<Body>> {
    let text = app
        .prepare(move |app| {
            let name = "tokens";
            let list = fields.list(name)?.ok_or_else(|| fields.missing(name))?;
            fields.end(&[])?;
            let ids = tokens(name, &list, app.model.hparams.n_vocab)?;
            let pieces = ids.iter().map(|id| app.model.tokenizer.piece(*id, true));
            Ok(String::from_utf8_lossy(&pieces.collect::<Vec<_>>().concat()).into_owned())
        })
        .await?;
    Ok(answer(StatusCode::OK, &json!({"content": text})))
}
