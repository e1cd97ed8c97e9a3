//! One image: validated, converted, checked, signed, published.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use berth_client::api::ErrorKind;
use berth_config::{Compression, Ownership};
use berth_convert::job::{self, Done, FailureKind, Options, Policy};
use berth_image::digest::{hex, unhex};
use berth_image::envelope::MAX_ENVELOPE;
use berth_image::record::{Conversion, DataFile, Record};
use berth_image::store::Temp;
use berth_image::{Digest, Platform, layout};
use berth_squashfs::check::{self, Limits};
use berth_squashfs::verity::{self, BLOCK, VerityOptions};
use sha2::{Digest as _, Sha256};

use super::converter::{self, Input, Outcome};
use super::manifest::Image;
use super::protocol::{Progress, SealFailure, SealRequest, Sealed};
use super::site::Site;
use super::tree;

/// The record of an image that is whole: signed by a key of the site, its data file of the size it says.
pub(super) fn existing(
    site: &Site,
    manifest: &Digest,
    platform: &Platform,
) -> Option<(Record, PathBuf)> {
    let bytes = site
        .store
        .read(&layout::record(manifest, platform), MAX_ENVELOPE);
    let (record, _) = Record::open(&bytes.ok()?, &site.trusted, manifest, platform).ok()?;
    let path = layout::image_dir(manifest, platform).join(record.file.name());
    let file = site.store.open_file(&path).ok()?;
    (file.metadata().ok()?.len() == record.file.size)
        .then(|| (record, site.store.path().join(path)))
}

/// Makes an image that is not there. `pipes` are the layers, base first.
pub(super) fn seal(
    site: &Site,
    request: &SealRequest,
    image: &Image,
    pipes: Vec<OwnedFd>,
    client: &impl AsFd,
    mut progress: impl FnMut(Progress) -> bool,
) -> Result<Sealed, SealFailure> {
    let temp = site.store.create_temp().map_err(|e| store_failure(&e))?;
    let spill = spill(site).map_err(|e| store_failure(&e))?;
    let verity = VerityOptions {
        salt: derived(b"berth-verity-salt-1", &request.manifest_digest),
        uuid: uuid(&request.manifest_digest),
    };
    let input = Input {
        output: temp.file(),
        spill,
        pipes,
        layers: &image.layers,
        options: options(site, &verity),
    };
    let outcome = converter::run(&site.converter, input, client, |news| {
        progress(Progress {
            bytes_in: news.bytes_in,
            bytes_out: news.bytes_out,
            entries: news.entries,
        })
    });
    let done = match outcome {
        Ok(Outcome::Done(done)) => done,
        Ok(Outcome::Failed(failure)) => return Err(converter_failure(site, failure)),
        Ok(Outcome::Abandoned) => return Err(internal("the client went away")),
        Ok(Outcome::Died(why)) => return Err(internal(format!("the converter failed: {why}"))),
        Err(e) => {
            let program = site.converter.display();
            return Err(internal(format!("cannot run `{program}`: {e}")));
        }
    };
    let file = check_image(site, temp.file(), image, &done, &verity)?;
    publish(site, request, image, temp, file, *done)
}

/// A file without a name beside the image: as large as what upper layers hide.
fn spill(site: &Site) -> io::Result<File> {
    let temp = site.store.create_temp()?;
    temp.file().try_clone()
}

/// Looks at everything that can be seen without reading all contents; the converter's word counts for nothing.
fn check_image(
    site: &Site,
    file: &File,
    image: &Image,
    done: &Done,
    verity: &VerityOptions,
) -> Result<DataFile, SealFailure> {
    let unfit = |why: String| {
        internal(format!(
            "the converter made an image that must not be signed: {why}"
        ))
    };
    if done
        .diff_ids
        .iter()
        .ne(image.layers.iter().map(|l| &l.diff_id))
    {
        return Err(unfit("its layers are not the configuration's".into()));
    }
    let config = &site.config.convert;
    let most = config
        .limits
        .max_entries
        .saturating_mul(2)
        .saturating_add(1 << 20);
    let limits = Limits {
        max_inodes: u32::try_from(most).unwrap_or(u32::MAX),
        setid: config.keep_setid,
        devices: false,
        xattrs: options(site, verity).policy.xattr_prefixes(),
        contents: config.read_back,
        ..Limits::default()
    };
    let found = check::check(file, &limits).map_err(|e| unfit(e.to_string()))?;
    let size = file.metadata().map_err(|e| store_failure(&e))?.len();
    let hash_offset = found.image_bytes.next_multiple_of(BLOCK as u64);
    if size != hash_offset + verity::tree_len(hash_offset) {
        return Err(unfit(format!("its size is {size}")));
    }
    let root = tree::check(file, hash_offset, verity, config.read_back)
        .map_err(|e| unfit(format!("its hash tree: {e}")))?;
    let said = (done.squashfs_size, done.hash_offset, done.file_size);
    if said != (found.image_bytes, hash_offset, size) || unhex(&done.verity_root) != Some(root) {
        return Err(unfit("it is not as the converter described it".into()));
    }
    Ok(DataFile {
        size,
        squashfs_size: found.image_bytes,
        hash_offset,
        verity_root: root,
        verity_salt: verity.salt,
    })
}

