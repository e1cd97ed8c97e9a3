//! Brings the catalogue into line with the store: images by their signed records, and what references stand for by
//! the signed entries in `refs/`.

use std::collections::HashSet;
use std::sync::Arc;

use berth_image::{
    Digest, ImageRef, Platform, PublicKey, Record, RefEntry, Store, envelope, layout,
};

use super::{Catalogue, CatalogueError, ImageRow, TagRow};

/// What a scan changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scanned {
    pub added: usize,
    pub removed: usize,
    /// Image folders whose record could not be read or believed.
    pub refused: usize,
    /// References that were learned from the store.
    pub references: usize,
}

/// Adds the images that the store has and the catalogue lacks or has otherwise, and removes those that are gone.
/// Records are read in full only for images that are new to the catalogue.
pub async fn scan(
    catalogue: &Catalogue,
    store: Arc<Store>,
    keys: Arc<Vec<PublicKey>>,
) -> Result<Scanned, CatalogueError> {
    let known: HashSet<(Digest, Platform)> = (catalogue.images().await?.into_iter())
        // A row whose file is gone was replaced or removed: its record is read again.
        .filter(|i| std::path::Path::new(&i.path).exists())
        .map(|i| (i.manifest, i.platform))
        .collect();
    let known_refs = catalogue.published_references().await?;
    let (of_refs, with_keys) = (store.clone(), keys.clone());
    let refs = tokio::task::spawn_blocking(move || read_refs(&of_refs, &with_keys, &known_refs));
    let read = tokio::task::spawn_blocking(move || read_store(&store, &keys, &known));
    let (present, new, refused) = (read.await)
        .map_err(|e| CatalogueError::Content(e.to_string()))?
        .map_err(|e| CatalogueError::Content(format!("cannot read the store: {e}")))?;
    let mut scanned = Scanned {
        refused,
        ..Scanned::default()
    };
    for image in new {
        catalogue.put_image(&image).await?;
        scanned.added += 1;
    }
    for image in catalogue.images().await? {
        if !present.contains(&(image.manifest, image.platform.clone())) {
            catalogue
                .remove_image(&image.manifest, &image.platform)
                .await?;
            scanned.removed += 1;
        }
    }
    let refs = (refs.await)
        .map_err(|e| CatalogueError::Content(e.to_string()))?
        .map_err(|e| CatalogueError::Content(format!("cannot read the store: {e}")))?;
    for entry in refs {
        scanned.references += 1;
        for (platform, manifest) in &entry.manifests {
            // What the catalogue has of a registry's own answer is younger.
            if catalogue.tag(&entry.reference, platform).await?.is_some() {
                continue;
            }
            let row = TagRow {
                top: entry.top,
                manifest: *manifest,
                checked_at: entry.resolved_at,
                published: true,
            };
            catalogue.put_tag(&entry.reference, platform, &row).await?;
            (catalogue.mark_published(&entry.reference, platform, &entry.top, manifest)).await?;
        }
    }
    Ok(scanned)
}

/// The entries of references that are not `known`. One that is not believed is said and left out.
fn read_refs(
    store: &Store,
    keys: &[PublicKey],
    known: &HashSet<ImageRef>,
) -> std::io::Result<Vec<RefEntry>> {
    let mut entries = Vec::new();
    for (reference, path) in store.ref_entries()? {
        if known.contains(&reference) {
            continue;
        }
        let read = (store.read(&path, envelope::MAX_ENVELOPE))
            .map_err(|e| e.to_string())
            .and_then(|bytes| RefEntry::open(&bytes, keys, &reference).map_err(|e| e.to_string()));
        match read {
            Ok((entry, _)) => entries.push(entry),
            Err(why) => {
                tracing::error!(image = %reference, why, "a reference's entry is not believed");
            }
        }
    }
    Ok(entries)
}

type Found = (HashSet<(Digest, Platform)>, Vec<ImageRow>, usize);

fn read_store(
    store: &Store,
    keys: &[PublicKey],
    known: &HashSet<(Digest, Platform)>,
) -> std::io::Result<Found> {
    let (mut present, mut new, mut refused) = (HashSet::new(), Vec::new(), 0);
    for (manifest, platform) in store.image_dirs()? {
        let key = (manifest, platform);
        if known.contains(&key) {
            if store.path().join(layout::record(&key.0, &key.1)).exists() {
                present.insert(key);
            }
            continue;
        }
        match read_image(store, keys, &key.0, &key.1) {
            Ok(Some(image)) => {
                new.push(image);
                present.insert(key);
            }
            // A folder without a record is work in progress of the sealer's.
            Ok(None) => {}
            Err(why) => {
                tracing::error!(digest = %key.0, platform = %key.1, why, "an image's record is not believed");
                refused += 1;
            }
        }
    }
    Ok((present, new, refused))
}

pub(super) fn read_image(
    store: &Store,
    keys: &[PublicKey],
    manifest: &Digest,
    platform: &Platform,
) -> Result<Option<ImageRow>, String> {
    let path = layout::record(manifest, platform);
    let bytes = match store.read(&path, envelope::MAX_ENVELOPE) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
    };
    let (record, _) = Record::open(&bytes, keys, manifest, platform).map_err(|e| e.to_string())?;
    let data = store
        .path()
        .join(layout::image_dir(manifest, platform))
        .join(record.file.name());
    Ok(Some(ImageRow::new(&record, data.display().to_string())))
}
