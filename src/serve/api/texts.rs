//! Texts that are being written for a request: from tokens to characters, up to what ends them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::watch;
use tokio::time::sleep;

use super::App;
use super::failure::{Answer, Failure, lost};
use super::server::Phase;
use super::stops::Stops;
use crate::error::Error;
use crate::serve::Refused;
use crate::serve::job::{End, Event, Generation, Job, Logprobs};
use crate::token::StreamDecoder;

/// Time after which a text that found no room in the queue tries again, if none of its request runs.
const AGAIN_TIME: Duration = Duration::from_millis(20);

/// Why a text ended, as OpenAI's clients know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Reason {
    Stop,
    Length,
    ToolCalls,
}

/// Tokens of a text and the time they took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cost {
    pub(super) n_prompt: usize,
    pub(super) n_cached: usize,
    pub(super) n_predicted: usize,
    /// From the beginning of the prompt to the first token.
    pub(super) prompt_time: Duration,
    /// From there to the last one.
    pub(super) predicted_time: Duration,
}

/// A token with its probability.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) id: u32,
    pub(super) logprobs: Logprobs,
}

/// What happened to a text.
#[derive(Debug)]
pub(super) enum News {
    /// The prompt is being read.
    Started,
    /// Probabilities of the prompt's tokens but the first.
    Prompt(Vec<Logprobs>),
    /// More of it, with those of its tokens whose probabilities were asked for.
    More(String, Vec<Chosen>),
    /// The last of it.
    Ended(String, Vec<Chosen>, Reason, Cost),
}

/// All texts of a request. Who drops it ends them.
pub(super) struct Texts {
    app: Arc<App>,
    /// Those that are not yet in the queue.
    waiting: VecDeque<(usize, Generation)>,
    active: Vec<Text>,
    /// Those that will not be begun, because the server ends.
    late: Vec<usize>,
    has_begun: bool,
    stops: Stops,
    /// Control tokens that are seen as text.
    controls: Arc<[u32]>,
    phase: watch::Receiver<Phase>,
    /// The one that is looked at next.
    turn: usize,
}

/// A text in the queue or in a slot.
struct Text {
    index: usize,
    events: UnboundedReceiver<Event>,
    decoder: StreamDecoder,
    stops: Stops,
    /// Tokens that are held back with their text, and where each begins and ends in it, in bytes.
    held: VecDeque<(Chosen, usize, usize)>,
    /// Bytes of all text, and of what was passed on.
    n_bytes: usize,
    n_passed: usize,
    cost: Cost,
    started: Option<Instant>,
    last: Option<Instant>,
}

impl Texts {
    /// Has texts written that end in front of `stops` and have the names of `controls`. Fails if not even the first finds room in the
    /// queue.
    pub(super) fn new(
        app: &Arc<App>,
        generations: Vec<Generation>,
        stops: Stops,
        controls: Vec<u32>,
    ) -> Answer<Texts> {
        let mut texts = Texts {
            app: app.clone(),
            waiting: generations.into_iter().enumerate().collect(),
            active: Vec::new(),
            late: Vec::new(),
            has_begun: false,
            stops,
            controls: controls.into(),
            phase: app.phase.clone(),
            turn: 0,
        };
        texts.submit()?;
        Ok(texts)
    }

    /// Puts texts into the queue, as many as run together. A request with many of them must not fill the
    /// queue, so those that find no room come after others have ended. Those with grammars come at once:
    /// they cannot be kept for later.
    fn submit(&mut self) -> Answer<()> {
        while (self.active.len() < self.app.n_slots || self.has_grammars())
            && let Some((index, generation)) = self.waiting.pop_front()
        {
            let (sender, events) = unbounded_channel();
            let again = self.has_begun.then(|| again(&generation)).flatten();
            match (self.app.handle.submit(Job::Generate(Box::new(generation), sender)), again) {
                (Ok(()), _) => self.active.push(Text::new(index, events, self.stops.clone())),
                (Err(Refused::Full { .. }), Some(generation)) => {
                    self.waiting.push_front((index, generation));
                    break;
                }
                (Err(Refused::Stopping), _) if self.has_begun => {
                    self.late.push(index);
                    self.late.extend(self.waiting.drain(..).map(|(index, _)| index));
                }
                (Err(refused), _) => return Err(refused.into()),
            }
            self.has_begun = true;
        }
        Ok(())
    }

