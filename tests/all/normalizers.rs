//! Every normalizer: what its registry entry promises, identities between them, hostile rows.

use qkov::normalizer::{COMMON, Choice, Domain, Kind, NORMALIZERS, Row};

const AT: Row = Row { position: 4096, layer: 2, head: 1, n_ctx_train: 1024 };

fn weights(text: &str, scores: &[f32]) -> Vec<f32> {
    let mut row = scores.to_vec();
    Choice::parse(text).unwrap().row(&mut row, AT);
    row
}

/// Scores like those of a trained head: normal, of this spread.
fn scores(n: usize, spread: f32, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32
    };
    // Sums of uniforms are as good as normal here.
    (0..n).map(|_| spread * ((0..12).map(|_| uniform()).sum::<f32>() - 6.0)).collect()
}

fn close(a: &[f32], b: &[f32], bound: f32) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= bound)
}

fn assert_close(what: &str, a: &[f32], b: &[f32], bound: f32) {
    assert!(close(a, b, bound), "{what}: {:?} {:?}", &a[..a.len().min(8)], &b[..b.len().min(8)]);
}

const LENGTHS: [usize; 5] = [1, 2, 7, 64, 4097];

fn each_kind(check: impl Fn(&'static Kind, &[f32])) {
    for kind in NORMALIZERS {
        for n in LENGTHS {
            check(kind, &scores(n, 3.0, n as u64 + 5));
        }
    }
}

#[test]
fn hostile_rows_stay_finite() {
    for kind in NORMALIZERS {
        for n in LENGTHS {
            for size in [0.0f32, 1e-30, 1e4] {
                for row in [vec![size; n], vec![-size; n], scores(n, size / 6.0, 3)] {
                    let out = weights(kind.name, &row);
                    let odd = out.iter().find(|w| !w.is_finite());
                    assert!(odd.is_none(), "{} on {n} scores of size {size}: {odd:?}", kind.name);
                }
            }
        }
        let mut row = scores(7, 1.0, 1);
        row[3] = f32::NAN;
        assert!(weights(kind.name, &row).iter().any(|w| w.is_nan()), "{} hides NaN", kind.name);
    }
}

#[test]
fn rows_sum_to_one_where_promised() {
    each_kind(|kind, row| {
        let sum: f64 = weights(kind.name, row).iter().map(|w| f64::from(*w)).sum();
        let one = (sum - 1.0).abs() < 2e-5;
        assert!(one || !kind.sums_to_one, "{} of {}: {sum}", kind.name, row.len());
    });
    // And are not promised where they do not.
    for kind in NORMALIZERS.iter().filter(|k| !k.sums_to_one) {
        let rows = LENGTHS.map(|n| weights(kind.name, &scores(n, 3.0, 9)).iter().sum::<f32>());
        let always = rows.iter().all(|sum| (sum - 1.0).abs() < 1e-6);
        assert!(!always, "{} sums to 1", kind.name);
    }
}

#[test]
fn shifts_change_nothing_where_promised() {
    each_kind(|kind, row| {
        let moved: Vec<f32> = row.iter().map(|x| x + 2.0).collect();
        let (a, b) = (weights(kind.name, row), weights(kind.name, &moved));
        assert!(close(&a, &b, 1e-5) || !kind.shift_invariant, "{} of {}", kind.name, row.len());
    });
    for kind in NORMALIZERS.iter().filter(|k| !k.shift_invariant) {
        let differs = |by: f32| {
            let row = scores(64, 3.0, 4);
            let moved: Vec<f32> = row.iter().map(|x| x + by).collect();
            !close(&weights(kind.name, &row), &weights(kind.name, &moved), 1e-6)
        };
        let told = kind.name == "threshold" || differs(2.0) || differs(40.0);
        assert!(told, "{} is shift-invariant", kind.name);
    }
}

#[test]
fn order_matters_only_where_promised() {
    for kind in NORMALIZERS.iter().filter(|k| !["stick_breaking", "gumbel"].contains(&k.name)) {
        for n in LENGTHS {
            let row = scores(n, 3.0, 8);
            let mut turned: Vec<f32> = row.iter().rev().copied().collect();
            turned = weights(kind.name, &turned);
            turned.reverse();
            assert_close(kind.name, &weights(kind.name, &row), &turned, 3e-6);
        }
    }
}

#[test]
fn limits_are_softmax() {
    for n in LENGTHS {
        let row = scores(n, 2.0, 11);
        let softmax = weights("softmax", &row);
        for (text, bound) in [
            ("temperature:tau=1", 0.0),
            ("top_k:k=1000000", 0.0),
            ("top_p:p=1", 1e-6),
            ("clipped:alpha=0", 1e-6),
            ("softcap:cap=1e6", 1e-4),
            ("sink:s=-1e4", 1e-6),
            ("softmax_n:n=0", 0.0),
            ("differential:lambda=0", 0.0),
            ("adaptive:c4=0,c3=0,c2=0,c1=0,c0=1", 0.0),
            ("entmax:alpha=1.001", 2e-2),
            ("threshold", 0.0),
            ("skip:eps=0", 1e-6),
            ("reweight:power=1", 1e-6),
            ("yarn:f=1", 0.0),
            ("llama4:scale_n=0", 0.0),
            ("softermax:scale=1.442695", 1e-6),
            ("consmax:norm=l1", 1e-6),
            ("softmax:sinks=4", 1e-6),
            ("softmax:renorm=l1", 1e-6),
        ] {
            assert_close(text, &weights(text, &row), &softmax, bound);
        }
        let wide = scores(n, 1.0, 12);
        assert_close(
            "log_n",
            &weights("log_n:n_train=5000", &wide),
            &weights("softmax", &wide),
            0.0,
        );
    }
}

#[test]
fn identities_hold() {
    for n in LENGTHS {
        let row = scores(n, 2.0, 13);
        let softmax = weights("softmax", &row);
        let mass = |text: &str| weights(text, &row).iter().map(|w| f64::from(*w)).sum::<f64>();
        let log_sum = row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        assert!((mass("sink:s=1.5") - sigmoid(log_sum - 1.5)).abs() < 1e-6);
        assert!((mass("softmax1") - sigmoid(log_sum)).abs() < 1e-6);
        assert!((mass("softmax_n:n=7") - sigmoid(log_sum - 7f64.ln())).abs() < 1e-6);
        // Sigmoid with the row's own -L is p / (1 + p).
        let own = format!("sigmoid:b=0,offset={}", -log_sum);
        let odds: Vec<f32> = softmax.iter().map(|p| p / (1.0 + p)).collect();
        assert_close("sigmoid at -L", &weights(&own, &row), &odds, 1e-5);
        assert_close(
            "entmax 2",
            &weights("entmax:alpha=2", &row),
            &weights("sparsemax", &row),
            2e-6,
        );
        let entmax15 = weights("entmax15", &row);
        assert_close("entmax 1.5", &weights("entmax:alpha=1.5", &row), &entmax15, 2e-6);
        let sharp = weights("temperature:tau=1e-4", &row);
        assert_close("hardmax", &weights("hardmax", &row), &sharp, 1e-6);
        // What is left of the stick.
        let stick: f64 = row.iter().map(|x| 1.0 - sigmoid(f64::from(*x))).product();
        assert!((mass("stick_breaking") + stick - 1.0).abs() < 1e-5);
        let l2: f64 = weights("l2", &row).iter().map(|w| f64::from(*w * *w)).sum();
        assert!((l2 - 1.0).abs() < 1e-5);
    }
}

#[test]
fn published_vectors() {
    let row = [-2.0, 0.0, 0.5];
    for (text, expected) in [
        ("softmax", [0.0486, 0.3592, 0.5922]),
        ("sparsemax", [0.0, 0.25, 0.75]),
        ("entmax15", [0.0, 0.3260, 0.6740]),
    ] {
        assert_close(text, &weights(text, &row), &expected, 6e-5);
    }
}

/// By halving, as the definition asks for a root.
fn entmax(x: &[f64], alpha: f64) -> Vec<f64> {
    let z: Vec<f64> = x.iter().map(|x| (alpha - 1.0) * x).collect();
    let max = z.iter().fold(f64::MIN, |a, b| a.max(*b));
    let over = |tau: f64| z.iter().map(move |z| (z - tau).max(0.0).powf(1.0 / (alpha - 1.0)));
    let (mut low, mut high) = (max - 1.0, max);
    for _ in 0..100 {
        let tau = (low + high) / 2.0;
        match over(tau).sum::<f64>() > 1.0 {
            true => low = tau,
            false => high = tau,
        }
    }
    over(low).collect()
}

/// The plain definitions, in `f64`, of those that are not pinned by an identity.
#[test]
fn definitions_hold() {
    type Plain = fn(&[f64]) -> Vec<f64>;
    fn over(w: Vec<f64>, divisor: f64) -> Vec<f64> {
        w.into_iter().map(|w| w / divisor).collect()
    }
    fn l1(w: Vec<f64>) -> Vec<f64> {
        let sum = w.iter().map(|w| w.abs()).sum();
        over(w, sum)
    }
    fn each(x: &[f64], f: fn(f64) -> f64) -> Vec<f64> {
        x.iter().map(|x| f(*x)).collect()
    }
    let plain: &[(&str, Plain)] = &[
        ("relu", |x| over(each(x, |x| x.max(0.0)), x.len() as f64)),
        ("relu2", |x| over(each(x, |x| x.max(0.0).powi(2)), x.len() as f64)),
        ("softplus", |x| over(each(x, |x| x.exp().ln_1p()), x.len() as f64)),
        ("squareplus", |x| over(each(x, |x| (x + (x * x + 4.0).sqrt()) / 2.0), x.len() as f64)),
        ("elu1", |x| l1(each(x, |x| if x > 0.0 { x + 1.0 } else { x.exp() }))),
        ("taylor2", |x| l1(each(x, |x| 1.0 + x + x * x / 2.0))),
        ("power", |x| over(each(x, |x| x.powi(3)), (x.len() as f64).sqrt())),
        ("sigmoid", |x| {
            let n = (x.len() as f64).ln();
            x.iter().map(|x| 1.0 / (1.0 + (n - x).exp())).collect()
        }),
        ("softpick", |x| {
            let sum: f64 = x.iter().map(|x| (x.exp() - 1.0).abs()).sum();
            over(each(x, |x| (x.exp() - 1.0).max(0.0)), sum + 1e-6)
        }),
        ("sigsoftmax", |x| l1(each(x, |x| x.exp() / (1.0 + (-x).exp())))),
        ("softermax", |x| l1(each(x, f64::exp2))),
        ("ssmax", |x| {
            let factor = f64::from(0.1685f32) * (x.len() as f64).ln();
            l1(x.iter().map(|x| (factor * x).exp()).collect())
        }),
        ("lssa", |x| {
            let factor = f64::from(0.1685f32) * (x.len() as f64).ln();
            l1(x.iter().map(|x| (factor * x).exp().ln_1p()).collect())
        }),
        ("sparsemax", |x| entmax(x, 2.0)),
        ("entmax15", |x| entmax(x, 1.5)),
        ("entmax", |x| entmax(x, 1.25)),
        ("entmax:alpha=1.4", |x| entmax(x, f64::from(1.4f32))),
        ("hccs", |x| {
            let max = x.iter().fold(f64::MIN, |a, b| a.max(*b));
            l1(x.iter().map(|x| (1.0 + 0.25 * (x - max)).max(0.0)).collect())
        }),
        ("clipped", |x| {
            let n = x.len() as f64;
            let p = l1(each(x, f64::exp));
            p.iter().map(|p| ((1.0 + 1.0 / n) * p - 1.0 / n).clamp(0.0, 1.0)).collect()
        }),
    ];
    for (name, plain) in plain {
        for n in LENGTHS {
            let row = scores(n, 2.0, 17);
            let wide: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
            let expected: Vec<f32> = plain(&wide).iter().map(|w| *w as f32).collect();
            let size = expected.iter().fold(1e-3f32, |a, w| a.max(w.abs()));
            assert_close(name, &weights(name, &row), &expected, 3e-6 * size);
        }
    }
}

#[test]
fn selections_keep_what_they_say() {
    let row = scores(1000, 3.0, 21);
    let kept = |text: &str| weights(text, &row).iter().filter(|w| **w > 0.0).count();
    assert_eq!(kept("top_k:k=17"), 17);
    let softmax = weights("softmax", &row);
    let mut sorted = softmax.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let mut sum = 0.0f64;
    let fewest = sorted
        .iter()
        .take_while(|w| {
            let more = sum < 0.9;
            sum += f64::from(**w);
            more
        })
        .count();
    assert_eq!(kept("top_p:p=0.9"), fewest);
    assert!((weights("top_p:p=0.9,rest=lost", &row).iter().sum::<f32>() - 0.9).abs() < 0.02);
    let max = row.iter().fold(f32::MIN, |a, b| a.max(*b));
    let near = row.iter().filter(|x| **x >= max + 1e-3f32.ln()).count();
    assert_eq!(kept("skip:eps=0.001"), near);
    assert_eq!(kept(&format!("threshold:theta={}", max + 1.0)), 1);
}

#[test]
fn common_parameters_do_what_they_say() {
    let row = scores(9, 2.0, 31);
    let softmax = weights("softmax", &row);
    let double: Vec<f32> = softmax.iter().map(|w| 2.0 * w).collect();
    assert_close("gain", &weights("softmax:gain=2", &row), &double, 1e-6);
    assert_close(
        "scale",
        &weights("softmax:scale=2", &row),
        &weights("temperature:tau=0.5", &row),
        1e-6,
    );
    let shifted = format!("relu:offset_n={}", 1.0);
    let by_hand = format!("relu:offset={}", 9f32.ln());
    assert_close("offset_n", &weights(&shifted, &row), &weights(&by_hand, &row), 1e-6);
    let warmer = format!("softmax:scale_n={}", 1.0 / 9f32.ln());
    assert_close("scale_n", &weights(&warmer, &row), &weights("softmax:scale=2", &row), 1e-6);
    let first = weights("hardmax:sinks=3", &row);
    assert_close("sinks", &first[..3], &softmax[..3], 1e-6);
    assert!((first.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    assert!((weights("sigmoid:renorm=l1", &row).iter().sum::<f32>() - 1.0).abs() < 1e-6);
}

#[test]
fn texts_are_read_back() {
    for kind in NORMALIZERS {
        assert_eq!(Choice::parse(kind.name).unwrap().text(), kind.name);
        assert!(!kind.formula.is_empty() && !kind.paper.is_empty(), "{}", kind.name);
        for param in kind.params.iter().chain(COMMON) {
            let value = match param.domain {
                Domain::From(a, b) | Domain::Above(a, b) => {
                    (a.max(-9.0) + b.min(9.0)) / 2.0 + 0.125
                }
                Domain::Whole(a, _) => a + 1.0,
                Domain::Word(words) => {
                    let text = format!("{}:{}={}", kind.name, param.name, words[words.len() - 1]);
                    Choice::parse(&text).unwrap();
                    continue;
                }
            };
            let value = match param.domain {
                Domain::From(a, b) => value.clamp(a, b),
                Domain::Above(_, b) => value.min(b),
                _ => value,
            };
            let text = format!("{}:{}={value}", kind.name, param.name);
            let choice = Choice::parse(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            let again = Choice::parse(&choice.text()).unwrap();
            assert_eq!(again.text(), choice.text());
        }
    }
}

#[test]
fn wrong_texts_are_refused() {
    for (text, expected) in [
        ("sofmax", "normalizer \"sofmax\" is not known; known: softmax, temperature,"),
        (
            "softmax:t=1",
            "normalizer softmax has no parameter \"t\"; it has scale (default 1, any number)",
        ),
        ("temperature:tau=0", "normalizer temperature: tau = 0; allowed more than 0"),
        ("temperature:tau=-1", "tau = -1; allowed more than 0"),
        ("temperature:tau=NaN", "tau = NaN; allowed more than 0"),
        ("temperature:tau=inf", "tau = inf; allowed more than 0"),
        ("top_k:k=0", "k = 0; allowed whole numbers 1 to 1000000000"),
        ("top_k:k=2.5", "k = 2.5; allowed whole numbers"),
        ("entmax:alpha=1", "alpha = 1; allowed 1.001 to 2"),
        ("entmax:alpha=3", "alpha = 3; allowed 1.001 to 2"),
        ("relu:norm=l3", "norm = l3; allowed none or n or sqrt_n or l1 or l2"),
        ("relu:norm", "\"norm\" is not key=value"),
    ] {
        let Err(error) = Choice::parse(text) else { panic!("{text}: accepted") };
        let error = error.to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}
