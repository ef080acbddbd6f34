//! What the attention of a layer costs, in numbers that no machine changes.

use super::{Geometry, Kept};

/// Elements and products of the attention of one layer, or of several together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Elements of the matrices, which a token alone reads.
    pub weights: usize,
    /// Products with them for each token.
    pub products: usize,
    /// Elements that the cache keeps of a token.
    pub cached: usize,
    /// Products of a token alone for each token that it sees.
    pub attended: usize,
    /// The same of tokens that are read together, which see keys and values in any form.
    pub attended_together: usize,
}

impl Geometry {
    /// What attention of this shape costs in a model of this width.
    pub fn cost(&self, n_embd: usize) -> Cost {
        let (q, k, v) = (self.query_width(), self.key_width(), self.value_width());
        let o = self.output_width();
        let together = q + o;
        // What makes values.
        let v_in = if let Kept::Keys { .. } = self.kept { k } else { n_embd };
        let weights = n_embd * (q + k + o) + v_in * v;
        let (products, attended) = match self.kept {
            Kept::KeysAndValues => (weights, together),
            // Keys are mixed with the weights of every query head, and the mix is made an output.
            Kept::Keys { .. } => (n_embd * (q + k + o) + k * o, q + self.n_head * k),
            // Queries are multiplied with what makes keys, instead of inputs.
            Kept::Input { n_embd } => (2 * n_embd * (q + o), 2 * self.n_head * n_embd),
        };
        Cost { weights, products, cached: self.cached(), attended, attended_together: together }
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), |a, b| Cost {
            weights: a.weights + b.weights,
            products: a.products + b.products,
            cached: a.cached + b.cached,
            attended: a.attended + b.attended,
            attended_together: a.attended_together + b.attended_together,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::KvHead;
    use super::*;

    /// GPT-2 small: 12 heads of 64, 768 wide.
    fn gpt2(kept: Kept) -> Cost {
        let kv = vec![KvHead { score_dim: 64, value_dim: 64, planes: None }; 12];
        Geometry { kept, ..Geometry::new(12, kv) }.cost(768)
    }

    #[test]
    fn forms_of_gpt2_cost_what_formulas_say() {
        let d = 768;
        let split = gpt2(Kept::KeysAndValues);
        assert_eq!((split.weights, split.products), (4 * d * d, 4 * d * d));
        assert_eq!((split.cached, split.attended), (2 * d, 2 * d));
        let slim = gpt2(Kept::Keys { n_planes: 0 });
        assert_eq!((slim.weights, slim.products), (4 * d * d, 4 * d * d));
        assert_eq!((slim.cached, slim.attended), (d, d + 12 * d));
        let absorb = gpt2(Kept::Input { n_embd: d });
        assert_eq!((absorb.weights, absorb.products), (4 * d * d, 4 * d * d));
        assert_eq!((absorb.cached, absorb.attended), (d, 24 * d));
        assert_eq!(slim.attended_together, split.attended);
    }

    #[test]
    fn grouped_heads_share_what_is_cached() {
        // Qwen2.5-0.5B: 14 heads, 2 of keys and values, 896 wide.
        let kv = vec![KvHead { score_dim: 48, value_dim: 64, planes: None }; 2];
        let cost = Geometry::new(14, kv).cost(896);
        assert_eq!(cost.weights, 896 * (14 + 2) * (48 + 64));
        assert_eq!((cost.cached, cost.attended), (2 * (48 + 64), 14 * (48 + 64)));
    }
}
