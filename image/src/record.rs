//! The image record and the ref entry: what the site's key signs.
//!
//! Both are in-toto statements (in-toto attestation framework v1) in a DSSE envelope ([`crate::envelope`]). A record
//! says: this SquashFS, of this size, hash offset and verity root, was made from that manifest, under these
//! conversion options. A node believes the record, and takes from it everything it needs to start a job: nobody
//! parses the image's own configuration there.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::digest::{Digest, hex};
use crate::envelope::{self, EnvelopeError};
use crate::key::{KeyId, PrivateKey, PublicKey};
use crate::platform::Platform;
use crate::reference::ImageRef;

const STATEMENT: &str = "https://in-toto.io/Statement/v1";
const RECORD: &str = "urn:berth:record:1";
const REF: &str = "urn:berth:ref:1";
/// The name under which a verity root stands in a statement's digest set.
const VERITY: &str = "dm-verity-sha256";

#[derive(Serialize, Deserialize)]
struct Statement<P> {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<Subject>,
    #[serde(rename = "predicateType")]
    predicate_type: String,
    predicate: P,
}

#[derive(Serialize, Deserialize)]
struct Subject {
    name: String,
    digest: BTreeMap<String, String>,
}

/// A sealed image. Sizes and offsets are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Digest of the manifest of this one platform: the image's identity.
    pub manifest: Digest,
    pub platform: Platform,
    /// Digest of the image configuration.
    pub config: Digest,
    /// Digests of the layers, base first, as in the manifest.
    pub layers: Vec<Digest>,
    pub file: DataFile,
    pub run: RunConfig,
    pub conversion: Conversion,
    pub admission: Admission,
    /// Grows with every record the sealer signs; a later record of the same image replaces an earlier one.
    pub serial: u64,
    pub signed_at: Timestamp,
}

/// The one data file that a record names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// Size of the whole file: SquashFS, padding, hash tree.
    pub size: u64,
    /// Bytes that the SquashFS superblock says are in use.
    pub squashfs_size: u64,
    /// Where the dm-verity superblock starts; a multiple of 4096.
    pub hash_offset: u64,
    /// Root of the SHA-256 hash tree.
    #[serde(with = "hex32")]
    pub verity_root: [u8; 32],
    #[serde(with = "hex32")]
    pub verity_salt: [u8; 32],
}

/// What of the image's configuration applies to a task (OCI image-spec, config.md, "config").
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunConfig {
    /// `NAME=VALUE`, in the image's order.
    pub env: Vec<String>,
    pub working_dir: Option<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub labels: BTreeMap<String, String>,
}

/// How the data file was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conversion {
    /// Version of the converter.
    pub version: String,
    pub compression: String,
    pub level: i32,
    pub block_size: u32,
    /// `keep`: owners and modes as in the layers; `readable`: everything owned by root and readable (`a+rX`).
    pub ownership: String,
    pub keep_setid: bool,
    pub keep_xattrs: Vec<String>,
    pub entries: u64,
    /// What was left out, one line each (devices, sockets, dropped attributes).
    pub notes: Vec<String>,
}

/// Under which rule the image was let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admission {
    pub rule: String,
    pub reasons: Vec<String>,
}

/// What a tag, or the digest of an index, stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefEntry {
    pub reference: ImageRef,
    /// What the registry answered: the digest of the index, or of the manifest where there is no index.
    pub top: Digest,
    /// The manifest digest for each platform that this site has asked for.
    pub manifests: BTreeMap<Platform, Digest>,
    pub serial: u64,
    pub resolved_at: Timestamp,
}

impl DataFile {
    /// `rootfs-<verity root>.squashfs`: the content is in the name, so a file never changes under it.
    pub fn name(&self) -> String {
        format!("rootfs-{}.squashfs", hex(&self.verity_root))
    }
}

impl Record {
    /// The signed record as the bytes of `record.dsse.json`.
    pub fn seal(&self, key: &PrivateKey) -> Result<Vec<u8>, EnvelopeError> {
        let digest = BTreeMap::from([(VERITY.to_owned(), hex(&self.file.verity_root))]);
        seal(
            RECORD,
            Subject {
                name: self.file.name(),
                digest,
            },
            self,
            key,
        )
    }

    /// Reads a record that one of `trusted` signed, and checks that it is one of image `manifest` for `platform`: a
    /// good record of another image in the wrong folder is refused.
    pub fn open(
        bytes: &[u8],
        trusted: &[PublicKey],
        manifest: &Digest,
        platform: &Platform,
    ) -> Result<(Self, KeyId), EnvelopeError> {
        let (record, id): (Self, _) = open(RECORD, bytes, trusted)?;
        if record.manifest != *manifest || record.platform != *platform {
            return Err(EnvelopeError::Content(format!(
                "it is the record of {} for {}",
                record.manifest, record.platform
            )));
        }
        let file = &record.file;
        if file.hash_offset % 4096 != 0
            || file.squashfs_size > file.hash_offset
            || file.hash_offset >= file.size
        {
            return Err(EnvelopeError::Content(
                "its sizes contradict each other".into(),
            ));
        }
        Ok((record, id))
    }
}

