//! Bytes as an image's manifest or index and as its configuration, through the daemon's reader and the sealer's.
//! What is taken is within the limits, and both read the same layers.

use berth_image::record::Admission;
use berth_image::{Digest, Platform};

use super::Target;

/// The daemon's own files: its crate with its runtime, database and TLS is not to be compiled here.
#[path = "../../../daemon/src/resolve/manifest.rs"]
#[allow(dead_code, reason = "resolving uses more of it")]
mod resolve;
use crate::seal::protocol::{self, SealRequest};
use resolve::Document;

pub const TARGET: Target = Target {
    name: "manifest",
    run,
    seeds,
};

fn run(data: &[u8]) {
    let platform: Platform = "linux/amd64".parse().expect("a platform");
    let digest = Digest::of(data);
    let parsed = resolve::parse(digest, data);
    if let Err(e) = &parsed {
        assert!(
            !e.to_string().contains('\n') && e.to_string().len() < 1000,
            "{e}"
        );
    }
    match &parsed {
        Ok(Document::Index(index)) => {
            let _ = index.select(&platform);
        }
        Ok(Document::Image(manifest)) => {
            assert!(manifest.layers.len() <= protocol::MAX_LAYERS);
            let _ = manifest.check(1 << 30);
        }
        Err(_) => {}
    }

    // A manifest, one line, a configuration: what the sealer gets; digests are made to fit, so that parsing begins.
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Some((manifest, config)) = text.split_once('\n') else {
        return;
    };
    let manifest = manifest.replace("CONFIG", &Digest::of(config.as_bytes()).to_string());
    let request = SealRequest {
        manifest_digest: Digest::of(manifest.as_bytes()),
        manifest,
        config: config.to_owned(),
        platform,
        admission: Admission {
            rule: String::new(),
            reasons: vec![],
        },
    };
    let sealer = crate::seal::read(&request);
    let daemon = resolve::parse(request.manifest_digest, request.manifest.as_bytes());
    match sealer {
        Ok(layers) => {
            assert!(layers.len() <= protocol::MAX_LAYERS);
            if let Ok(Document::Image(theirs)) = daemon {
                let theirs: Vec<_> = theirs.layers.iter().map(|l| l.digest).collect();
                assert_eq!(layers, theirs, "sealer and daemon read other layers");
            }
        }
        Err(failure) => {
            assert!(
                !failure.message.contains('\n') && failure.message.len() < 1000,
                "{failure}"
            );
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let layer = Digest::of(b"layer");
    let config = format!(
        r#"{{"os":"linux","architecture":"amd64","config":{{"Env":["A=b"],"Cmd":null,"Labels":{{"a":"b"}}}},"rootfs":{{"type":"layers","diff_ids":["{layer}"]}}}}"#
    );
    let manifest = |config: &str| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":9}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{layer}","size":9}}]}}"#,
            resolve::OCI_MANIFEST
        )
    };
    let entry = |platform: &str| {
        format!(
            r#"{{"mediaType":"{}","digest":"{layer}","size":1{platform}}}"#,
            resolve::OCI_MANIFEST
        )
    };
    let index = format!(
        r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[{},{},{}]}}"#,
        resolve::OCI_INDEX,
        entry(r#","platform":{"os":"linux","architecture":"amd64"}"#),
        entry(r#","platform":{"os":"linux","architecture":"arm64","variant":"v8"}"#),
        entry(""),
    );
    vec![
        manifest(&layer.to_string()).into_bytes(),
        format!("{}\n{config}", manifest("CONFIG")).into_bytes(),
        index.into_bytes(),
        br#"{"schemaVersion":1,"name":"x"}"#.to_vec(),
    ]
}
