//! The form that takes least on this machine.

use crate::bad_usage;
use crate::cpu::KvCache;
use crate::engine::CacheType;
use crate::error::{Error, Result};
use crate::measure::timing::{N_PROBE, Parts, Timing, shapes, total};
use crate::merge::{Choice, FORMS, Geometry};
use crate::model::{Model, NewLayer};
use crate::param::{self, Domain, MAX, Param, param};
use crate::plan::Plan;
use crate::session::Session;

/// What chooses a form by its times, in place of a form's name.
pub const AUTO: &str = "auto";

/// Its parameters.
pub static PARAMS: &[Param] = &[
    param(
        "kl",
        "divergence from the model as trained, nats per token, that is allowed; 0: exact forms only",
        0.0,
        Domain::From(0.0, MAX),
    ),
    param("depth", "tokens in the cache before", 1024.0, Domain::Whole(0.0, 1e9)),
    param("prompt", "tokens that are read together", 128.0, Domain::Whole(1.0, 1e6)),
    param("gen", "tokens that are read one by one", 128.0, Domain::Whole(0.0, 1e6)),
];

/// Another form takes less only if it takes at most this share: times are as uncertain as that.
const SURELY_LESS: f64 = 0.98;

/// What a form is to be good at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Auto {
    /// Divergence that is allowed.
    pub kl: f32,
    n_depth: usize,
    n_prompt: usize,
    n_gen: usize,
}

impl Auto {
    /// Reads `auto[:key=value,..]`; none from another text.
    pub fn parse(text: &str) -> Result<Option<Auto>> {
        let (name, rest) = param::split(text);
        if name != AUTO {
            return Ok(None);
        }
        let defaults = PARAMS.iter().map(|p| p.default).collect();
        let values = param::read("form auto", PARAMS.iter(), defaults, rest)?;
        let [kl, n_depth, n_prompt, n_gen] = values[..] else { return Ok(None) };
        let [n_depth, n_prompt, n_gen] = [n_depth, n_prompt, n_gen].map(|n| n as usize);
        Ok(Some(Auto { kl, n_depth, n_prompt, n_gen }))
    }

    /// Tokens that need to fit, as far as the model has positions for them.
    pub fn n_ctx(&self, model: &Model) -> usize {
        model.hparams.within_positions(self.n_depth + self.n_prompt + self.n_gen)
    }

    /// Seconds of a turn.
    fn seconds(&self, t: &Timing) -> f64 {
        let after = self.n_depth + self.n_prompt + self.n_gen / 2;
        self.n_prompt as f64 * t.together(self.n_prompt, self.n_depth)
            + self.n_gen as f64 * t.alone(after)
    }

    /// Times all forms that the session's model can have as it is, after the form that it has.
    pub fn time(&self, session: &mut Session) -> Result<(Parts, Vec<Candidate>)> {
        let base = session.model().plan.clone();
        let timing = Timing::measure(session, self.n_prompt, self.n_depth)?;
        let parts = Parts::of(session, self.n_depth);
        let mut found = vec![Candidate::of(session, timing)?];
        for form in FORMS.iter().filter(|f| !f.rewrites()) {
            let choice = Choice::of(*form);
            if base.layers.iter().all(|l| l.form.text() == choice.text()) {
                continue;
            }
            let plan = match wherever(session.model(), &base, &choice) {
                Ok(plan) => plan,
                Err(reason) => {
                    found.push(Candidate::refused(&base, &choice, reason));
                    continue;
                }
            };
            found.push(match session.set_plan(plan) {
                Ok(()) => {
                    // Once through one depth: the other is what is predicted.
                    let n_depth = N_PROBE.min(self.n_depth);
                    let timing = Timing::measure(session, self.n_prompt, n_depth)?;
                    Candidate::of(session, timing)?
                }
                // What only shows in the weights.
                Err(Error::Usage(reason)) => Candidate::refused(&base, &choice, reason),
                Err(e) => return Err(e),
            });
            session.set_plan(base.clone())?;
        }
        Ok((parts, found))
    }

    /// Every layer in the form that saves most there, if that makes more than one form of the candidates
    /// beside the first. What a form saves is taken to be the same in all layers that it changes.
    pub fn mixed(&self, found: &[Candidate]) -> Option<Candidate> {
        let (first, others) = found.split_first()?;
        let whole = first.timing.as_ref().ok()?;
        let saving = others.iter().filter_map(|c| {
            let (timing, layers) = (c.timing.as_ref().ok()?, c.plan.other_forms(&first.plan));
            let saved = (self.seconds(whole) - self.seconds(timing)) / layers.len() as f64;
            (saved > 0.0).then_some((saved, layers, c, timing))
        });
        let saving: Vec<_> = saving.collect();
        let mut mixed = first.clone();
        let mut n_used = vec![0; saving.len()];
        for (i, layer) in mixed.plan.layers.iter_mut().enumerate() {
            let able = (0..saving.len()).filter(|k| saving[*k].1.contains(&i));
            if let Some(k) = able.max_by(|a, b| saving[*a].0.total_cmp(&saving[*b].0)) {
                n_used[k] += 1;
                layer.form = saving[k].2.plan.layers[i].form.clone();
            }
        }
        if n_used.iter().filter(|n| **n > 0).count() < 2 {
            return None;
        }
        let mut timing = *whole;
        for ((_, layers, c, own), n) in saving.iter().zip(n_used).filter(|(_, n)| *n > 0) {
            let share = n as f64 / layers.len() as f64;
            timing = timing.moved(share, (whole, own));
            mixed.cache_bytes += share * (c.cache_bytes - first.cache_bytes);
            mixed.loss = mixed.loss.or(c.loss.clone());
        }
        mixed.timing = Ok(timing);
        mixed.form = mixed.plan.names()[1].clone();
        Some(mixed)
    }