    fn has_grammars(&self) -> bool {
        self.waiting.front().is_some_and(|(_, generation)| generation.grammar.is_some())
    }

    /// What happened next, and to which text; `None` after the end of all.
    pub(super) async fn next(&mut self) -> Option<Answer<(usize, News)>> {
        loop {
            if *self.phase.borrow_and_update() == Phase::Over {
                return self.cut();
            }
            if let Some(news) = self.ready() {
                return news;
            }
            let mut phase = self.phase.clone();
            let has_none = self.active.is_empty();
            tokio::select! {
                () = sleep(AGAIN_TIME), if has_none => if let Err(failure) = self.submit() {
                    return Some(Err(failure));
                },
                news = std::future::poll_fn(|cx| self.poll(cx)) => return news,
                // Without a server there is nobody to write for.
                changed = phase.changed() => if changed.is_err() { return self.cut() },
            }
        }
    }

    /// The same, if it needs no waiting.
    pub(super) fn ready(&mut self) -> Option<Option<Answer<(usize, News)>>> {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match self.poll(&mut cx) {
            Poll::Ready(news) => Some(news),
            Poll::Pending => None,
        }
    }

    fn poll(&mut self, cx: &mut Context) -> Poll<Option<Answer<(usize, News)>>> {
        if let Some(index) = self.late.pop() {
            return Poll::Ready(Some(Ok((index, not_begun()))));
        }
        if self.active.is_empty() && self.waiting.is_empty() {
            return Poll::Ready(None);
        }
        let n = self.active.len();
        for i in (0..n).map(|i| (self.turn + i) % n) {
            let text = &mut self.active[i];
            while let Poll::Ready(event) = text.events.poll_recv(cx) {
                let Some(news) = text.take(&self.app, &self.controls, event) else { continue };
                let news = news.map(|news| (text.index, news));
                self.turn = i + 1;
                if !matches!(news, Ok((_, News::Started | News::Prompt(_) | News::More(..)))) {
                    self.active.remove(i);
                    if let Err(failure) = self.submit() {
                        return Poll::Ready(Some(Err(failure)));
                    }
                }
                return Poll::Ready(Some(news));
            }
        }
        Poll::Pending
    }

    /// Ends a text where it is, because the server ends.
    fn cut(&mut self) -> Option<Answer<(usize, News)>> {
        if let Some(mut text) = self.active.pop() {
            return Some(Ok((text.index, text.end(&self.app, Reason::Length))));
        }
        let waiting = self.waiting.pop_front().map(|(index, _)| index);
        let index = waiting.or_else(|| self.late.pop())?;
        Some(Ok((index, not_begun())))
    }
}

/// The end of a text of which nothing was written.
fn not_begun() -> News {
    News::Ended(String::new(), Vec::new(), Reason::Length, Cost::default())
}

/// The same text to write once more; none with a grammar, which is at its place in a text.
fn again(generation: &Generation) -> Option<Generation> {
    let Generation {
        prompt, ask, params, max_tokens, ignore_eos, logprobs, prompt_logprobs, ..
    } = generation;
    generation.grammar.is_none().then(|| Generation {
        prompt: prompt.clone(),
        ask: ask.clone(),
        params: params.clone(),
        grammar: None,
        max_tokens: *max_tokens,
        ignore_eos: *ignore_eos,
        logprobs: *logprobs,
        prompt_logprobs: *prompt_logprobs,
    })
}

