//! A pull: what somebody asked for, on its way through all stages. One task a pull, one pull a reference and platform;
//! who asks while it runs joins it. It is nobody's child, and a restart of the daemon goes on with it under its id.

#[cfg(test)]
mod others;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use berth_client::api::{ErrorBody, ErrorKind, Pull, PullState};
use berth_config::Config;
use berth_image::{Digest, ImageRef, Platform};
use jiff::Timestamp;

use crate::catalogue::{Catalogue, EndedPull, ImageRow, OpenPull, Present};
use crate::convert::{Maker, Progress};
use crate::metrics::{Metrics, Outcome, PullLabels};
use crate::resolve::{Resolution, Resolver};
use crate::seal::protocol::{Answer, RefRequest, Request};
use crate::sealer::Sealer;

pub use table::Entry;
use table::{REMEMBERED, Table, lock};

/// Pulls that one user may have in flight. Admins may have any number.
const MAX_OF_USER: usize = 64;

/// All pulls. Clones are the same.
#[derive(Debug, Clone)]
pub struct Pulls {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    resolver: Resolver,
    maker: Maker,
    sealer: Sealer,
    catalogue: Catalogue,
    present: Present,
    metrics: Arc<Metrics>,
    table: Mutex<Table>,
    failure_ttl: Duration,
}

