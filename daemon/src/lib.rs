//! The site daemon: resolve, admit, fetch, have images made and sealed, serve.
//!
//! The stages of an image's life are the modules: [`resolve`] → [`admit`] → [`fetch`] → [`convert`] (hand-over to the
//! sealer, [`seal`], a process of its own that publishes) → [`serve`] → [`collect`]. [`pulls`] drives one image
//! through them; [`catalogue`] remembers; [`registry`] speaks to registries.

pub mod admit;
pub mod catalogue;
pub mod collect;
pub mod convert;
pub mod fetch;
pub mod flight;
pub mod metrics;
mod notify;
pub mod pulls;
pub mod registry;
pub mod resolve;
pub mod rights;
pub mod seal;
mod sealer;
pub mod serve;
pub mod start;
#[cfg(test)]
mod testbed;
pub mod turns;

/// Installs the one TLS provider of the process (two are compiled in by dependencies, and rustls takes neither by
/// itself). Does nothing the second time.
pub fn install_tls() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}
