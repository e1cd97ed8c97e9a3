//! Serving an image as a file system to the kernel, without root, and without losing a reader when the server dies.
//!
//! - [`abi`]: the protocol's bytes;
//! - [`fs`]: what the file system is;
//! - [`fuse`]: from a request to its answer;
//! - [`slots`]: requests in memory that outlives a server;
//! - [`session`]: the threads that serve;
//! - [`mount`]: making it visible;
//! - [`holder`]: what stays when a server dies.

pub mod abi;
pub mod fs;
pub mod fuse;
pub mod holder;
pub mod mount;
pub mod session;
pub mod slots;
