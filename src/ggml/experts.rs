//! FFNs of which each token goes through a few.

use ggml::Tensor;

use super::pass::Pass;
use super::weights::{ExpertWeights, Stacked};
use crate::arch::{Experts, Gating};

impl Pass<'_> {
    /// What the experts of each token make of it, summed by their weights.
    pub(super) fn experts(
        &mut self,
        (w, experts): (&ExpertWeights, &Experts),
        x: Tensor,
    ) -> Tensor {
        let [width, n, ..] = self.graph.shape(x).dims;
        let scores = self.product(&w.router, x);
        let shares = match experts.gating {
            Gating::Softmax => self.graph.soft_max_plain(scores),
            Gating::Sigmoid => self.graph.sigmoid(scores),
        };
        let mut liked = shares;
        if let Some(preference) = w.preference {
            let preference = self.tensor(preference);
            liked = self.graph.add(liked, preference);
        }
        if let Some(groups) = experts.groups {
            let has_preference = w.preference.is_some();
            let of = experts.n / groups.0;
            liked = self.graph.rows(liked, move |_, row| {
                only_best_groups(row, of, groups.1, has_preference);
            });
        }
        let ids = self.graph.top_k(liked, experts.n_used);
        let shares = self.graph.reshape(shares, [1, experts.n, n, 1]);
        let shares = self.graph.get_rows(shares, ids);
        let mut shares = self.graph.reshape(shares, [experts.n_used, n, 1, 1]);
        if experts.norm {
            let sum = self.graph.sum_rows(shares);
            let sum = self.graph.clamp(sum, f32::MIN_POSITIVE, f32::INFINITY);
            shares = self.graph.div(shares, sum);
        }
        if experts.scale != 1.0 {
            shares = self.graph.scale(shares, experts.scale, 0.0);
        }
        let x = self.graph.reshape(x, [width, 1, n, 1]);
        let up = self.stacked(&w.up, x, ids);
        let gate = w.gate.as_ref().map(|gate| self.stacked(gate, x, ids));
        let made = self.activated(gate, up);
        let made = self.stacked(&w.down, made, ids);
        let shares = self.graph.reshape(shares, [1, experts.n_used, n, 1]);
        let made = self.graph.mul(made, shares);
        let [_, row, token, _] = self.graph.strides(made);
        let part = |pass: &mut Self, i: usize| {
            pass.graph.view(made, [width, n, 1, 1], [token, token * n, token * n], i * row)
        };
        let mut sum = part(self, 0);
        for i in 1..experts.n_used {
            let next = part(self, i);
            sum = self.graph.add(sum, next);
        }
        match experts.n_used {
            1 => self.graph.cont(sum),
            _ => sum,
        }
    }

    fn stacked(&mut self, w: &Stacked, x: Tensor, ids: Tensor) -> Tensor {
        let at = self.tensor(w.at);
        let out = self.graph.mul_mat_id(at, x, ids);
        match w.bias {
            Some(bias) => {
                let bias = self.tensor(bias);
                self.graph.add_id(out, bias, ids)
            }
            None => out,
        }
    }
}

/// Leaves to groups of `of` experts each, but for the `n` best, nothing. A group is as good as its best
/// expert, or where a preference has been trained for that, its two best (DeepSeek-V3, arXiv
/// 2412.19437, section 2.1.2).
fn only_best_groups(liked: &mut [f32], of: usize, n: usize, has_preference: bool) {
    let n_best = if has_preference { 2 } else { 1 };
    let value = |group: &[f32]| -> f32 {
        let mut own = group.to_vec();
        own.sort_by(|a, b| b.total_cmp(a));
        own.iter().take(n_best).sum()
    };
    let values: Vec<f32> = liked.chunks_exact(of).map(value).collect();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    for group in order.into_iter().skip(n) {
        liked[group * of..(group + 1) * of].fill(f32::NEG_INFINITY);
    }
}
