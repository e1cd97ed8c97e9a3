//! Stages four to six, from the daemon's side: an image in the store, for all who want it ([`image`] makes one).
//!
//! One image is made at a time per (manifest, platform), whoever asks and under whatever name. Bytes are keyed by
//! digest, failures are not: who joined the making of an image from another source and saw it fail goes on from its
//! own source alone.

mod image;

use std::sync::Arc;

use berth_client::api::{ErrorBody, ErrorKind};
use berth_config::Config;
use berth_image::{Digest, Platform};
use tokio::sync::watch;

use crate::catalogue::{Catalogue, ImageRow, Present};
use crate::fetch::Fetcher;
use crate::flight::Flights;
use crate::metrics::Metrics;
use crate::resolve::{Resolution, Resolver};
use crate::sealer::Sealer;
use crate::turns::Turns;
use image::Inner;

/// How far an image is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Compressed bytes of all layers.
    pub total: u64,
    pub fetched: u64,
    pub converted: u64,
    /// The sealer is at work.
    pub converting: bool,
}

/// The image, and the source that it is made from alone.
type Key = (Digest, Platform, Option<String>);
/// From which source it was made, and what came of it.
type Made = (String, Result<ImageRow, ErrorBody>);

/// Makes images. Clones share the work in flight.
#[derive(Debug, Clone)]
pub struct Maker {
    inner: Arc<Inner>,
    flights: Arc<Flights<Key, Made>>,
    news: Arc<std::sync::Mutex<std::collections::HashMap<Key, watch::Receiver<Progress>>>>,
}

impl Maker {
    pub fn new(
        config: &Config,
        resolver: Resolver,
        fetcher: Fetcher,
        sealer: Sealer,
        (catalogue, present): (Catalogue, Present),
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                resolver,
                fetcher,
                sealer,
                catalogue,
                present,
                metrics,
                turns: Turns::new(config.daemon.parallel_conversions),
                max_bytes: config.convert.limits.max_bytes,
            }),
            flights: Arc::default(),
            news: Arc::default(),
        }
    }

    /// The image, from the store or made now, for the user `uid`. `tell` hears how far it is, for a joined flight too.
    pub async fn make(
        &self,
        resolution: &Resolution,
        uid: u32,
        mut tell: impl FnMut(Progress),
    ) -> Result<ImageRow, ErrorBody> {
        let own = source(resolution);
        let (from, made) = self.fly(resolution, uid, None, &mut tell).await?;
        match made {
            Err(e) if from != own && is_of_source(e.kind) => {
                tracing::warn!(digest = %resolution.manifest, error = %e, source = from, "another source failed, begun again from `{own}`");
                self.fly(resolution, uid, Some(own), &mut tell).await?.1
            }
            made => made,
        }
    }

    /// Joins the making of the image, or begins it; from one source `alone` where that is wanted.
    async fn fly(
        &self,
        resolution: &Resolution,
        uid: u32,
        alone: Option<String>,
        mut tell: impl FnMut(Progress),
    ) -> Result<Made, ErrorBody> {
        let key = (resolution.manifest, resolution.platform.clone(), alone);
        let mut news = None;
        let work = || {
            let (tx, rx) = watch::channel(Progress::default());
            let (inner, resolution) = (self.inner.clone(), resolution.clone());
            let (all_news, key) = (self.news.clone(), key.clone());
            lock(&all_news).insert(key.clone(), rx);
            async move {
                let made = inner.make(&resolution, uid, key.2.is_some(), &tx).await;
                lock(&all_news).remove(&key);
                (source(&resolution), made)
            }
        };
        let mut made = std::pin::pin!(self.flights.join(&key, work));
        loop {
            let heard = async {
                match &mut news {
                    None => tokio::task::yield_now().await,
                    Some(news) => changed(news).await,
                }
            };
            tokio::select! {
                biased;
                made = &mut made => return made.map_err(|e| internal(e.to_string())),
                () = heard => match &mut news {
                    None => news = Some(lock(&self.news).get(&key).cloned().unwrap_or_else(silence)),
                    Some(news) => tell(*news.borrow_and_update()),
                },
            }
        }
    }
}

/// Where a reference's bytes come from.
fn source(resolution: &Resolution) -> String {
    let reference = &resolution.reference;
    format!("{}/{}", reference.registry(), reference.repository())
}

/// Whether a failure may be that of the source, and another one may do better.
fn is_of_source(kind: ErrorKind) -> bool {
    match kind {
        ErrorKind::UnknownImage
        | ErrorKind::Unauthorized
        | ErrorKind::Denied
        | ErrorKind::UpstreamUnavailable
        | ErrorKind::DigestMismatch
        | ErrorKind::NotFound
        | ErrorKind::Internal => true,
        ErrorKind::BadRequest
        | ErrorKind::BadReference
        | ErrorKind::NoPlatform
        | ErrorKind::CorruptLayer
        | ErrorKind::DiskFull
        | ErrorKind::StoreUnavailable
        | ErrorKind::ConversionFailed => false,
    }
}

/// News that never come.
fn silence() -> watch::Receiver<Progress> {
    watch::channel(Progress::default()).1
}

async fn changed(news: &mut watch::Receiver<Progress>) {
    if news.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn internal(message: String) -> ErrorBody {
    ErrorBody {
        kind: ErrorKind::Internal,
        message,
        hint: None,
    }
}
