//! The model's thread: what comes of jobs, alone and beside others, and what becomes of those that
//! nobody waits for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use qkov::arch::Pooling;
use qkov::engine::Threads;
use qkov::measure::divergence::Row;
use qkov::measure::record::record;
use qkov::serve::job::{Comparison, End, Event, Generation, Job, Look};
use qkov::serve::{Handle, Refused, start};
use qkov::session::pool::{Ask, Pool};
use qkov::session::sampler::SamplerParams;
use qkov::session::{Options, Session};

use crate::family;

const N_CTX: usize = 256;

fn options() -> Options {
    Options {
        n_ctx: Some(N_CTX),
        n_threads: Threads { one: 2, batch: 2 },
        pin: false,
        ..Options::default()
    }
}

fn server(n_slots: usize, n_queue: usize) -> (Handle, std::thread::JoinHandle<()>) {
    start(Pool::new(Arc::new(family::softmax()), &options()).unwrap(), n_slots, n_queue).unwrap()
}

fn session() -> Session {
    Session::new(Arc::new(family::softmax()), &options()).unwrap()
}

fn tokens(text: &str) -> Vec<u32> {
    family::softmax().tokenizer.encode(text, true, true).unwrap()
}

fn generation(text: &str, max_tokens: usize) -> Generation {
    Generation {
        prompt: tokens(text),
        ask: Ask::default(),
        params: SamplerParams { temperature: 0.0, ..SamplerParams::default() },
        grammar: None,
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        logprobs: None,
        prompt_logprobs: false,
    }
}

fn submit(handle: &Handle, generation: Generation) -> UnboundedReceiver<Event> {
    let (sender, receiver) = unbounded_channel();
    handle.submit(Job::Generate(Box::new(generation), sender)).unwrap();
    receiver
}

/// All tokens, and how they ended.
fn finish(mut events: UnboundedReceiver<Event>) -> (Vec<u32>, End) {
    let mut ids = Vec::new();
    loop {
        match events.blocking_recv().unwrap() {
            Event::Token { id, .. } => ids.push(id),
            Event::Ended(end) => return (ids, end),
            Event::Failed(e) => panic!("{e}"),
            Event::Started { .. } | Event::Prompt(_) => {}
        }
    }
}

fn ask(norm: &str) -> Ask {
    Ask { norm: Some(norm.into()), ..Ask::default() }
}

