//! Center: the means of keys and values are taken out of what is cached, and given back where that costs
//! nothing. Where means are large, what is cached is smaller then, and rounding it loses less.
//!
//! A constant `c` taken from all keys of a head takes `q . c` from all scores of a row, which softmax does
//! not see; with a rotation between, it would be another one for every distance. A constant taken from all
//! values takes itself from the output, as weights sum to 1, and comes back through the output's bias: `W_O
//! c`. Without a text the constants are the biases, so that there are none left.

use super::{
    Choice, Form, Geometry, Grams, Rewritten, Site, Trained, Verdict, Weights, only_products,
};
use crate::error::Result;
use crate::param::{Domain, Param, param};

pub(super) struct Center;

static PARAMS: &[Param] = &[param(
    "data",
    "whether means are those of a text; if not, they are the biases",
    1.0,
    Domain::Word(&["no", "yes"]),
)];

impl Form for Center {
    fn name(&self) -> &'static str {
        "center"
    }

    fn what(&self) -> &'static str {
        "means of keys, where they are not rotated, and of values are not cached: rounded caches lose less \
         where means are large"
    }

    fn paper(&self) -> &'static str {
        "keys: Zhang et al. 2024 (SageAttention), arXiv 2410.02367"
    }

    fn params(&self) -> &'static [Param] {
        PARAMS
    }

    fn applies(&self, _: &Choice, site: &Site) -> Verdict {
        only_products(site)?;
        may_center(site)
    }

    fn exact(&self, _: &Choice, _: &Site) -> Verdict {
        Ok(())
    }

    fn needs_grams(&self, choice: &Choice) -> bool {
        choice.value("data") == Some(1.0)
    }

    fn rewrites(&self) -> bool {
        true
    }

    fn rewrite(&self, choice: &Choice, layers: &[Trained]) -> Result<Vec<Option<Rewritten>>> {
        let with_data = self.needs_grams(choice);
        let new = |layer: &Trained| centered(layer, layer.grams.filter(|_| with_data));
        Ok(layers.iter().map(|layer| Some(new(layer))).collect())
    }
}

/// Refuses normalizers that see the means.
pub(super) fn may_center(site: &Site) -> Verdict {
    match site.shift_invariant && site.unit_sum {
        true => Ok(()),
        false => {
            Err("means can only be taken out where weights sum to 1 and do not change when a \
                      constant is added to scores, as those of softmax without a cap"
                .into())
        }
    }
}

fn centered(layer: &Trained, grams: Option<&Grams>) -> Rewritten {
    let (site, mut w) = (&layer.site, (layer.weights)());
    let hp = site.hparams;
    let geometry = Geometry::new(site.at().n_head, hp.kv_heads(site.at()));
    let n = geometry.n_head_kv();
    if !site.rotates() && hp.qk_norm.is_none() {
        let means = grams.map(|g| g.key_means.concat());
        take(&mut w.k.bias, means);
    }
    let taken = take(&mut w.v.bias, grams.map(|g| g.value_means.concat()));
    give_back(&mut w, &geometry, &taken);
    let errors = vec![0.0; n];
    Rewritten {
        weights: w,
        geometry,
        score_errors: errors.clone(),
        output_errors: errors,
        damped: 0,
    }
}

/// Takes means, or a bias itself, from a bias; what was taken.
fn take(bias: &mut Option<Vec<f32>>, means: Option<Vec<f64>>) -> Vec<f64> {
    match means {
        Some(means) => {
            let bias = bias.get_or_insert_with(|| vec![0.0; means.len()]);
            bias.iter_mut().zip(&means).for_each(|(b, m)| *b = (f64::from(*b) - m) as f32);
            means
        }
        None => {
            let all = bias.take().unwrap_or_default();
            *bias = Some(vec![0.0; all.len()]).filter(|_| !all.is_empty());
            all.into_iter().map(f64::from).collect()
        }
    }
}

/// Adds what the output makes of means of values to its bias.
fn give_back(w: &mut Weights, g: &Geometry, means: &[f64]) {
    if means.is_empty() {
        return;
    }
    let bias = w.o.bias.get_or_insert_with(|| vec![0.0; w.o.data.len() / w.o.n_in]);
    for (bias, row) in bias.iter_mut().zip(w.o.data.chunks_exact(w.o.n_in)) {
        let of_head = |head: usize| {
            let means = &means[g.values(head / g.per_kv())];
            means.iter().zip(&row[g.outputs(head)]).map(|(m, w)| m * f64::from(*w)).sum::<f64>()
        };
        *bias = (f64::from(*bias) + (0..g.n_head).map(of_head).sum::<f64>()) as f32;
    }
}
