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
mod guard;
mod manifest;
pub mod retry;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_config::{Config, Network, RegistrySite};

pub use blob::BlobStream;
pub use client::Registry;
pub use error::RegistryError;
pub use manifest::{MAX_MANIFEST, RawManifest};

/// Registries whose connections and tokens are kept. Users name hosts without end.
const MAX_OPEN: usize = 256;

/// Every registry that was talked to lately, by host.
#[derive(Debug)]
pub struct Registries {
    sites: BTreeMap<String, RegistrySite>,
    networks: Vec<Network>,
    stall: Duration,
    attempts: u32,
    /// With the time of the last use.
    open: Mutex<HashMap<String, (Arc<Registry>, Instant)>>,
}

impl Registries {
    pub fn new(config: &Config) -> Self {
        Self {
            sites: config.registry.clone(),
            networks: config.policy.networks.clone(),
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
        if let Some((registry, used_at)) = open.get_mut(host) {
            *used_at = Instant::now();
            return Ok(registry.clone());
        }
        let site = self.sites.get(host);
        let registry = Arc::new(Registry::open(host, site, &self.networks, self.stall)?);
        if open.len() >= MAX_OPEN {
            let oldest = open.iter().min_by_key(|(_, (_, used_at))| *used_at);
            let oldest = oldest.map(|(host, _)| host.clone());
            oldest.map(|host| open.remove(&host));
        }
        open.insert(host.to_owned(), (registry.clone(), Instant::now()));
        Ok(registry)
    }

    /// Whether the site's configuration names the registry, and so believes what it says of itself.
    pub fn is_trusted(&self, host: &str) -> bool {
        self.sites.contains_key(host)
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
