//! The sealer, `berthd seal`: owns the store and the key; has images made, signs and publishes them.
//!
//! A process of its own, so that what talks to strangers (the rest of the daemon) holds neither.

pub mod client;
mod frame;
pub mod protocol;
