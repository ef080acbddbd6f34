//! Which layers or heads to swap: those that hurt least, up to a stated divergence.

use std::collections::HashSet;

use crate::error::Result;
use crate::measure::calibrate::{Fitted, apply};
use crate::measure::quality::{Base, Quality, Windows, evaluate};
use crate::plan::Plan;
use crate::session::Session;

/// What is swapped as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// All heads of a layer. Ordered by the divergence that each causes alone.
    Layer,
    /// One head. Ordered by the square of what is wrong with its output.
    Head,
}

/// A point of the frontier.
#[derive(Debug, Clone)]
pub struct Step {
    /// Units that are swapped.
    pub n: usize,
    /// The one that was swapped last: `LAYER` or `LAYER.HEAD`.
    pub last: String,
    /// With these swapped.
    pub quality: Quality,
}

/// The frontier: units in the order in which they are swapped, and what that does.
pub struct Frontier {
    /// Fits of each unit.
    pub units: Vec<Vec<Fitted>>,
    /// After one unit, two, and so on; of heads, at most [`MAX_STEPS`] of these points.
    pub steps: Vec<Step>,
}

/// Most points of a frontier of heads.
pub const MAX_STEPS: usize = 16;

impl Frontier {
    /// Most units that can be swapped while the divergence stays within `budget`, in nats per token.
    pub fn within(&self, budget: f64) -> Option<&Step> {
        let kl = |s: &Step| s.quality.divergence.as_ref().map(|d| d.kl.mean.value);
        self.steps.iter().filter(|s| kl(s).is_some_and(|kl| kl <= budget)).max_by_key(|s| s.n)
    }

    /// What `wanted` asks for in the first `n` units, and `trained` elsewhere.
    pub fn plan(&self, n: usize, wanted: &Plan, trained: &Plan) -> Plan {
        let mut plan = trained.clone();
        for fit in self.units.iter().take(n).flatten() {
            let choice = &wanted.layers[fit.layer].normalizers[fit.head];
            plan.layers[fit.layer].normalizers[fit.head] = choice.clone();
        }
        plan
    }
}

/// Steps that [`search`] takes with this many layers or heads.
pub fn n_steps(unit: Unit, fits: &[Fitted]) -> usize {
    match unit {
        Unit::Layer => 2 * fits.iter().map(|f| f.layer).collect::<HashSet<_>>().len(),
        Unit::Head => points(fits.len()).len(),
    }
}

/// Numbers of heads at which a frontier is measured.
fn points(n: usize) -> Vec<usize> {
    let n_points = n.min(MAX_STEPS);
    (1..=n_points).map(|i| i * n / n_points).collect()
}

/// Swaps more and more units, with fits that were made with the inputs trained with, and judges the
/// result against `base`. `progress` is called after each measurement.
pub fn search(
    session: &mut Session,
    (base, windows): (&mut Base, &Windows),
    fits: &[Fitted],
    unit: Unit,
    progress: &mut dyn FnMut(),
) -> Result<Frontier> {
    let trained = session.model().trained.clone();
    let mut measure = |fits: &mut dyn Iterator<Item = &Fitted>| -> Result<Quality> {
        let mut plan = trained.clone();
        fits.for_each(|fit| apply(&mut plan, std::slice::from_ref(fit)));
        session.set_plan(plan)?;
        let quality = evaluate(session, windows, Some(base), None, &mut |_| {})?;
        progress();
        Ok(quality)
    };
    let same = |a: &Fitted, b: &Fitted| a.layer == b.layer && unit == Unit::Layer;
    let mut units = Vec::new();
    for fits in fits.chunk_by(same) {
        let harm = match unit {
            Unit::Layer => {
                let alone = measure(&mut fits.iter())?.divergence;
                alone.map_or(f64::INFINITY, |d| d.kl.mean.value)
            }
            Unit::Head => fits.iter().map(|f| f.size * f.err * f.err).sum(),
        };
        units.push((harm, fits.to_vec()));
    }
    units.sort_by(|a, b| a.0.total_cmp(&b.0));
    let units: Vec<_> = units.into_iter().map(|(_, fits)| fits).collect();
    let at = match unit {
        Unit::Layer => (1..=units.len()).collect(),
        Unit::Head => points(units.len()),
    };
    let mut steps = Vec::new();
    for n in at {
        let quality = measure(&mut units[..n].iter().flatten())?;
        let last = match (unit, units[n - 1].first()) {
            (Unit::Layer, Some(fit)) => fit.layer.to_string(),
            (_, Some(fit)) => format!("{}.{}", fit.layer, fit.head),
            _ => String::new(),
        };
        steps.push(Step { n, last, quality });
    }
    Ok(Frontier { units, steps })
}