fn publish(
    site: &Site,
    request: &SealRequest,
    image: &Image,
    temp: Temp<'_>,
    file: DataFile,
    done: Done,
) -> Result<Sealed, SealFailure> {
    let convert = &site.config.convert;
    let io = |e: io::Error| store_failure(&e);
    let record = Record {
        manifest: request.manifest_digest,
        platform: request.platform.clone(),
        config: image.config,
        layers: image.layers.iter().map(|l| l.digest).collect(),
        file,
        run: image.run.clone(),
        conversion: Conversion {
            version: env!("CARGO_PKG_VERSION").into(),
            compression: compression(convert.compression).1.into(),
            level: convert.level,
            block_size: convert.block_size,
            ownership: match convert.ownership {
                Ownership::Keep => "keep".into(),
                Ownership::Readable => "readable".into(),
            },
            keep_setid: convert.keep_setid,
            keep_xattrs: convert.keep_xattrs.clone(),
            entries: done.entries,
            notes: done
                .notes
                .iter()
                .take(16)
                .map(|n| converter::clean(n))
                .collect(),
        },
        admission: request.admission.clone(),
        serial: site.state.next_serial().map_err(io)?,
        signed_at: jiff::Timestamp::now(),
    };
    let sealed = record
        .seal(&site.key)
        .map_err(|e| internal(e.to_string()))?;
    if sealed.len() > MAX_ENVELOPE {
        let why =
            format!("the image's configuration makes a record larger than {MAX_ENVELOPE} bytes");
        return Err(SealFailure::new(ErrorKind::ConversionFailed, why));
    }
    let dir = layout::image_dir(&record.manifest, &record.platform);
    let data = dir.join(record.file.name());
    temp.publish(&data).map_err(io)?;
    let path = layout::record(&record.manifest, &record.platform);
    site.store.publish_bytes(&path, &sealed).map_err(io)?;
    Ok(Sealed {
        path: site.store.path().join(data),
        record,
        existing: false,
    })
}

fn options(site: &Site, verity: &VerityOptions) -> Options {
    let convert = &site.config.convert;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    Options {
        compression: compression(convert.compression).0,
        level: convert.level,
        block_size: convert.block_size,
        policy: Policy {
            ownership: match convert.ownership {
                Ownership::Keep => job::Ownership::Keep,
                Ownership::Readable => job::Ownership::Readable,
            },
            keep_setid: convert.keep_setid,
            keep_xattrs: convert.keep_xattrs.clone(),
        },
        salt: hex(&verity.salt),
        uuid: hex(&verity.uuid),
        limits: job::Limits {
            max_bytes: convert.limits.max_bytes,
            max_entries: convert.limits.max_entries,
            max_ratio: convert.limits.max_ratio.max(1),
        },
        memory: convert.memory,
        threads: match convert.threads {
            0 => cores,
            n => n,
        },
    }
}

fn compression(configured: Compression) -> (job::Compression, &'static str) {
    match configured {
        Compression::Zstd => (job::Compression::Zstd, "zstd"),
        Compression::Gzip => (job::Compression::Gzip, "gzip"),
        Compression::Lz4 => (job::Compression::Lz4, "lz4"),
    }
}

/// `SHA-256(label || manifest digest)`: the same image gives the same bytes everywhere (docs/FORMATS.md).
fn derived(label: &[u8], manifest: &Digest) -> [u8; 32] {
    Sha256::new_with_prefix(label)
        .chain_update(manifest.as_bytes())
        .finalize()
        .into()
}

/// The first 16 bytes, marked as a UUID of version 8 (RFC 9562, section 5.8).
fn uuid(manifest: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&derived(b"berth-verity-uuid-1", manifest)[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn converter_failure(site: &Site, failure: job::Failure) -> SealFailure {
    let kind = match failure.kind {
        FailureKind::CorruptLayer => ErrorKind::CorruptLayer,
        FailureKind::DigestMismatch => ErrorKind::DigestMismatch,
        FailureKind::Limit => ErrorKind::ConversionFailed,
        FailureKind::DiskFull => ErrorKind::DiskFull,
        FailureKind::Internal => ErrorKind::Internal,
    };
    SealFailure {
        kind,
        message: failure.to_string(),
        hint: (kind == ErrorKind::DiskFull).then(|| free_space(site)),
        layer: failure.layer,
        entry: failure.entry,
    }
}

fn free_space(site: &Site) -> String {
    format!(
        "free space in {}, then pull again",
        site.store.path().display()
    )
}

/// The store refused.
pub(super) fn store_failure(error: &io::Error) -> SealFailure {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            ErrorKind::DiskFull
        }
        _ => ErrorKind::StoreUnavailable,
    };
    SealFailure::new(kind, format!("cannot write to the store: {error}"))
}

fn internal(message: impl Into<String>) -> SealFailure {
    SealFailure::new(ErrorKind::Internal, message)
}
