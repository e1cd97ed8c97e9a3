//! Where things lie in the store. Pure path arithmetic: nothing here touches a disk.
//!
//! ```text
//! FORMAT
//! images/sha256/ab/<64 hex>-<os>-<architecture>[-<variant>]/rootfs-<verity root>.squashfs, record.dsse.json
//! refs/<registry>/<repository>/_tags/<tag>.json, _digests/<hex>.json
//! tmp/ trash/
//! ```
//! `_tags` and `_digests` cannot be parts of a repository's name (those start with a letter or digit), so a
//! repository `foo/latest` and a tag `latest` of `foo` never meet.

use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::platform::Platform;
use crate::reference::ImageRef;

pub const FORMAT: &str = "FORMAT";
pub const IMAGES: &str = "images";
pub const REFS: &str = "refs";
pub const TMP: &str = "tmp";
pub const TRASH: &str = "trash";
/// The signed record's name in an image's folder.
pub const RECORD: &str = "record.dsse.json";

/// The folder of one image, relative to the store.
pub fn image_dir(manifest: &Digest, platform: &Platform) -> PathBuf {
    let hex = manifest.hex();
    Path::new(IMAGES)
        .join("sha256")
        .join(&hex[..2])
        .join(format!("{hex}-{}", platform.dashed()))
}

/// The signed record of one image, relative to the store.
pub fn record(manifest: &Digest, platform: &Platform) -> PathBuf {
    image_dir(manifest, platform).join(RECORD)
}

/// The signed entry of a reference, relative to the store. A reference with tag and digest is its digest.
pub fn ref_entry(reference: &ImageRef) -> PathBuf {
    let repository = Path::new(REFS)
        .join(reference.registry())
        .join(reference.repository());
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => repository
            .join("_digests")
            .join(format!("{}.json", digest.hex())),
        (None, tag) => repository
            .join("_tags")
            .join(format!("{}.json", tag.unwrap_or("latest"))),
    }
}

/// The reference whose signed entry lies at `path`, relative to the store.
pub fn parse_ref_entry(path: &Path) -> Option<ImageRef> {
    let parts: Vec<&str> = path.iter().map(|p| p.to_str()).collect::<Option<_>>()?;
    let [REFS, registry, repository @ .., kind, file] = parts.as_slice() else {
        return None;
    };
    let name = file.strip_suffix(".json")?;
    let repository = repository.join("/");
    let text = match *kind {
        "_tags" => format!("{registry}/{repository}:{name}"),
        "_digests" => format!("{registry}/{repository}@sha256:{name}"),
        _ => return None,
    };
    let reference = ImageRef::parse(&text, None).ok()?;
    // Only what this module writes: no second spelling of a name.
    (ref_entry(&reference) == path).then_some(reference)
}

/// What the name of an image's folder says: `<64 hex>-<os>-<architecture>[-<variant>]`.
pub fn parse_image_dir(name: &str) -> Option<(Digest, Platform)> {
    let (hex, platform) = name.split_once('-').filter(|_| !name.contains('/'))?;
    Some((
        Digest::from_hex(hex).ok()?,
        platform.replace('-', "/").parse().ok()?,
    ))
}

/// The image that a path printed by `berth path` names: only its digest and platform are taken, to be looked up
/// anew. `None` for every other path, so that no file of a user's own is ever given to the kernel's driver.
pub fn parse_data_path(store: &Path, path: &Path) -> Option<(Digest, Platform)> {
    let inside = path.strip_prefix(store).ok()?;
    let parts: Vec<&str> = inside.iter().map(|p| p.to_str()).collect::<Option<_>>()?;
    let [IMAGES, "sha256", fan, dir, file] = parts.as_slice() else {
        return None;
    };
    let (digest, platform) = parse_image_dir(dir)?;
    let root = file.strip_prefix("rootfs-")?.strip_suffix(".squashfs")?;
    (digest.hex().starts_with(fan) && fan.len() == 2 && crate::digest::unhex::<32>(root).is_some())
        .then_some((digest, platform))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_read_back() {
        let digest = Digest::of(b"x");
        let platform: Platform = "linux/arm/v7".parse().unwrap();
        let dir = image_dir(&digest, &platform);
        assert_eq!(
            parse_image_dir(dir.file_name().unwrap().to_str().unwrap()),
            Some((digest, platform.clone()))
        );
        let store = Path::new("/s");
        let data = store
            .join(&dir)
            .join(format!("rootfs-{}.squashfs", digest.hex()));
        assert_eq!(parse_data_path(store, &data), Some((digest, platform)));
    }

    #[test]
    fn other_paths_name_no_image() {
        let store = Path::new("/s");
        let dir = store.join(image_dir(&Digest::of(b"x"), &Platform::host()));
        let root = Digest::of(b"y").hex();
        for path in [
            PathBuf::from("/home/u/my.sqsh"),
            dir.join("record.dsse.json"),
            dir.join("rootfs-00.squashfs"),
            dir.join("..").join(format!("rootfs-{root}.squashfs")),
            Path::new("/t").join(format!("rootfs-{root}.squashfs")),
        ] {
            assert_eq!(parse_data_path(store, &path), None, "{}", path.display());
        }
    }

    #[test]
    fn an_image_folder_is_one_folder() {
        let name = format!("{}-linux/amd64", Digest::of(b"x").hex());
        assert_eq!(parse_image_dir(&name), None);
    }

    #[test]
    fn a_signed_entrys_path_names_its_reference() {
        let digest = Digest::of(b"x");
        for text in ["r.example:5000/a/b:1", "docker.io/library/debian:12"] {
            let tag = ImageRef::parse(text, None).unwrap();
            assert_eq!(parse_ref_entry(&ref_entry(&tag)), Some(tag.clone()));
            let by_digest = tag.with_digest(digest);
            let read = parse_ref_entry(&ref_entry(&by_digest)).unwrap();
            assert_eq!(
                (read.repository(), read.digest()),
                (tag.repository(), Some(digest))
            );
        }
        for other in [
            "refs/r.example/a/_tags/1",
            "refs/r.example/a/_other/1.json",
            "refs/_tags/1.json",
            "images/r/a/_tags/1.json",
            "refs/docker.io/debian/_tags/12.json",
        ] {
            assert_eq!(parse_ref_entry(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_repository_cannot_be_a_tag_folder() {
        let tag = ImageRef::parse("a.b/foo:latest", None).unwrap();
        let repository = ImageRef::parse("a.b/foo/latest:json", None).unwrap();
        assert_ne!(
            ref_entry(&tag).parent(),
            Some(ref_entry(&repository).as_path())
        );
        assert!(ImageRef::parse("a.b/foo/_tags/x", None).is_err());
    }
}
