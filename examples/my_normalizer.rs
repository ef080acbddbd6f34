//! A normalizer of one's own in an already trained model: `cargo run --release --example my_normalizer`
#![allow(clippy::print_stdout)]
use std::{path::Path, sync::Arc};

use qkov::measure::{SAMPLE, quality};
use qkov::normalizer::{Class, Domain, Kind, Normalizer, Row, param, register};
use qkov::{model::Model, session::Session};

/// Weights fall in a straight line from the largest score, and end `width` below it.
struct Tent(f32);
impl Normalizer for Tent {
    fn row(&self, scores: &mut [f32], _: Row) {
        let max = scores.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
        scores.iter_mut().for_each(|x| *x = (*x - max + self.0).max(0.0));
        let sum: f32 = scores.iter().sum();
        scores.iter_mut().for_each(|w| *w /= sum);
    }
}
static TENT: Kind = Kind {
    name: "tent",
    formula: "w_j = max(x_j - max x + width, 0) / sum",
    paper: "this example",
    params: &[param("width", "scores below the largest", 4.0, Domain::Above(0.0, 100.0))],
    class: Class::TwoPass,
    shift_invariant: true,
    sums_to_one: true,
    make: |values| Box::new(Tent(values[0])),
};

fn main() -> qkov::error::Result<()> {
    register(&TENT)?;
    let mut model = Model::open(Path::new("models/softmax-q8_0.gguf"))?;
    model.set_normalizers("*=softmax;3-5=tent:width=6")?;
    let windows = quality::Windows::new(model.tokenizer.encode(SAMPLE, true, false)?, 256)?;
    let mut session = Session::new(Arc::new(model), &Default::default())?;
    let quality = quality::evaluate(&mut session, &windows, None, None, &mut |_| {})?;
    println!("perplexity {:.1}", quality.ppl.value);
    Ok(())
}
