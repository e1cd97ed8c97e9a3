//! Talking to registries (OCI distribution-spec 1.1, and what Docker's speak): manifests and blobs, read only.
//!
//! Invariant: what leaves this module as a manifest by digest has that digest. A blob's bytes are checked by whoever
//! collects them, since a blob may come in several pieces.

mod auth;
mod blob;
mod challenge;
mod client;
mod credentials;
mod error;
mod manifest;
pub mod retry;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_config::{Config, RegistrySite};

pub use blob::BlobStream;
pub use client::Registry;
pub use error::RegistryError;
pub use manifest::{MAX_MANIFEST, RawManifest};

/// Every registry that was talked to, by host.
#[derive(Debug)]
pub struct Registries {
    sites: BTreeMap<String, RegistrySite>,
    stall: Duration,
    attempts: u32,
    open: Mutex<HashMap<String, Arc<Registry>>>,
}

impl Registries {
    pub fn new(config: &Config) -> Self {
        Self {
            sites: config.registry.clone(),
            stall: Duration::from_secs(config.daemon.stall_timeout_s),
            attempts: config.daemon.fetch_attempts,
            open: Mutex::default(),
        }
    }

    /// The registry at `HOST[:PORT]`. Connections and tokens are shared by all that ask.
    ///
    /// # Errors
    /// [`RegistryError::SetUp`] when its certificates or credentials cannot be read; read again at the next call.
    pub fn get(&self, host: &str) -> Result<Arc<Registry>, RegistryError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(registry) = open.get(host) {
            return Ok(registry.clone());
        }
        let default = RegistrySite::default();
        let site = self.sites.get(host).unwrap_or(&default);
        let registry = Arc::new(Registry::open(host, site, self.stall)?);
        open.insert(host.to_owned(), registry.clone());
        Ok(registry)
    }

    /// Does `what` until it succeeds, fails for good, or has failed as often as the site allows.
    pub async fn retrying<T, F>(&self, mut what: impl FnMut() -> F) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, RegistryError>>,
    {
        let mut attempt = 0;
        loop {
            attempt += 1;
            match what().await {
                Err(e) if e.is_transient() && attempt < self.attempts => {
                    let wait = retry::delay(attempt, e.retry_after(), retry::jitter());
                    tracing::warn!(error = %e, attempt, ms = wait.as_millis() as u64, "trying again");
                    tokio::time::sleep(wait).await;
                }
                other => return other,
            }
        }
    }
}