impl Text {
    fn new(index: usize, events: UnboundedReceiver<Event>, stops: Stops) -> Text {
        Text {
            index,
            events,
            decoder: StreamDecoder::default(),
            stops,
            held: VecDeque::new(),
            n_bytes: 0,
            n_passed: 0,
            cost: Cost::default(),
            started: None,
            last: None,
        }
    }

    /// Takes what the model's thread says; `None` if there is nothing to pass on.
    fn take(&mut self, app: &App, controls: &[u32], event: Option<Event>) -> Option<Answer<News>> {
        match event {
            Some(Event::Started { n_prompt, n_cached, at }) => {
                (self.cost.n_prompt, self.cost.n_cached) = (n_prompt, n_cached);
                self.started = Some(at);
                Some(Ok(News::Started))
            }
            Some(Event::Prompt(logprobs)) => Some(Ok(News::Prompt(logprobs))),
            Some(Event::Token { id, logprobs }) => self.token(app, controls, id, logprobs).map(Ok),
            Some(Event::Ended(End::Stop)) => Some(Ok(self.end(app, Reason::Stop))),
            Some(Event::Ended(End::Length)) => Some(Ok(self.end(app, Reason::Length))),
            Some(Event::Failed(Error::Usage(text))) => Some(Err(Failure::invalid(text))),
            Some(Event::Failed(e)) => Some(Err(e.into())),
            None => Some(Err(lost())),
        }
    }

    fn token(
        &mut self,
        app: &App,
        controls: &[u32],
        id: u32,
        logprobs: Option<Logprobs>,
    ) -> Option<News> {
        self.count(app);
        let piece = app.model.tokenizer.piece(id, controls.contains(&id));
        let text = self.decoder.push(piece);
        let start = self.n_bytes;
        self.n_bytes += text.len();
        let has_logprobs = logprobs.is_some();
        if let Some(logprobs) = logprobs {
            self.held.push_back((Chosen { id, logprobs }, start, self.n_bytes));
        }
        let passed = self.stops.push(text);
        self.n_passed += passed.text.len();
        if passed.stopped {
            // Its other tokens belong to the stop.
            let at = self.n_passed;
            let kept = self.held.drain(..).filter(|(_, start, _)| *start < at);
            let tokens = kept.map(|(token, ..)| token).collect();
            return Some(self.ended(app, passed.text, tokens, Reason::Stop));
        }
        let n = self.held.iter().take_while(|(.., end)| *end <= self.n_passed).count();
        let tokens: Vec<Chosen> = self.held.drain(..n).map(|(token, ..)| token).collect();
        let silent = passed.text.is_empty() && (tokens.is_empty() || !has_logprobs);
        (!silent).then_some(News::More(passed.text, tokens))
    }

    /// Counts a token, and the time to it.
    fn count(&mut self, app: &App) {
        let now = Instant::now();
        let since = |then: Instant| now.saturating_duration_since(then);
        match self.last {
            Some(last) => app.metrics.between_tokens.add(since(last)),
            None => app.metrics.first_token.add(self.started.map_or(Duration::ZERO, since)),
        }
        self.last = Some(now);
        self.cost.n_predicted += 1;
        match (self.cost.n_predicted, self.started) {
            (1, Some(started)) => self.cost.prompt_time = since(started),
            (_, Some(started)) => self.cost.predicted_time = since(started) - self.cost.prompt_time,
            _ => {}
        }
    }

    fn end(&mut self, app: &App, reason: Reason) -> News {
        let passed = self.stops.push(self.decoder.finish());
        let mut text = passed.text;
        if !passed.stopped {
            text += &self.stops.finish();
        }
        let tokens = self.held.drain(..).map(|(token, ..)| token).collect();
        self.ended(app, text, tokens, if passed.stopped { Reason::Stop } else { reason })
    }

    fn ended(&mut self, app: &App, text: String, tokens: Vec<Chosen>, reason: Reason) -> News {
        if let (0, Some(started)) = (self.cost.n_predicted, self.started) {
            self.cost.prompt_time = started.elapsed();
        }
        app.metrics.ended();
        News::Ended(text, tokens, reason, self.cost)
    }
}
