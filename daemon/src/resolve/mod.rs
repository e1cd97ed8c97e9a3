//! Stage one: from a reference to the digest of one platform's manifest.
//!
//! Digests are for ever, so what was once fetched by digest is never asked for again. A tag's answer is used for
//! `tag_ttl_s`; then the registry is asked whether it still holds, and when the registry cannot say, the old answer
//! is given and called stale. One question per reference and platform is in flight at a time.

pub mod manifest;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_client::api::{ErrorBody, ErrorKind, Job};
use berth_config::{Config, Policy};
use berth_image::record::Admission;
use berth_image::{Digest, ImageRef, Platform};
use jiff::Timestamp;

use crate::admit::admit;
use crate::catalogue::{Catalogue, Present, TagRow};
use crate::flight::Flights;
use crate::registry::{RawManifest, Registries};
use manifest::{Document, Manifest, ManifestError};

/// How deep an index may lie in indexes.
const MAX_NESTING: usize = 3;
/// How long the registry is waited for by those for whom an old answer would do.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a registry that did not answer is not asked again about what it answered before.
const REST: Duration = Duration::from_secs(30);
/// Failures remembered at a time.
const MAX_FAILURES: usize = 4096;

/// What a reference stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolution {
    pub reference: ImageRef,
    pub platform: Platform,
    /// What the registry answered: the index, or the manifest where there is no index.
    pub top: Digest,
    /// The manifest for the platform.
    pub manifest: Digest,
    /// When the registry said so.
    pub resolved_at: Timestamp,
    /// The registry could not be asked, and the answer is older than the site wants.
    pub stale: bool,
    /// The store holds a signed entry that says the same.
    pub published: bool,
}

impl Resolution {
    /// Seconds since the registry said so.
    pub fn age_s(&self) -> u64 {
        let age = Timestamp::now().as_second() - self.resolved_at.as_second();
        u64::try_from(age).unwrap_or_default()
    }
}

type Answer = Result<Resolution, ErrorBody>;

/// Resolves references. Clones share the questions in flight.
#[derive(Debug, Clone)]
pub struct Resolver {
    inner: Arc<Inner>,
    flights: Arc<Flights<(ImageRef, Platform), Answer>>,
}

#[derive(Debug)]
struct Inner {
    registries: Arc<Registries>,
    catalogue: Catalogue,
    present: Present,
    policy: Policy,
    ttl: Duration,
    failure_ttl: Duration,
    /// When a registry last did not answer.
    failed: Mutex<HashMap<String, Instant>>,
    /// What could not be resolved lately, and why.
    failures: Mutex<HashMap<(ImageRef, Platform), (ErrorBody, Instant)>>,
}

