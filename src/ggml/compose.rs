//! Normalizers as operations that every device has. Those that are not here are computed by the
//! processor, row by row; that both give the same is tested over the registry.

use ggml::{Shape, Tensor, Type};

use super::pass::{MaskKind, Pass, PerToken};
use crate::normalizer::Choice;

/// Keeps divisors from being 0.
const TINY: f32 = 1e-30;

/// Scores of some tokens on their way to weights. `[keys, tokens, heads]`
struct Rows<'a> {
    layer: usize,
    /// The first of the tokens in the batch, and how many there are.
    first: usize,
    n: usize,
    choice: &'a Choice,
}

impl Rows<'_> {
    fn value(&self, name: &str) -> f32 {
        self.choice.value(name).unwrap_or(0.0)
    }

    /// The value of a parameter that all kinds have.
    fn common(&self, name: &str) -> f32 {
        self.choice.common(name).unwrap_or(0.0)
    }
}

impl Pass<'_> {
    /// Weights of scaled scores, if there are operations for the layer's normalizer.
    pub(super) fn composed(
        &mut self,
        layer: usize,
        first: usize,
        scores: Tensor,
    ) -> Option<Tensor> {
        let attention = &self.model.attention[layer];
        let choice = attention.normalizers().first()?;
        let is_one = attention.normalizers().iter().all(|other| other.text() == choice.text());
        let n = self.graph.shape(scores).dims[1];
        let rows = Rows { layer, first, n, choice };
        if !is_one || !attention.slopes().is_empty() || rows.common("sinks") > 0.0 {
            return None;
        }
        let x = match attention.softcap() {
            Some(cap) => self.softcap(scores, cap),
            None => scores,
        };
        let x = self.common(&rows, x);
        let w = match self.softmax_like(&rows, x) {
            Some(w) => w,
            None => self.pointwise(&rows, x)?,
        };
        let w = if rows.common("renorm") == 1.0 { self.divided(w, w, true) } else { w };
        Some(match rows.common("gain") {
            1.0 => w,
            gain => self.graph.scale(w, gain, 0.0),
        })
    }

    /// `(scale + scale_n ln n) x + offset + offset_n ln n`
    fn common(&mut self, rows: &Rows, x: Tensor) -> Tensor {
        let value = |name| rows.common(name);
        let (scale, offset) = (value("scale"), value("offset"));
        let (scale_n, offset_n) = (value("scale_n"), value("offset_n"));
        if scale_n == 0.0 && offset_n == 0.0 {
            return match (scale, offset) {
                (1.0, 0.0) => x,
                _ => self.graph.scale(x, scale, offset),
            };
        }
        let scales = self.per_token(rows, move |n, _| scale + scale_n * ln(n));
        let offsets = self.per_token(rows, move |n, _| offset + offset_n * ln(n));
        let x = self.graph.mul(x, scales);
        self.graph.add(x, offsets)
    }

    /// A number for each token, of how many keys it sees and its position. `[1, tokens]`
    fn per_token(
        &mut self,
        rows: &Rows,
        f: impl Fn(usize, usize) -> f32 + Send + Sync + 'static,
    ) -> Tensor {
        let tensor = self.graph.input(Shape { ty: Type::F32, dims: [1, self.sizes.n, 1, 1] });
        self.inputs.per_token.push(PerToken { layer: rows.layer, f: Box::new(f), tensor });
        self.rows_of(tensor, &(rows.first..rows.first + rows.n))
    }

    fn masked_softmax(&mut self, rows: &Rows, x: Tensor) -> Tensor {
        let mask = self.mask(rows.layer, MaskKind::Added);
        let mask = self.rows_of(mask, &(rows.first..rows.first + rows.n));
        self.graph.soft_max(x, mask, 1.0, 0.0)
    }

    /// Numbers of keys that are seen; 0 of others.
    fn seen(&mut self, rows: &Rows, x: Tensor) -> Tensor {
        let mask = self.mask(rows.layer, MaskKind::Seen);
        let mask = self.rows_of(mask, &(rows.first..rows.first + rows.n));
        self.graph.mul(x, mask)
    }

    /// `x` divided by the sum of sizes of each row of `y`, or the root of their squares.
    fn divided(&mut self, x: Tensor, y: Tensor, by_sizes: bool) -> Tensor {
        let terms = if by_sizes { self.graph.abs(y) } else { self.graph.sqr(y) };
        let sum = self.graph.sum_rows(terms);
        let sum = self.graph.clamp(sum, TINY, f32::INFINITY);
        let sum = if by_sizes { sum } else { self.graph.sqrt(sum) };
        self.graph.div(x, sum)
    }

    /// Softmax of something else, or something of softmax. Formulas and sources: the registry.
    fn softmax_like(&mut self, rows: &Rows, x: Tensor) -> Option<Tensor> {
        let value = |name| rows.value(name);
        let n_ctx_train = self.model.hparams.n_ctx_train as f32;
        let x = match rows.choice.kind().name {
            "softmax" | "l2" | "clipped" | "softmax1" | "softmax_n" | "sink" | "differential" => x,
            "temperature" => self.graph.scale(x, 1.0 / value("tau"), 0.0),
            "softermax" => self.graph.scale(x, std::f32::consts::LN_2, 0.0),
            "yarn" => self.graph.scale(x, (0.1 * value("f").ln() + 1.0).powi(2), 0.0),
            "softcap" => self.softcap(x, value("cap")),
            "sigsoftmax" => {
                // exp(x) sigmoid(x) = exp(x - softplus(-x))
                let negative = self.graph.scale(x, -1.0, 0.0);
                let less = self.graph.softplus(negative);
                self.graph.sub(x, less)
            }
            "ssmax" => {
                let (s, least) = (value("s"), value("least"));
                let factors = self.per_token(rows, move |n, _| (s * ln(n)).max(least));
                self.graph.mul(x, factors)
            }
            "log_n" => {
                let given = value("n_train");
                let trained = if given > 0.0 { given } else { n_ctx_train };
                let f = move |n, _| (ln(n) / trained.max(2.0).ln()).max(1.0);
                let factors = self.per_token(rows, f);
                self.graph.mul(x, factors)
            }
            "llama4" => {
                let (floor, scale) = (value("floor"), value("scale_n"));
                let factors = self.per_token(rows, move |_, position| {
                    let steps = ((position + 1) as f32 / floor).floor();
                    1.0 + scale * (steps + 1.0).ln()
                });
                self.graph.mul(x, factors)
            }
            _ => return None,
        };
        let w = self.masked_softmax(rows, x);
        let sink = match rows.choice.kind().name {
            "softmax1" => 0.0,
            "softmax_n" => value("n").ln(),
            "sink" => value("s"),
            "l2" => return Some(self.divided(w, w, false)),
            "clipped" => {
                let (alpha, zeta) = (value("alpha"), value("zeta"));
                let factors = self.per_token(rows, move |n, _| zeta + alpha / n as f32);
                let cuts = self.per_token(rows, move |n, _| -alpha / n as f32);
                let w = self.graph.mul(w, factors);
                let w = self.graph.add(w, cuts);
                return Some(self.graph.clamp(w, 0.0, 1.0));
            }
            "differential" => {
                let other = self.graph.scale(x, 1.0 / value("tau"), 0.0);
                let other = self.masked_softmax(rows, other);
                let other = self.graph.scale(other, -value("lambda"), 0.0);
                let w = self.graph.add(w, other);
                return Some(if value("clip") == 1.0 { self.graph.relu(w) } else { w });
            }
            _ => return Some(w),
        };
        let n_head = self.graph.shape(x).dims[2];
        let sinks = self.constant(vec![sink; n_head], [n_head, 1, 1, 1]);
        self.graph.add_sinks(w, sinks);
        Some(w)
    }

    /// Functions of each score alone, and what they are divided by.
    fn pointwise(&mut self, rows: &Rows, x: Tensor) -> Option<Tensor> {
        let value = |name| rows.value(name);
        let graph = &mut self.graph;
        let name = rows.choice.kind().name;
        let y = match name {
            "sigmoid" => {
                let factor = value("b");
                let shifts = self.per_token(rows, move |n, _| factor * ln(n));
                let x = self.graph.add(x, shifts);
                self.graph.sigmoid(x)
            }
            "relu" => graph.relu(x),
            "relu2" => {
                let x = graph.relu(x);
                graph.sqr(x)
            }
            "softplus" => graph.softplus(x),
            "squareplus" => {
                let squares = graph.sqr(x);
                let squares = graph.scale(squares, 1.0, 4.0);
                let root = graph.sqrt(squares);
                let sum = graph.add(x, root);
                graph.scale(sum, 0.5, 0.0)
            }
            "elu1" => {
                let above = graph.relu(x);
                let below = graph.clamp(x, f32::NEG_INFINITY, 0.0);
                let below = graph.exp(below);
                graph.add(above, below)
            }
            "taylor2" => {
                let squares = graph.sqr(x);
                let half = graph.scale(squares, 0.5, 1.0);
                graph.add(x, half)
            }
            "power" => (1..value("p") as usize).fold(x, |y, _| graph.mul(y, x)),
            "consmax" => {
                let x = graph.scale(x, 1.0, -value("beta"));
                let x = graph.exp(x);
                graph.scale(x, 1.0 / value("gamma"), 0.0)
            }
            "polymax" => {
                let above = graph.relu(x);
                let above = graph.sqr(above);
                let below = graph.clamp(x, f32::NEG_INFINITY, 0.0);
                let below = graph.scale(below, 0.01, 1.0);
                let below = graph.relu(below);
                let sum = graph.add(above, below);
                graph.scale(sum, 1.0 / value("divisor"), 0.0)
            }
            "lssa" => {
                let c = value("c");
                let factors = self.per_token(rows, move |n, _| c * ln(n));
                let x = self.graph.mul(x, factors);
                self.graph.softplus(x)
            }
            _ => return None,
        };
        let y = self.seen(rows, y);
        // As numbers of the parameter `norm`: none, n, sqrt_n, l1, l2.
        let norm = if name == "lssa" { 3.0 } else { value("norm") };
        Some(match norm {
            0.0 => y,
            1.0 => {
                let factors = self.per_token(rows, |n, _| 1.0 / n as f32);
                self.graph.mul(y, factors)
            }
            2.0 => {
                let factors = self.per_token(rows, |n, _| 1.0 / (n as f32).sqrt());
                self.graph.mul(y, factors)
            }
            norm => self.divided(y, y, norm == 3.0),
        })
    }
}

fn ln(n: usize) -> f32 {
    (n as f32).ln()
}
