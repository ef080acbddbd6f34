//! Statistics of heads, as `eval --heads` shows them.

use serde_json::{Value, json};

use crate::measure::heads::{HeadStats, RowStats};
use crate::measure::latency::{mean_and_deviation, percentile};

/// Mean, standard deviation, and the points below which 5, 50 and 95 % lie.
struct Summary {
    mean: f64,
    std: f64,
    points: [f64; 3],
}

fn summary(head: &HeadStats, of: impl Fn(&RowStats) -> f32) -> Summary {
    let mut values: Vec<f64> = head.rows.iter().map(|r| f64::from(of(r))).collect();
    values.sort_by(f64::total_cmp);
    let (mean, std) = mean_and_deviation(&values);
    Summary { mean, std, points: [0.05, 0.5, 0.95].map(|share| percentile(&values, share)) }
}

/// One object for each head.
pub(super) fn report(heads: &[HeadStats]) -> Value {
    let one = |head: &HeadStats| {
        let (mass, log_sum) = (summary(head, |r| r.mass), summary(head, |r| r.log_sum));
        let (intercept, slope) = head.log_sum_over_n();
        json!({
            "layer": head.layer,
            "head": head.head,
            "norm": head.norm,
            "rows": head.rows.len(),
            "entropy": head.mean(|r| r.entropy),
            "mass": mass.mean,
            "mass_std": mass.std,
            "mass_p5": mass.points[0],
            "mass_p50": mass.points[1],
            "mass_p95": mass.points[2],
            "sink_mass": head.mean(|r| r.sink),
            "support": head.mean(|r| r.support as f32),
            "support_share": head.mean(RowStats::support_share),
            "effective_keys": head.mean(|r| r.effective),
            "log_sum": log_sum.mean,
            "log_sum_std": log_sum.std,
            "log_sum_p5": log_sum.points[0],
            "log_sum_p50": log_sum.points[1],
            "log_sum_p95": log_sum.points[2],
            "log_sum_intercept": intercept,
            "log_sum_slope": slope,
            "output_err": head.output_err,
        })
    };
    heads.iter().map(one).collect()
}

/// One line for each head.
pub(super) fn table(heads: &[HeadStats]) -> String {
    let n_rows = heads.first().map_or(0, |h| h.rows.len());
    let mut text = format!(
        "\nheads, means over {n_rows} rows: entropy in nats; keys: 1 / sum of squared weights; used: share of\n\
         keys with a weight; mass: sum of weights; first: weight of the first key; ln sum exp of\n\
         scores; error of outputs against the normalizer trained with\n\n\
         {:>7}{:>9}{:>8}{:>8}{:>16}{:>8}{:>16}{:>9}\n",
        "head", "entropy", "keys", "used %", "mass", "first", "ln sum exp", "error"
    );
    for head in heads {
        let (mass, log_sum) = (summary(head, |r| r.mass), summary(head, |r| r.log_sum));
        let used = 100.0 * head.mean(RowStats::support_share);
        text += &format!(
            "{:>7}{:9.3}{:8.1}{used:8.1}{:9.3} ± {:<5.2}{:7.3}{:8.2} ± {:<5.2}{:8.4}\n",
            format!("{}.{}", head.layer, head.head),
            head.mean(|r| r.entropy),
            head.mean(|r| r.effective),
            mass.mean,
            mass.std,
            head.mean(|r| r.sink),
            log_sum.mean,
            log_sum.std,
            head.output_err,
        );
    }
    text
}
