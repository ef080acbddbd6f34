//! Layers of random numbers, against sums over everything that their heads see.

use std::f64::consts::TAU;
use std::ops::Range;

use super::*;
use crate::arch::{
    Activation, Bias, Gate, Hparams, LayerHparams, Norm, NormKind, PostNorm, QkNorm, Rope, Scaling,
};

const N_EMBD: usize = 20;
const N_TOKENS: usize = 24;
/// Distances after which all planes have turned whole times.
const PERIOD: usize = 32;
const LAYER: usize = 3;

#[derive(Debug, Clone, Copy)]
struct Case {
    n_head: usize,
    n_head_kv: usize,
    key_dim: usize,
    value_dim: usize,
    /// Pairing and elements.
    rope: Option<(Pairing, usize)>,
    /// Planes, the last ones, that do not turn.
    n_still: usize,
    qk_norm: bool,
}

const PLAIN: Case = Case {
    n_head: 2,
    n_head_kv: 2,
    key_dim: 8,
    value_dim: 6,
    rope: None,
    n_still: 0,
    qk_norm: false,
};
const HALF: Case = Case { rope: Some((Pairing::Half, 8)), ..PLAIN };
static CASES: &[Case] = &[
    PLAIN,
    Case { n_head: 6, key_dim: 10, ..PLAIN },
    Case { n_head: 3, n_head_kv: 1, value_dim: 16, ..PLAIN },
    HALF,
    Case { n_head: 4, rope: Some((Pairing::Adjacent, 8)), ..PLAIN },
    Case { n_head: 4, key_dim: 12, ..HALF },
    Case { key_dim: 12, rope: Some((Pairing::Adjacent, 4)), ..PLAIN },
    Case { n_still: 2, ..HALF },
    Case { n_head: 6, key_dim: 12, rope: Some((Pairing::Adjacent, 10)), n_still: 3, ..PLAIN },
    Case { qk_norm: true, n_head: 4, ..HALF },
];

/// Numbers between -1 and 1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    fn dense(&mut self, n_out: usize, n_in: usize) -> Dense {
        let mut some = |n: usize| (0..n).map(|_| self.next() as f32).collect();
        Dense { n_in, data: some(n_out * n_in), bias: Some(some(n_out)) }
    }
}

/// A layer, what it reads, and the weights of its heads.
struct Layer {
    case: Case,
    hparams: Hparams,
    frequencies: Vec<f64>,
    weights: Weights,
    inputs: Vec<Vec<f64>>,
    /// `[n_head][N_TOKENS][N_TOKENS]`
    mix: Vec<Vec<Vec<f64>>>,
}

