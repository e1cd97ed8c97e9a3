//! What the catalogue and the store have to say to each other between two scans: an admin, or a filesystem that broke, may
//! have taken away behind the daemon's back what the catalogue remembers, and another daemon over the same store may have
//! had made what it does not know. An image that is gone is forgotten, so that who asks for it has it made anew; one that
//! is found, and signed by a key of the site, is learned.
//!
//! A store that does not answer in time, or that lacks its FORMAT too, is not an empty one: then the catalogue is
//! believed. Looking for what the catalogue does not know costs the store one open, [`MOST_LOOKS`] at a time, and what
//! was not found is not looked for again for [`MISSED_FOR`].

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use berth_image::{Digest, ImageRef, Platform, PublicKey, RefEntry, Store, envelope, layout};
use tokio::sync::Semaphore;

use super::scan::read_image;
use super::{Catalogue, CatalogueError, ImageRow, TagRow};

/// How long the store may take to say something.
const PATIENCE: Duration = Duration::from_secs(5);
/// Threads that look for what the catalogue does not know. A store that hangs holds no more.
const MOST_LOOKS: usize = 4;
const MISSED_FOR: Duration = Duration::from_secs(3);
/// Digests that are remembered as missing.
const MOST_MISSED: usize = 10_000;

type Key = (Digest, Platform);

/// The catalogue beside its store. Clones are the same.
#[derive(Debug, Clone)]
pub struct Present {
    catalogue: Catalogue,
    store: Arc<Store>,
    /// Whose records are believed.
    keys: Arc<Vec<PublicKey>>,
    looks: Arc<Semaphore>,
    missed: Arc<Mutex<HashMap<Key, Instant>>>,
}

impl Present {
    pub fn new(catalogue: Catalogue, store: Arc<Store>, keys: Vec<PublicKey>) -> Self {
        Self {
            catalogue,
            store,
            keys: Arc::new(keys),
            looks: Arc::new(Semaphore::new(MOST_LOOKS)),
            missed: Arc::default(),
        }
    }

    pub(crate) fn keys(&self) -> Arc<Vec<PublicKey>> {
        Arc::clone(&self.keys)
    }

    /// An image that the store has now.
    pub async fn image(
        &self,
        manifest: &Digest,
        platform: &Platform,
    ) -> Result<Option<ImageRow>, CatalogueError> {
        let Some(image) = self.catalogue.image(manifest, platform).await? else {
            return self.learned(manifest, platform).await;
        };
        let dir = layout::image_dir(manifest, platform);
        let name = Path::new(&image.path).file_name().unwrap_or_default();
        let files = vec![
            (dir.join(layout::RECORD), None),
            (dir.join(name), Some(image.size)),
        ];
        if !is_gone(&self.store, files).await {
            return Ok(Some(image));
        }
        tracing::warn!(digest = %manifest, %platform, "an image has gone from the store, and is forgotten");
        self.catalogue.forget_image(&image).await?;
        Ok(None)
    }

    /// An image that the catalogue knows, or the store has: not looked for where it is known.
    pub async fn known(
        &self,
        manifest: &Digest,
        platform: &Platform,
    ) -> Result<Option<ImageRow>, CatalogueError> {
        match self.catalogue.image(manifest, platform).await? {
            Some(image) => Ok(Some(image)),
            None => self.learned(manifest, platform).await,
        }
    }

    /// Whether the signed entry of a reference, which the catalogue knows, is still there.
    pub async fn reference(&self, reference: &ImageRef) -> bool {
        !is_gone(&self.store, vec![(layout::ref_entry(reference), None)]).await
    }

    /// An image that another daemon had made, which the catalogue knows from now on.
    async fn learned(
        &self,
        manifest: &Digest,
        platform: &Platform,
    ) -> Result<Option<ImageRow>, CatalogueError> {
        let key = (*manifest, platform.clone());
        if self.is_missed(&key) {
            return Ok(None);
        }
        let (store, keys, of) = (self.store.clone(), self.keys.clone(), key.clone());
        let look = move || whole_image(&store, &keys, &of.0, &of.1);
        // Of many who ask for the same at once one looks.
        let before = async || match self.is_missed(&key) {
            true => Ok(Some(None)),
            false => Ok(self.catalogue.image(manifest, platform).await?.map(Some)),
        };
        let found = match self.look(before, look).await? {
            None => return Ok(None),
            Some(Looked::Before(known)) => return Ok(known),
            Some(Looked::Now(found)) => found.unwrap_or_else(|why| {
                tracing::error!(digest = %manifest, %platform, why, "an image's record is not believed");
                None
            }),
        };
        match found {
            Some(image) => {
                tracing::info!(digest = %manifest, %platform, "an image that another daemon had made");
                self.catalogue.put_image(&image).await?;
                Ok(Some(image))
            }
            None => {
                self.miss(key);
                Ok(None)
            }
        }
    }

