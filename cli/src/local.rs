//! Images found without the daemon: the store's signed entries, believed only when a key of the site signed them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use berth_config::Config;
use berth_image::envelope::MAX_ENVELOPE;
use berth_image::layout;
use berth_image::{Digest, ImageRef, KeyId, Platform, PublicKey, Record, RefEntry, Store};

use crate::context::Context;
use crate::error::{CONFIG, Failure, OTHER, PERMISSION, UNAVAILABLE, USAGE};

/// Fewest digits of a shortened digest.
const MIN_DIGITS: usize = 8;

/// What a user may name an image by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    Reference(ImageRef),
    /// A digest, with the platform where a path said it.
    Digest(Digest, Option<Platform>),
    /// The first digits of a digest, as lists show them.
    Digits(String),
}

impl Wanted {
    /// Reads a reference, a digest or its start, or a path that `berth path` printed.
    pub fn parse(text: &str, context: &Context) -> Result<Self, Failure> {
        if text.starts_with('/') {
            return match layout::parse_data_path(&context.config.store.path, Path::new(text)) {
                Some((digest, platform)) => Ok(Self::Digest(digest, Some(platform))),
                None => Err(Failure::new(
                    USAGE,
                    format!(
                        "`{}` is not a path of an image in the store",
                        text.escape_default()
                    ),
                )
                .hint("give a reference, or a path printed by `berth path`")),
            };
        }
        let Some(digits) = text.strip_prefix("sha256:") else {
            return context.reference(text).map(Self::Reference);
        };
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        match text.parse() {
            Ok(digest) => Ok(Self::Digest(digest, None)),
            Err(_) if (MIN_DIGITS..64).contains(&digits.len()) && digits.bytes().all(hex) => {
                Ok(Self::Digits(digits.to_owned()))
            }
            Err(e) => Err(Failure::new(USAGE, e.to_string())
                .hint(format!("at least {MIN_DIGITS} of the digits are needed"))),
        }
    }
}

/// An image whose record a trusted key signed.
#[derive(Debug)]
pub struct Found {
    pub record: Record,
    pub key: KeyId,
    /// The SquashFS file.
    pub path: PathBuf,
    /// The signed entry that led here.
    pub entry: Option<RefEntry>,
}

/// The store and the keys that this machine trusts.
#[derive(Debug)]
pub struct Local {
    pub store: Store,
    keys: Vec<PublicKey>,
}

impl Local {
    pub fn open(config: &Config) -> Result<Self, Failure> {
        Ok(Self {
            store: Store::open(&config.store.path, None, None)?,
            keys: keys(config)?,
        })
    }

    /// The image, or `None` where the store does not have it.
    pub fn find(
        &self,
        wanted: &Wanted,
        platform: Option<&Platform>,
    ) -> Result<Option<Found>, Failure> {
        let host = Platform::host();
        match wanted {
            Wanted::Reference(reference) => {
                self.find_reference(reference, platform.unwrap_or(&host))
            }
            Wanted::Digest(digest, named) => match platform.or(named.as_ref()) {
                Some(platform) => self.record(digest, platform),
                None => match self.record(digest, &host)? {
                    Some(found) => Ok(Some(found)),
                    None => self.find_digits(&digest.hex()),
                },
            },
            Wanted::Digits(digits) => self.find_digits(digits),
        }
    }

