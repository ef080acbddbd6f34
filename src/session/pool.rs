//! Sequences of one model that go through the layers together, each with normalizers, masks and forms
//! of its own: what a server needs. On the engine cpu.

use std::ops::Range;
use std::sync::Arc;

use super::embed::{pooled, wanted};
use super::timeline::{Timeline, copies};
use super::{Options, context};
use crate::arch::Pooling;
use crate::attention::{Attention, together};
use crate::bad_usage;
use crate::cpu::{self, KvCache, Observer, Span, check_finite};
use crate::engine::{Asked, Kind};
use crate::error::Result;
use crate::model::Model;
use crate::plan::Plan;

/// Most variants that are remembered.
const MAX_VARIANTS: usize = 64;
/// Engines for other forms than the model was opened with, which have packed weights of their own: as
/// many as a comparison needs.
const MAX_OTHER_FORMS: usize = 2;

/// What a sequence attends with, as it is asked for: what is not said is as the model was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, serde::Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// As [`Plan::set_normalizers`] reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<String>,
    /// As [`Plan::set_forms`] reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub form: Option<String>,
    /// As [`Plan::set_masks`] reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<String>,
}

impl Ask {
    /// A model's plan with what is asked for.
    ///
    /// # Errors
    ///
    /// What cannot be read or does not go with the model, and forms that need other matrices.
    pub fn plan(&self, model: &Model) -> Result<Plan> {
        let mut plan = model.plan.clone();
        if let Some(text) = &self.norm {
            plan.set_normalizers(text)?;
            model.check(&plan)?;
        }
        if let Some(text) = &self.mask {
            plan.set_masks(text)?;
        }
        if let Some(text) = &self.form {
            plan.set_forms(text)?;
            model.check_forms(&plan)?;
        }
        Ok(plan)
    }
}

/// A plan, bound to the model.
pub struct Variant {
    plan: Plan,
    attention: Vec<Attention>,
    /// Forms, by layer.
    forms: Vec<String>,
}

impl Variant {
    fn new(model: &Model, plan: Plan) -> Variant {
        let attention = model.bind(&plan);
        let forms = plan.layers.iter().map(|layer| layer.form.text()).collect();
        Variant { plan, attention, forms }
    }

    /// Normalizers, forms and masks in use, as [`Plan::names`] gives them.
    pub fn names(&self) -> [String; 3] {
        self.plan.names()
    }
}

/// A sequence of tokens with its cache: what is read, and what is to be read next.
pub struct Sequence {
    variant: Arc<Variant>,
    timeline: Timeline,
    cache: KvCache,
    /// Tokens that follow, all copies of prompts among them.
    todo: Vec<u32>,
    /// Positions of the prompt that is being read.
    prompt: Range<usize>,
}

impl Sequence {
    /// What it attends with.
    pub fn variant(&self) -> &Arc<Variant> {
        &self.variant
    }

    /// The tokens that were read, by position.
    pub fn tokens(&self) -> &[u32] {
        self.timeline.tokens()
    }

    /// Refuses numbers that came of it and are not finite, see [`check_finite`].
    pub fn check_finite(&self, numbers: &[f32]) -> Result<()> {
        check_finite(numbers, self.cache.fault(self.tokens().len()))
    }

    /// Number of tokens that are still to be read.
    pub fn n_todo(&self) -> usize {
        self.todo.len()
    }

    /// Positions that are kept if this prompt is begun.
    pub fn n_shared(&self, prompt: &[u32]) -> usize {
        self.timeline.shared(prompt, &[]).1
    }

    /// Bytes of the cache that its positions take.
    pub fn cache_bytes(&self) -> usize {
        self.cache.n_bytes() / self.cache.n_ctx() * self.tokens().len()
    }

    /// Bytes of the cache when the context is full.
    pub fn max_cache_bytes(&self) -> usize {
        self.cache.n_bytes()
    }

    /// Forgets all tokens.
    pub fn forget(&mut self) {
        self.timeline.rewind(0);
        self.todo.clear();
    }

    /// Has more tokens read, which see nothing after them.
    pub fn push(&mut self, tokens: &[u32]) {
        self.todo.extend_from_slice(tokens);
    }
}

/// What is done with a sequence in a step.
pub struct Step<'a> {
    /// The sequence.
    pub sequence: &'a mut Sequence,
    /// How many tokens of those that are to be read it takes, or a few more: some masks have tokens
    /// read together.
    pub n: usize,
    /// What is asked of all of them, instead of the last that is to be read.
    pub all: bool,
}

/// A model and what takes sequences forward.
pub struct Pool {
    model: Arc<Model>,
    options: Options,
    n_ctx: usize,
    /// First that for the forms that the model was opened in.
    engines: Vec<(Vec<String>, cpu::Engine)>,
    variants: Vec<(Ask, Arc<Variant>)>,
    /// Things worth telling that do not prevent use.
    pub warnings: Vec<String>,
}