fn hparams(case: Case) -> Hparams {
    let layer = LayerHparams {
        n_head: case.n_head,
        n_head_kv: case.n_head_kv,
        n_ff: 1,
        has_experts: false,
        rope: case.rope.map(|_| 0),
        window: None,
        rewritten: None,
    };
    let rope =
        |(pairing, dim)| Rope { pairing, dim, base: 1e4, attn_factor: 1.0, scaling: Scaling::None };
    Hparams {
        arch: "none",
        n_vocab: 1,
        n_embd: N_EMBD,
        n_ctx_train: PERIOD,
        causal: true,
        pooling: None,
        layers: vec![layer; LAYER + 1],
        key_dim: case.key_dim,
        value_dim: case.value_dim,
        attn_scale: 1.0,
        attn_softcap: None,
        final_softcap: None,
        norm: Norm { kind: NormKind::Rms, eps: 1e-5, bias: false },
        embedding_norm: false,
        attn_norm: Some("attn_norm"),
        ffn_norm: Some("ffn_norm"),
        qk_norm: case.qk_norm.then_some(QkNorm::Heads),
        post_norm: PostNorm::None,
        output_norm: true,
        output: true,
        parallel: false,
        needs_sinks: false,
        learned_positions: false,
        token_types: None,
        max_alibi_bias: None,
        temperature: None,
        qkv_limit: None,
        ropes: case.rope.map(rope).into_iter().collect(),
        rope_freqs: true,
        fused_qkv: false,
        qkv_bias: Bias::Optional,
        attn_output_bias: Bias::Optional,
        ffn_bias: Bias::Never,
        activation: Activation::Silu,
        ffn_gate: Gate::None,
        experts: None,
        latent: None,
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logit_scale: 1.0,
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm2(a: &[f64]) -> f64 {
    dot(a, a)
}

/// Some rows of a matrix times `x`.
fn times(w: &Dense, rows: Range<usize>, x: &[f64]) -> Vec<f64> {
    let bias = |i: usize| w.bias.as_ref().map_or(0.0, |b| f64::from(b[i]));
    let row = |i: usize| w.data[i * w.n_in..(i + 1) * w.n_in].iter().map(|w| f64::from(*w));
    rows.map(|i| row(i).zip(x).map(|(w, x)| w * x).sum::<f64>() + bias(i)).collect()
}

/// Some columns of a matrix times `z`, without the bias.
fn written(o: &Dense, columns: Range<usize>, z: &[f64]) -> Vec<f64> {
    let row =
        |row: &[f32]| row[columns.clone()].iter().zip(z).map(|(w, z)| f64::from(*w) * z).sum();
    o.data.chunks_exact(o.n_in).map(row).collect()
}

fn second_moment(rows: &[Vec<f64>]) -> Mat<f64> {
    let n = rows[0].len();
    let mean = |i: usize, j: usize| rows.iter().map(|r| r[i] * r[j]).sum::<f64>();
    Mat::from_fn(n, n, |i, j| mean(i, j) / rows.len() as f64)
}

impl Layer {
    fn new(case: Case, seed: u64) -> Layer {
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let Case { n_head, n_head_kv, key_dim, value_dim, .. } = case;
        let weights = Weights {
            q: random.dense(n_head * key_dim, N_EMBD),
            k: random.dense(n_head_kv * key_dim, N_EMBD),
            v: random.dense(n_head_kv * value_dim, N_EMBD),
            o: random.dense(N_EMBD, n_head * value_dim),
        };
        // Of different sizes, and not about zero.
        let scales: Vec<f64> = (0..N_EMBD).map(|_| random.next().powi(3)).collect();
        let inputs = (0..N_TOKENS)
            .map(|_| scales.iter().map(|s| s * (random.next() + 0.7)).collect())
            .collect();
        // Every head looks at one token more than at others.
        let mut weights_of = |h: usize| -> Vec<f64> {
            let own = |n: usize| if n == h { 3.0 } else { 0.0 };
            let all: Vec<f64> =
                (0..N_TOKENS).map(|n| (2.0 * random.next() + own(n)).exp()).collect();
            let sum: f64 = all.iter().sum();
            all.iter().map(|p| p / sum).collect()
        };
        let mix = (0..n_head).map(|h| (0..N_TOKENS).map(|_| weights_of(h)).collect()).collect();
        let n_planes = case.rope.map_or(0, |(_, dim)| dim / 2);
        let turn = |j: usize| if j + case.n_still < n_planes { (j + 1) as f64 } else { 0.0 };
        let frequencies = (0..n_planes).map(|j| TAU * turn(j) / PERIOD as f64).collect();
        Layer { case, hparams: hparams(case), frequencies, weights, inputs, mix }
    }

    fn per_kv(&self) -> usize {
        self.case.n_head / self.case.n_head_kv
    }

    fn geometry(&self) -> Geometry {
        let Case { key_dim, value_dim, n_head, n_head_kv, .. } = self.case;
        let head = KvHead { score_dim: key_dim, value_dim, planes: None };
        Geometry::new(n_head, vec![head; n_head_kv])
    }

    fn rows(&self, w: &Dense, at: Range<usize>) -> Vec<Vec<f64>> {
        self.inputs.iter().map(|x| times(w, at.clone(), x)).collect()
    }

    /// What a head makes of every token. `v`: the values of its kv head.
    fn mixed(&self, head: usize, v: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let mixed = |p: &Vec<f64>| {
            (0..v[0].len()).map(|i| p.iter().zip(v).map(|(p, v)| p * v[i]).sum()).collect()
        };
        self.mix[head].iter().map(mixed).collect()
    }

    fn outputs(&self, head: usize) -> Vec<Vec<f64>> {
        let g = self.geometry();
        self.mixed(head, &self.rows(&self.weights.v, g.values(head / self.per_kv())))
    }

    fn grams(&self) -> Grams {
        let (g, w) = (self.geometry(), &self.weights);
        let keys: Vec<_> = (0..g.n_head_kv()).map(|kv| self.rows(&w.k, g.keys(kv))).collect();
        let outputs: Vec<_> = (0..g.n_head).map(|h| self.outputs(h)).collect();
        let queries = |kv: usize| {
            let group = kv * self.per_kv()..(kv + 1) * self.per_kv();
            let all = group.map(|h| second_moment(&self.rows(&w.q, g.queries(h))));
            all.reduce(|a, b| a + b).unwrap()
        };
        Grams {
            queries: (0..g.n_head_kv()).map(queries).collect(),
            keys: keys.iter().map(|k| second_moment(k)).collect(),
            outputs: outputs.iter().map(|z| second_moment(z)).collect(),
            key_means: keys.iter().map(|k| mean_of(k)).collect(),
            value_means: (0..g.n_head_kv())
                .map(|kv| mean_of(&self.rows(&w.v, g.values(kv))))
                .collect(),
            output_means: outputs.iter().map(|z| mean_of(z)).collect(),
        }
    }

    fn site(&self) -> Site<'_> {
        Site {
            hparams: &self.hparams,
            layer: LAYER,
            shift_invariant: true,
            unit_sum: true,
            frequencies: self.frequencies.clone(),
        }
    }

    fn with(&self, grams: &Grams, form: &str) -> Result<Option<Rewritten>> {
        let weights = || self.weights.clone();
        let choice = Choice::parse(form)?;
        let layer = Trained { site: self.site(), weights: &weights, grams: Some(grams) };
        Ok(choice.form().rewrite(&choice, &[layer])?.remove(0))
    }

    fn rewritten(&self, form: &str) -> Rewritten {
        self.with(&self.grams(), form).unwrap().unwrap()
    }

    /// A product of a query and a key of a head, so far apart.
    fn logit(&self, head: &KvHead, (q, k): (&[f64], &[f64]), distance: usize) -> f64 {
        let n_all = self.frequencies.len();
        let pairing = self.case.rope.map_or(Pairing::Half, |(pairing, _)| pairing);
        let planes = head.planes.clone().unwrap_or_else(|| (0..n_all).collect());
        let n = planes.len();
        let mut sum = 0.0;
        for (at, j) in planes.iter().enumerate() {
            // With norms, rows keep their width, and what is left is taken out of them.
            let [a, b] =
                if self.case.qk_norm { pairing.pair(*j, n_all) } else { pairing.pair(at, n) };
            let (sin, cos) = (self.frequencies[*j] * distance as f64).sin_cos();
            sum += cos * (q[a] * k[a] + q[b] * k[b]) + sin * (q[a] * k[b] - q[b] * k[a]);
        }
        if self.case.qk_norm { sum } else { sum + dot(&q[2 * n..], &k[2 * n..]) }
    }

    /// Sums over all tokens and distances of the squares of what changes in the logits of a kv head's
    /// queries, and of the logits as trained, but for what is the same for all keys if `center`.
    fn score_loss(&self, new: &Rewritten, kv: usize, center: bool) -> (f64, f64) {
        let (old, w) = (self.geometry(), &self.weights);
        let n_distances = if self.case.rope.is_some() { PERIOD } else { 1 };
        // Rows that norms are to follow are as wide as they were.
        let g = if self.case.qk_norm { &old } else { &new.geometry };
        let (k, new_k) = (self.rows(&w.k, old.keys(kv)), self.rows(&new.weights.k, g.keys(kv)));
        let mean = if center { mean_of(&k) } else { vec![0.0; self.case.key_dim] };
        let (mut lost, mut all) = (0.0, 0.0);
        for h in kv * self.per_kv()..(kv + 1) * self.per_kv() {
            let q = self.rows(&w.q, old.queries(h));
            let new_q = self.rows(&new.weights.q, g.queries(h));
            for (q, new_q) in q.iter().zip(&new_q) {
                for (k, new_k) in k.iter().zip(&new_k) {
                    for distance in 0..n_distances {
                        let was = self.logit(&old.kv[kv], (q, k), distance) - dot(q, &mean);
                        let is = self.logit(&new.geometry.kv[kv], (new_q, new_k), distance);
                        lost += (was - is).powi(2);
                        all += was.powi(2);
                    }
                }
            }
        }
        (lost, all)
    }

    /// Sums over all tokens of the squares of what changes in what a head writes, and of what it wrote,
    /// but for the `constant` of values that went to the bias.
    fn output_loss(&self, new: &Rewritten, head: usize, constant: Option<&[f64]>) -> (f64, f64) {
        let (old, g) = (self.geometry(), &new.geometry);
        let new_v = self.rows(&new.weights.v, g.values(head / self.per_kv()));
        let zeros = vec![0.0; self.case.value_dim];
        let constant = written(&self.weights.o, old.outputs(head), constant.unwrap_or(&zeros));
        let (mut lost, mut all) = (0.0, 0.0);
        for (z, new_z) in self.outputs(head).iter().zip(self.mixed(head, &new_v)) {
            let was = written(&self.weights.o, old.outputs(head), z);
            let is = written(&new.weights.o, g.outputs(head), &new_z);
            let was: Vec<f64> = was.iter().zip(&constant).map(|(x, c)| x - c).collect();
            lost += was.iter().zip(&is).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            all += norm2(&was);
        }
        (lost, all)
    }

    /// What is taken from the values of each kv head, and thus of outputs.
    fn constants(&self) -> Vec<Vec<f64>> {
        let means: Vec<_> = (0..self.case.n_head).map(|h| mean_of(&self.outputs(h))).collect();
        means.chunks(self.per_kv()).map(mean_of).collect()
    }
}

#[test]
fn what_is_kept_whole_is_as_it_was() {
    for (i, case) in CASES.iter().enumerate() {
        let layer = Layer::new(*case, i as u64 + 1);
        let (w, grams) = (&layer.weights, layer.grams());
        let (qk, ov) = (case.key_dim, case.value_dim);
        for form in ["lowrank", "lowrank:data=no", &format!("lowrank:qk={qk},ov={ov}")] {
            assert_eq!(layer.with(&grams, form).unwrap(), None, "{case:?} {form}");
        }
        let new = layer.rewritten(&format!("lowrank:ov={}", ov - 2));
        assert_eq!((&new.weights.q, &new.weights.k), (&w.q, &w.k), "{case:?}");
        assert!(new.score_errors.iter().all(|e| *e == 0.0));
        let new = layer.rewritten(&format!("lowrank:qk={}", qk - 2));
        assert_eq!((&new.weights.v, &new.weights.o.bias), (&w.v, &w.o.bias), "{case:?}");
        assert!(new.weights.o.n_in.is_multiple_of(32));
        let rows = new.weights.o.data.chunks_exact(new.weights.o.n_in);
        for (new, old) in rows.zip(w.o.data.chunks_exact(w.o.n_in)) {
            let (kept, rest) = new.split_at(w.o.n_in);
            assert!(kept == old && rest.iter().all(|x| *x == 0.0), "{case:?}");
        }
        assert!(new.output_errors.iter().all(|e| *e == 0.0));
    }
}

#[test]
fn stated_errors_are_those_of_scores() {
    for (i, case) in CASES.iter().enumerate() {
        let layer = Layer::new(*case, 40 + i as u64);
        for rank in (2..case.key_dim).step_by(2) {
            for data in ["yes", "no"] {
                let new = layer.rewritten(&format!("lowrank:qk={rank},data={data}"));
                for kv in 0..case.n_head_kv {
                    assert_eq!(new.geometry.kv[kv].score_dim, rank);
                    let (lost, all) = layer.score_loss(&new, kv, false);
                    let (error, stated) = (lost / all, new.score_errors[kv].powi(2));
                    // Those of weights alone say nothing of these tokens, only what is possible.
                    let is_true = data == "no" || (error - stated).abs() < 1e-5;
                    assert!(is_true, "{case:?} {rank} {kv}: {error} {stated}");
                    let informed = layer.rewritten(&format!("lowrank:qk={rank}"));
                    let best = layer.score_loss(&informed, kv, false).0;
                    assert!(best <= lost + 1e-6 * all, "{case:?} {rank} {kv}: {best} {lost}");
                }
            }
        }
    }
}

#[test]
fn the_plane_that_carries_least_goes() {
    for case in [HALF, Case { n_head: 6, rope: Some((Pairing::Adjacent, 8)), ..PLAIN }] {
        let layer = Layer::new(case, 7 + case.n_head as u64);
        let (dim, n) = (case.key_dim, case.key_dim / 2);
        let pairing = case.rope.unwrap().0;
        let best = layer.rewritten(&format!("lowrank:qk={}", dim - 2));
        for kv in 0..case.n_head_kv {
            let planes = best.geometry.kv[kv].planes.clone().unwrap();
            assert_eq!(planes.len(), n - 1);
            let lost = layer.score_loss(&best, kv, false).0;
            let mut others = Vec::new();
            for plane in (0..n).filter(|j| planes.contains(j)) {
                // The layer with nothing in this plane.
                let mut weights = layer.weights.clone();
                for i in pairing.pair(plane, n).map(|i| kv * dim + i) {
                    weights.k.data[i * N_EMBD..(i + 1) * N_EMBD].fill(0.0);
                    weights.k.bias.as_mut().unwrap()[i] = 0.0;
                }
                let other = Rewritten { weights, geometry: layer.geometry(), ..best.clone() };
                others.push(layer.score_loss(&other, kv, false).0);
            }
            assert_eq!(others.len(), n - 1);
            assert!(others.iter().all(|other| lost < *other), "{case:?} {kv}: {lost} {others:?}");
        }
    }
}

#[test]
fn norms_of_heads_see_whole_rows() {
    let layer = Layer::new(Case { qk_norm: true, ..HALF }, 3);
    let new = layer.rewritten("lowrank:qk=4,ov=4");
    assert_eq!((&new.weights.q, &new.weights.k), (&layer.weights.q, &layer.weights.k));
    for head in &new.geometry.kv {
        assert_eq!((head.score_dim, head.value_dim), (4, 4));
        assert_eq!(head.planes.as_ref().unwrap().len(), 2);
    }
}

#[test]
fn stated_errors_are_those_of_outputs() {
    for case in CASES.iter().filter(|case| case.n_head == case.n_head_kv) {
        let layer = Layer::new(*case, 60);
        let constants = layer.constants();
        for ov in (2..case.value_dim).step_by(2) {
            let form = |rest: &str| layer.rewritten(&format!("lowrank:ov={ov}{rest}"));
            let (plain, blind) = (form(""), form(",data=no"));
            let centered = (!case.qk_norm).then(|| form(",center=yes"));
            for (kv, constant) in constants.iter().enumerate() {
                let (lost, all) = layer.output_loss(&plain, kv, None);
                let stated = plain.output_errors[kv].powi(2);
                assert!((lost / all - stated).abs() < 1e-5, "{case:?} {ov}: {lost} {all} {stated}");
                assert!(lost <= layer.output_loss(&blind, kv, None).0 + 1e-6 * all);
                let Some(new) = &centered else { continue };
                let (less, rest) = layer.output_loss(new, kv, Some(constant));
                let stated = new.output_errors[kv].powi(2);
                assert!(
                    (less / rest - stated).abs() < 1e-5,
                    "{case:?} {ov}: {less} {rest} {stated}"
                );
                assert!(less <= lost + 1e-6 * all, "{case:?} {ov}: {less} {lost}");
            }
        }
    }
}

#[test]
fn outputs_are_refitted_to_each_head() {
    for case in CASES.iter().filter(|case| case.n_head > case.n_head_kv) {
        let layer = Layer::new(*case, 80);
        let new = layer.rewritten("lowrank:ov=2");
        for h in 0..case.n_head {
            let (lost, all) = layer.output_loss(&new, h, None);
            assert!(lost > 1e-6 * all, "{case:?} {h}: {lost} {all}");
            // No other output matrix does better with these values.
            for (row, column) in (0..N_EMBD).flat_map(|r| (0..2).map(move |c| (r, c))) {
                for change in [-0.002, 0.002] {
                    let mut other = new.clone();
                    let at = row * other.weights.o.n_in + other.geometry.outputs(h).start + column;
                    other.weights.o.data[at] += change;
                    assert!(layer.output_loss(&other, h, None).0 > lost, "{case:?} {h}");
                }
            }
        }
    }
}

#[test]
fn constants_that_are_taken_out_come_back() {
    for (i, case) in CASES.iter().enumerate().filter(|(_, case)| !case.qk_norm) {
        let layer = Layer::new(*case, 100 + i as u64);
        // One side is cut, the other whole.
        let cut = |side: &str, dim: usize| {
            layer.rewritten(&format!("lowrank:{side}={},center=yes", dim - 2))
        };
        let (narrow, new) = (cut("ov", case.value_dim), cut("qk", case.key_dim));
        let constants = layer.constants();
        let mut moved = [0.0; N_EMBD];
        for h in 0..case.n_head {
            let kv = h / layer.per_kv();
            let (lost, all) = layer.score_loss(&narrow, kv, case.rope.is_none());
            assert!(lost < 1e-10 * all, "{case:?}: {lost} {all}");
            let (lost, all) = layer.output_loss(&new, h, Some(&constants[kv]));
            assert!(lost < 1e-10 * all, "{case:?}: {lost} {all}");
            let constant = written(&layer.weights.o, layer.geometry().outputs(h), &constants[kv]);
            moved.iter_mut().zip(constant).for_each(|(sum, x)| *sum += x);
        }
        let bias = |w: &Weights| w.o.bias.clone().unwrap();
        for ((new, old), moved) in bias(&new.weights).iter().zip(bias(&layer.weights)).zip(moved) {
            assert!((f64::from(new - old) - moved).abs() < 1e-5, "{case:?}: {new} {old} {moved}");
        }
        // Without a rotation, keys about their mean leave less to lose.
        if case.rope.is_none() {
            let [plain, centered] = ["", ",center=yes"].map(|center| {
                let new = layer.rewritten(&format!("lowrank:qk=4{center}"));
                let (lost, all) = layer.score_loss(&new, 0, !center.is_empty());
                assert!((lost / all - new.score_errors[0].powi(2)).abs() < 1e-5);
                lost
            });
            assert!(centered < plain, "{case:?}: {centered} {plain}");
        }
    }
}

#[test]
fn heads_that_say_nothing_or_nonsense() {
    let layer = Layer::new(PLAIN, 5);
    let mut grams = layer.grams();
    let all = [&mut grams.queries, &mut grams.keys, &mut grams.outputs];
    all.into_iter().flatten().for_each(|gram| gram.fill(0.0));
    [&mut grams.key_means, &mut grams.output_means]
        .into_iter()
        .flatten()
        .for_each(|mean| mean.fill(0.0));
    for form in ["qk=4,ov=4", "ratio=0.5", "energy=0.9", "qk=2,ov=2,center=yes"] {
        let new = layer.with(&grams, &format!("lowrank:{form}")).unwrap().unwrap();
        let w = &new.weights;
        let data = [&w.q, &w.k, &w.v, &w.o].into_iter().flat_map(|dense| &dense.data);
        assert!(data.into_iter().all(|x| x.is_finite()), "{form}");
        assert!(new.geometry.kv.iter().all(|kv| kv.score_dim >= 2 && kv.value_dim >= 1), "{form}");
    }
    let mut grams = layer.grams();
    grams.keys[1][(2, 2)] = f64::INFINITY;
    let error = layer.with(&grams, "lowrank:qk=4").unwrap_err().to_string();
    assert!(error.contains("layer 3, kv head 1: a second moment"), "{error}");
}
