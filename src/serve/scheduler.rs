//! The model's thread: it takes jobs from a queue into slots, and all slots forward together, step by
//! step.
//!
//! A step has one token of every text that is being written, and parts of the prompts that are being
//! read, so that nobody waits for a long prompt of somebody else: those share what is left of the step,
//! the shortest first. After each step slots are freed whose text is over or no longer wanted.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::job::Job;
use super::slot::{Slot, Slots};
use super::task::Task;
use crate::error::{Error, Result};
use crate::session::pool::Pool;

/// Tokens of a step, most of them of prompts: few enough that who is being written to does not wait long.
const N_STEP: usize = 256;
/// Tokens of a step in which nobody is written to.
const N_STEP_ALONE: usize = 512;
/// How often the status is told anew when nothing begins or ends.
const STATUS_TIME: Duration = Duration::from_millis(100);
/// What speed is measured over.
const SPEED_TIME: Duration = Duration::from_secs(1);
/// Longest time after which a client is told to ask again, in seconds.
const MAX_RETRY: f64 = 60.0;

/// Why a job is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// As many wait as may.
    Full {
        /// Seconds after which there may be room.
        retry_after: u32,
    },
    /// The server is about to end.
    Stopping,
}

/// What has happened since the start.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Jobs that were taken from the queue.
    pub n_jobs: u64,
    /// Tokens of prompts that were read.
    pub n_prompt_tokens: u64,
    /// Tokens of prompts that had been read before.
    pub n_cached_tokens: u64,
    /// Tokens that were written.
    pub n_predicted_tokens: u64,
    /// Time of steps in which prompts were read.
    pub prompt_seconds: f64,
    /// Time of the others.
    pub predicted_seconds: f64,
    /// Steps.
    pub n_steps: u64,
    /// Busy slots, summed over the steps.
    pub n_busy_slots: u64,
    /// Steps that failed.
    pub n_failures: u64,
}

/// A slot, seen from outside.
#[derive(Debug, Clone, Default)]
pub struct SlotStatus {
    /// Whether a text is being read or written.
    pub is_busy: bool,
    /// Positions that are cached.
    pub n_tokens: usize,
    /// Normalizers, forms and masks.
    pub names: [String; 3],
}

/// What the model's thread is doing.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Of every slot.
    pub slots: Vec<SlotStatus>,
    /// Jobs that wait.
    pub n_queued: usize,
    /// Bytes of memory that cached positions take.
    pub cache_bytes: usize,
    /// Tokens that are written per second, over the last one.
    pub tokens_per_second: f64,
    /// Sums.
    pub counters: Counters,
}

/// What both sides see.
#[derive(Default)]
struct Shared {
    queue: Mutex<VecDeque<Job>>,
    /// Something came, or it is time to stop.
    news: Condvar,
    stopping: AtomicBool,
    status: Mutex<Status>,
    n_queue: usize,
    n_slots: usize,
    /// Mean seconds of a job in a slot.
    job_seconds: Mutex<f64>,
}

/// The other side of the model's thread.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

/// What a lock guards, also after whoever held it panicked: nothing is left half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Handle {
    /// Has a job wait for its turn.
    pub fn submit(&self, job: Job) -> std::result::Result<(), Refused> {
        let shared = &*self.0;
        let mut queue = lock(&shared.queue);
        if shared.stopping.load(Ordering::SeqCst) {
            return Err(Refused::Stopping);
        }
        if queue.len() >= shared.n_queue {
            queue.retain(Job::is_wanted);
        }
        if queue.len() >= shared.n_queue {
            let rounds = queue.len() as f64 / shared.n_slots as f64;
            let seconds = (rounds * *lock(&shared.job_seconds)).ceil().clamp(1.0, MAX_RETRY);
            return Err(Refused::Full { retry_after: seconds as u32 });
        }
        queue.push_back(job);
        shared.news.notify_one();
        Ok(())
    }

    /// What is going on.
    pub fn status(&self) -> Status {
        let n_queued = lock(&self.0.queue).iter().filter(|job| job.is_wanted()).count();
        Status { n_queued, ..lock(&self.0.status).clone() }
    }

    /// Takes no more jobs; the thread ends when those that were taken are over.
    pub fn stop(&self) {
        let queue = lock(&self.0.queue);
        self.0.stopping.store(true, Ordering::SeqCst);
        self.0.news.notify_one();
        drop(queue);
    }

    /// Whether it was told to stop.
    pub fn is_stopping(&self) -> bool {
        self.0.stopping.load(Ordering::SeqCst)
    }
}

/// Starts the model's thread, with `n_slots` texts at once and `n_queue` that wait.
pub fn start(pool: Pool, n_slots: usize, n_queue: usize) -> Result<(Handle, JoinHandle<()>)> {
    let slots = Slots::new(n_slots.max(1));
    let shared = Shared { n_queue, n_slots: n_slots.max(1), ..Shared::default() };
    let handle = Handle(Arc::new(shared));
    let scheduler = Scheduler {
        shared: handle.0.clone(),
        pool,
        slots,
        task: None,
        counters: Counters::default(),
        speed: Speed { since: Instant::now(), n: 0, per_second: 0.0 },
        told: None,
    };
    let thread = std::thread::Builder::new().name("qkov-model".into());
    let thread = thread.spawn(move || scheduler.run());
    let thread = thread.map_err(|e| Error::Runtime(format!("cannot start a thread: {e}")))?;
    Ok((handle, thread))
}

