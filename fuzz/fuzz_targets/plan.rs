//! What attention is made of, as texts: a plan file in TOML, or a line each of normalizers, forms and masks.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use qkov::model::Model;
use qkov::normalizer::{self, Row};
use qkov::plan::{Plan, PlanFile};
use qkov::session::Session;
use qkov::session::pool::Ask;
use qkov_fuzz::{model, session};

thread_local! {
    static SESSION: RefCell<Session> = RefCell::new(session(model()).unwrap());
}

/// What a plan says is what is read of it again.
fn check_file(plan: &Plan, model: &Model) {
    let (trained, hash) = (&model.trained, model.gguf.hash());
    let file = PlanFile::of(plan, trained, &hash);
    let read = PlanFile::parse(&file.text().unwrap()).unwrap();
    assert_eq!(read, file);
    let mut again = trained.clone();
    if trained.other_forms(plan).is_empty() {
        read.apply(&mut again, &hash, &model.hparams).unwrap();
        assert_eq!(again.names(), plan.names());
    }
}

/// No row of sound scores may become anything but numbers.
fn check_rows(text: &str) {
    let Ok(choice) = normalizer::Choice::parse(text) else { return };
    let again = normalizer::Choice::parse(&choice.text()).unwrap();
    assert_eq!(again.text(), choice.text());
    for n in [1usize, 2, 7, 40] {
        let mut scores: Vec<f32> = (0..n).map(|i| ((i * 7919) % 23) as f32 - 9.0).collect();
        choice.row(&mut scores, Row { position: n - 1, n_ctx_train: 64, ..Row::default() });
        assert!(!scores.iter().any(|x| x.is_nan()), "{}: {scores:?}", choice.text());
    }
}

/// A plan file, or lines.
fn plan(text: &str, model: &Model) -> Option<Plan> {
    if let Ok(file) = PlanFile::parse(text) {
        let mut plan = model.trained.clone();
        return file.apply(&mut plan, &model.gguf.hash(), &model.hparams).ok().map(|()| plan);
    }
    let mut lines = text.lines().map(|line| (!line.is_empty()).then(|| line.to_string()));
    let mut line = || lines.next().flatten();
    let ask = Ask { norm: line(), form: line(), mask: line() };
    ask.norm.iter().for_each(|text| check_rows(text));
    ask.plan(model).ok()
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    SESSION.with_borrow_mut(|session| {
        session.set_plan(session.model().trained.clone()).unwrap();
        let Some(plan) = plan(text, session.model()) else { return };
        check_file(&plan, session.model());
        if session.set_plan(plan).is_ok() && session.feed_prompt(&[1, 2, 3, 4, 5]).is_ok() {
            session.feed(&[6]).unwrap();
        }
    });
});
