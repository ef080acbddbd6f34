//! One team of threads per engine: made by rayon, pinned to cores, in step behind spinning waits.
//!
//! A forward pass enters the pool once ([`Team::enter`], one `broadcast`, about 12 us). Inside it,
//! the first thread walks the layers and hands the others one phase after another
//! ([`Crew::each`], [`Crew::chunks`], below 1 us), because waking a pool for each of the hundreds of
//! operations of a token would cost milliseconds. Threads that wait spin for a moment, then sleep.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Thread;

use rayon::ThreadPool;

use crate::error::{Error, Result};

/// Looks at a flag before a thread on a core of its own sleeps: some 100 us, far more than most
/// waits.
const SPINS: u32 = 10_000;

/// A value on cache lines of its own, two because lines are fetched in pairs.
#[repr(align(128))]
#[derive(Default)]
struct Apart<T>(T);

/// Threads that wait for [`Team::enter`].
pub struct Team {
    pool: ThreadPool,
    /// Looks at a flag before a waiting thread sleeps.
    spins: u32,
}

/// Cores to pin to: one of every physical core first, then their siblings; within the process's
/// affinity.
pub fn cores() -> Vec<core_affinity::CoreId> {
    let ids = core_affinity::get_core_ids().unwrap_or_default();
    let siblings = |id: usize| {
        let path = format!("/sys/devices/system/cpu/cpu{id}/topology/thread_siblings_list");
        std::fs::read_to_string(path).unwrap_or_else(|_| id.to_string())
    };
    let mut seen = std::collections::HashSet::new();
    let (first, rest): (Vec<_>, Vec<_>) =
        ids.into_iter().partition(|core| seen.insert(siblings(core.id)));
    [first, rest].concat()
}

/// Threads unless asked: physical cores, within the process's affinity and quota.
pub fn default_threads() -> usize {
    num_cpus::get_physical().min(num_cpus::get()).max(1)
}

/// Whether the system lets a thread stay on a core.
pub fn can_pin() -> bool {
    let pinned = || cores().first().is_some_and(|core| core_affinity::set_for_current(*core));
    // On a thread of its own, so that this one stays free.
    std::thread::spawn(pinned).join().unwrap_or(false)
}

impl Team {
    /// Starts `n` threads; with `pin`, each stays on a core of its own if there are as many.
    pub fn new(n: usize, pin: bool) -> Result<Team> {
        let cores = cores();
        // Threads that share a core must not keep each other from it.
        let spins = if n <= cores.len().max(1) { SPINS } else { 0 };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n)
            .thread_name(|i| format!("qkov-{i}"))
            .start_handler(move |i| {
                // More threads than cores are left to the system.
                if let Some(core) = cores.get(i).filter(|_| pin && n <= cores.len()) {
                    core_affinity::set_for_current(*core);
                }
            })
            .build()
            .map_err(|e| Error::Runtime(format!("cannot start {n} threads: {e}")))?;
        Ok(Team { pool, spins })
    }

    /// Number of threads.
    pub fn n_threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `lead` on the first of `n` threads (at most all); the others do what it hands them.
    pub fn enter<R: Send>(&self, n: usize, lead: impl FnOnce(&Crew) -> R + Send) -> Option<R> {
        let crew = Crew::new(n.clamp(1, self.n_threads()), self.spins);
        let lead = Mutex::new(Some(lead));
        let results = self.pool.broadcast(|ctx| match ctx.index() {
            0 => {
                let lead = lead.lock().ok()?.take()?;
                // Also when `lead` panics: the others must not wait for ever.
                let _dismissed = Dismiss(&crew);
                Some(lead(&crew))
            }
            i if i < crew.n_threads => {
                crew.serve(i);
                None
            }
            _ => None,
        });
        results.into_iter().flatten().next()
    }
}

/// A phase: called by every thread with its number.
type Job<'a> = &'a (dyn Fn(usize) + Sync);

/// The threads inside [`Team::enter`].
pub struct Crew {
    n_threads: usize,
    spins: u32,
    /// Counts phases; the job of the present one lies in `job`.
    phase: Apart<AtomicUsize>,
    /// Threads that have finished the present phase.
    done: Apart<AtomicUsize>,
    /// The next task of the present phase.
    next: Apart<AtomicUsize>,
    over: AtomicBool,
    panicked: AtomicBool,
    job: UnsafeCell<Option<Job<'static>>>,
    /// Where each thread sleeps, by its number.
    sleepers: Vec<Sleeper>,
}

