//! One image: config and layers fetched, handed to the sealer, noted in the catalogue.
//!
//! Layers are fetched from the top down, because the converter reads the top one first, and flow to it while they
//! arrive.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use berth_client::api::{ErrorBody, ErrorKind};
use berth_image::Digest;
use berth_image::shown::{clip, parse_error};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use serde::Deserialize;
use tokio::sync::watch;

use super::Progress;
use crate::catalogue::{Catalogue, ImageRow, Present};
use crate::fetch::{Blob, FetchError, Fetcher, Want, feed};
use crate::metrics::Metrics;
use crate::resolve::manifest::{Descriptor, Manifest, ManifestError};
use crate::resolve::{Resolution, Resolver};
use crate::rights::{self, Wanted};
use crate::seal::protocol::{Answer, Request, SealRequest};
use crate::sealer::Sealer;
use crate::turns::{Asker, Turns};

/// Bytes a pipe should hold. The kernel gives less when the daemon's pipes hold much already.
const PIPE_SIZE: usize = 256 << 10;
/// How often progress is told.
const TELL: Duration = Duration::from_millis(200);
/// How often a conversion is begun again because the sealer went away, or because of what an earlier run had left
/// in the spool.
const TRIES: u32 = 3;
/// A conversion that gets less in ten seconds, and has no more to read, waits for its registry.
const STARVED: u64 = 8 << 20;

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) resolver: Resolver,
    pub(super) fetcher: Fetcher,
    pub(super) sealer: Sealer,
    pub(super) catalogue: Catalogue,
    pub(super) present: Present,
    pub(super) metrics: Arc<Metrics>,
    pub(super) turns: Turns,
    pub(super) max_bytes: u64,
}

/// Why a try failed, and whether another one may help.
enum Attempt {
    /// The sealer went away.
    Sealer(ErrorBody),
    /// What an earlier run left in the spool was no good.
    Spool(ErrorBody),
    /// What another source was sending was no good.
    Stranger(ErrorBody),
    Final(ErrorBody),
}

impl<E: Into<ErrorBody>> From<E> for Attempt {
    fn from(e: E) -> Self {
        Self::Final(e.into())
    }
}

impl Inner {
    /// The image, from the store or made now, from its own source `alone` where that is wanted.
    pub(super) async fn make(
        &self,
        resolution: &Resolution,
        uid: u32,
        mut alone: bool,
        news: &watch::Sender<Progress>,
    ) -> Result<ImageRow, ErrorBody> {
        let (manifest, platform) = (&resolution.manifest, &resolution.platform);
        let mut tried = 0;
        loop {
            tried += 1;
            let there = self.present.image(manifest, platform).await?;
            if let Some(image) = there {
                return Ok(image);
            }
            match self.attempt(resolution, (alone, uid), news).await {
                Ok(image) => return Ok(image),
                Err(Attempt::Sealer(e)) if tried < TRIES => {
                    tracing::warn!(digest = %manifest, error = %e, "begun again");
                }
                Err(Attempt::Spool(e) | Attempt::Stranger(e)) if tried < TRIES => {
                    // Whoever spoiled it cannot do so again.
                    alone = true;
                    tracing::warn!(digest = %manifest, error = %e, "begun again");
                }
                Err(
                    Attempt::Sealer(e)
                    | Attempt::Spool(e)
                    | Attempt::Stranger(e)
                    | Attempt::Final(e),
                ) => return Err(e),
            }
        }
    }

