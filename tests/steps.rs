//! What a step costs besides computing. A binary of its own: it counts what all threads allocate.
#![allow(missing_docs, unsafe_code, clippy::unwrap_used, clippy::print_stdout)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use qkov::model::Model;
use qkov::session::{Options, Session};

struct Counted;

#[global_allocator]
static ALLOCATOR: Counted = Counted;
static COUNT: AtomicUsize = AtomicUsize::new(0);
static SIZE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        SIZE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Allocations of a forward pass, however many layers it has: two by which rayon calls all threads,
/// one for where they sleep, and one for the parts of sequences that go through together.
const PER_PASS: usize = 4;

#[test]
fn a_token_allocates_only_to_call_the_threads() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/models/softmax-q8_0.gguf");
    let model = Model::open(file.as_ref()).unwrap();
    let mut session = Session::new(Arc::new(model), &Options::default()).unwrap();
    let n = session.n_ctx();
    // Twice over the whole context; what the first round grew, the second has.
    for round in 0..2 {
        session.rewind(0);
        let before = [&COUNT, &SIZE].map(|n| n.load(Ordering::Relaxed));
        for token in 0..n as u32 {
            session.feed(&[token]).unwrap();
        }
        let after = [&COUNT, &SIZE].map(|n| n.load(Ordering::Relaxed));
        let [count, size] = [after[0] - before[0], after[1] - before[1]];
        println!("{count} allocations of {size} bytes for {n} tokens");
        assert!(round == 0 || (count <= PER_PASS * n && size <= 100 * PER_PASS * n));
    }
}
