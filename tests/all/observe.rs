//! Looking into attention: what is seen is what is computed.

use std::sync::Arc;

use qkov::cpu::{Observer, Seen};
use qkov::engine::{CacheType, Threads};
use qkov::measure::heads::{RowStats, observe};
use qkov::measure::quality::Windows;
use qkov::measure::record::record;
use qkov::session::{Options, Session};

use crate::family;

const TEXT: &str = "The fox went down to the river, and the river was cold and wide. ";

fn session(norm: &str, cache: CacheType) -> (Session, Vec<u32>) {
    let mut model = family::softmax();
    model.set_normalizers(norm).unwrap();
    let tokens = model.tokenizer.encode(&TEXT.repeat(20), true, false).unwrap();
    let n_threads = Threads { one: 2, batch: 2 };
    let options = Options { n_threads, cache: (cache, cache), ..Options::default() };
    (Session::new(Arc::new(model), &options).unwrap(), tokens[..230].to_vec())
}

/// Looks at every second layer.
struct EverySecond;

impl Observer for EverySecond {
    fn wants(&self, layer: usize) -> bool {
        layer % 2 == 1
    }

    fn see(&self, seen: &Seen) {
        assert_eq!(seen.layer % 2, 1);
    }
}

#[test]
fn observing_changes_no_bit() {
    for cache in CacheType::ALL {
        let (mut session, tokens) = session("*=softmax;1=sparsemax", cache);
        let plain = session.feed_wanting(&tokens, 100..230).unwrap().to_vec();
        session.rewind(0);
        let observed = session.feed_observed(&tokens, 100..230, &EverySecond).unwrap();
        assert!(plain == observed, "{}", cache.name());
        session.rewind(0);
        session.feed(&tokens[..100]).unwrap();
        let rest = session.feed_observed(&tokens[100..], 0..130, &EverySecond).unwrap();
        assert!(plain == rest, "{} in two parts", cache.name());
    }
}

#[test]
fn what_is_seen_fits_together() {
    for cache in CacheType::ALL {
        let (mut session, tokens) = session("softmax", cache);
        let n = tokens.len();
        let n_layer = session.model().layers.len();
        let records = record(&mut session, &tokens, 0..n_layer).unwrap();
        assert_eq!(records.len(), n_layer);
        for record in &records {
            for head in &record.heads {
                let dim = head.values.len() / n;
                for q in 0..n {
                    let (scores, hidden) = head.scores[q * n..(q + 1) * n].split_at(q + 1);
                    let weights = &head.weights[q * n..(q + 1) * n];
                    assert!(hidden.iter().all(|x| *x == f32::NEG_INFINITY));
                    assert!(weights[q + 1..].iter().all(|w| *w == 0.0));
                    let sum: f64 = scores.iter().map(|x| f64::from(*x).exp()).sum();
                    for (x, w) in scores.iter().zip(weights) {
                        let softmax = f64::from(*x).exp() / sum;
                        assert!((softmax - f64::from(*w)).abs() < 1e-6);
                    }
                    for i in 0..dim {
                        let values = head.values.chunks_exact(dim).map(|v| f64::from(v[i]));
                        let mixed: f64 =
                            weights.iter().zip(values).map(|(w, v)| f64::from(*w) * v).sum();
                        let output = f64::from(head.outputs[q * dim + i]);
                        assert!(
                            (mixed - output).abs() < 1e-5 * (1.0 + mixed.abs()),
                            "{mixed} {output}"
                        );
                    }
                }
            }
        }
    }
    let (mut session, tokens) = session("softmax", CacheType::F16);
    let error = record(&mut session, &tokens, 0..99).unwrap_err().to_string();
    assert!(error.contains("the model has 0 to"), "{error}");
}

#[test]
fn rows_of_known_weights() {
    let scores = [0.0, 2f32.ln(), f32::NEG_INFINITY, 4f32.ln()];
    let row = RowStats::new(&scores, &[0.5, 0.0, 0.0, -0.5]);
    assert_eq!((row.n, row.support, row.mass, row.sink), (3, 2, 0.0, 0.5));
    assert!((row.entropy - 2f32.ln()).abs() < 1e-6);
    assert!((row.effective - 2.0).abs() < 1e-6);
    assert!((row.log_sum - 7f32.ln()).abs() < 1e-6);
    let nothing = RowStats::new(&scores, &[0.0; 4]);
    assert_eq!((nothing.support, nothing.entropy, nothing.effective), (0, 0.0, 0.0));
}

#[test]
fn heads_differ_from_what_they_were_trained_with_only_where_they_were_changed() {
    let (mut session, tokens) =
        session("*=softmax;2=sigmoid;0.1=temperature:tau=1", CacheType::F16);
    let windows = Windows::new([&tokens[..], &tokens].concat(), 128).unwrap();
    let stats = observe(&mut session, &windows, 2, &mut |_| {}).unwrap();
    for head in &stats {
        assert_eq!(head.rows.len(), 2 * 127);
        let mass = head.mean(|r| r.mass);
        match (head.layer, head.head) {
            (2, _) => assert!(head.output_err > 0.1 && (mass - 1.0).abs() > 0.01, "{mass}"),
            // The same by another name.
            (0, 1) => assert!(head.output_err < 1e-3 && (mass - 1.0).abs() < 1e-5),
            _ => assert!(head.output_err == 0.0 && (mass - 1.0).abs() < 1e-5),
        }
        let (intercept, slope) = head.log_sum_over_n();
        let mid = intercept + slope * head.mean(|r| (r.n as f32).ln());
        assert!((mid - head.mean(|r| r.log_sum)).abs() < 1e-6);
    }
}
