//! Text as an image reference, a digest, a platform: what is taken prints as itself, and leads nowhere but below the
//! store's own folders.

use std::path::Component;

use berth_image::{Digest, ImageRef, Platform, layout};

use super::Target;

pub const TARGET: Target = Target {
    name: "reference",
    run,
    seeds,
};

fn below(path: &std::path::Path, folder: &str) {
    let mut parts = path.components();
    assert_eq!(
        parts.next(),
        Some(Component::Normal(folder.as_ref())),
        "{path:?}"
    );
    for part in parts {
        assert!(
            matches!(part, Component::Normal(name) if name.len() <= 255),
            "{path:?}"
        );
    }
}

fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    for default in [None, Some("docker.io"), Some("registry.example:5000")] {
        let Ok(reference) = ImageRef::parse(text, default) else {
            continue;
        };
        let printed = reference.to_string();
        let again = ImageRef::parse(&printed, None).expect("what is printed can be read");
        assert_eq!(again, reference);
        assert!(
            printed.len() < 600 && printed.chars().all(|c| c.is_ascii_graphic()),
            "{printed}"
        );
        below(&layout::ref_entry(&reference), "refs");
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Ok(platform) = text.parse::<Platform>() {
        let printed = platform.to_string();
        assert_eq!(printed.parse::<Platform>().as_ref(), Ok(&platform));
        below(&layout::image_dir(&Digest::of(b""), &platform), "images");
    }
    if let Some((manifest, platform)) = layout::parse_image_dir(text) {
        let dir = layout::image_dir(&manifest, &platform);
        assert_eq!(dir.file_name().and_then(|n| n.to_str()), Some(text));
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let digest = Digest::of(b"").to_string();
    let dir = layout::image_dir(
        &Digest::of(b""),
        &"linux/arm64/v8".parse().expect("a platform"),
    );
    [
        "docker://registry.example:5000/group/app:2.1",
        "ubuntu",
        "docker.io/library/debian:stable-slim",
        "localhost/a__b--c.d/e_f:T-1.x_",
        "[::1]:5000/a",
        "linux/arm64/v8",
        &format!("a.b/c:d@{digest}"),
        &digest,
        dir.file_name().and_then(|n| n.to_str()).unwrap_or_default(),
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
