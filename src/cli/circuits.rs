//! `qkov inspect --heads`: what is inside the heads.

use std::sync::Mutex;

use serde_json::{Value, json};

use crate::cpu::{Observer, SeenHead, SeenRows};
use crate::error::{Result, escaped};
use crate::measure::circuits::{Circuit, Match, Product, Side, circuits, matches};
use crate::model::Model;
use crate::session::Session;

/// Shares of a head's width at which energies are given.
const SHARES: [f64; 4] = [0.125, 0.25, 0.5, 0.75];
/// Most tokens of a text whose patterns and messages are read.
pub(super) const MAX_TEXT: usize = 64;
/// Directions whose tokens are shown, and tokens of each.
const DIRECTIONS: usize = 2;

/// Which heads, and how much of them.
pub(super) struct Selection {
    pub(super) layers: std::ops::Range<usize>,
    /// Of each of the layers.
    pub(super) heads: std::ops::Range<usize>,
    /// Tokens for a direction.
    pub(super) n_tokens: usize,
    /// Whether directions are shown as tokens, which reads the whole vocabulary.
    pub(super) details: bool,
}

/// A head with its directions as tokens.
pub(super) struct Shown {
    circuit: Circuit,
    /// For each direction what queries and keys look for, what is read and what is written.
    directions: Vec<[Vec<Match>; 4]>,
}

/// The heads that were asked for.
pub(super) fn select(model: &Model, selection: &Selection) -> Result<Vec<Shown>> {
    let all = circuits(model, selection.layers.clone())?;
    let chosen: Vec<Circuit> =
        all.into_iter().filter(|c| selection.heads.contains(&c.head)).collect();
    if !selection.details {
        let shown = chosen.into_iter().map(|circuit| Shown { circuit, directions: Vec::new() });
        return Ok(shown.collect());
    }
    let column = |m: &faer::Mat<f64>, c: usize| m.col(c).iter().copied().collect::<Vec<f64>>();
    let each = |of: fn(&Circuit) -> &faer::Mat<f64>, side: Side| {
        let directions: Vec<Vec<f64>> = chosen
            .iter()
            .flat_map(|c| (0..DIRECTIONS.min(of(c).ncols())).map(move |d| column(of(c), d)))
            .collect();
        matches(model, side, &directions, selection.n_tokens, false)
    };
    let mut parts = [
        each(|c| &c.qk.left, Side::Embedding),
        each(|c| &c.qk.right, Side::Embedding),
        each(|c| &c.ov.left, Side::Embedding),
        each(|c| &c.ov.right, Side::Output),
    ]
    .map(Vec::into_iter);
    let mut shown = Vec::new();
    for circuit in chosen {
        let n = DIRECTIONS.min(circuit.qk.left.ncols()).min(circuit.ov.left.ncols());
        let directions =
            (0..n).map(|_| parts.each_mut().map(|part| part.next().unwrap_or_default())).collect();
        shown.push(Shown { circuit, directions });
    }
    Ok(shown)
}

fn energies(product: &Product) -> Vec<f64> {
    let n = product.values.len() as f64;
    SHARES.iter().map(|share| product.energy((share * n).round() as usize)).collect()
}

fn pieces(model: &Model, found: &[Match]) -> String {
    let piece = |m: &Match| {
        let piece = String::from_utf8_lossy(model.tokenizer.piece(m.token, true));
        format!("\"{}\"", escaped(&piece))
    };
    found.iter().map(piece).collect::<Vec<_>>().join(" ")
}

/// A row for each head.
pub(super) fn table(shown: &[Shown]) -> String {
    let mut text = "layer.head  QK norm  rank  energy at 1/4 1/2  OV norm  rank  energy at 1/4 1/2   cond K   cond V  copying\n".to_string();
    for Shown { circuit: c, .. } in shown {
        let at = format!("{}.{}", c.layer, c.head);
        let side = |p: &Product| {
            let e = energies(p);
            format!("{:7.2}  {:4.1}  {:13.3} {:.3}", p.norm(), p.effective_rank(), e[1], e[2])
        };
        text += &format!(
            "{at:>10}  {}  {}  {:>7}  {:>7}  {:7.2}\n",
            side(&c.qk),
            side(&c.ov),
            short(c.key_condition),
            short(c.value_condition),
            c.copying
        );
    }
    text
}

/// A large number in few characters.
fn short(x: f64) -> String {
    if x < 1e4 { format!("{x:.1}") } else { format!("{x:.1e}") }
}

/// Spectra, planes and directions of each head.
pub(super) fn details(model: &Model, shown: &[Shown]) -> String {
    let mut text = String::new();
    for Shown { circuit: c, directions } in shown {
        text += &format!("\nlayer {}, head {}\n", c.layer, c.head);
        for (name, product) in [("QK", &c.qk), ("OV", &c.ov)] {
            let values: Vec<String> =
                product.values.iter().take(12).map(|s| format!("{s:.2}")).collect();
            let e: Vec<String> = energies(product).iter().map(|e| format!("{e:.3}")).collect();
            text += &format!("  {name} singular values {} ..\n", values.join(" "));
            text += &format!("  {name} energy at 1/8, 1/4, 1/2, 3/4: {}\n", e.join(" "));
        }
        if !c.planes.is_empty() {
            let mut planes: Vec<(usize, &(f64, f64))> = c.planes.iter().enumerate().collect();
            planes.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
            let planes: Vec<String> = planes
                .iter()
                .take(6)
                .map(|(i, (turn, share))| {
                    format!("{i} ({turn:.0} positions) {:.1} %", 100.0 * share)
                })
                .collect();
            text += &format!("  planes by energy: {}\n", planes.join(", "));
        }
        for (d, [query, key, read, write]) in directions.iter().enumerate() {
            text += &format!("  direction {d}\n");
            for (name, found) in
                [("queries", query), ("look for keys", key), ("reads", read), ("writes", write)]
            {
                text += &format!("    {name:13}  {}\n", pieces(model, found));
            }
        }
    }
    text
}