impl Pulls {
    pub fn new(
        config: &Config,
        resolver: Resolver,
        maker: Maker,
        sealer: Sealer,
        (catalogue, present): (Catalogue, Present),
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                resolver,
                maker,
                sealer,
                catalogue,
                present,
                metrics,
                table: Mutex::default(),
                failure_ttl: Duration::from_secs(config.daemon.failure_ttl_s),
            }),
        }
    }

    /// Asks for an image. One that is in the store is ready at once; else a pull is joined or begun.
    pub async fn start(
        &self,
        reference: &ImageRef,
        platform: &Platform,
        uid: u32,
        is_admin: bool,
    ) -> Result<Arc<Entry>, ErrorBody> {
        let inner = &self.inner;
        if let Some((_, entry)) = self.at_hand(reference, platform, uid).await? {
            return Ok(entry);
        }
        let key = (reference.clone(), platform.clone());
        let entry = {
            let mut table = lock(&inner.table);
            if let Some(entry) = table.running(&key) {
                entry.join(uid);
                return Ok(entry);
            }
            if let Some(entry) = table.failed(&key, inner.failure_ttl) {
                entry.join(uid);
                return Ok(entry);
            }
            if !is_admin && table.running_of(uid) >= MAX_OF_USER {
                return Err(ErrorBody {
                    kind: ErrorKind::Denied,
                    message: format!(
                        "uid {uid} has {MAX_OF_USER} pulls in flight, no more are begun"
                    ),
                    hint: Some("wait for some of them, `berth pulls` shows them".into()),
                });
            }
            let entry = Entry::new(
                new_id()?,
                &reference.to_string(),
                platform,
                Timestamp::now(),
                BTreeSet::from([uid]),
            );
            table.begin(key.clone(), &entry);
            entry
        };
        let open = OpenPull {
            id: entry.pull().id,
            reference: reference.clone(),
            platform: platform.clone(),
            started_at: Timestamp::now(),
            uids: BTreeSet::from([uid]),
        };
        self.run(key, entry.clone(), Some(open));
        Ok(entry)
    }

    /// What needs nobody's answer and is in the store: its digest, and a pull that has ended.
    pub async fn at_hand(
        &self,
        reference: &ImageRef,
        platform: &Platform,
        uid: u32,
    ) -> Result<Option<(Digest, Arc<Entry>)>, ErrorBody> {
        let Some((resolution, image)) = self.inner.at_once(reference, platform).await? else {
            return Ok(None);
        };
        let name = resolution.reference.to_string();
        let entry = self.found(&name, &image, uid).await?;
        Ok(Some((resolution.manifest, entry)))
    }

    /// Lets the next one who asks try again, though it failed just now.
    pub fn forget_failure(&self, reference: &ImageRef, platform: &Platform) {
        let key = (reference.clone(), platform.clone());
        lock(&self.inner.table).forget_failure(&key);
        self.inner.resolver.forget_failure(&key);
    }

    /// An image that is in the store, as a pull that has ended.
    pub async fn found(
        &self,
        reference: &str,
        image: &ImageRow,
        uid: u32,
    ) -> Result<Arc<Entry>, ErrorBody> {
        let inner = &self.inner;
        let now = Timestamp::now();
        let uids = BTreeSet::from([uid]);
        let entry = Entry::new(new_id()?, reference, &image.platform, now, uids);
        entry.update(|p| ready(p, image));
        lock(&inner.table).hit(&entry);
        inner.count(Outcome::Hit);
        (inner.catalogue)
            .touch_image(&image.manifest, &image.platform)
            .await?;
        Ok(entry)
    }

    /// Goes on with what the last daemon left, and remembers what it remembered.
    pub async fn resume(&self) -> Result<usize, ErrorBody> {
        for ended in self.inner.catalogue.ended_pulls(REMEMBERED).await? {
            let entry = Entry::ended(ended.pull, ended.uids);
            lock(&self.inner.table).end(None, &entry);
        }
        let open = self.inner.catalogue.open_pulls().await?;
        let number = open.len();
        for pull in open {
            tracing::info!(pull = pull.id, image = %pull.reference, "goes on");
            let name = pull.reference.to_string();
            let entry = Entry::new(pull.id, &name, &pull.platform, pull.started_at, pull.uids);
            let key = (pull.reference, pull.platform);
            lock(&self.inner.table).begin(key.clone(), &entry);
            self.run(key, entry, None);
        }
        Ok(number)
    }

    pub fn get(&self, id: &str) -> Option<Arc<Entry>> {
        lock(&self.inner.table).get(id)
    }

    /// Pulls in flight and those that ended lately, oldest first.
    pub fn all(&self) -> Vec<Arc<Entry>> {
        lock(&self.inner.table).all()
    }

    pub fn in_flight(&self) -> usize {
        lock(&self.inner.table).in_flight()
    }

    fn run(&self, key: (ImageRef, Platform), entry: Arc<Entry>, open: Option<OpenPull>) {
        let inner = self.inner.clone();
        inner.metrics.pulls_in_flight.inc();
        tokio::spawn(async move {
            let began = Instant::now();
            let ended = inner.pull(&key, &entry, open.as_ref()).await;
            let id = entry.pull().id;
            // First: who hears of the end and asks again begins anew, and does not join what has ended.
            {
                let mut table = lock(&inner.table);
                table.end(Some(&key), &entry);
                if ended.is_err() {
                    table.fail(&key, &entry);
                }
            }
            entry.update(|p| match &ended {
                Ok(image) => ready(p, image),
                Err(e) => {
                    p.state = PullState::Failed;
                    p.ended_at = Some(Timestamp::now().to_string());
                    p.error = Some(e.clone());
                }
            });
            inner.metrics.pulls_in_flight.dec();
            let ms = began.elapsed().as_millis() as u64;
            match &ended {
                Ok(image) => {
                    inner.count(Outcome::Made);
                    inner
                        .metrics
                        .pull_seconds
                        .observe(began.elapsed().as_secs_f64());
                    tracing::info!(pull = id, image = %key.0, digest = %image.manifest, bytes = image.size, ms, "ready");
                }
                Err(e) => {
                    inner.count(Outcome::Failed);
                    tracing::warn!(pull = id, image = %key.0, error = %e, ms, "failed");
                }
            }
            let ended = EndedPull {
                pull: entry.pull(),
                uids: entry.uids(),
            };
            if let Err(e) = inner.catalogue.end_pull(&ended).await {
                tracing::error!(pull = id, error = %e, "cannot note that a pull has ended");
            }
        });
    }
}