#[derive(Default)]
struct Sleeper {
    asleep: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

// SAFETY: `job` is written by the lead between phases only, when no other thread reads it: readers
// wait for `phase` to change (acquire, after the write), and the lead waits for `done`.
unsafe impl Sync for Crew {}

struct Dismiss<'a>(&'a Crew);

impl Drop for Dismiss<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
        self.0.phase.0.fetch_add(1, Ordering::SeqCst);
        self.0.wake();
    }
}

impl Crew {
    fn new(n_threads: usize, spins: u32) -> Crew {
        Crew {
            n_threads,
            spins,
            phase: Apart::default(),
            done: Apart::default(),
            next: Apart::default(),
            over: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            sleepers: (0..n_threads).map(|_| Sleeper::default()).collect(),
        }
    }

    /// Number of threads.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Runs `job` once on every thread, and returns when all are done.
    pub fn run(&self, job: impl Fn(usize) + Sync) {
        if self.n_threads == 1 {
            return job(0);
        }
        let job: Job<'_> = &job;
        // SAFETY: only the lifetime changes. The job is forgotten by every thread before this
        // function returns: each adds itself to `done` after its last use.
        let job: Job<'static> = unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(job) };
        // SAFETY: no thread reads `job` now, see the `Sync` implementation.
        unsafe { *self.job.get() = Some(job) };
        self.done.0.store(0, Ordering::Relaxed);
        self.phase.0.fetch_add(1, Ordering::SeqCst);
        self.wake();
        let finished = Finish(self);
        job(0);
        drop(finished);
        assert!(!self.panicked.load(Ordering::Acquire), "a thread of the team panicked");
    }

    /// Calls `f(thread, task)` for every task below `n_tasks`; whoever is free takes the next one.
    pub fn each(&self, n_tasks: usize, f: impl Fn(usize, usize) + Sync) {
        if n_tasks == 1 {
            return f(0, 0);
        }
        self.next.0.store(0, Ordering::Relaxed);
        self.run(|thread| {
            loop {
                let task = self.next.0.fetch_add(1, Ordering::Relaxed);
                if task >= n_tasks {
                    return;
                }
                f(thread, task);
            }
        });
    }

    /// Calls `f(own, task)` for every task below `n_tasks`; each thread has one of `own` to itself.
    pub fn each_with<B: Send>(
        &self,
        own: &mut [B],
        n_tasks: usize,
        f: impl Fn(&mut B, usize) + Sync,
    ) {
        let own = Columns::new(own, 1);
        self.each(n_tasks, |thread, task| {
            // SAFETY: the numbers of threads differ, and a thread has one task at a time.
            if let [own] = unsafe { own.part(thread, 0, 1) } {
                f(own, task);
            }
        });
    }

    /// Calls `f(thread, i, chunk)` for the chunks of `data`, the last of which may be shorter.
    pub fn chunks<T: Send>(
        &self,
        data: &mut [T],
        len: usize,
        f: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        let n = data.len();
        let len = len.max(1);
        let base = Columns::new(data, n.max(1));
        self.each(n.div_ceil(len), |thread, i| {
            let start = i * len;
            // SAFETY: every task is taken once, and tasks have chunks of their own.
            let chunk = unsafe { base.part(0, start, len.min(n - start)) };
            f(thread, i, chunk);
        });
    }

    /// Waits for phases and takes part in them until the lead is gone.
    fn serve(&self, i: usize) {
        let mut seen = 0;
        loop {
            self.sleepers[i].wait(self.spins, || self.phase.0.load(Ordering::SeqCst) != seen);
            if self.over.load(Ordering::Acquire) {
                return;
            }
            seen += 1;
            // SAFETY: the lead wrote the job before it changed `phase`, and waits for `done`.
            let job = unsafe { *self.job.get() };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                if let Some(job) = job {
                    job(i);
                }
            }));
            if outcome.is_err() {
                self.panicked.store(true, Ordering::Release);
            }
            if self.done.0.fetch_add(1, Ordering::SeqCst) == self.n_threads - 2 {
                self.sleepers[0].wake();
            }
        }
    }

    fn wake(&self) {
        self.sleepers.iter().skip(1).for_each(Sleeper::wake);
    }
}

