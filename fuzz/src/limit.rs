//! No input is large, so whoever asks for much memory at once believes a number in it.

use std::alloc::{GlobalAlloc, Layout, System};

/// Most bytes of one allocation.
const MAX: usize = 64 << 20;

struct Limited;

#[global_allocator]
static ALLOCATOR: Limited = Limited;

fn check(n: usize) {
    if n > MAX {
        eprintln!("{n} bytes at once; allowed {MAX}");
        std::process::abort();
    }
}

// SAFETY: every call goes to the system's allocator unchanged, or not at all.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, n: usize) -> *mut u8 {
        check(n);
        unsafe { System.realloc(at, layout, n) }
    }
}
