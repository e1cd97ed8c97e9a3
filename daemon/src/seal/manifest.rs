//! What the sealer takes from an image's manifest and configuration (OCI image-spec, manifest.md and config.md; Docker
//! image manifest V2, schema 2). Both were written by strangers; both are checked against digests first.

use std::collections::BTreeMap;

use berth_client::api::ErrorKind;
use berth_image::record::RunConfig;
use berth_image::shown::parse_error;
use berth_image::{Digest, Platform};
use serde::Deserialize;

use super::protocol::{MAX_LAYERS, SealFailure, SealRequest};

/// An image's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) config: Digest,
    /// Base first.
    pub(super) layers: Vec<Layer>,
    pub(super) run: RunConfig,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) digest: Digest,
    pub(super) diff_id: Digest,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: Digest,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
    config: Option<ConfigRun>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

/// Docker writes `null` for what is empty.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct ConfigRun {
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    labels: Option<BTreeMap<String, String>>,
}

/// Reads and checks both documents of a request.
pub(super) fn read(request: &SealRequest) -> Result<Image, SealFailure> {
    expect_digest("manifest", &request.manifest, request.manifest_digest)?;
    let manifest: Manifest = parse("manifest", &request.manifest)?;
    expect_digest("configuration", &request.config, manifest.config.digest)?;
    let config: Config = parse("configuration", &request.config)?;

    let platform = &request.platform;
    if !Platform::accepts(
        platform,
        &config.os,
        &config.architecture,
        config.variant.as_deref(),
    ) {
        return Err(SealFailure::new(
            ErrorKind::NoPlatform,
            format!(
                "the image is for {}/{}, not for {platform}",
                config.os.escape_default(),
                config.architecture.escape_default()
            ),
        ));
    }
    let (layers, diff_ids) = (manifest.layers, config.rootfs.diff_ids);
    if layers.len() != diff_ids.len() {
        return Err(failed(format!(
            "the manifest names {} layers, the configuration {}",
            layers.len(),
            diff_ids.len()
        )));
    }
    if layers.len() > MAX_LAYERS {
        return Err(failed(format!(
            "the image has {} layers, at most {MAX_LAYERS} are allowed",
            layers.len()
        )));
    }
    if let Some((index, odd)) = (layers.iter().enumerate()).find(|(_, l)| !is_layer(&l.media_type))
    {
        let mut failure = failed(format!(
            "layer {index} is of type `{}`, which is not a file system layer",
            odd.media_type.escape_default()
        ));
        failure.layer = Some(index);
        return Err(failure);
    }
    let run = config.config.unwrap_or_default();
    Ok(Image {
        config: manifest.config.digest,
        layers: (layers.iter().zip(diff_ids))
            .map(|(layer, diff_id)| Layer {
                digest: layer.digest,
                diff_id,
            })
            .collect(),
        run: RunConfig {
            env: run.env.unwrap_or_default(),
            working_dir: run.working_dir.filter(|dir| !dir.is_empty()),
            entrypoint: run.entrypoint.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
            labels: run.labels.unwrap_or_default(),
        },
    })
}

/// The compression is seen from the bytes; the type only has to be one of tar streams in the clear.
fn is_layer(media_type: &str) -> bool {
    const KINDS: [&str; 4] = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    ];
    KINDS.iter().any(|kind| {
        matches!(
            media_type.strip_prefix(kind),
            Some("" | "+gzip" | "+zstd" | ".gzip" | ".zstd")
        )
    })
}

fn expect_digest(what: &str, text: &str, expected: Digest) -> Result<(), SealFailure> {
    let found = Digest::of(text.as_bytes());
    if found == expected {
        return Ok(());
    }
    Err(SealFailure::new(
        ErrorKind::DigestMismatch,
        format!("the {what} has digest {found}, expected {expected}"),
    ))
}

fn parse<'t, T: Deserialize<'t>>(what: &str, text: &'t str) -> Result<T, SealFailure> {
    serde_json::from_str(text).map_err(|e| {
        failed(format!(
            "the image's {what} cannot be understood: {}",
            parse_error(&e)
        ))
    })
}

fn failed(message: String) -> SealFailure {
    SealFailure::new(ErrorKind::ConversionFailed, message)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use berth_image::record::Admission;
    use serde_json::json;

    /// A request for an image of these layers: (media type, digest, diff_id).
    pub(in crate::seal) fn request(layers: &[(&str, Digest, Digest)]) -> SealRequest {
        let config = json!({
            "os": "linux", "architecture": "amd64",
            "config": {"Env": ["A=b"], "Cmd": null, "WorkingDir": ""},
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|l| l.2).collect::<Vec<_>>()},
        })
        .to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "config": {"mediaType": "x", "digest": Digest::of(config.as_bytes()), "size": config.len()},
            "layers": layers.iter().map(|l| json!({"mediaType": l.0, "digest": l.1, "size": 1}))
                .collect::<Vec<_>>(),
        })
        .to_string();
        SealRequest {
            manifest_digest: Digest::of(manifest.as_bytes()),
            manifest,
            config,
            platform: "linux/amd64".parse().unwrap(),
            admission: Admission {
                rule: "default".into(),
                reasons: vec![],
            },
        }
    }

    const GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

    #[test]
    fn a_good_image_is_read() {
        let (digest, diff_id) = (Digest::of(b"l"), Digest::of(b"d"));
        let image = read(&request(&[(GZIP, digest, diff_id)])).unwrap();
        assert_eq!(image.layers, [Layer { digest, diff_id }]);
        assert_eq!(image.run.env, ["A=b"]);
        assert_eq!(image.run.working_dir, None);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let good = request(&[(GZIP, Digest::of(b"l"), Digest::of(b"d"))]);
        let kind = |change: fn(&mut SealRequest)| {
            let mut request = good.clone();
            change(&mut request);
            read(&request).unwrap_err().kind
        };
        assert_eq!(kind(|r| r.manifest.push(' ')), ErrorKind::DigestMismatch);
        assert_eq!(kind(|r| r.config.push(' ')), ErrorKind::DigestMismatch);
        assert_eq!(
            kind(|r| r.platform = "linux/arm64".parse().unwrap()),
            ErrorKind::NoPlatform
        );
        let odd = request(&[(
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            Digest::of(b"l"),
            Digest::of(b"d"),
        )]);
        assert_eq!(read(&odd).unwrap_err().layer, Some(0));
    }
}
