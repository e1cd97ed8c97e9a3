//! Bytes as a signed record or ref entry: once as they come, and once as the payload of an envelope that a trusted key
//! signed. Only what that key signed opens, and what opens keeps its own promises.

use std::sync::LazyLock;

use berth_image::envelope;
use berth_image::record::{Admission, Conversion, DataFile, RunConfig};
use berth_image::{Digest, ImageRef, Platform, PrivateKey, PublicKey, Record, RefEntry};

use super::Target;

pub const TARGET: Target = Target {
    name: "envelope",
    run,
    seeds,
};

/// Of 32 bytes 7: the same for every run, so that what was found stays found.
static KEY: LazyLock<PrivateKey> = LazyLock::new(|| {
    let der = "MC4CAQAwBQYDK2VwBCIEIAcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcH";
    let pem = format!(
        "-----BEGIN {0}-----\n{der}\n-----END {0}-----\n",
        "PRIVATE KEY"
    );
    PrivateKey::from_pem(&pem).expect("a key")
});

fn image() -> (Digest, Platform) {
    (
        Digest::of(b"manifest"),
        "linux/amd64".parse().expect("a platform"),
    )
}

fn reference() -> ImageRef {
    ImageRef::parse("registry.example/group/app:1", None).expect("a reference")
}

fn open(bytes: &[u8], trusted: &[PublicKey]) {
    let (manifest, platform) = image();
    if let Ok((record, id)) = Record::open(bytes, trusted, &manifest, &platform) {
        assert_eq!(id, KEY.public().id());
        assert_eq!(record.manifest, manifest);
        assert!(record.file.hash_offset < record.file.size);
        assert!(record.file.squashfs_size <= record.file.hash_offset);
        let again = record.seal(&KEY).expect("a record");
        assert_eq!(
            Record::open(&again, trusted, &manifest, &platform)
                .expect("ours")
                .0,
            record
        );
    }
    if let Ok((entry, _)) = RefEntry::open(bytes, trusted, &reference()) {
        assert_eq!(entry.reference, reference());
    }
    let _ = envelope::open::<serde_json::Value>(bytes, trusted);
}

fn run(data: &[u8]) {
    let trusted = [KEY.public()];
    open(data, &trusted);
    if let Ok(statement) = serde_json::from_slice::<serde_json::Value>(data)
        && let Ok(signed) = envelope::seal(&statement, &KEY)
    {
        open(&signed, &trusted);
        assert!(envelope::open::<serde_json::Value>(&signed, &[]).is_err());
    }
    let text = String::from_utf8_lossy(data);
    let _ = PublicKey::from_pem(&text);
    let _ = PrivateKey::from_pem(&text);
}

fn seeds() -> Vec<Vec<u8>> {
    let (manifest, platform) = image();
    let record = Record {
        manifest,
        platform: platform.clone(),
        config: Digest::of(b"c"),
        layers: vec![Digest::of(b"l")],
        file: DataFile {
            size: 12_288,
            squashfs_size: 4000,
            hash_offset: 4096,
            verity_root: [1; 32],
            verity_salt: [2; 32],
        },
        run: RunConfig {
            env: vec!["A=b".into()],
            working_dir: Some("/w".into()),
            ..RunConfig::default()
        },
        conversion: Conversion {
            version: "1".into(),
            compression: "zstd".into(),
            level: 3,
            block_size: 131_072,
            ownership: "keep".into(),
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
        signed_at: jiff::Timestamp::UNIX_EPOCH,
    };
    let entry = RefEntry {
        reference: reference(),
        top: manifest,
        manifests: [(platform, manifest)].into(),
        serial: 2,
        resolved_at: jiff::Timestamp::UNIX_EPOCH,
    };
    let signed = [record.seal(&KEY), entry.seal(&KEY)].map(|s| s.expect("a statement"));
    let statements = signed.clone().map(|s| {
        let (statement, _) =
            envelope::open::<serde_json::Value>(&s, &[KEY.public()]).expect("ours");
        serde_json::to_vec(&statement).expect("JSON")
    });
    let pem = KEY.public().to_pem().expect("a key").into_bytes();
    [&signed[..], &statements, &[pem]].concat()
}
