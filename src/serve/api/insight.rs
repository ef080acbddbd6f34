//! `POST /qkov/compare` and `/qkov/attention`: what two variants make of a reply, and what a head does.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Response, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use super::App;
use super::completions::encode;
use super::conversation::Conversation;
use super::failure::{Answer, Failure, answer, lost};
use super::fields::Fields;
use super::reply::{ln, shown};
use super::wanted::{ask, ask_of, check_model, check_prompt};
use crate::serve::job::{Comparison, Job, Look, Map, Scored};

/// Likeliest tokens of each variant that are told.
const N_TOP: usize = 5;
/// Most tokens that a head is looked at for.
const MAX_LOOK: usize = 1024;
/// What the largest weight becomes in a byte with a sign.
const MAX_BYTE: f32 = 127.0;

/// The prompt of a request, and the tokens of the reply to it.
fn texts(fields: &mut Fields, app: &App) -> Answer<(Vec<u32>, Vec<u32>)> {
    app.model.hparams.must_predict()?;
    check_model(fields, app)?;
    let prompt = match (fields.list("messages")?, fields.text("prompt")?) {
        (Some(list), None) => Conversation::read(list)?.tokens(app)?,
        (None, Some(text)) => encode(&text, app)?,
        _ => return Err(Failure::field("prompt", "messages or prompt: one of them is needed")),
    };
    let reply = fields.needed_text("reply")?;
    let reply = app.model.tokenizer.encode(&reply, false, false)?;
    check_prompt(app, prompt.len() + reply.len())?;
    Ok((prompt, reply))
}

/// Answers with what two variants make of a reply.
pub(super) async fn compare(app: Arc<App>, fields: Fields) -> Answer<Response<Body>> {
    let comparison = app.prepare(move |app| comparison(fields, app)).await?;
    let n = comparison.reply.len();
    let (sender, mut answers) = unbounded_channel();
    app.handle.submit(Job::Compare(comparison, sender))?;
    let tokenizer = &app.model.tokenizer;
    let mut tokens = Vec::new();
    let (mut kl, mut sums) = (0.0, [0.0; 2]);
    while tokens.len() < n {
        let Scored { id, kl: own, logprobs } = answers.recv().await.ok_or_else(lost)??;
        kl += own;
        for (sum, logprobs) in sums.iter_mut().zip(&logprobs) {
            *sum += f64::from(logprobs.own);
        }
        let top = logprobs.each_ref().map(|logprobs| {
            let one =
                |(id, x): &(u32, f32)| json!({"text": shown(tokenizer, *id), "logprob": ln(*x)});
            logprobs.top.iter().map(one).collect::<Value>()
        });
        tokens.push(json!({
            "id": id,
            "text": shown(tokenizer, id),
            "kl": own,
            "logprobs": logprobs.each_ref().map(|logprobs| ln(logprobs.own)),
            "top": top,
        }));
    }
    let perplexity = sums.map(|sum| (-sum / n as f64).exp());
    let body = json!({"tokens": tokens, "mean_kl": kl / n as f64, "perplexity": perplexity});
    Ok(answer(StatusCode::OK, &body))
}

fn comparison(mut fields: Fields, app: &Arc<App>) -> Answer<Comparison> {
    let (prompt, reply) = texts(&mut fields, app)?;
    let name = "variants";
    let variants = fields.list(name)?.ok_or_else(|| fields.missing(name))?;
    fields.end(&[])?;
    let Ok([first, second]) = <[Value; 2]>::try_from(variants) else {
        return Err(Failure::field(name, format!("{name}: an array of 2 is needed")));
    };
    if reply.is_empty() {
        return Err(Failure::field("reply", "the reply has no tokens; 1 or more are needed"));
    }
    let (first, _) = ask_of("variants[0]", first, app)?;
    let (second, _) = ask_of("variants[1]", second, app)?;
    Ok(Comparison { prompt, reply, asks: [first, second], n_top: N_TOP })
}

/// Answers with what a head does.
pub(super) async fn attention(app: Arc<App>, fields: Fields) -> Answer<Response<Body>> {
    let look = app.prepare(move |app| look(fields, app)).await?;
    let Look { n_prompt, layer, head, .. } = look;
    let tokenizer = &app.model.tokenizer;
    let pieces: Vec<_> = look.tokens.iter().map(|id| shown(tokenizer, *id).into_owned()).collect();
    let (sender, mut answers) = unbounded_channel();
    app.handle.submit(Job::Look(look, sender))?;
    let Map { weights, entropy, first } = answers.recv().await.ok_or_else(lost)??;
    if weights.len() != pieces.len() * pieces.len() {
        let text = "qkov: this mask has prompts read more than once; a map shows each token once";
        return Err(Failure::field("qkov.mask", text));
    }
    let max = weights.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let scale = if max > 0.0 { MAX_BYTE / max } else { 0.0 };
    // Two's complement: normalizers may give negative weights.
    let bytes: Vec<u8> = weights.iter().map(|x| (x * scale).round() as i8 as u8).collect();
    let body = json!({
        "tokens": pieces,
        "n_prompt": n_prompt,
        "n_layers": app.model.hparams.layers.len(),
        "n_heads": app.model.hparams.layers[layer].n_head,
        "layer": layer,
        "head": head,
        "max": max,
        "weights": STANDARD.encode(bytes),
        "entropy": entropy,
        "first": first,
    });
    Ok(answer(StatusCode::OK, &body))
}

fn look(mut fields: Fields, app: &Arc<App>) -> Answer<Look> {
    let (ask, _) = ask(&mut fields, "qkov", app)?;
    let (mut tokens, reply) = texts(&mut fields, app)?;
    let n_prompt = tokens.len();
    tokens.extend(reply);
    if tokens.len() > MAX_LOOK {
        let text = format!("the texts have {} tokens; allowed {MAX_LOOK}", tokens.len());
        return Err(Failure::invalid(text));
    }
    let layers = &app.model.hparams.layers;
    let layer = fields.whole("layer", 0..=layers.len() - 1)?.unwrap_or(0);
    let head = fields.whole("head", 0..=layers[layer].n_head - 1)?.unwrap_or(0);
    fields.end(&[])?;
    Ok(Look { tokens, n_prompt, ask, layer, head })
}