    fn find_reference(
        &self,
        reference: &ImageRef,
        platform: &Platform,
    ) -> Result<Option<Found>, Failure> {
        let bytes = match self.store.read(&layout::ref_entry(reference), MAX_ENVELOPE) {
            Ok(bytes) => bytes,
            // A digest may be that of the image itself, which needs no entry.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return match reference.digest() {
                    Some(digest) => self.record(&digest, platform),
                    None => Ok(None),
                };
            }
            Err(e) => return Err(unreadable(&layout::ref_entry(reference), &e)),
        };
        let (entry, _) = RefEntry::open(&bytes, &self.keys, reference)
            .map_err(|e| disbelieved(&format!("the store's entry of {reference}"), &e))?;
        let Some(digest) = entry.manifests.get(platform) else {
            return Ok(None);
        };
        let found = self.record(digest, platform)?;
        Ok(found.map(|found| Found {
            entry: Some(entry),
            ..found
        }))
    }

    fn find_digits(&self, digits: &str) -> Result<Option<Found>, Failure> {
        let dirs = self.store.image_dirs();
        let dirs = dirs.map_err(|e| unreadable(Path::new(layout::IMAGES), &e))?;
        let mut fitting = dirs.iter().filter(|(d, _)| d.hex().starts_with(digits));
        match (fitting.next(), fitting.next()) {
            (Some((digest, platform)), None) => self.record(digest, platform),
            (None, _) => Ok(None),
            (Some(_), Some(_)) => Err(Failure::new(
                USAGE,
                format!("several images' digests start with {digits}"),
            )
            .hint("give more digits")),
        }
    }

    /// The image of a digest, when its record is there and believed.
    pub fn record(&self, digest: &Digest, platform: &Platform) -> Result<Option<Found>, Failure> {
        let relative = layout::record(digest, platform);
        let bytes = match self.store.read(&relative, MAX_ENVELOPE) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(unreadable(&relative, &e)),
        };
        let (record, key) = Record::open(&bytes, &self.keys, digest, platform)
            .map_err(|e| disbelieved(&format!("the record of {digest}"), &e))?;
        let file = layout::image_dir(digest, platform).join(record.file.name());
        Ok(Some(Found {
            path: self.store.path().join(file),
            record,
            key,
            entry: None,
        }))
    }

    /// The references that the store's signed entries give each manifest, sorted. What cannot be read or is not believed
    /// is left out.
    pub fn references(&self) -> BTreeMap<Digest, Vec<String>> {
        let mut references: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for (reference, path) in self.store.ref_entries().unwrap_or_default() {
            let bytes = self.store.read(&path, MAX_ENVELOPE).ok();
            let entry = bytes.and_then(|b| RefEntry::open(&b, &self.keys, &reference).ok());
            let Some((entry, _)) = entry else { continue };
            for manifest in entry.manifests.values() {
                references
                    .entry(*manifest)
                    .or_default()
                    .push(reference.to_string());
            }
        }
        for names in references.values_mut() {
            names.sort();
            names.dedup();
        }
        references
    }

    /// Opens the image's file: whether this user may read it, and whether it is whole.
    pub fn check_file(&self, found: &Found) -> Result<(), Failure> {
        let path = found
            .path
            .strip_prefix(self.store.path())
            .unwrap_or(&found.path);
        let size = self.store.open_file(path).and_then(|f| f.metadata());
        let size = size.map_err(|e| unreadable(path, &e))?.len();
        if size != found.record.file.size {
            return Err(Failure::new(
                OTHER,
                format!(
                    "the image file has {size} bytes, its record says {}",
                    found.record.file.size
                ),
            )
            .hint("ask the admin to remove the image with `berth rm` and to pull it again"));
        }
        Ok(())
    }
}

/// The public keys that `node.keys` names.
pub fn keys(config: &Config) -> Result<Vec<PublicKey>, Failure> {
    let read = |path: &PathBuf| {
        let pem = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
        PublicKey::from_pem(&pem).map_err(|e| e.to_string())
    };
    (config.node.keys.iter())
        .map(|path| {
            read(path).map_err(|why| {
                Failure::new(
                    CONFIG,
                    format!("cannot read the key `{}`: {why}", path.display()),
                )
                .hint("copy the site's public key there (`node.keys`)")
            })
        })
        .collect()
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    let (code, message) = match error.kind() {
        io::ErrorKind::PermissionDenied => (
            PERMISSION,
            format!("you may not read `{}` in the store", path.display()),
        ),
        _ => (
            UNAVAILABLE,
            format!("cannot read `{}` in the store: {error}", path.display()),
        ),
    };
    Failure::new(code, message)
}

fn disbelieved(what: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(OTHER, format!("{what} is not believed: {error}"))
        .hint("tell the admin; `berth doctor` shows which keys this machine trusts")
}