impl Inner {
    /// The image, when memory and store suffice.
    async fn at_once(
        &self,
        reference: &ImageRef,
        platform: &Platform,
    ) -> Result<Option<(Resolution, ImageRow)>, ErrorBody> {
        let known = self.resolver.known(reference, platform).await?;
        let Some(resolution) = known.filter(|r| r.published) else {
            return Ok(None);
        };
        let image = self.present.image(&resolution.manifest, platform).await?;
        let Some(image) = image else {
            return Ok(None);
        };
        let is_named = self.present.reference(&resolution.reference).await;
        Ok(is_named.then_some((resolution, image)))
    }

    /// The stages, one after the other.
    async fn pull(
        &self,
        (reference, platform): &(ImageRef, Platform),
        entry: &Arc<Entry>,
        open: Option<&OpenPull>,
    ) -> Result<ImageRow, ErrorBody> {
        if let Some(open) = open {
            self.catalogue.begin_pull(open).await?;
        }
        let resolution = self.resolver.resolve(reference, platform).await?;
        entry.update(|p| {
            p.digest = Some(resolution.manifest.to_string());
            p.state = PullState::Fetching;
        });
        let uid = entry.uids().first().copied().unwrap_or_default();
        let image = (self.maker)
            .make(&resolution, uid, |news| entry.update(|p| advance(p, news)))
            .await?;
        entry.update(|p| p.state = PullState::Publishing);
        self.publish_reference(&resolution).await?;
        (self.catalogue)
            .touch_image(&image.manifest, &image.platform)
            .await?;
        Ok(image)
    }

    /// Has the store say what the reference stands for, unless it does already.
    async fn publish_reference(&self, resolution: &Resolution) -> Result<(), ErrorBody> {
        if resolution.published && self.present.reference(&resolution.reference).await {
            return Ok(());
        }
        let request = Request::Ref(RefRequest {
            reference: resolution.reference.clone(),
            top: resolution.top,
            platform: resolution.platform.clone(),
            manifest: resolution.manifest,
            resolved_at: resolution.resolved_at,
        });
        self.sealer.ready().await?;
        match self.sealer.request(&request, Vec::new(), |_| {}).await? {
            Answer::RefWritten { .. } => {}
            _ => {
                return Err(ErrorBody {
                    kind: ErrorKind::Internal,
                    message: "the sealer answered something else".into(),
                    hint: None,
                });
            }
        }
        let r = resolution;
        (self.catalogue)
            .mark_published(&r.reference, &r.platform, &r.top, &r.manifest)
            .await?;
        Ok(())
    }

    fn count(&self, outcome: Outcome) {
        self.metrics
            .pulls
            .get_or_create(&PullLabels { outcome })
            .inc();
    }
}

/// What the stages' progress means for the pull.
fn advance(pull: &mut Pull, news: Progress) {
    pull.bytes_total = news.total;
    pull.bytes_fetched = news.fetched;
    pull.bytes_converted = news.converted;
    pull.state = if news.fetched < news.total || !news.converting {
        PullState::Fetching
    } else if news.converted < news.total {
        PullState::Converting
    } else {
        PullState::Publishing
    };
}

fn ready(pull: &mut Pull, image: &ImageRow) {
    pull.state = PullState::Ready;
    pull.digest = Some(image.manifest.to_string());
    pull.path = Some(image.path.clone());
    pull.ended_at = Some(Timestamp::now().to_string());
    pull.bytes_fetched = pull.bytes_total;
    pull.bytes_converted = pull.bytes_total;
}

fn new_id() -> Result<String, ErrorBody> {
    let mut bytes = [0u8; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(|e| {
        ErrorBody {
            kind: ErrorKind::Internal,
            message: format!("no randomness: {e}"),
            hint: None,
        }
    })?;
    Ok(berth_image::digest::hex(&bytes))
}