/// Waits until a condition holds, at most `limit`.
fn within(limit: Duration, holds: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < limit {
        if holds() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

fn n_busy(handle: &Handle) -> usize {
    handle.status().slots.iter().filter(|slot| slot.is_busy).count()
}

#[test]
fn a_text_is_the_same_alone_and_beside_others() {
    let (handle, thread) = server(16, 64);
    let jobs: Vec<Generation> = (0..24)
        .map(|i| {
            let text = "The old man went to the sea and said nothing. ".repeat(1 + i % 7);
            let mut job = generation(&format!("{i} {text}"), 20 + i);
            job.ask = if i % 3 == 2 { ask("entmax") } else { Ask::default() };
            job
        })
        .collect();
    let copy = |job: &Generation| Generation {
        prompt: job.prompt.clone(),
        ask: job.ask.clone(),
        ..generation("", job.max_tokens.unwrap())
    };
    let alone: Vec<_> = jobs.iter().map(|job| finish(submit(&handle, copy(job)))).collect();
    let streams: Vec<_> = jobs.iter().map(|job| submit(&handle, copy(job))).collect();
    for (i, (events, alone)) in streams.into_iter().zip(&alone).enumerate() {
        assert_eq!(finish(events), *alone, "text {i}");
        assert_eq!((alone.0.len(), alone.1), (20 + i, End::Length));
    }
    let mut session = session();
    let argmax = |logits: &[f32]| Row::new(logits).top();
    session.feed_prompt(&jobs[0].prompt).unwrap();
    for token in &alone[0].0 {
        assert_eq!(argmax(session.logits()), *token);
        session.feed(&[*token]).unwrap();
    }
    handle.stop();
    thread.join().unwrap();
}

#[test]
fn texts_in_more_forms_than_engines_take_turns() {
    let file = std::path::Path::new(crate::golden::FOLDER).join("gpt2.gguf");
    let model = Arc::new(qkov::model::Model::open(&file).unwrap());
    let options = Options { n_ctx: Some(64), ..options() };
    let server = || start(Pool::new(model.clone(), &options).unwrap(), 8, 64).unwrap().0;
    let forms = ["split", "slim", "absorb", "0=slim", "1=absorb", "0=slim;1=absorb"];
    let asks = forms.map(|form| Ask { form: Some(form.into()), ..Ask::default() });
    let text = |i: usize| {
        let prompt = vec![1, 2 + i as u32, 7];
        Generation { prompt, ask: asks[i % asks.len()].clone(), ..generation("", 20) }
    };
    // Not on one server: of a prompt that was read before, tokens would be read one by one, which is
    // another order of sums in these forms.
    let (one, other) = (server(), server());
    let alone: Vec<_> = (0..12).map(|i| finish(submit(&one, text(i)))).collect();
    let all: Vec<_> = (0..12).map(|i| submit(&other, text(i))).collect();
    all.into_iter().zip(alone).for_each(|(events, alone)| assert_eq!(finish(events), alone));
}

#[test]
fn a_conversation_goes_on_where_it_was() {
    let (handle, _) = server(2, 8);
    let cached = |text: &str| {
        let mut events = submit(&handle, generation(text, 1));
        let Some(Event::Started { n_prompt, n_cached, .. }) = events.blocking_recv() else {
            panic!("not started");
        };
        finish(events);
        (n_prompt, n_cached)
    };
    let text = "Once upon a time there was a king who had three sons, and the eldest was proud. ";
    let text = &text.repeat(3);
    let (n, none) = cached(text);
    assert_eq!(none, 0);
    let (_, most) = cached(&format!("{text} And then he"));
    assert!(most + 2 >= n, "{most} of {n}");
    // Another one that begins alike gets a copy.
    let (_, some) = cached(&format!("{} But", &text[..text.len() / 2]));
    assert!(some + 4 >= n / 2, "{some} of {n}");
}

#[test]
fn what_nobody_waits_for_frees_its_slot() {
    let (handle, _) = server(4, 64);
    for _ in 0..10 {
        let events: Vec<_> =
            (0..12).map(|i| submit(&handle, generation(&format!("{i} away"), 240))).collect();
        assert!(within(Duration::from_secs(5), || n_busy(&handle) == 4));
        drop(events);
        assert!(within(Duration::from_millis(250), || {
            n_busy(&handle) == 0 && handle.status().n_queued == 0
        }));
    }
}

#[test]
fn a_full_queue_refuses_and_a_stopped_one_ends_what_it_took() {
    let (handle, thread) = server(2, 3);
    let first: Vec<_> = (0..2).map(|_| submit(&handle, generation("The", 100))).collect();
    assert!(within(Duration::from_secs(5), || n_busy(&handle) == 2));
    let waiting: Vec<_> = (0..3).map(|_| submit(&handle, generation("And", 5))).collect();
    let (sender, _receiver) = unbounded_channel();
    let refused = handle.submit(Job::Generate(Box::new(generation("No", 5)), sender));
    assert!(matches!(refused, Err(Refused::Full { retry_after: 1.. })), "{refused:?}");
    handle.stop();
    let (sender, _receiver) = unbounded_channel();
    let refused = handle.submit(Job::Generate(Box::new(generation("No", 5)), sender));
    assert_eq!(refused, Err(Refused::Stopping));
    first.into_iter().for_each(|events| assert_eq!(finish(events).0.len(), 100));
    waiting.into_iter().for_each(|events| assert_eq!(finish(events).0.len(), 5));
    thread.join().unwrap();
}

#[test]
fn a_long_prompt_does_not_keep_short_ones_waiting() {
    let options = Options { n_ctx: Some(2048), ..options() };
    let pool = Pool::new(Arc::new(family::softmax()), &options).unwrap();
    let (handle, _) = start(pool, 4, 8).unwrap();
    let jobs = [2000, 2000, 2000, 2].iter().enumerate().map(|(i, n)| {
        let prompt = (0..*n).map(|at| if at == 0 { 10 + i as u32 } else { 5 }).collect();
        Generation { prompt, ..generation("", 1) }
    });
    let events: Vec<_> = jobs.map(|job| submit(&handle, job)).collect();
    // The last that came is the first that is done.
    let ends: Vec<Instant> = std::thread::scope(|scope| {
        let wait = |events| scope.spawn(|| (finish(events), Instant::now()).1);
        let threads: Vec<_> = events.into_iter().map(wait).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(ends[..3].iter().all(|end| ends[3] < *end));
}

#[test]
fn probabilities_are_those_of_the_model() {
    let (handle, _) = server(2, 8);
    let mut job = generation("It was a dark night, and the rain fell", 3);
    (job.logprobs, job.prompt_logprobs) = (Some(4), true);
    let prompt = job.prompt.clone();
    let mut events = submit(&handle, job);
    let mut session = session();
    let all = session.feed_wanting(&prompt, 0..prompt.len()).unwrap().to_vec();
    let n_vocab = session.model().hparams.n_vocab;
    let mut n_tokens = 0;
    loop {
        match events.blocking_recv().unwrap() {
            Event::Prompt(told) => {
                assert_eq!(told.len(), prompt.len() - 1);
                for ((told, row), token) in told.iter().zip(all.chunks(n_vocab)).zip(&prompt[1..]) {
                    let row = Row::new(row);
                    assert_eq!(told.own, row.ln_p(*token) as f32);
                    assert_eq!(told.top[0], (row.top(), row.ln_p(row.top()) as f32));
                    assert_eq!(told.top.len(), 4);
                    assert!(told.top.is_sorted_by(|a, b| a.1 >= b.1));
                }
            }
            Event::Token { id, logprobs } => {
                let row = Row::new(session.logits());
                assert_eq!(logprobs.unwrap().own, row.ln_p(id) as f32);
                session.feed(&[id]).unwrap();
                n_tokens += 1;
            }
            Event::Ended(_) => break,
            Event::Started { n_cached, .. } => assert_eq!(n_cached, 0),
            Event::Failed(e) => panic!("{e}"),
        }
    }
    assert_eq!(n_tokens, 3);
}

#[test]
fn texts_are_embedded_compared_and_looked_at() {
    let (handle, _) = server(2, 8);
    let (text, n_prompt) = (tokens("The king had a daughter who was fair"), 4);
    let (answer, mut vectors) = unbounded_channel();
    let (ask_none, texts) = (Ask::default(), vec![text.clone(), text[..3].to_vec()]);
    let pooling = Pooling::Mean;
    handle.submit(Job::Embed { texts: texts.clone(), ask: ask_none, pooling, answer }).unwrap();
    let mut session = session();
    for text in &texts {
        let vector = vectors.blocking_recv().unwrap().unwrap();
        assert_eq!(vector, session.embed(text, Pooling::Mean).unwrap());
    }
    assert!(vectors.blocking_recv().is_none());

    let compare = |asks: [Ask; 2]| {
        let (answer, mut scores) = unbounded_channel();
        let (prompt, reply) = (text[..n_prompt].to_vec(), text[n_prompt..].to_vec());
        handle.submit(Job::Compare(Comparison { prompt, reply, asks, n_top: 5 }, answer)).unwrap();
        std::iter::from_fn(|| scores.blocking_recv()).map(|s| s.unwrap()).collect::<Vec<_>>()
    };
    let same = compare([Ask::default(), Ask::default()]);
    assert_eq!(same.len(), text.len() - n_prompt);
    assert!(same.iter().all(|s| s.kl == 0.0 && s.logprobs[0] == s.logprobs[1]));
    let all = compare([Ask::default(), ask("sigmoid")]);
    assert!(all.iter().all(|s| s.kl > 0.0));
    let rows = |session: &mut Session| {
        session.rewind(0);
        session.feed_prompt(&text[..n_prompt]).unwrap();
        let mut rows = vec![session.logits().to_vec()];
        for token in &text[n_prompt..] {
            session.feed(&[*token]).unwrap();
            rows.push(session.logits().to_vec());
        }
        rows
    };
    let base = rows(&mut session);
    let mut plan = session.model().trained.clone();
    plan.set_normalizers("sigmoid").unwrap();
    session.set_plan(plan.clone()).unwrap();
    for ((scored, a), b) in all.iter().zip(&base).zip(&rows(&mut session)) {
        assert_eq!(scored.kl, Row::new(a).kl(&Row::new(b)));
        assert_eq!(scored.logprobs[1].own, Row::new(b).ln_p(scored.id) as f32);
    }

    let (answer, mut maps) = unbounded_channel();
    let (layer, head) = (2, 3);
    let look =
        Look { tokens: text.clone(), n_prompt: text.len(), ask: ask("sigmoid"), layer, head };
    handle.submit(Job::Look(look, answer)).unwrap();
    let map = maps.blocking_recv().unwrap().unwrap();
    let recorded = record(&mut session, &text, layer..layer + 1).unwrap();
    assert_eq!(map.weights, recorded[0].heads[head].weights);
    assert_eq!(map.entropy.len(), recorded[0].heads.len());
    for (head, first) in recorded[0].heads.iter().zip(&map.first) {
        let column = head.weights.iter().step_by(text.len());
        let mean = column.sum::<f32>() / text.len() as f32;
        assert!((mean - first).abs() < 1e-6, "{mean} {first}");
    }
}

#[test]
fn what_cannot_be_done_is_told() {
    let (handle, _) = server(1, 8);
    let failed = |job: Generation| {
        let mut events = submit(&handle, job);
        match events.blocking_recv().unwrap() {
            Event::Failed(e) => e.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let mut job = generation("The", 1);
    job.ask = ask("nonsense");
    assert!(failed(job).contains("nonsense"));
    let mut job = generation("The", 1);
    job.prompt = vec![3; N_CTX + 1];
    assert!(failed(job).contains("257 tokens do not fit a context of 256"));
    let mut job = generation("The", 1);
    job.params.temperature = -1.0;
    assert!(failed(job).contains("temp"));
    // Slots are as free as before.
    assert_eq!(finish(submit(&handle, generation("The", 2))).0.len(), 2);
    let full = generation("The", 1000);
    assert_eq!(finish(submit(&handle, full)).1, End::Length);
}