    async fn attempt(
        &self,
        resolution: &Resolution,
        (alone, uid): (bool, u32),
        news: &watch::Sender<Progress>,
    ) -> Result<ImageRow, Attempt> {
        let reference = &resolution.reference;
        let (raw, manifest) = self
            .resolver
            .manifest(reference, resolution.manifest)
            .await?;
        manifest.check(self.max_bytes)?;
        let admission = self.resolver.admit(reference)?;
        let config = self.config(resolution, &manifest, (alone, uid)).await?;
        // From the top down: transfers start in the order in which they are asked for.
        let mut blobs = Vec::new();
        for layer in manifest.layers.iter().rev() {
            blobs.push(self.fetch(resolution, layer, (alone, uid))?);
        }
        blobs.reverse();
        news.send_modify(|p| p.total = manifest.layer_bytes());
        rights::check(&self.catalogue, &self.fetcher, &blobs, uid).await?;

        let request = Request::Seal(SealRequest {
            manifest_digest: manifest.digest,
            manifest: text(raw.bytes, "manifest")?,
            config,
            platform: resolution.platform.clone(),
            admission,
        });
        let told = tell(&blobs, news);
        let noted = rights::note(&self.catalogue, &self.fetcher, &blobs);
        let sealed = async {
            // Transfers go on while this image waits for its turn.
            let asker = Asker {
                uid,
                registry: reference.registry().into(),
            };
            let mut turn = self.turns.ask(asker).await;
            self.sealer.ready().await?;
            let mut before = 0;
            let is_starved = || {
                let now = *news.borrow();
                let fetched = std::mem::replace(&mut before, now.fetched);
                now.fetched < now.total
                    && now.fetched - now.converted.min(now.fetched) < STARVED
                    && now.fetched - fetched < STARVED
            };
            tokio::select! {
                sealed = self.seal(&request, &blobs, news) => sealed,
                never = turn.lend_when(is_starved) => match never {},
            }
        };
        let image = tokio::select! {
            sealed = sealed => sealed?,
            never = told => match never {},
            never = noted => match never {},
        };
        self.catalogue.put_image(&image).await?;
        Ok(image)
    }

    /// The image configuration's text, after a look at whether it is for the platform that is wanted.
    async fn config(
        &self,
        resolution: &Resolution,
        manifest: &Manifest,
        (alone, uid): (bool, u32),
    ) -> Result<String, Attempt> {
        #[derive(Deserialize)]
        struct For {
            #[serde(default)]
            os: String,
            #[serde(default)]
            architecture: String,
            #[serde(default)]
            variant: Option<String>,
        }
        let (blob, want) = self.fetch(resolution, &manifest.config, (alone, uid))?;
        let file = blob.wait().await;
        let file = file.map_err(|e| fetch_failed(&blob, &want, e))?;
        let blobs = [(blob.clone(), want)];
        rights::check(&self.catalogue, &self.fetcher, &blobs, uid).await?;
        let size = blob.size as usize;
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; size];
            std::os::unix::fs::FileExt::read_exact_at(&*file, &mut bytes, 0).map(|()| bytes)
        });
        let bytes = read.await.map_err(|e| internal(e.to_string()))?;
        let bytes = bytes.map_err(|e| internal(format!("cannot read the spool: {e}")))?;
        if Digest::of(&bytes) != manifest.config.digest {
            self.fetcher.discard(&[manifest.config.digest]);
            return Err(Attempt::Spool(internal("the spool is damaged".into())));
        }
        let is: For = serde_json::from_slice(&bytes).map_err(|e| {
            failed(
                ErrorKind::ConversionFailed,
                format!(
                    "the configuration of {} is not right: {}",
                    manifest.digest,
                    parse_error(&e)
                ),
            )
        })?;
        let wanted = &resolution.platform;
        if !wanted.accepts(&is.os, &is.architecture, is.variant.as_deref()) {
            let variant = is.variant.map(|v| format!("/{v}")).unwrap_or_default();
            let available = format!("{}/{}{variant}", is.os, is.architecture);
            return Err(Attempt::from(ManifestError::NoPlatform {
                wanted: wanted.clone(),
                available: vec![clip(&available)],
            }));
        }
        Ok(text(bytes, "configuration")?)
    }

    fn fetch(
        &self,
        resolution: &Resolution,
        descriptor: &Descriptor,
        (alone, uid): (bool, u32),
    ) -> Result<Wanted, ErrorBody> {
        let want = Want {
            registry: resolution.reference.registry().into(),
            repository: resolution.reference.repository().into(),
            digest: descriptor.digest,
            size: descriptor.size,
        };
        let blob = self.fetcher.ensure(want.clone(), alone, uid);
        let blob = blob.map_err(|e| internal(format!("cannot use the spool: {e}")))?;
        Ok((blob, want))
    }

    /// Hands the image to the sealer and feeds it the layers.
    async fn seal(
        &self,
        request: &Request,
        blobs: &[Wanted],
        news: &watch::Sender<Progress>,
    ) -> Result<ImageRow, Attempt> {
        let mut readers = Vec::new();
        // Dropped after `answer`, whatever ends this: the connection closes first, because an end of file on a pipe
        // says that the layer is whole.
        let mut feeders = FuturesUnordered::new();
        for (blob, want) in blobs {
            let (reader, writer) = new_pipe().map_err(|e| internal(format!("no pipe: {e}")))?;
            readers.push(reader);
            feeders.push(async move {
                let fed = feed(blob.clone(), writer).await;
                fed.map_err(|failed| (failed.pipe, fetch_failed(blob, want, failed.error)))
            });
        }
        news.send_modify(|p| p.converting = true);
        let progress = |p: crate::seal::protocol::Progress| {
            news.send_modify(|n| n.converted = p.bytes_in);
        };
        let mut answer = Box::pin(self.sealer.request(request, readers, progress));
        let answer = loop {
            tokio::select! {
                answer = &mut answer => break answer,
                Some(fed) = feeders.next() => {
                    if let Err((pipe, failed)) = fed {
                        drop(answer);
                        drop(pipe);
                        return Err(failed);
                    }
                }
            }
        };
        match answer {
            Ok(Answer::Sealed(sealed)) => {
                if !sealed.existing {
                    self.metrics.conversions.inc();
                }
                let path = sealed.path.display().to_string();
                Ok(ImageRow::new(&sealed.record, path))
            }
            Ok(_) => Err(Attempt::Final(internal(
                "the sealer answered something else".into(),
            ))),
            Err(e) if e.kind == ErrorKind::StoreUnavailable => Err(Attempt::Sealer(e.into())),
            Err(e) if e.kind == ErrorKind::CorruptLayer => {
                // The layer has its digest: what is wrong is in the image, or in what the disk made of the spool.
                self.fetcher
                    .discard(&blobs.iter().map(|(b, _)| b.digest).collect::<Vec<_>>());
                Err(Attempt::Final(e.into()))
            }
            Err(e) => Err(Attempt::Final(e.into())),
        }
    }
}