    /// What the store's signed entry says of a reference that the catalogue does not know, which it does from now on.
    pub async fn entry(
        &self,
        reference: &ImageRef,
        platform: &Platform,
    ) -> Result<Option<TagRow>, CatalogueError> {
        let (store, keys, of) = (self.store.clone(), self.keys.clone(), reference.clone());
        let look = move || read_entry(&store, &keys, &of);
        let found = match self.look(async || Ok(None::<()>), look).await? {
            Some(Looked::Now(found)) => found.unwrap_or_else(|why| {
                tracing::error!(image = %reference, why, "a reference's entry is not believed");
                None
            }),
            _ => None,
        };
        let row = found.and_then(|entry| {
            Some(TagRow {
                top: entry.top,
                manifest: *entry.manifests.get(platform)?,
                checked_at: entry.resolved_at,
                published: true,
            })
        });
        if let Some(row) = &row {
            self.catalogue.put_tag(reference, platform, row).await?;
            (self.catalogue)
                .mark_published(reference, platform, &row.top, &row.manifest)
                .await?;
        }
        Ok(row)
    }

    /// Looks into the store when it is this one's turn, unless somebody found out `before`. `None` when the store does
    /// not say anything in time.
    async fn look<K, F: Send + 'static>(
        &self,
        before: impl AsyncFnOnce() -> Result<Option<K>, CatalogueError>,
        look: impl FnOnce() -> F + Send + 'static,
    ) -> Result<Option<Looked<K, F>>, CatalogueError> {
        let looked = async {
            let Ok(turn) = Arc::clone(&self.looks).acquire_owned().await else {
                return Ok(None);
            };
            if let Some(known) = before().await? {
                return Ok(Some(Looked::Before(known)));
            }
            let looked = tokio::task::spawn_blocking(move || {
                // Held by who hangs, not by who waits.
                let _turn = turn;
                look()
            });
            Ok(looked.await.ok().map(Looked::Now))
        };
        match tokio::time::timeout(PATIENCE, looked).await {
            Ok(looked) => looked,
            Err(_) => {
                tracing::warn!("the store does not answer, the catalogue is believed");
                Ok(None)
            }
        }
    }

    fn missed(&self) -> MutexGuard<'_, HashMap<Key, Instant>> {
        // Every change is one call.
        self.missed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_missed(&self, key: &Key) -> bool {
        let missed = self.missed();
        missed.get(key).is_some_and(|at| at.elapsed() < MISSED_FOR)
    }

    fn miss(&self, key: Key) {
        let mut missed = self.missed();
        if missed.len() >= MOST_MISSED {
            missed.retain(|_, at| at.elapsed() < MISSED_FOR);
        }
        if missed.len() < MOST_MISSED {
            missed.insert(key, Instant::now());
        }
    }
}

/// What came of a look.
enum Looked<K, F> {
    /// Somebody else had found it out.
    Before(K),
    Now(F),
}

/// An image whose record is believed and whose file is as long as that says.
fn whole_image(
    store: &Store,
    keys: &[PublicKey],
    manifest: &Digest,
    platform: &Platform,
) -> Result<Option<ImageRow>, String> {
    let Some(image) = read_image(store, keys, manifest, platform)? else {
        return Ok(None);
    };
    let name = Path::new(&image.path).file_name().unwrap_or_default();
    let file = layout::image_dir(manifest, platform).join(name);
    let size = store.size_of(&file).map_err(|e| e.to_string())?;
    Ok((size == Some(image.size)).then_some(image))
}

fn read_entry(
    store: &Store,
    keys: &[PublicKey],
    reference: &ImageRef,
) -> Result<Option<RefEntry>, String> {
    let path = layout::ref_entry(reference);
    let bytes = match store.read(&path, envelope::MAX_ENVELOPE) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    let (entry, _) = RefEntry::open(&bytes, keys, reference).map_err(|e| e.to_string())?;
    Ok(Some(entry))
}

/// Whether one of these files is not there, or has not the size it should have.
async fn is_gone(store: &Arc<Store>, files: Vec<(PathBuf, Option<u64>)>) -> bool {
    let with = Arc::clone(store);
    let looked = tokio::task::spawn_blocking(move || lacks(&with, &files));
    match tokio::time::timeout(PATIENCE, looked).await {
        Ok(Ok(Ok(gone))) => gone,
        Ok(Ok(Err(e))) => {
            tracing::warn!(error = %e, "cannot look into the store, the catalogue is believed");
            false
        }
        Ok(Err(_)) | Err(_) => {
            tracing::warn!("the store does not answer, the catalogue is believed");
            false
        }
    }
}

fn lacks(store: &Store, files: &[(PathBuf, Option<u64>)]) -> io::Result<bool> {
    for (path, wanted) in files {
        let found = store.size_of(path)?;
        if found.is_none() || wanted.is_some_and(|size| found != Some(size)) {
            return Ok(store.size_of(Path::new(layout::FORMAT))?.is_some());
        }
    }
    Ok(false)
}
