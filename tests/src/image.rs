//! Small images made on the spot, good and bad ones, and pushed straight into a registry.

use std::io::Write;

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::http::request;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// `sha256:…` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Bytes that do not compress, the same ones for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// One layer: a tar archive in the making.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    tar: Vec<u8>,
}

impl Layer {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn file(self, name: &str, bytes: &[u8], mode: u32) -> Self {
        self.entry(name, b'0', mode, "", bytes)
    }

    pub fn folder(self, name: &str) -> Self {
        self.entry(&format!("{name}/"), b'5', 0o755, "", b"")
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(name, b'2', 0o777, target, b"")
    }

    /// Any ustar header: `kind` is its type flag.
    pub fn entry(mut self, name: &str, kind: u8, mode: u32, link: &str, bytes: &[u8]) -> Self {
        let mut header = [0_u8; 512];
        let mut put =
            |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
        put(0, name);
        put(100, &format!("{mode:07o}"));
        put(108, "0000000");
        put(116, "0000000");
        put(124, &format!("{:011o}", bytes.len()));
        put(136, "14000000000");
        put(148, "        ");
        put(157, link);
        put(257, "ustar\u{0}00");
        header[156] = kind;
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.tar.extend_from_slice(&header);
        self.tar.extend_from_slice(bytes);
        self.tar.resize(self.tar.len().next_multiple_of(512), 0);
        self
    }

    fn finish(&self) -> (Vec<u8>, String) {
        let mut tar = self.tar.clone();
        tar.resize(tar.len() + 1024, 0);
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&tar).expect("memory takes every byte");
        (
            gzip.finish().expect("memory takes every byte"),
            digest(&tar),
        )
    }
}

/// An image in the making.
#[derive(Debug, Clone)]
pub struct Image {
    blobs: Vec<(Vec<u8>, String)>,
    pub config: Value,
}

/// What was pushed.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// `HOST:PORT/REPOSITORY:TAG`, without `docker://`.
    pub name: String,
    /// Of the manifest.
    pub digest: String,
    /// Of the layers, bottom first.
    pub layers: Vec<String>,
    pub config: String,
}

impl Image {
    /// An image without layers, for this machine's platform.
    pub fn new() -> Self {
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": []},
        });
        Self {
            blobs: Vec::new(),
            config,
        }
    }

    /// A shell and the usual small tools (busybox), and `/etc/os-release` with `VARIANT_ID=variant`: no two variants
    /// share their top layer.
    ///
    /// # Panics
    /// Where busybox-static is not installed.
    pub fn shell(variant: &str) -> Self {
        let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
        let mut tools = Layer::new().folder("bin").folder("etc").folder("tmp");
        tools = tools.file("bin/busybox", &busybox, 0o755);
        for tool in [
            "sh", "cat", "echo", "id", "ls", "env", "sleep", "true", "false", "pwd", "grep",
            "mount", "touch", "tr", "readlink", "stat", "head", "hostname", "ps", "kill", "test",
            "wc", "dd", "mkdir", "cp",
        ] {
            tools = tools.symlink(&format!("bin/{tool}"), "busybox");
        }
        let release = format!("NAME=\"Berth test image\"\nVARIANT_ID={variant}\n");
        Self::new().layer(&tools).layer(&Layer::new().file(
            "etc/os-release",
            release.as_bytes(),
            0o644,
        ))
    }

    pub fn layer(mut self, layer: &Layer) -> Self {
        let (blob, diff_id) = layer.finish();
        self.blobs.push((blob, diff_id));
        self
    }

    /// A layer as it is, with the diff id that the config is to claim.
    pub fn raw_layer(mut self, blob: Vec<u8>, diff_id: &str) -> Self {
        self.blobs.push((blob, diff_id.to_owned()));
        self
    }

    /// One more of the config's `Env`.
    pub fn env(mut self, setting: &str) -> Self {
        if let Some(list) = self.config["config"]["Env"].as_array_mut() {
            list.push(json!(setting));
        }
        self
    }

    pub fn workdir(mut self, folder: &str) -> Self {
        self.config["config"]["WorkingDir"] = json!(folder);
        self
    }

    pub fn architecture(mut self, name: &str) -> Self {
        self.config["architecture"] = json!(name);
        self
    }

    /// Pushes to `REPOSITORY:TAG` of the registry at `HOST:PORT`.
    ///
    /// # Panics
    /// When the registry does not take it.
    pub fn push(&self, registry: &str, name: &str) -> Pushed {
        let (repository, tag) = name.rsplit_once(':').expect("REPOSITORY:TAG");
        let mut config = self.config.clone();
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for (blob, diff_id) in &self.blobs {
            let name = push_blob(registry, repository, blob);
            layers.push(json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": name, "size": blob.len(),
            }));
            diff_ids.push(json!(diff_id));
        }
        config["rootfs"]["diff_ids"] = json!(diff_ids);
        let config = config.to_string().into_bytes();
        let config_digest = push_blob(registry, repository, &config);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config_digest, "size": config.len(),
            },
            "layers": layers,
        });
        let manifest = manifest.to_string().into_bytes();
        put_manifest(registry, repository, tag, &manifest);
        let digests = layers.iter().filter_map(|layer| layer["digest"].as_str());
        Pushed {
            name: format!("{registry}/{name}"),
            digest: digest(&manifest),
            layers: digests.map(str::to_owned).collect(),
            config: config_digest,
        }
    }
}