impl Pool {
    /// A pool without sequences, each of which will have the context that the options say.
    ///
    /// # Errors
    ///
    /// Another engine than cpu, and what an engine could not start.
    pub fn new(model: Arc<Model>, options: &Options) -> Result<Pool> {
        if options.engine != Kind::Cpu {
            bad_usage!("engine {}: many sequences need the engine cpu", options.engine.name());
        }
        let mut warnings = Vec::new();
        let n_ctx = context(&model, options.n_ctx, &mut warnings)?;
        model.check_file()?;
        let engine = cpu::Engine::new(&model, options.n_threads, options.pin, options.exact)?;
        let variant = Arc::new(Variant::new(&model, model.plan.clone()));
        let engines = vec![(variant.forms.clone(), engine)];
        let variants = vec![(Ask::default(), variant)];
        let options = options.clone();
        Ok(Pool { model, options, n_ctx, engines, variants, warnings })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Tokens that fit a sequence.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// What a sequence attends with unless asked: as the model was opened.
    pub fn first(&self) -> &Arc<Variant> {
        &self.variants[0].1
    }

    /// What a sequence attends with that is asked for so.
    ///
    /// # Errors
    ///
    /// Those of [`Ask::plan`].
    pub fn variant(&mut self, ask: &Ask) -> Result<Arc<Variant>> {
        if let Some((_, variant)) = self.variants.iter().find(|(known, _)| known == ask) {
            return Ok(variant.clone());
        }
        let plan = ask.plan(&self.model)?;
        let variant = Arc::new(Variant::new(&self.model, plan));
        if self.variants.len() == MAX_VARIANTS {
            self.variants.truncate(1);
        }
        self.variants.push((ask.clone(), variant.clone()));
        Ok(variant)
    }

    /// An empty sequence.
    pub fn sequence(&self, variant: Arc<Variant>) -> Result<Sequence> {
        let geometry = variant.attention.iter().map(|a| a.geometry.clone());
        let cache = KvCache::new(geometry, self.n_ctx, self.options.cache)?;
        let timeline = Timeline::default();
        Ok(Sequence { variant, timeline, cache, todo: Vec::new(), prompt: 0..0 })
    }

    /// Tokens in all copies of a prompt.
    pub fn n_read(&self, variant: &Variant, prompt: &[u32]) -> usize {
        copies(prompt, variant.plan.n_copies(), self.model.tokenizer.bos()).len()
    }

    /// Has a sequence read a prompt, of which it keeps what it shares with what it has read: so many of
    /// the prompt's tokens. `as_text`: nothing is kept, and no token sees later ones, whatever
    /// the mask does with prompts.
    ///
    /// # Errors
    ///
    /// No tokens, some that the vocabulary does not have, or more than fit.
    pub fn begin(&self, sequence: &mut Sequence, prompt: &[u32], as_text: bool) -> Result<usize> {
        let n_vocab = self.model.hparams.n_vocab;
        if let Some(token) = prompt.iter().find(|token| **token as usize >= n_vocab) {
            bad_usage!("token {token}; the vocabulary has {n_vocab}");
        }
        if prompt.is_empty() {
            bad_usage!("the prompt has no tokens; 1 or more are needed");
        }
        let (n, position) = if as_text { (0, 0) } else { sequence.timeline.shared(prompt, &[]) };
        let Sequence { variant, timeline, todo, prompt: at, .. } = sequence;
        let new = &prompt[n..];
        let n_copies = if as_text { 1 } else { variant.plan.n_copies() };
        let all = copies(new, n_copies, self.model.tokenizer.bos());
        if position + all.len() > self.n_ctx {
            let n = position + all.len();
            bad_usage!("{n} tokens do not fit a context of {}", self.n_ctx);
        }
        timeline.rewind(position);
        *at = match as_text {
            true => 0..0,
            false => timeline.begin_prompt(&variant.attention, all.len(), new.len()),
        };
        *todo = all.into_owned();
        Ok(n)
    }

    /// The embedding of a text, as [`Session::embed`](super::Session::embed) gives it.
    pub fn embed(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        pooling: Pooling,
    ) -> Result<Vec<f32>> {
        sequence.forget();
        self.begin(sequence, tokens, false)?;
        let n_copies = sequence.variant.plan.n_copies();
        let wanted = wanted((sequence.n_todo(), tokens.len()), n_copies, pooling)?;
        let n_embd = self.model.hparams.n_embd;
        let mut states = Vec::new();
        let step = Step { n: sequence.n_todo(), sequence, all: true };
        self.forward(&mut [step], None, (Asked::States, &mut states))?;
        sequence.check_finite(&states)?;
        states.truncate(wanted.end * n_embd);
        states.drain(..wanted.start * n_embd);
        Ok(pooled(states, pooling, n_embd))
    }

    /// Makes of a sequence what another one of the same variant has read of a prompt.
    pub fn share(&self, from: &Sequence, to: &mut Sequence, prompt: &[u32]) -> Result<()> {
        let mut timeline = from.timeline.clone();
        timeline.rewind(from.timeline.shared(prompt, &[]).1);
        to.cache.take(&from.cache, timeline.tokens().len())?;
        (to.timeline, to.variant) = (timeline, from.variant.clone());
        to.todo.clear();
        Ok(())
    }

    /// Takes sequences forward, and appends to `out` what is asked of their tokens. Where each step's
    /// rows are: `[n, n_vocab]` or `[n, n_embd]`, no rows for a step that does not read the last token.
    ///
    /// # Errors
    ///
    /// An engine for other forms could not start.
    pub fn forward(
        &mut self,
        steps: &mut [Step],
        observer: Option<&dyn Observer>,
        (asked, out): (Asked, &mut Vec<f32>),
    ) -> Result<Vec<Range<usize>>> {
        let width = match asked {
            Asked::Logits => self.model.hparams.n_vocab,
            Asked::States => self.model.hparams.n_embd,
        };
        for step in steps.iter_mut() {
            let Sequence { variant, timeline, todo, prompt, .. } = &*step.sequence;
            let start = timeline.tokens().len();
            let end = start + step.n.min(todo.len());
            step.n = together(&variant.attention, start..end, prompt) - start;
        }
        let mut rows = vec![0..0; steps.len()];
        let mut left: Vec<usize> = (0..steps.len()).collect();
        while let Some(first) = left.first() {
            let variant = steps[*first].sequence.variant.clone();
            let same = |i: &usize| steps[*i].sequence.variant.forms == variant.forms;
            let (now, later): (Vec<usize>, Vec<usize>) = left.iter().copied().partition(same);
            let engine = self.engine(&variant)?;
            self.group(engine, steps, &now, observer, (asked, &mut *out), (&mut rows, width));
            left = later;
        }
        Ok(rows)
    }

    /// Takes the steps in `now` forward, which have the forms of one engine.
    fn group(
        &mut self,
        engine: usize,
        steps: &mut [Step],
        now: &[usize],
        observer: Option<&dyn Observer>,
        (asked, out): (Asked, &mut Vec<f32>),
        (rows, width): (&mut [Range<usize>], usize),
    ) {
        let mut spans = Vec::new();
        let mut at = out.len();
        for (i, step) in steps.iter_mut().enumerate().filter(|(i, _)| now.contains(i)) {
            let Step { sequence, n, all } = step;
            let Sequence { variant, timeline, cache, todo, prompt } = &mut **sequence;
            let last = *n - usize::from(*n == todo.len()).min(*n);
            let wanted = if *all { 0..*n } else { last..*n };
            rows[i] = at..at + wanted.len() * width;
            at = rows[i].end;
            spans.push(Span {
                tokens: &todo[..*n],
                n_past: timeline.tokens().len(),
                prompt,
                wanted,
                attention: &variant.attention,
                cache,
            });
        }
        self.engines[engine].1.forward(&self.model, &mut spans, observer, (asked, out));
        for i in now {
            let Step { sequence, n, .. } = &mut steps[*i];
            let Sequence { timeline, todo, prompt, .. } = &mut **sequence;
            timeline.extend(&todo[..*n]);
            todo.drain(..*n);
            if todo.is_empty() {
                // What follows is no prompt.
                *prompt = 0..0;
            }
        }
    }

    /// The engine for a variant's forms.
    fn engine(&mut self, variant: &Variant) -> Result<usize> {
        if let Some(i) = self.engines.iter().position(|(forms, _)| *forms == variant.forms) {
            return Ok(i);
        }
        if self.engines.len() > MAX_OTHER_FORMS {
            self.engines.remove(1);
        }
        let engine = self.engines[0].1.again(&self.model, &variant.attention)?;
        self.engines.push((variant.forms.clone(), engine));
        Ok(self.engines.len() - 1)
    }

    /// Whether there is an engine for the forms of each of these at a time; otherwise engines would be made
    /// again and again.
    pub fn go_together<'a>(&self, variants: impl Iterator<Item = &'a Variant>) -> bool {
        let mut others: Vec<&[String]> = Vec::new();
        for Variant { forms, .. } in variants {
            if *forms != self.engines[0].0 && !others.contains(&&forms[..]) {
                others.push(forms);
            }
        }
        others.len() <= MAX_OTHER_FORMS
    }

    /// Calls `f` for every number below `n`, on all threads.
    pub fn each(&self, n: usize, f: impl Fn(usize) + Sync) {
        self.engines[0].1.each(n, f);
    }
}
