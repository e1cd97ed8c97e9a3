//! An allocator that counts: an input that makes a parser hold, or only ask for, more than it should is a finding,
//! even where the pages are never touched and the process stays small.

#![allow(
    unsafe_code,
    reason = "GlobalAlloc is an unsafe trait; every call is handed to the system's allocator as it is"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};

/// Most bytes that one input may hold at a time, over all threads.
pub const MOST: isize = 192 << 20;

static HELD: AtomicIsize = AtomicIsize::new(0);
static WATCHED: AtomicBool = AtomicBool::new(false);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    if held > MOST && WATCHED.swap(false, Ordering::Relaxed) {
        // Not a panic: unwinding would allocate, and the input is to be kept.
        eprintln!("an input of a few bytes made the process hold {held} bytes");
        std::process::abort();
    }
}

// SAFETY: every call goes to `System` with the arguments it came with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Runs one input. What was held before, by the engine or by threads that are about to end, does not count.
pub fn bounded(run: impl FnOnce()) {
    HELD.store(0, Ordering::Relaxed);
    WATCHED.store(true, Ordering::Relaxed);
    run();
    WATCHED.store(false, Ordering::Relaxed);
}
