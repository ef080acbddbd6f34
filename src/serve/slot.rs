//! Places for texts: each has a sequence, which stays when a text is over, for those that begin alike.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::job::{End, Event, Generation, Logprobs};
use super::scheduler::{Counters, SlotStatus};
use crate::engine::Asked;
use crate::error::{Error, Result};
use crate::measure::divergence::Row;
use crate::session::pool::{Ask, Pool, Sequence, Step, Variant};
use crate::session::sampler::Sampler;

/// Positions that must be shared with another slot's sequence to be worth a copy.
const MIN_SHARED: usize = 16;

/// All places.
pub(super) struct Slots {
    all: Vec<Slot>,
    /// Counts texts, to tell which slot was used last.
    clock: u64,
    /// Seconds that texts took which have ended.
    ended: Vec<f64>,
    logits: Vec<f32>,
}

/// One of them.
#[derive(Default)]
pub(super) struct Slot {
    sequence: Option<Sequence>,
    text: Option<Text>,
    used: u64,
    /// Tokens that it takes in the next step.
    n_step: usize,
}

/// A text that is being read or written.
struct Text {
    generation: Generation,
    events: UnboundedSender<Event>,
    sampler: Sampler,
    n_written: usize,
    prompt_logprobs: Vec<Logprobs>,
    started: Instant,
}

/// What a step made of a text.
enum Next {
    /// Nothing yet.
    Reads,
    Token(u32, Option<Logprobs>),
    Ended(End),
    Failed(Error),
}

impl Slot {
    /// Takes its text away.
    fn free(&mut self) -> Option<Text> {
        let text = self.text.take()?;
        if let (true, Some(sequence)) = (text.generation.prompt_logprobs, &mut self.sequence) {
            sequence.forget();
        }
        Some(text)
    }

    fn is_writing(&self) -> bool {
        self.text.is_some() && self.sequence.as_ref().is_some_and(|s| s.n_todo() == 1)
    }

    fn n_todo(&self) -> usize {
        self.sequence.as_ref().map_or(0, Sequence::n_todo)
    }

    /// How it is seen from outside.
    pub(super) fn status(&self) -> SlotStatus {
        SlotStatus {
            is_busy: self.text.is_some(),
            n_tokens: self.sequence.as_ref().map_or(0, |s| s.tokens().len()),
            names: self.sequence.as_ref().map_or(Default::default(), |s| s.variant().names()),
        }
    }

    /// Memory that its cached positions take.
    pub(super) fn cache_bytes(&self) -> usize {
        self.sequence.as_ref().map_or(0, Sequence::cache_bytes)
    }
}

impl Slots {
    /// So many, all free.
    pub(super) fn new(n: usize) -> Slots {
        let all = (0..n).map(|_| Slot::default()).collect();
        Slots { all, clock: 0, ended: Vec::new(), logits: Vec::new() }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.all.iter()
    }

    /// Slots with a text.
    pub(super) fn n_busy(&self) -> usize {
        self.all.iter().filter(|slot| slot.text.is_some()).count()
    }

    /// Slots whose text is being written.
    pub(super) fn n_writing(&self) -> usize {
        self.all.iter().filter(|slot| slot.is_writing()).count()
    }

    pub(super) fn has_free(&self) -> bool {
        self.all.iter().any(|slot| slot.text.is_none())
    }

    /// Whether a text that attends so can be written beside those that are; also if it cannot be written
    /// at all, which it is told when it begins.
    pub(super) fn goes_with_others(&self, pool: &mut Pool, ask: &Ask) -> bool {
        let Ok(variant) = pool.variant(ask) else { return true };
        let busy = self.all.iter().filter(|slot| slot.text.is_some());
        let others = busy.filter_map(|slot| slot.sequence.as_ref()).map(|s| &**s.variant());
        pool.go_together(others.chain([&*variant]))
    }

    /// Seconds that texts took which have ended since.
    pub(super) fn take_ended(&mut self) -> impl Iterator<Item = f64> {
        self.ended.drain(..)
    }

