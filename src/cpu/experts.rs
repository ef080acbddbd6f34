//! FFNs of which each token goes through a few.
//!
//! Those that any token of a batch is for are computed once for all of their tokens, in the order of the
//! experts, so that a token's sum has the same bits whatever is in the batch.
#![allow(unsafe_code)]

use super::ffn::ffn_rows;
use super::forward::{Buffers, Pass};
use super::lora::{give_back, lower};
use super::observe::Input;
use super::products::{products, rows_per_task};
use super::rows::Rows;
use super::threads::Columns;
use super::weights::ExpertMatrices;
use crate::arch::{Experts, Gating};
use crate::model::ExpertLayer;
use crate::simd;

/// What experts need between operations.
#[derive(Default)]
pub(super) struct ExpertBuffers {
    /// Scores of all experts. `[n, n_experts]`
    scores: Vec<f32>,
    groups: Vec<Group>,
}

/// An expert and the tokens that go through it.
#[derive(Default)]
struct Group {
    expert: usize,
    /// Index in the batch, and weight.
    tokens: Vec<(usize, f32)>,
    /// Their inputs, `[n, n_embd]`, unless that is all of the batch.
    x: Rows,
    /// `[n, n_ff]`
    up: Rows,
    gate: Vec<f32>,
}

impl Buffers {
    /// Adds what experts of layer `i` make of the normed residual stream to it.
    pub(super) fn experts(
        &mut self,
        pass: &Pass,
        i: usize,
        (w, layer): (&ExpertMatrices, &ExpertLayer),
        n: usize,
    ) {
        let hp = &pass.model.hparams;
        let Some(experts) = &hp.experts else { return };
        let Buffers { x, normed, threads, experts: own, .. } = self;
        let ExpertBuffers { scores, groups } = own;
        scores.resize(n * experts.n, 0.0);
        let out = Columns::new(scores, experts.n);
        products(pass.crew, &[(&w.router, out)], &normed.view(), threads);
        let n_groups = grouped(scores, (experts, layer), groups);
        let groups = &mut groups[..n_groups];
        let is_all = |group: &Group| group.tokens.len() == n;
        let (n_embd, n_ff) = (hp.n_embd, experts.n_ff);
        for group in &mut *groups {
            let copies = w.all[group.expert].copies();
            if !is_all(group) {
                group.x.resize(group.tokens.len(), n_embd);
                group.x.finish(pass.crew, copies, |i, row| {
                    row.copy_from_slice(&normed.floats[group.tokens[i].0 * n_embd..][..n_embd]);
                });
            }
            group.up.resize(group.tokens.len(), n_ff);
            group.gate.resize(group.tokens.len() * n_ff, 0.0);
        }
        for group in &*groups {
            let x = if is_all(group) { normed.seen() } else { group.x.seen() };
            pass.show(i, Input::Expert(group.expert), x);
        }
        let mut n_low = 0;
        let parts: Vec<_> = groups
            .iter_mut()
            .map(|group| {
                let w = &w.all[group.expert];
                let x = if group.tokens.len() == n { normed.view() } else { group.x.view() };
                let first = n_low;
                n_low += w.readers().map(|w| x.n * w.rank()).sum::<usize>();
                (w, x, first, Columns::new(&mut group.gate, n_ff), group.up.parts(w.down.copies))
            })
            .collect();
        let readers = parts.iter().flat_map(|(w, x, ..)| w.readers().map(move |w| (w, *x)));
        let low = lower(pass.crew, readers, threads);
        let n_rows = rows_per_task(pass.crew, n_ff * n_groups).next_multiple_of(32);
        let n_tasks = n_ff.div_ceil(n_rows);
        pass.crew.each_with(threads, n_groups * n_tasks, |own, task| {
            let (w, x, first, gate, up) = &parts[task / n_tasks];
            let start = task % n_tasks * n_rows;
            let rows = (start, n_rows.min(n_ff - start));
            // SAFETY: tasks have rows of their own.
            unsafe {
                ffn_rows(pass, w, rows, (x, &low[*first..], &[]), &mut own.scratch, (*gate, up));
            }
        });
        drop(parts);
        give_back(threads, low);
        let (x, groups) = (Columns::new(x, n_embd), &*groups);
        for group in groups {
            pass.show(i, Input::ExpertHidden(group.expert), group.up.seen());
        }
        let readers = groups.iter().map(|group| (&w.all[group.expert].down, group.up.view()));
        let low = lower(pass.crew, readers, threads);
        let n_rows = rows_per_task(pass.crew, n_embd);
        pass.crew.each_with(threads, n_embd.div_ceil(n_rows), |own, task| {
            let start = task * n_rows;
            let len = n_rows.min(n_embd - start);
            let mut rest = &low[..];
            for group in groups {
                own.out.resize(group.tokens.len() * len, 0.0);
                let out = Columns::new(&mut own.out, len);
                let down = &w.all[group.expert].down;
                let made = down.lowered(&group.up.view(), &mut rest);
                // SAFETY: the output is this thread's own, and tasks have elements of their own.
                unsafe {
                    down.multiply((start, len), &made, &mut own.scratch, out, 0);
                    for ((t, weight), made) in group.tokens.iter().zip(own.out.chunks_exact(len)) {
                        let x = x.part(*t, start, len);
                        simd::add_scaled(x, hp.residual_scale * weight, made);
                    }
                }
            }
        });
        give_back(threads, low);
    }
}

