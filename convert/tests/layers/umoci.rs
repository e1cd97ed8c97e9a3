//! umoci as the oracle: what it unpacks from layers, and how that is compared with what the kernel shows of our image.

use std::process::Command;

use berth_image::Digest;

use crate::build::gzip;
use crate::image::{Mounted, Tree, convert_tars, options, tree};

pub const TOOLS: &[&str] = &["umoci", "mount", "umount"];

/// Or why umoci refuses these layers.
pub fn umoci(layers: &[Vec<u8>], now: i64) -> Result<Tree, String> {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    std::fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    let add = |media_type: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.{media_type}","digest":"{digest}","size":{}"#,
            bytes.len()
        )
    };
    let ids: Vec<String> = layers
        .iter()
        .map(|l| format!("\"{}\"", Digest::of(l)))
        .collect();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        ids.join(",")
    );
    let config = add("config.v1+json", config.as_bytes());
    let descriptors: Vec<String> = layers
        .iter()
        .map(|l| add("layer.v1.tar+gzip", &gzip(l)) + "}")
        .collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{config}}},"layers":[{}]}}"#,
        descriptors.join(",")
    );
    let manifest = add("manifest.v1+json", manifest.as_bytes());
    let name = r#""annotations":{"org.opencontainers.image.ref.name":"x"}"#;
    std::fs::write(
        layout.join("index.json"),
        format!(r#"{{"schemaVersion":2,"manifests":[{manifest},{name}}}]}}"#),
    )
    .unwrap();
    let bundle = dir.path().join("bundle");
    let image = format!("{}:x", layout.display());
    let out = Command::new("umoci")
        .args(["unpack", "--image", &image])
        .arg(&bundle)
        .output()
        .unwrap();
    match out.status.success() {
        true => Ok(tree(&bundle.join("rootfs"), now)),
        false => Err(String::from_utf8_lossy(&out.stderr).into_owned()),
    }
}

pub fn ours(layers: &[Vec<u8>], now: i64) -> Tree {
    let (file, _) = convert_tars(layers, &options()).unwrap_or_else(|e| panic!("{e}"));
    let mounted = Mounted::new(&file);
    tree(&mounted.root(), now)
}

pub fn now() -> i64 {
    // Before anything that a test unpacks from now on.
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap().as_secs() as i64 - 1
}

#[track_caller]
pub fn same(layers: &[Vec<u8>]) {
    let now = now();
    let expected =
        umoci(layers, now).unwrap_or_else(|e| panic!("umoci takes well-formed layers: {e}"));
    compare(&expected, &ours(layers, now), "");
}

#[track_caller]
pub fn compare(expected: &Tree, found: &Tree, case: &str) {
    let mut differences = Vec::new();
    for name in expected.keys().chain(found.keys()) {
        let (theirs, mut ours) = (expected.get(name).cloned(), found.get(name).cloned());
        if theirs
            .as_ref()
            .is_some_and(|line| line.starts_with("04") && !line.contains(" time "))
        {
            // umoci left the time of its own work on the folder: it made it, or took something out of it.
            ours = ours.map(|line| without_time(&line));
        }
        if theirs != ours && !name.is_empty() {
            let name = name.escape_ascii();
            differences.push(format!("{name}\n  umoci {theirs:?}\n  ours  {ours:?}"));
        }
    }
    assert!(differences.is_empty(), "{case}\n{}", differences.join("\n"));
}

fn without_time(line: &str) -> String {
    match line.split_once(" time ") {
        Some((before, after)) => {
            let rest = after.find(' ').map_or("", |at| &after[at..]);
            format!("{before}{rest}")
        }
        None => line.to_owned(),
    }
}