/// Everything.
pub(super) fn as_json(model: &Model, shown: &[Shown]) -> Vec<Value> {
    let tokens = |found: &[Match]| -> Vec<Value> {
        let piece =
            |m: &Match| String::from_utf8_lossy(model.tokenizer.piece(m.token, true)).into_owned();
        found.iter().map(|m| json!({"id": m.token, "token": piece(m), "score": m.score})).collect()
    };
    let number = |x: f64| if x.is_finite() { json!(x) } else { Value::Null };
    let side = |p: &Product| {
        json!({"singular_values": p.values, "norm": p.norm(), "effective_rank": p.effective_rank(),
               "energy_at": SHARES, "energy": energies(p)})
    };
    shown
        .iter()
        .map(|Shown { circuit: c, directions }| {
            let planes: Vec<Value> =
                c.planes.iter().map(|(turn, share)| json!({"turn": turn, "energy": share})).collect();
            let directions: Vec<Value> = directions
                .iter()
                .map(|[q, k, r, w]| {
                    json!({"query": tokens(q), "key": tokens(k), "read": tokens(r), "write": tokens(w)})
                })
                .collect();
            json!({"layer": c.layer, "head": c.head, "qk": side(&c.qk), "ov": side(&c.ov),
                   "key_condition": number(c.key_condition), "value_condition": number(c.value_condition),
                   "layer_key_condition": number(c.layer_condition), "copying": c.copying,
                   "planes": planes, "directions": directions})
        })
        .collect()
}

/// Queries and values of a text at one head.
struct Read {
    layer: usize,
    head: usize,
    queries: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

/// Keeps them of the selected heads.
struct Reader<'a> {
    selection: &'a Selection,
    seen: Mutex<Vec<Read>>,
}

impl Observer for Reader<'_> {
    fn wants(&self, _: usize) -> bool {
        false
    }

    fn wants_heads(&self, layer: usize) -> bool {
        self.selection.layers.contains(&layer)
    }

    fn see_head(&self, seen: &SeenHead) {
        if self.selection.heads.contains(&seen.head)
            && let Ok(mut all) = self.seen.lock()
        {
            let rows = |rows: SeenRows| rows.iter().map(<[f32]>::to_vec).collect();
            let (queries, values) = (rows(seen.queries), rows(seen.values));
            all.push(Read { layer: seen.layer, head: seen.head, queries, values });
        }
    }
}

/// For every token of a text its pattern, `x W_QK`, as the tokens that a head looks for there (at its own
/// position, where there is a rotation), and its message, `x W_OV`, as the tokens that it writes where
/// the token is attended to.
pub(super) fn patterns_and_messages(
    session: &mut Session,
    selection: &Selection,
    tokens: &[u32],
) -> Result<String> {
    let reader = Reader { selection, seen: Mutex::default() };
    session.feed_observed(tokens, 0..0, &reader)?;
    let model = session.model().clone();
    let mut seen = reader.seen.into_inner().unwrap_or_default();
    seen.sort_by_key(|read| (read.layer, read.head));
    let mut text = String::new();
    for Read { layer, head, queries, values } in seen {
        let g = &model.attention[layer].geometry;
        let w = model.weights(layer);
        let gain = &model.layers[layer].attn_norm.weight;
        let (k_at, o_at) = (g.keys(head / g.per_kv()), g.outputs(head));
        let pattern = |q: &Vec<f32>| -> Vec<f64> {
            let mut sum = vec![0.0; w.k.n_in];
            for (x, i) in q.iter().zip(k_at.clone()) {
                let row = &w.k.data[i * w.k.n_in..(i + 1) * w.k.n_in];
                sum.iter_mut().zip(row).for_each(|(s, k)| *s += f64::from(x * k));
            }
            sum.iter().zip(gain).map(|(s, g)| s * f64::from(*g)).collect()
        };
        let message = |v: &Vec<f32>| -> Vec<f64> {
            let row =
                |row: &[f32]| v.iter().zip(&row[o_at.clone()]).map(|(a, b)| f64::from(a * b)).sum();
            w.o.data.chunks_exact(w.o.n_in).map(row).collect()
        };
        let patterns: Vec<_> = queries.iter().map(pattern).collect();
        let messages: Vec<_> = values.iter().map(message).collect();
        let n = selection.n_tokens;
        let looks = matches(&model, Side::Embedding, &patterns, n, true);
        let writes = matches(&model, Side::Output, &messages, n, true);
        text += &format!("\nlayer {layer}, head {head}: token | looks for | writes\n");
        for ((token, looks), writes) in tokens.iter().zip(&looks).zip(&writes) {
            let own = pieces(&model, &[Match { token: *token, score: 0.0 }]);
            text +=
                &format!("  {own:14} | {} | {}\n", pieces(&model, looks), pieces(&model, writes));
        }
    }
    Ok(text)
}
