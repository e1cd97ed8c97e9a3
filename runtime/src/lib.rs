//! A job's view of an image on a compute node: found, checked, mounted, and handed to the tasks that asked.
//!
//! Runs as root, one process a step, with one thread. Everything that a user named is opened by a child that is wholly
//! that user ([`opener`]); everything that could hang (the parallel filesystem, the daemon) happens in children that
//! can be left behind.

mod channel;
mod opener;
mod sys;
mod text;
mod user;
pub mod view;

pub use opener::OpenError;
pub use user::{Account, User};