/// Tells again and again how much has arrived. Never ends.
async fn tell(blobs: &[Wanted], news: &watch::Sender<Progress>) -> std::convert::Infallible {
    let mut tick = tokio::time::interval(TELL);
    loop {
        tick.tick().await;
        let fetched = blobs.iter().map(|(b, _)| b.bytes()).sum();
        news.send_if_modified(|p| std::mem::replace(&mut p.fetched, fetched) != fetched);
    }
}

fn new_pipe() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // A small pipe is slower and no error.
    let _ = fcntl_setpipe_size(&writer, PIPE_SIZE);
    Ok((reader, writer))
}

fn fetch_failed(blob: &Blob, want: &Want, e: FetchError) -> Attempt {
    match e {
        FetchError::Spool { .. } => Attempt::Final(e.into()),
        FetchError::Size { .. } => Attempt::Stranger(e.into()),
        e if !blob.comes_from(want) => Attempt::Stranger(e.into()),
        FetchError::Digest { resumed: true, .. } => Attempt::Spool(e.into()),
        e => Attempt::Final(e.into()),
    }
}

fn text(bytes: Vec<u8>, what: &str) -> Result<String, ErrorBody> {
    String::from_utf8(bytes).map_err(|_| {
        failed(
            ErrorKind::ConversionFailed,
            format!("the image's {what} is not text"),
        )
    })
}

fn failed(kind: ErrorKind, message: String) -> ErrorBody {
    ErrorBody {
        kind,
        message,
        hint: None,
    }
}

fn internal(message: String) -> ErrorBody {
    failed(ErrorKind::Internal, message)
}