impl RefEntry {
    /// The signed entry as the bytes of a file below `refs/`.
    pub fn seal(&self, key: &PrivateKey) -> Result<Vec<u8>, EnvelopeError> {
        let digest = BTreeMap::from([("sha256".to_owned(), self.top.hex())]);
        seal(
            REF,
            Subject {
                name: self.reference.to_string(),
                digest,
            },
            self,
            key,
        )
    }

    /// Reads an entry that one of `trusted` signed, and checks that it is the one of `reference`.
    pub fn open(
        bytes: &[u8],
        trusted: &[PublicKey],
        reference: &ImageRef,
    ) -> Result<(Self, KeyId), EnvelopeError> {
        let (entry, id): (Self, _) = open(REF, bytes, trusted)?;
        if entry.reference != *reference {
            return Err(EnvelopeError::Content(format!(
                "it is the entry of {}",
                entry.reference
            )));
        }
        Ok((entry, id))
    }
}

fn seal<P: Serialize>(
    kind: &str,
    subject: Subject,
    predicate: &P,
    key: &PrivateKey,
) -> Result<Vec<u8>, EnvelopeError> {
    let statement = Statement {
        kind: STATEMENT.into(),
        subject: vec![subject],
        predicate_type: kind.into(),
        predicate,
    };
    envelope::seal(&statement, key)
}

fn open<P: serde::de::DeserializeOwned>(
    kind: &str,
    bytes: &[u8],
    trusted: &[PublicKey],
) -> Result<(P, KeyId), EnvelopeError> {
    // Two steps: a statement of another kind is told as such, not as a list of missing fields.
    let (statement, id): (Statement<serde_json::Value>, _) = envelope::open(bytes, trusted)?;
    if statement.kind != STATEMENT || statement.predicate_type != kind {
        return Err(EnvelopeError::Content(format!(
            "it is a `{}`, expected a `{kind}`",
            crate::shown::clip(&statement.predicate_type)
        )));
    }
    let predicate = serde_json::from_value(statement.predicate)
        .map_err(|e| EnvelopeError::Content(crate::shown::parse_error(&e)))?;
    Ok((predicate, id))
}

/// 32 bytes as 64 hexadecimal digits in JSON.
mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&crate::digest::hex(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 32], D::Error> {
        let digits = String::deserialize(d)?;
        crate::digest::unhex(&digits)
            .ok_or_else(|| D::Error::custom("expected 64 hexadecimal digits"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> Record {
        Record {
            manifest: Digest::of(b"manifest"),
            platform: "linux/amd64".parse().unwrap(),
            config: Digest::of(b"config"),
            layers: vec![Digest::of(b"layer")],
            file: DataFile {
                size: 12_288,
                squashfs_size: 4000,
                hash_offset: 4096,
                verity_root: [7; 32],
                verity_salt: [8; 32],
            },
            run: RunConfig {
                env: vec!["PATH=/bin".into()],
                ..RunConfig::default()
            },
            conversion: Conversion {
                version: "0.1.0".into(),
                compression: "zstd".into(),
                level: 3,
                block_size: 131_072,
                ownership: "readable".into(),
                keep_setid: false,
                keep_xattrs: vec!["user.".into()],
                entries: 1,
                notes: vec![],
            },
            admission: Admission {
                rule: "default".into(),
                reasons: vec![],
            },
            serial: 1,
            signed_at: "2026-01-01T00:00:00Z".parse().unwrap(),
        }
    }

    #[test]
    fn a_record_opens_only_as_what_it_is() {
        let key = PrivateKey::generate().unwrap();
        let record = example();
        let bytes = record.seal(&key).unwrap();
        let trusted = [key.public()];
        let (again, _) =
            Record::open(&bytes, &trusted, &record.manifest, &record.platform).unwrap();
        assert_eq!(again, record);
        assert!(Record::open(&bytes, &trusted, &Digest::of(b"another"), &record.platform).is_err());
        assert!(
            Record::open(
                &bytes,
                &trusted,
                &record.manifest,
                &"linux/arm64".parse().unwrap()
            )
            .is_err()
        );

        let entry = RefEntry {
            reference: ImageRef::parse("a.b/x:1", None).unwrap(),
            top: record.manifest,
            manifests: BTreeMap::new(),
            serial: 1,
            resolved_at: record.signed_at,
        };
        let entry = entry.seal(&key).unwrap();
        let refused = Record::open(&entry, &trusted, &record.manifest, &record.platform);
        assert!(refused.unwrap_err().to_string().contains("urn:berth:ref:1"));
    }

    #[test]
    fn contradicting_sizes_are_refused_though_signed() {
        let key = PrivateKey::generate().unwrap();
        let mut record = example();
        record.file.hash_offset = 5000;
        let bytes = record.seal(&key).unwrap();
        assert!(Record::open(&bytes, &[key.public()], &record.manifest, &record.platform).is_err());
    }
}
