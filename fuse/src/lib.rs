//! Serving an image as a file system to the kernel, without root, and without losing a reader when the server dies.
//!
//! - [`abi`]: the protocol's bytes;
//! - [`filesystem`]: what a file system must answer;
//! - [`fs`]: an image's files;
//! - [`block`]: an image's bytes as one file, for a loop device;
//! - [`fuse`]: from a request to its answer;
//! - [`slots`]: requests in memory that outlives a server;
//! - [`session`]: the threads that serve;
//! - `near`: on which CPU they run;
//! - [`meter`]: how long requests take;
//! - [`mount`]: making it visible;
//! - [`chunks`]: images that are elsewhere, checked piece by piece;
//! - [`holder`]: what stays when a server dies.

pub mod abi;
pub mod block;
pub mod chunks;
pub mod filesystem;
pub mod fs;
pub mod fuse;
pub mod holder;
pub mod meter;
pub mod mount;
mod near;
pub mod session;
pub mod slots;

/// Locks a mutex whose data is whole at every moment at which a thread could panic.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