impl Resolver {
    pub fn new(
        config: &Config,
        registries: Arc<Registries>,
        catalogue: Catalogue,
        present: Present,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                registries,
                catalogue,
                present,
                ttl: Duration::from_secs(config.daemon.tag_ttl_s),
                policy: config.policy.clone(),
                failure_ttl: Duration::from_secs(config.daemon.failure_ttl_s),
                failed: Mutex::default(),
                failures: Mutex::default(),
            }),
            flights: Arc::default(),
        }
    }

    /// What `reference` stands for, from memory where that may be used.
    pub async fn resolve(&self, reference: &ImageRef, platform: &Platform) -> Answer {
        if let Some(known) = self.known(reference, platform).await? {
            return Ok(known);
        }
        let old = self.inner.catalogue.tag(reference, platform).await?;
        let stale = old.map(|row| resolution(reference, platform, &row, true));
        if let Some(stale) = &stale
            && self.inner.failed_lately(reference.registry())
        {
            return Ok(stale.clone());
        }
        if let Some(failure) = self.inner.failure(reference, platform) {
            return Err(failure);
        }
        let key = (reference.clone(), platform.clone());
        let work = || {
            let (inner, (reference, platform)) = (self.inner.clone(), key.clone());
            async move { inner.ask(&reference, &platform).await }
        };
        let asked = self.flights.join(&key, work);
        let answer = match stale {
            None => asked.await,
            // The question goes on without us: the next one who asks gets its answer.
            Some(stale) => match tokio::time::timeout(PATIENCE, asked).await {
                Ok(answer) => answer,
                Err(_) => return Ok(stale),
            },
        };
        answer.unwrap_or_else(|e| Err(internal(&e.to_string())))
    }

    /// Whether the site's policy lets `reference` in, and under which rule.
    pub fn admit(&self, reference: &ImageRef) -> Result<Admission, ErrorBody> {
        admit(&self.inner.policy, reference).enforce(reference)
    }

    /// Lets the next one who asks try again, though it failed just now.
    pub fn forget_failure(&self, key: &(ImageRef, Platform)) {
        let mut failures = (self.inner.failures.lock()).unwrap_or_else(PoisonError::into_inner);
        failures.remove(key);
    }

    /// The answer that needs nobody: a digest's, or a tag's that is young enough.
    pub async fn known(
        &self,
        reference: &ImageRef,
        platform: &Platform,
    ) -> Result<Option<Resolution>, ErrorBody> {
        self.admit(reference)?;
        let row = self.inner.catalogue.tag(reference, platform).await?;
        Ok(row
            .filter(|row| reference.digest().is_some() || self.inner.is_fresh(row))
            .map(|row| resolution(reference, platform, &row, false)))
    }

    /// The answer for a job of the user who asks: what the two were told first, for ever.
    pub async fn resolve_for_job(
        &self,
        job: (u32, &Job),
        reference: &ImageRef,
        platform: &Platform,
    ) -> Answer {
        self.admit(reference)?;
        let catalogue = &self.inner.catalogue;
        if let Some((manifest, at)) = catalogue.job_answer(job, reference, platform).await? {
            let row = TagRow {
                top: manifest,
                manifest,
                checked_at: at,
                published: false,
            };
            return Ok(resolution(reference, platform, &row, false));
        }
        let mut answer = self.resolve(reference, platform).await?;
        let kept = catalogue.keep_job_answer(job, reference, platform, &answer.manifest);
        answer.manifest = kept.await?;
        Ok(answer)
    }

    /// The manifest that a resolution found, as it was sent and as it reads.
    pub async fn manifest(
        &self,
        reference: &ImageRef,
        digest: Digest,
    ) -> Result<(RawManifest, Manifest), ErrorBody> {
        let raw = self.inner.by_digest(reference, digest).await?;
        match manifest::parse(digest, &raw.bytes)? {
            Document::Image(manifest) => Ok((raw, manifest)),
            Document::Index(_) => Err(internal(&format!("{digest} is an index"))),
        }
    }
}

impl Inner {
    fn is_fresh(&self, row: &TagRow) -> bool {
        let age = Timestamp::now().as_second() - row.checked_at.as_second();
        // An answer from the future is a clock that was set back: ask again.
        u64::try_from(age).is_ok_and(|age| age < self.ttl.as_secs())
    }

    fn failed_lately(&self, registry: &str) -> bool {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.get(registry).is_some_and(|at| at.elapsed() < REST)
    }

    fn failure(&self, reference: &ImageRef, platform: &Platform) -> Option<ErrorBody> {
        let mut failures = (self.failures.lock()).unwrap_or_else(PoisonError::into_inner);
        failures.retain(|_, (_, at)| at.elapsed() < self.failure_ttl);
        let found = failures.get(&(reference.clone(), platform.clone()));
        found.map(|(failure, _)| failure.clone())
    }

    fn keep_failure(&self, reference: &ImageRef, platform: &Platform, failure: &ErrorBody) {
        let mut failures = (self.failures.lock()).unwrap_or_else(PoisonError::into_inner);
        if failures.len() < MAX_FAILURES {
            let failure = (failure.clone(), Instant::now());
            failures.insert((reference.clone(), platform.clone()), failure);
        }
    }