/// Waits for the other threads, also when the lead's own part panics: they use what it borrows.
struct Finish<'a>(&'a Crew);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let crew = self.0;
        crew.sleepers[0]
            .wait(crew.spins, || crew.done.0.load(Ordering::SeqCst) == crew.n_threads - 1);
    }
}

impl Sleeper {
    /// Spins, then sleeps until `ready`. Whoever makes it so calls `wake` afterwards.
    fn wait(&self, spins: u32, ready: impl Fn() -> bool) {
        for _ in 0..spins {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
        if let Ok(mut thread) = self.thread.lock() {
            *thread = Some(std::thread::current());
        }
        while !ready() {
            self.asleep.store(true, Ordering::SeqCst);
            // Looked at again after the flag is up, so that no wake-up is missed.
            if !ready() {
                std::thread::park();
            }
            self.asleep.store(false, Ordering::SeqCst);
        }
    }

    fn wake(&self) {
        if self.asleep.load(Ordering::SeqCst)
            && let Ok(thread) = self.thread.lock()
            && let Some(thread) = thread.as_ref()
        {
            thread.unpark();
        }
    }
}

/// A matrix whose disjoint parts are written by several threads. `[n, width]`
#[derive(Clone, Copy)]
pub struct Columns<'a, T> {
    data: *mut T,
    n: usize,
    width: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out parts by `part`, whose callers promise that they are disjoint.
unsafe impl<T: Send> Sync for Columns<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Columns<'_, T> {}

impl<'a, T> Columns<'a, T> {
    /// The rows of `data`, each of `width` elements.
    pub fn new(data: &'a mut [T], width: usize) -> Columns<'a, T> {
        let n = data.len() / width.max(1);
        Columns { data: data.as_mut_ptr(), n, width, life: std::marker::PhantomData }
    }

    /// Number of rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The rows from `n` on.
    pub fn skip(&self, n: usize) -> Columns<'a, T> {
        let n = n.min(self.n);
        // SAFETY: inside `data`, or at its end.
        Columns { data: unsafe { self.data.add(n * self.width) }, n: self.n - n, ..*self }
    }

    /// The first row from `start` on, cut into rows of `width` elements.
    pub fn cut(&self, start: usize, width: usize) -> Columns<'a, T> {
        let start = start.min(if self.n > 0 { self.width } else { 0 });
        let n = if self.n > 0 { (self.width - start) / width.max(1) } else { 0 };
        // SAFETY: inside `data`, or at its end.
        Columns { data: unsafe { self.data.add(start) }, n, width, ..*self }
    }

    /// `len` elements of `row`, from `start` on.
    ///
    /// # Safety
    /// No two parts that are alive at one time overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, row: usize, start: usize, len: usize) -> &mut [T] {
        assert!(row < self.n && start + len <= self.width);
        // SAFETY: inside `data`, which is borrowed for 'a; the caller promises the rest.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.width + start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_is_done_once() {
        for n in [1, 2, 3] {
            let team = Team::new(n, false).unwrap();
            for round in 0..50 {
                let mut data = vec![0usize; 1001];
                let sum = team.enter(n, |crew| {
                    for _ in 0..20 {
                        crew.chunks(&mut data, 7, |_, i, chunk| {
                            chunk.iter_mut().for_each(|x| *x += i + round);
                        });
                    }
                    data.iter().sum::<usize>()
                });
                let expected: usize = (0..1001).map(|i| 20 * (i / 7 + round)).sum();
                assert_eq!(sum, Some(expected));
            }
        }
    }

    #[test]
    fn sleepers_wake() {
        let team = Team::new(2, false).unwrap();
        let count = AtomicUsize::new(0);
        team.enter(2, |crew| {
            for _ in 0..3 {
                std::thread::sleep(std::time::Duration::from_millis(20));
                crew.run(|_| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        assert_eq!(count.into_inner(), 6);
    }

    #[test]
    fn a_panic_does_not_hang() {
        let team = Team::new(2, false).unwrap();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            team.enter(2, |crew| crew.run(|thread| assert_ne!(thread, 1)));
        }));
        assert!(caught.is_err());
        assert_eq!(team.enter(2, |crew| crew.n_threads()), Some(2));
    }
}