impl Default for Image {
    fn default() -> Self {
        Self::new()
    }
}

impl Pushed {
    /// Another name of the same image, in the same repository.
    pub fn tag(&self, registry: &str, tag: &str) -> Self {
        let (host_path, _) = self.name.rsplit_once(':').expect("has a tag");
        let (_, repository) = host_path.split_once('/').expect("has a host");
        let path = format!("/v2/{repository}/manifests/{}", self.digest);
        let manifest =
            request(registry, "GET", &path, &[("Accept", MANIFEST)], b"").expect("a manifest");
        put_manifest(registry, repository, tag, &manifest.body);
        Self {
            name: format!("{host_path}:{tag}"),
            ..self.clone()
        }
    }

    /// The same image by way of another address, a proxy's.
    pub fn via(&self, address: &str) -> String {
        let (_, rest) = self.name.split_once('/').expect("has a host");
        format!("{address}/{rest}")
    }
}

fn push_blob(registry: &str, repository: &str, bytes: &[u8]) -> String {
    let name = digest(bytes);
    let start = format!("/v2/{repository}/blobs/uploads/");
    let answer = request(registry, "POST", &start, &[], b"").expect("the registry answers");
    let location = answer.head.header("location").expect("an upload's place");
    let path = match location.strip_prefix("http://") {
        Some(rest) => rest.split_once('/').map_or("", |(_, path)| path),
        None => location.trim_start_matches('/'),
    };
    let mark = if path.contains('?') { '&' } else { '?' };
    let target = format!("/{path}{mark}digest={name}");
    let kind = [("Content-Type", "application/octet-stream")];
    let answer = request(registry, "PUT", &target, &kind, bytes).expect("the registry answers");
    assert_eq!(answer.head.status(), 201, "{:?}", answer.head);
    name
}

fn put_manifest(registry: &str, repository: &str, tag: &str, manifest: &[u8]) {
    let path = format!("/v2/{repository}/manifests/{tag}");
    let answer = request(
        registry,
        "PUT",
        &path,
        &[("Content-Type", MANIFEST)],
        manifest,
    );
    let answer = answer.expect("the registry answers");
    assert_eq!(answer.head.status(), 201, "{:?}", answer.head);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_sha256() {
        let known = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest(b"abc"), known);
    }

    #[test]
    fn tar_reads_a_layer() {
        let layer = Layer::new()
            .folder("a")
            .file("a/b", b"text", 0o640)
            .symlink("a/c", "b");
        let (blob, _) = layer.finish();
        let file = std::env::temp_dir().join(format!("berth-layer-{}.tgz", std::process::id()));
        std::fs::write(&file, blob).unwrap();
        let path = file.to_str().unwrap();
        let listed = crate::Run::new("tar", &["-tvzf", path]).end();
        std::fs::remove_file(&file).unwrap();
        assert!(
            listed.ok().contains("-rw-r----- 0/0               4 "),
            "{listed}"
        );
        assert!(listed.ok().contains("a/c -> b"), "{listed}");
    }
}