    fn note(&self, registry: &str, answered: bool) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.retain(|_, at| at.elapsed() < REST);
        if answered {
            failed.remove(registry);
        } else {
            failed.insert(registry.to_owned(), Instant::now());
        }
    }

    async fn ask(&self, reference: &ImageRef, platform: &Platform) -> Answer {
        let known = match self.catalogue.tag(reference, platform).await? {
            Some(row) => Some(row),
            // Another daemon's answer, which the sealer signed.
            None => self.present.entry(reference, platform).await?,
        };
        let for_ever = reference.digest().is_some();
        if let Some(row) = (known.as_ref()).filter(|row| for_ever || self.is_fresh(row)) {
            return Ok(resolution(reference, platform, row, false));
        }
        let answer = self.ask_registry(reference, platform, known.as_ref()).await;
        let silent = matches!(&answer, Err(e) if e.kind == ErrorKind::UpstreamUnavailable);
        self.note(reference.registry(), !silent);
        match answer {
            Ok(row) => {
                self.catalogue.put_tag(reference, platform, &row).await?;
                tracing::info!(image = %reference, platform = %platform, digest = %row.manifest, "resolved");
                Ok(resolution(reference, platform, &row, false))
            }
            Err(e) => match known {
                Some(row) if silent => {
                    tracing::warn!(image = %reference, error = %e, "the registry does not answer, the last answer is used");
                    Ok(resolution(reference, platform, &row, true))
                }
                _ => {
                    self.keep_failure(reference, platform, &e);
                    Err(e)
                }
            },
        }
    }

    async fn ask_registry(
        &self,
        reference: &ImageRef,
        platform: &Platform,
        known: Option<&TagRow>,
    ) -> Result<TagRow, ErrorBody> {
        let checked_at = Timestamp::now();
        let top = match reference.digest() {
            // An image that is in the store tells its own digest, whatever became of its registry.
            Some(digest) if self.present.known(&digest, platform).await?.is_some() => {
                return Ok(TagRow {
                    top: digest,
                    manifest: digest,
                    checked_at,
                    published: false,
                });
            }
            Some(digest) => self.by_digest(reference, digest).await?,
            None => {
                let registry = self.registries.get(reference.registry())?;
                let (repository, tag) = (reference.repository(), reference.manifest_name());
                let unchanged = match known {
                    Some(row) => {
                        let now = (self.registries)
                            .retrying(|| registry.manifest_digest(repository, &tag))
                            .await?;
                        now == Some(row.top)
                    }
                    None => false,
                };
                if let Some(row) = known.filter(|_| unchanged) {
                    return Ok(TagRow {
                        checked_at,
                        ..row.clone()
                    });
                }
                let raw = (self.registries)
                    .retrying(|| registry.manifest(repository, &tag, None))
                    .await?;
                self.keep(&raw).await?;
                raw
            }
        };
        Ok(TagRow {
            top: top.digest,
            manifest: self.descend(reference, platform, top).await?,
            checked_at,
            published: false,
        })
    }

    /// From an index to the manifest for `platform`.
    async fn descend(
        &self,
        reference: &ImageRef,
        platform: &Platform,
        top: RawManifest,
    ) -> Result<Digest, ErrorBody> {
        let mut raw = top;
        for _ in 0..=MAX_NESTING {
            match manifest::parse(raw.digest, &raw.bytes)? {
                Document::Image(manifest) => return Ok(manifest.digest),
                Document::Index(index) => {
                    let entry = index.select(platform)?;
                    raw = self.by_digest(reference, entry.digest).await?;
                }
            }
        }
        Err(ManifestError::Nested(MAX_NESTING).into())
    }

    async fn by_digest(
        &self,
        reference: &ImageRef,
        digest: Digest,
    ) -> Result<RawManifest, ErrorBody> {
        if let Some(raw) = self.catalogue.manifest(&digest).await? {
            return Ok(raw);
        }
        let registry = self.registries.get(reference.registry())?;
        let (repository, name) = (reference.repository(), digest.to_string());
        let raw = (self.registries)
            .retrying(|| registry.manifest(repository, &name, Some(digest)))
            .await?;
        self.keep(&raw).await?;
        Ok(raw)
    }

    /// Remembers a document, if it is one.
    async fn keep(&self, raw: &RawManifest) -> Result<(), ErrorBody> {
        manifest::parse(raw.digest, &raw.bytes)?;
        Ok(self.catalogue.put_manifest(raw).await?)
    }
}

fn resolution(reference: &ImageRef, platform: &Platform, row: &TagRow, stale: bool) -> Resolution {
    Resolution {
        reference: reference.clone(),
        platform: platform.clone(),
        top: row.top,
        manifest: row.manifest,
        resolved_at: row.checked_at,
        stale,
        published: row.published,
    }
}

fn internal(message: &str) -> ErrorBody {
    ErrorBody {
        kind: ErrorKind::Internal,
        message: message.into(),
        hint: None,
    }
}