    /// Gives a text a slot, of which one must be free; or tells why it cannot be begun.
    pub(super) fn begin(
        &mut self,
        pool: &mut Pool,
        generation: Generation,
        events: UnboundedSender<Event>,
        counters: &mut Counters,
    ) {
        let tell = events.clone();
        if let Err(e) = self.try_begin(pool, generation, events, counters) {
            // Whoever asked may be gone.
            let _ = tell.send(Event::Failed(e));
        }
    }

    fn try_begin(
        &mut self,
        pool: &mut Pool,
        generation: Generation,
        events: UnboundedSender<Event>,
        counters: &mut Counters,
    ) -> Result<()> {
        let started = Instant::now();
        let mut sampler = Sampler::new(generation.params.clone(), pool.model().hparams.n_vocab)?;
        let prompt = &generation.prompt;
        let skip = prompt.len().saturating_sub(generation.params.n_history());
        prompt[skip..].iter().for_each(|token| sampler.accept(*token));
        let variant = pool.variant(&generation.ask)?;
        let at = self.place(pool, &variant, prompt)?;
        let slot = &mut self.all[at];
        let Some(sequence) = &mut slot.sequence else { return Ok(()) };
        let n_cached = pool.begin(sequence, prompt, generation.prompt_logprobs)?;
        counters.n_cached_tokens += n_cached as u64;
        counters.n_prompt_tokens += sequence.n_todo() as u64;
        let n_prompt = prompt.len();
        let _ = events.send(Event::Started { n_prompt, n_cached, at: started });
        self.clock += 1;
        slot.used = self.clock;
        let (n_written, prompt_logprobs) = (0, Vec::new());
        slot.text = Some(Text { generation, events, sampler, n_written, prompt_logprobs, started });
        Ok(())
    }

    /// A free slot with a sequence that attends so, and has read as much of the prompt as any has.
    fn place(&mut self, pool: &Pool, variant: &Arc<Variant>, prompt: &[u32]) -> Result<usize> {
        let shared = |slot: &Slot| match &slot.sequence {
            // What is read as a text is none's prompt.
            _ if slot.text.as_ref().is_some_and(|t| t.generation.prompt_logprobs) => 0,
            Some(sequence) if Arc::ptr_eq(sequence.variant(), variant) => sequence.n_shared(prompt),
            _ => 0,
        };
        let all: Vec<usize> = self.all.iter().map(shared).collect();
        let free = || (0..all.len()).filter(|i| self.all[*i].text.is_none());
        // A sequence goes on where most of it is shared; what is worth keeping is left to others.
        let best = free().max_by_key(|i| all[*i]);
        let goes_on = |i: &usize| {
            all[*i] > 0
                && 2 * all[*i] >= self.all[*i].sequence.as_ref().map_or(0, |s| s.tokens().len())
        };
        if let Some(i) = best.filter(goes_on) {
            return Ok(i);
        }
        let Some(to) = free().min_by_key(|i| self.all[*i].used) else {
            return Err(Error::Runtime("no slot is free".into()));
        };
        let from = (0..all.len()).max_by_key(|i| all[*i]).filter(|i| all[*i] >= MIN_SHARED);
        if from == Some(to) {
            return Ok(to);
        }
        let is_same = |sequence: &Sequence| Arc::ptr_eq(sequence.variant(), variant);
        let mut sequence = match self.all[to].sequence.take().filter(is_same) {
            Some(sequence) => sequence,
            None => pool.sequence(variant.clone())?,
        };
        if let Some(from) = from.and_then(|from| self.all[from].sequence.as_ref()) {
            pool.share(from, &mut sequence, prompt)?;
        }
        self.all[to].sequence = Some(sequence);
        Ok(to)
    }

    /// Frees slots whose text nobody waits for. Whether there were any.
    pub(super) fn free_unwanted(&mut self) -> bool {
        let mut any = false;
        for slot in &mut self.all {
            if slot.text.as_ref().is_some_and(|text| text.events.is_closed()) {
                slot.free();
                any = true;
            }
        }
        any
    }

    /// Ends all texts with an error, and forgets their sequences.
    pub(super) fn fail(&mut self, error: &dyn Fn() -> Error) {
        for slot in self.all.iter_mut().filter(|slot| slot.text.is_some()) {
            if let Some(text) = slot.free() {
                let _ = text.events.send(Event::Failed(error()));
            }
            slot.sequence = None;
        }
    }

