//! Matrices of the feed-forward network, or of many.

use super::{Binder, ExpertLayer, Ffn, Linear};
use crate::arch::{Bias, Experts, Gate, Hparams, LayerHparams};
use crate::bad_file;
use crate::error::Result;
use crate::simd;

impl Binder<'_> {
    /// The FFN that all tokens of a layer go through, beside experts or without them.
    pub(super) fn ffn(
        &mut self,
        blk: &str,
        layer: &LayerHparams,
        hp: &Hparams,
    ) -> Result<Option<Ffn>> {
        let (e, n_ff) = (hp.n_embd, layer.n_ff);
        if n_ff == 0 {
            return Ok(None);
        }
        let shared = if layer.has_experts { "_shexp" } else { "" };
        let mut linear = |name: &str, n_in: usize, n_out: usize| {
            self.linear(&format!("{blk}.{name}{shared}"), n_in, n_out, hp.ffn_bias)
        };
        let (gate, up) = match hp.ffn_gate {
            Gate::None => (None, linear("ffn_up", e, n_ff)?),
            Gate::Own => (Some(linear("ffn_gate", e, n_ff)?), linear("ffn_up", e, n_ff)?),
            Gate::Fused => {
                let both = linear("ffn_up", e, 2 * n_ff)?;
                (Some(both.rows(0, n_ff)?), both.rows(n_ff, n_ff)?)
            }
        };
        let down = linear("ffn_down", n_ff, e)?;
        let has_share = layer.has_experts && hp.experts.is_some_and(|e| e.shared_gate);
        let share = match has_share {
            true => Some(self.linear(&format!("{blk}.ffn_gate_inp_shexp"), e, 1, Bias::Never)?),
            false => None,
        };
        Ok(Some(Ffn { gate, up, down, share }))
    }

    /// The experts of a layer.
    pub(super) fn experts(
        &mut self,
        blk: &str,
        experts: &Experts,
        hp: &Hparams,
    ) -> Result<ExpertLayer> {
        let at = |name: &str| format!("{blk}.{name}");
        let router = self.linear(&at("ffn_gate_inp"), hp.n_embd, experts.n, experts.bias)?;
        let preference = self.bias(&at("exp_probs_b"), experts.n, Bias::Optional)?;
        if preference.as_ref().is_some_and(|bias| !simd::are_finite(bias)) {
            // It chooses experts, and is in no sum that would show it.
            bad_file!("tensor \"{}\": every number must be finite", at("exp_probs_b.bias"));
        }
        let mut all_of = |name: &str, n_in: usize, n_out: usize| -> Result<Vec<Linear>> {
            let weight = self.shaped(&at(&format!("{name}.weight")), &[n_in, n_out, experts.n])?;
            let bias = match experts.bias {
                Bias::Never => None,
                _ => Some(self.rows_of_floats(&at(&format!("{name}.bias")), n_out, experts.n)?),
            };
            let all = Linear { weight, bias };
            (0..experts.n).map(|i| all.rows(i * n_out, n_out)).collect()
        };
        let gate = all_of("ffn_gate_exps", hp.n_embd, experts.n_ff)?;
        let up = all_of("ffn_up_exps", hp.n_embd, experts.n_ff)?;
        let down = all_of("ffn_down_exps", experts.n_ff, hp.n_embd)?;
        let all = gate.into_iter().zip(up).zip(down);
        let all = all.map(|((gate, up), down)| Ffn { gate: Some(gate), up, down, share: None });
        Ok(ExpertLayer { router, preference, all: all.collect() })
    }

    /// The numbers of a matrix, row after row.
    fn rows_of_floats(&mut self, name: &str, n_in: usize, n_out: usize) -> Result<Vec<f32>> {
        let w = self.matrix(name, n_in, n_out)?;
        let mut all = vec![0.0; n_in * n_out];
        for (i, row) in all.chunks_exact_mut(n_in).enumerate() {
            w.dequantize_row(i, row);
        }
        Ok(all)
    }
}