/// Tokens per second.
struct Speed {
    since: Instant,
    n: u64,
    per_second: f64,
}

impl Speed {
    fn count(&mut self, n: u64) {
        self.n += n;
        let seconds = self.since.elapsed();
        if seconds >= SPEED_TIME {
            self.per_second = self.n as f64 / seconds.as_secs_f64();
            (self.since, self.n) = (Instant::now(), 0);
        }
    }
}

struct Scheduler {
    shared: Arc<Shared>,
    pool: Pool,
    slots: Slots,
    /// What is done beside texts, in steps of its own.
    task: Option<Box<dyn Task>>,
    counters: Counters,
    speed: Speed,
    /// When the status was told last.
    told: Option<Instant>,
}

impl Scheduler {
    fn run(mut self) {
        loop {
            let changed = self.admit();
            self.tell(changed);
            if self.slots.n_busy() == 0 && self.task.is_none() {
                let queue = lock(&self.shared.queue);
                if !queue.is_empty() {
                    continue;
                }
                if self.shared.stopping.load(Ordering::SeqCst) {
                    return;
                }
                self.speed.per_second = 0.0;
                // A moment later, speed and whoever went away while nothing happened are told.
                let wait = self.shared.news.wait_timeout(queue, SPEED_TIME);
                drop(wait.unwrap_or_else(PoisonError::into_inner));
                continue;
            }
            let step = catch_unwind(AssertUnwindSafe(|| self.step()));
            let changed = step.unwrap_or_else(|_| {
                self.counters.n_failures += 1;
                self.slots.fail(&|| Error::Runtime("the engine failed".into()));
                self.task = None;
                true
            });
            self.tell(changed);
        }
    }

    /// Takes what has room from the queue, first come first. Whether anything was.
    fn admit(&mut self) -> bool {
        let mut any = false;
        let shared = self.shared.clone();
        loop {
            let mut queue = lock(&shared.queue);
            queue.retain(Job::is_wanted);
            let (has_slot, has_task) = (self.slots.has_free(), self.task.is_none());
            let (slots, pool) = (&self.slots, &mut self.pool);
            let next = queue.iter().position(|job| match job {
                Job::Generate(text, _) => has_slot && slots.goes_with_others(pool, &text.ask),
                _ => has_task,
            });
            let Some(job) = next.and_then(|i| queue.remove(i)) else { return any };
            drop(queue);
            any = true;
            self.counters.n_jobs += 1;
            match job {
                Job::Generate(generation, events) => {
                    let (pool, counters) = (&mut self.pool, &mut self.counters);
                    self.slots.begin(pool, *generation, events, counters);
                }
                job => self.task = super::task::new(job, &mut self.pool),
            }
        }
    }

    /// Takes everything one step forward. Whether a slot was freed.
    fn step(&mut self) -> bool {
        let start = Instant::now();
        let n_before = self.counters.n_predicted_tokens;
        let mut freed = self.slots.free_unwanted();
        let n_busy = self.slots.n_busy();
        if n_busy > 0 {
            let n_writing = self.slots.n_writing();
            let n = if n_writing == 0 { N_STEP_ALONE } else { N_STEP };
            let reads = self.slots.share_out(n);
            freed |= self.slots.step(&mut self.pool, &mut self.counters);
            let seconds = start.elapsed().as_secs_f64();
            self.counters.n_steps += 1;
            self.counters.n_busy_slots += n_busy as u64;
            match reads {
                true => self.counters.prompt_seconds += seconds,
                false => self.counters.predicted_seconds += seconds,
            }
        }
        for seconds in self.slots.take_ended() {
            let mut mean = lock(&self.shared.job_seconds);
            *mean += (seconds - *mean) * if *mean == 0.0 { 1.0 } else { 0.1 };
        }
        if let Some(task) = &mut self.task
            && task.step(&mut self.pool)
        {
            self.task = None;
        }
        self.speed.count(self.counters.n_predicted_tokens - n_before);
        freed
    }

    /// Tells the status, if something `changed` or it was not told for a while.
    fn tell(&mut self, changed: bool) {
        if !changed && self.told.is_some_and(|told| told.elapsed() < STATUS_TIME) {
            return;
        }
        self.told = Some(Instant::now());
        let slots = self.slots.iter().map(Slot::status).collect();
        let cache_bytes = self.slots.iter().map(Slot::cache_bytes).sum();
        *lock(&self.shared.status) = Status {
            slots,
            n_queued: 0,
            cache_bytes,
            tokens_per_second: self.speed.per_second,
            counters: self.counters.clone(),
        };
    }
}