    /// Shares out the tokens of a step: one for each text that is written, the rest for prompts, the
    /// shortest first. Whether any prompt is read.
    pub(super) fn share_out(&mut self, n: usize) -> bool {
        let mut left = n;
        let mut reading: Vec<&mut Slot> = Vec::new();
        for slot in self.all.iter_mut().filter(|slot| slot.text.is_some()) {
            match slot.is_writing() {
                true => {
                    slot.n_step = 1;
                    left = left.saturating_sub(1);
                }
                false => reading.push(slot),
            }
        }
        reading.sort_by_key(|slot| slot.n_todo());
        let any = !reading.is_empty();
        let n_reading = reading.len();
        for (i, slot) in reading.into_iter().enumerate() {
            slot.n_step = slot.n_todo().min((left / (n_reading - i)).max(1));
            left = left.saturating_sub(slot.n_step);
        }
        any
    }

    /// Takes all texts a step forward. Whether any ended.
    pub(super) fn step(&mut self, pool: &mut Pool, counters: &mut Counters) -> bool {
        let mut logits = std::mem::take(&mut self.logits);
        logits.clear();
        let (mut steps, mut texts) = (Vec::new(), Vec::new());
        for Slot { sequence, text, n_step, .. } in &mut self.all {
            if let (Some(sequence), Some(text)) = (sequence, text) {
                let all = text.generation.prompt_logprobs && text.n_written == 0;
                steps.push(Step { sequence, n: *n_step, all });
                texts.push(text);
            }
        }
        let rows = pool.forward(&mut steps, None, (Asked::Logits, &mut logits));
        let ended = match rows {
            Ok(rows) => {
                let n_vocab = pool.model().hparams.n_vocab;
                let all = split(&mut logits, &rows).into_iter();
                let parts: Vec<_> = all
                    .zip(steps.iter().zip(texts))
                    .map(|(rows, (step, text))| {
                        Mutex::new((text, &*step.sequence, rows, Next::Reads))
                    })
                    .collect();
                let tokenizer = &pool.model().tokenizer;
                let choose = |i: usize| {
                    let mut part = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
                    let (text, sequence, rows, next) = &mut *part;
                    let eog = |token| tokenizer.is_eog(token);
                    *next = text.next(sequence, rows, n_vocab, &eog);
                };
                match parts.len() {
                    1 => choose(0),
                    n => pool.each(n, choose),
                }
                let nexts = parts
                    .into_iter()
                    .map(|part| part.into_inner().unwrap_or_else(PoisonError::into_inner).3);
                let nexts: Vec<Next> = nexts.collect();
                self.take(nexts, pool.n_ctx(), counters)
            }
            Err(e) => {
                let e = e.to_string();
                self.fail(&|| Error::Runtime(e.clone()));
                true
            }
        };
        self.logits = logits;
        ended
    }

    /// Tells who waits what came next, and has it read. Whether any text ended.
    fn take(&mut self, nexts: Vec<Next>, n_ctx: usize, counters: &mut Counters) -> bool {
        let mut any = false;
        let busy = self.all.iter_mut().filter(|slot| slot.text.is_some());
        for (slot, next) in busy.zip(nexts) {
            let (Some(sequence), Some(text)) = (&mut slot.sequence, &mut slot.text) else {
                continue;
            };
            let end = match next {
                Next::Reads => continue,
                Next::Token(id, logprobs) => {
                    text.tell_prompt();
                    let _ = text.events.send(Event::Token { id, logprobs });
                    text.n_written += 1;
                    counters.n_predicted_tokens += 1;
                    sequence.push(&[id]);
                    text.end(sequence.tokens().len() == n_ctx)
                }
                Next::Ended(reason) => {
                    text.tell_prompt();
                    Some(reason)
                }
                Next::Failed(e) => {
                    let _ = text.events.send(Event::Failed(e));
                    slot.free();
                    // Nothing is kept of what may have been computed wrong.
                    slot.sequence.iter_mut().for_each(Sequence::forget);
                    any = true;
                    continue;
                }
            };
            if let Some(end) = end {
                let _ = text.events.send(Event::Ended(end));
                self.ended.push(text.started.elapsed().as_secs_f64());
                slot.free();
                any = true;
            }
        }
        any
    }
}