    /// The candidate that takes least: the first, unless another surely takes less.
    pub fn best<'a>(&self, found: &'a [Candidate]) -> Option<&'a Candidate> {
        let seconds = |c: &Candidate| c.timing.as_ref().map_or(f64::INFINITY, |t| self.seconds(t));
        let least = found.iter().min_by(|a, b| seconds(a).total_cmp(&seconds(b)))?;
        let first = found.first()?;
        Some(if seconds(least) <= SURELY_LESS * seconds(first) { least } else { first })
    }

    /// What is chosen between, as a table, and what is chosen.
    pub fn table(&self, found: &[Candidate]) -> String {
        let mut text = format!(
            "{:28} {:>13} {:>10} {:>9} {:>9}   {} tokens cached, {} read, {} written\n",
            "form",
            "cache B/token",
            "prompt t/s",
            "token t/s",
            "turn s",
            self.n_depth,
            self.n_prompt,
            self.n_gen
        );
        for c in found {
            text += &match &c.timing {
                Ok(t) => format!(
                    "{:28} {:13.0} {:10.1} {:9.1} {:9.2}{}\n",
                    c.form,
                    c.cache_bytes,
                    1.0 / t.together(self.n_prompt, self.n_depth),
                    1.0 / t.alone(self.n_depth),
                    self.seconds(t),
                    c.loss.as_ref().map_or(String::new(), |loss| format!("   not exact: {loss}"))
                ),
                Err(reason) => format!("{:28} {reason}\n", c.form),
            };
        }
        let best = self.best(found).map_or("", |c| &c.form);
        text + "chosen: " + best
    }
}

/// A form that a model might have.
#[derive(Clone)]
pub struct Candidate {
    /// The forms of all layers.
    pub form: String,
    /// The same, to be used.
    pub plan: Plan,
    /// Why the model would not be the one that was trained.
    pub loss: Option<String>,
    /// Bytes of a token in the cache.
    pub cache_bytes: f64,
    /// What it takes, or the reason why no layer can have it.
    pub timing: std::result::Result<Timing, String>,
}

impl Candidate {
    /// The form that a session's model has.
    fn of(session: &Session, timing: Timing) -> Result<Candidate> {
        let model = session.model();
        let geometries: Vec<Geometry> = shapes(model).cloned().collect();
        Candidate::new(model, &model.plan, &geometries, (session.cache_types(), timing))
    }

    /// A form that is to be made of new layers, predicted from the times of the model as it is.
    pub fn rewritten(
        (model, types): (&Model, (CacheType, CacheType)),
        layers: &[NewLayer],
        (parts, timing): (&Parts, &Timing),
    ) -> Result<Candidate> {
        let hp = &model.hparams;
        let mut plan = model.plan.clone();
        plan.layers.iter_mut().zip(layers).for_each(|(plan, new)| plan.form = new.form.clone());
        let geometry = |(i, new): (usize, &NewLayer)| match &new.rewritten {
            Some(new) => new.geometry.clone(),
            None => new.form.form().geometry(hp, &hp.layers[i]),
        };
        let geometries: Vec<Geometry> = layers.iter().enumerate().map(geometry).collect();
        let timing = timing.scaled(parts, total(model, geometries.iter()));
        Candidate::new(model, &plan, &geometries, (types, timing))
    }

    fn new(
        model: &Model,
        plan: &Plan,
        geometries: &[Geometry],
        (types, timing): ((CacheType, CacheType), Timing),
    ) -> Result<Candidate> {
        let loss = plan.layers.iter().enumerate().find_map(|(i, layer)| {
            layer.form.form().exact(&layer.form, &model.site(i, &layer.normalizers)).err()
        });
        Ok(Candidate {
            form: plan.names()[1].clone(),
            plan: plan.clone(),
            loss,
            cache_bytes: cache_bytes(geometries, types)?,
            timing: Ok(timing),
        })
    }

    /// One that no layer can have.
    pub fn refused(base: &Plan, choice: &Choice, reason: String) -> Candidate {
        Candidate {
            form: choice.text(),
            plan: base.clone(),
            loss: None,
            cache_bytes: 0.0,
            timing: Err(reason),
        }
    }
}

/// Bytes of a token in a cache of these shapes, without what one layer needs for itself at a time.
fn cache_bytes(geometries: &[Geometry], types: (CacheType, CacheType)) -> Result<f64> {
    // Of a length that divides evenly.
    let cache = KvCache::new(geometries.iter().cloned(), N_PROBE, types)?;
    let bytes: usize = (0..geometries.len()).map(|i| cache.layer_bytes(i)).sum();
    Ok(bytes as f64 / N_PROBE as f64)
}

/// `base` with a form in every layer that can have it; an error is the reason of the first if none can.
pub fn wherever(model: &Model, base: &Plan, choice: &Choice) -> std::result::Result<Plan, String> {
    let mut plan = base.clone();
    let mut reason = None;
    let mut n = 0;
    for (i, layer) in plan.layers.iter_mut().enumerate() {
        match choice.form().applies(choice, &model.site(i, &layer.normalizers)) {
            Ok(()) => {
                layer.form = choice.clone();
                n += 1;
            }
            Err(e) => reason = reason.or(Some(e)),
        }
    }
    if n == 0 { Err(reason.unwrap_or_default()) } else { Ok(plan) }
}

/// Refuses `auto` among forms, where none is chosen.
pub fn refuse(forms: &[String]) -> Result<()> {
    for text in forms {
        if Auto::parse(text)?.is_some() {
            bad_usage!("--form {text}: alone, and only where a model is run");
        }
    }
    Ok(())
}