/// Groups tokens by the experts that they go through, in the order of these; how many there are.
fn grouped(
    scores: &mut [f32],
    (experts, layer): (&Experts, &ExpertLayer),
    groups: &mut Vec<Group>,
) -> usize {
    let mut pairs = Vec::new();
    for (t, scores) in scores.chunks_exact_mut(experts.n).enumerate() {
        let preference = layer.preference.as_deref();
        pairs.extend(
            chosen(experts, preference, scores).map(|(expert, weight)| (expert, t, weight)),
        );
    }
    pairs.sort_by_key(|(expert, t, _)| (*expert, *t));
    let mut n = 0;
    for of_expert in pairs.chunk_by(|a, b| a.0 == b.0) {
        if groups.len() == n {
            groups.push(Group::default());
        }
        let group = &mut groups[n];
        group.expert = of_expert[0].0;
        group.tokens.clear();
        group.tokens.extend(of_expert.iter().map(|(_, t, weight)| (*t, *weight)));
        n += 1;
    }
    n
}

/// The experts that a token goes through, with their weights.
fn chosen(
    experts: &Experts,
    preference: Option<&[f32]>,
    scores: &mut [f32],
) -> impl Iterator<Item = (usize, f32)> {
    match experts.gating {
        Gating::Softmax => {
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            scores.iter_mut().for_each(|s| *s = libm::expf(*s - max));
            let sum: f32 = scores.iter().sum();
            simd::scale(scores, 1.0 / sum);
        }
        Gating::Sigmoid => scores.iter_mut().for_each(|s| *s = 1.0 / (1.0 + libm::expf(-*s))),
    }
    let liked: Vec<f32> = match preference {
        Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
        None => scores.to_vec(),
    };
    let mut order: Vec<usize> = (0..experts.n).collect();
    if let Some((n, n_used)) = experts.groups {
        let of_group = experts.n / n;
        // The two best of a group, where a preference has been trained for that, else the best.
        let n_best = if preference.is_some() { 2 } else { 1 };
        let value = |group: usize| -> f32 {
            let mut own = liked[group * of_group..(group + 1) * of_group].to_vec();
            own.sort_by(|a, b| b.total_cmp(a));
            own.iter().take(n_best).sum()
        };
        let mut groups: Vec<(usize, f32)> = (0..n).map(|g| (g, value(g))).collect();
        groups.sort_by(|a, b| b.1.total_cmp(&a.1));
        groups.truncate(n_used);
        order.retain(|i| groups.iter().any(|(g, _)| *g == i / of_group));
    }
    order.sort_by(|a, b| liked[*b].total_cmp(&liked[*a]));
    order.truncate(experts.n_used);
    let sum: f32 = order.iter().map(|i| scores[*i]).sum();
    let factor = experts.scale / if experts.norm { sum.max(f32::MIN_POSITIVE) } else { 1.0 };
    order.into_iter().map(move |i| (i, scores[i] * factor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Bias;

    const EXPERTS: Experts = Experts {
        n: 6,
        n_used: 2,
        n_ff: 4,
        gating: Gating::Softmax,
        norm: false,
        scale: 1.0,
        groups: None,
        bias: Bias::Never,
        shared_gate: false,
    };

    fn choose(experts: Experts, preference: Option<&[f32]>, scores: [f32; 6]) -> Vec<(usize, f32)> {
        let mut scores = scores.to_vec();
        chosen(&experts, preference, &mut scores).collect()
    }

    #[test]
    fn the_best_are_used() {
        let scores = [0.0f32, 2.0, -1.0, 1.0, 0.5, 1.5];
        let sum: f32 = scores.iter().map(|s| s.exp()).sum();
        let plain = choose(EXPERTS, None, scores);
        assert_eq!(plain.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [1, 5]);
        assert!((plain[0].1 - 2f32.exp() / sum).abs() < 1e-6);
        let normed = choose(Experts { norm: true, scale: 2.5, ..EXPERTS }, None, scores);
        assert!((normed.iter().map(|(_, w)| w).sum::<f32>() - 2.5).abs() < 1e-6);
        // A preference chooses, and is no part of the weight.
        let sigmoid = Experts { gating: Gating::Sigmoid, ..EXPERTS };
        let liked = choose(sigmoid, Some(&[0.0, 0.0, 9.0, 0.0, 0.0, 0.0]), scores);
        assert_eq!(liked[0].0, 2);
        assert!((liked[0].1 - 1.0 / (1.0 + 1f32.exp())).abs() < 1e-6);
        // The best is in a group that is not used, as others' two best are better together.
        let groups = Experts { groups: Some((3, 1)), ..sigmoid };
        let scores = [3.0, -9.0, 1.0, 1.0, 0.0, 0.0];
        assert_eq!(choose(groups, Some(&[0.0; 6]), scores)[0].0, 2);
        assert_eq!(choose(groups, None, scores)[0].0, 0);
    }
}