/// The parts of `data` at these places, which do not overlap and leave nothing out, in any order.
fn split<'a>(data: &'a mut [f32], places: &[Range<usize>]) -> Vec<&'a mut [f32]> {
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_by_key(|i| (places[*i].start, places[*i].end));
    let mut parts: Vec<&mut [f32]> = places.iter().map(|_| Default::default()).collect();
    let mut rest = data;
    for i in order {
        let (part, next) = rest.split_at_mut(places[i].len());
        (parts[i], rest) = (part, next);
    }
    parts
}

impl Text {
    /// What follows what the sequence has read; `rows` are logits after what it read last.
    fn next(
        &mut self,
        sequence: &Sequence,
        rows: &mut [f32],
        n_vocab: usize,
        is_eog: &dyn Fn(u32) -> bool,
    ) -> Next {
        let Generation {
            prompt, grammar, max_tokens, ignore_eos, logprobs, prompt_logprobs, ..
        } = &mut self.generation;
        if let Err(e) = sequence.check_finite(rows) {
            return Next::Failed(e);
        }
        if *prompt_logprobs && self.n_written == 0 {
            let n_top = logprobs.unwrap_or(0);
            let first = sequence.tokens().len() - rows.len() / n_vocab;
            let next = &prompt[prompt.len().min(first + 1)..];
            let told = next.iter().zip(rows.chunks_exact(n_vocab));
            self.prompt_logprobs.extend(told.map(|(token, row)| Logprobs::of(row, *token, n_top)));
        }
        if sequence.n_todo() > 0 {
            return Next::Reads;
        }
        if *max_tokens == Some(0) {
            return Next::Ended(End::Length);
        }
        let last = rows.len().saturating_sub(n_vocab);
        let row = &mut rows[last..];
        // What is told is what the model says, whatever may be chosen of it.
        let said = logprobs.map(|n_top| (n_top, row.to_vec()));
        if let Some(Err(e)) = grammar.as_mut().map(|grammar| grammar.restrict(row)) {
            return Next::Failed(e);
        }
        let token = self.sampler.sample(row);
        if is_eog(token) && !*ignore_eos {
            return Next::Ended(End::Stop);
        }
        self.sampler.accept(token);
        if let Some(Err(e)) = grammar.as_mut().map(|grammar| grammar.accept(token)) {
            return Next::Failed(e);
        }
        Next::Token(token, said.map(|(n_top, row)| Logprobs::of(&row, token, n_top)))
    }

    /// Why it is over, if it is; `is_full`: no other token can be read.
    fn end(&self, is_full: bool) -> Option<End> {
        let Generation { grammar, max_tokens, .. } = &self.generation;
        if grammar.as_ref().is_some_and(|grammar| grammar.is_over()) {
            return Some(End::Stop);
        }
        let is_long = max_tokens.is_some_and(|max| self.n_written >= max);
        (is_long || is_full).then_some(End::Length)
    }

    /// Tells the probabilities of the prompt, once, if they were asked for.
    fn tell_prompt(&mut self) {
        if self.generation.prompt_logprobs && self.n_written == 0 {
            let logprobs = std::mem::take(&mut self.prompt_logprobs);
            let _ = self.events.send(Event::Prompt(logprobs));
        }
    }
}

impl Logprobs {
    /// Those of a token, and of the `n_top` likeliest. `[n_vocab]`
    pub(super) fn of(logits: &[f32], token: u32, n_top: usize) -> Logprobs {
        let row = Row::new(logits);
        let ln_p = |token: u32| row.ln_p(token) as f32;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let largest =
            |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if (1..order.len()).contains(&n_top) {
            order.select_nth_unstable_by(n_top, largest);
        }
        order.truncate(n_top);
        order.sort_by(largest);
        let top = order.into_iter().map(|token| (token, ln_p(token))).collect();
        Logprobs { own: ln_p(token), top }
    }
}
