//! The sealer, `berthd seal`: owns the store and the key; has images made, signs and publishes them.
//!
//! A process of its own, so that what talks to strangers (the rest of the daemon) holds neither. It works with
//! threads and blocking calls: one a connection, one connection a request.
//!
//! - [`protocol`]: what is said on its socket; [`client`]: the daemon's end;
//! - `server`: its own end; `site`: what it holds; `state`: what it remembers;
//! - `manifest`: what an image claims to be; `conversion`: from there to a published record; `converter`: the
//!   sandboxed process that does the work; `tree`: the hash tree it left.

pub mod client;
mod conversion;
mod converter;
mod frame;
mod manifest;
pub mod protocol;
mod server;
mod site;
mod state;
mod tree;

use berth_config::Config;

pub use site::SealerError;

/// Runs the sealer until `parent` ends (for ever without one, until a signal ends it). What a sudden end leaves is
/// swept at the next start.
///
/// # Errors
/// When store, key or socket are not to be had.
pub fn run(config: &Config, parent: Option<i32>) -> Result<(), SealerError> {
    // What is published is for everybody to read, whoever started us.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let site = site::Site::open(config)?;
    let listen = |source| SealerError::Listen {
        path: config.seal.socket.clone(),
        source,
    };
    let listener = server::listen(&config.seal.socket).map_err(listen)?;
    tracing::info!(
        socket = %config.seal.socket.display(),
        store = %config.store.path.display(),
        key = %site.key.public().id(),
        "the sealer is ready"
    );
    server::serve(site, &listener, parent).map_err(listen)
}
