//! The daemon's API as types ([`api`]), and a small blocking client for it ([`Client`]).
//!
//! A site may have several daemons: they are asked in turn until one answers (`ways`).
//!
//! No tokio: `berth` and the root helper on nodes link this. Every call has a time limit for connecting and one for
//! the whole exchange, and reads a bounded answer. Nothing here looks at the environment: proxies that are meant for
//! the internet never see the daemon's traffic.

pub mod api;
mod client;
mod error;
mod munge;
mod sse;
mod unix;
mod way;
mod ways;

pub use client::{Client, Probe, PullEvents};
pub use error::ClientError;
pub use munge::{Credential, Munge, MungeError, request_payload};
pub use unix::{NoResolver, UnixConnector};
