//! The site's own files: configuration, keys, store, one image.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use berth_config::{Config, ConfigError};
use berth_image::{PublicKey, Store};

use super::{Check, trust};
use crate::error::Failure;
use crate::local::Local;

pub fn config(path: &Path, loaded: &Result<Config, ConfigError>) -> Vec<Check> {
    let name = "config";
    vec![match loaded {
        Err(error) => Check::fail(name, error.to_string())
            .hint("`berth config check` lists everything that is wrong"),
        Ok(_) if !path.exists() => Check::warn(
            name,
            format!("`{}` does not exist, so the defaults apply", path.display()),
        )
        .hint("write one, or name it with --config"),
        Ok(_) => match trust::weakness(path) {
            Some(why) => Check::fail(name, format!("root on nodes believes this file, but {why}"))
                .hint("make the file and the folders above it root's, writable by root alone"),
            None => Check::ok(name, path.display().to_string()),
        },
    }]
}

pub fn keys(config: &Config) -> Vec<Check> {
    config.node.keys.iter().map(|path| key(path)).collect()
}

fn key(path: &Path) -> Check {
    let name = "key";
    let pem = match std::fs::read_to_string(path) {
        Ok(pem) => pem,
        Err(e) => {
            return Check::fail(name, format!("cannot read `{}`: {e}", path.display())).hint(
                "copy the site's public key there (`node.keys`): without it no image is believed",
            );
        }
    };
    match (PublicKey::from_pem(&pem), trust::weakness(path)) {
        (Err(e), _) => Check::fail(name, format!("`{}`: {e}", path.display()))
            .hint("copy the site's public key there: `berth key generate` made it"),
        (Ok(_), Some(why)) => {
            Check::fail(name, format!("root on nodes believes this key, but {why}"))
                .hint("make the file and the folders above it root's, writable by root alone")
        }
        (Ok(key), None) => Check::ok(name, format!("{} in `{}`", key.id(), path.display())),
    }
}

pub fn store(config: &Config) -> Vec<Check> {
    let name = "store";
    let path = &config.store.path;
    let store = match Store::open(path, None, None) {
        Ok(store) => store,
        Err(e) => return vec![Check::failed(name, Failure::from(e))],
    };
    let found = format!("`{}`, uuid {}", path.display(), store.format().uuid);
    let mut checks = Vec::new();
    if store.format().owner == config.store.owner {
        checks.push(Check::ok(name, found));
    } else {
        checks.push(
            Check::warn(
                name,
                format!(
                    "{found}: written by the daemon `{}`, the configuration says `{}`",
                    store.format().owner,
                    config.store.owner
                ),
            )
            .hint("set `store.owner` to the name in the store's FORMAT"),
        );
    }
    checks.push(writers(path));
    checks.push(sample(config));
    checks
}

/// Jobs mount images through the kernel, which hashes nothing: whoever can write the store can give it anything.
fn writers(path: &Path) -> Check {
    let name = "store writers";
    for part in [
        path.to_owned(),
        path.join("images"),
        path.join("images/sha256"),
    ] {
        if let Some(mode) = trust::written_by_others(&part) {
            return Check::fail(
                name,
                format!(
                    "`{}` may be written by others (mode {mode:04o})",
                    part.display()
                ),
            )
            .hint(format!(
                "chmod go-w '{}': the kernel mounts what lies there",
                part.display()
            ));
        }
    }
    match std::fs::metadata(path) {
        Ok(facts) => Check::ok(
            name,
            format!(
                "only uid {} may write: images are mounted without hashing each block, so that one is trusted",
                facts.uid()
            ),
        ),
        Err(e) => Check::fail(name, format!("`{}`: {e}", path.display())),
    }
}

/// One image, as a node would look at it.
fn sample(config: &Config) -> Check {
    let name = "image";
    let local = match Local::open(config) {
        Ok(local) => local,
        Err(failure) => return Check::failed(name, failure),
    };
    let dirs = match local.store.image_dirs() {
        Ok(dirs) => dirs,
        Err(e) => return Check::fail(name, format!("cannot list the store: {e}")),
    };
    let Some((digest, platform)) = dirs.first() else {
        return Check::ok(name, "the store is empty, nothing to look at");
    };
    let found = local.record(digest, platform);
    match found.and_then(|f| f.map(|f| local.check_file(&f).map(|()| f)).transpose()) {
        Ok(Some(found)) => Check::ok(
            name,
            format!(
                "{} of {}: record signed by {}, file whole",
                crate::output::short_digest(&digest.to_string()),
                dirs.len(),
                found.key
            ),
        ),
        Ok(None) => Check::ok(name, format!("{digest} is being made")),
        Err(failure) => Check::failed(name, failure),
    }
}
