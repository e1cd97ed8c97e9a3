//! `berth store init` and `berth key generate`: what a site starts from. Neither replaces anything.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use berth_config::Config;
use berth_image::store::StoreError;
use berth_image::{PrivateKey, PublicKey, Store};
use nix::unistd::User;

use crate::context::Context;
use crate::error::{CONFIG, Failure, OTHER, PERMISSION, USAGE};
use crate::output;

/// The store of the configuration, then the key pair.
pub fn init(context: &Context, user: Option<&str>) -> Result<(), Failure> {
    let owner = user.map(find_user).transpose()?;
    let config = &context.config;
    let path = &config.store.path;
    let (store, made) = match Store::init(path, &config.store.owner) {
        Ok(store) => (store, true),
        Err(StoreError::NotEmpty { .. }) => {
            (Store::open(path, None, Some(&config.store.owner))?, false)
        }
        Err(e) => return Err(e.into()),
    };
    if made && let Some(owner) = &owner {
        let parts = ["", "FORMAT", "images", "refs", "tmp", "trash"];
        for part in parts {
            give(&path.join(part), owner)?;
        }
    }
    let key = match key_pair(config, owner.as_ref()) {
        Ok(key) => key,
        Err(failure) if failure.code == PERMISSION => {
            context.say(&format!("the store {} is there", path.display()));
            return Err(
                failure.hint("as root: berth key generate --user NAME, with the sealer's user")
            );
        }
        Err(failure) => return Err(failure),
    };
    if context.json {
        return output::json(&serde_json::json!({
            "store": path, "uuid": store.format().uuid, "owner": store.format().owner, "made": made,
            "key": key.public.id().hex(), "key_made": key.made,
        }));
    }
    let word = if made { "made" } else { "was there" };
    output::line(&format!(
        "store {} {word}: uuid {}, owner {}",
        path.display(),
        store.format().uuid,
        store.format().owner
    ))?;
    say_key(&key, config)
}

pub fn generate(context: &Context, user: Option<&str>) -> Result<(), Failure> {
    let owner = user.map(find_user).transpose()?;
    let key = key_pair(&context.config, owner.as_ref())?;
    match context.json {
        true => output::json(&serde_json::json!({
            "key": key.public.id().hex(), "key_made": key.made,
            "private": context.config.seal.key, "public": public_path(&context.config)?,
        })),
        false => say_key(&key, &context.config),
    }
}

struct Pair {
    public: PublicKey,
    made: bool,
}

fn say_key(key: &Pair, config: &Config) -> Result<(), Failure> {
    let word = if key.made { "made" } else { "was there" };
    output::line(&format!(
        "key {} {word}: {}",
        key.public.id(),
        public_path(config)?.display()
    ))
}

/// Makes what is missing of the pair: both, or the public half of a private key. A public key whose private half is
/// missing here may be another machine's, and is never replaced.
fn key_pair(config: &Config, owner: Option<&User>) -> Result<Pair, Failure> {
    let private_path = &config.seal.key;
    let public_path = public_path(config)?;
    let there = read_public(public_path)?;
    let private = match std::fs::read_to_string(private_path) {
        Ok(pem) => Some(
            PrivateKey::from_pem(&pem)
                .map_err(|e| Failure::new(CONFIG, format!("`{}`: {e}", private_path.display())))?,
        ),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        // Somebody else's, as it should be for whoever is not the sealer: the public half must be there.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied && there.is_some() => {
            return there
                .map(|public| Pair {
                    public,
                    made: false,
                })
                .ok_or_else(|| Failure::silent(OTHER));
        }
        Err(e) => return Err(io_failure("cannot read the key", private_path, &e)),
    };
    match (private, there) {
        (Some(private), Some(public)) if private.public().id() == public.id() => Ok(Pair {
            public,
            made: false,
        }),
        (Some(private), Some(public)) => Err(Failure::new(
            CONFIG,
            format!(
                "`{}` is key {}, but `{}` is key {}",
                private_path.display(),
                private.public().id(),
                public_path.display(),
                public.id()
            ),
        )
        .hint("`node.keys` must begin with the public half of `seal.key`")),
        (None, Some(public)) => Err(Failure::new(
            CONFIG,
            format!(
                "the public key {} is there, but its private half `{}` is not",
                public.id(),
                private_path.display()
            ),
        )
        .hint("run this where the sealer runs, or move the public key away to make a new pair")),
        (Some(private), None) => {
            write_public(public_path, &private.public())?;
            Ok(Pair {
                public: private.public(),
                made: false,
            })
        }
        (None, None) => {
            let private = PrivateKey::generate()
                .map_err(|e| Failure::new(70, format!("cannot draw a key: {e}")))?;
            let pem = private
                .to_pem()
                .map_err(|e| Failure::new(70, e.to_string()))?;
            write_new(private_path, &pem, 0o600)?;
            if let Some(owner) = owner {
                give(private_path, owner)?;
            }
            write_public(public_path, &private.public())?;
            Ok(Pair {
                public: private.public(),
                made: true,
            })
        }
    }
}

fn public_path(config: &Config) -> Result<&PathBuf, Failure> {
    (config.node.keys.first()).ok_or_else(|| Failure::new(CONFIG, "`node.keys` names no file"))
}

fn read_public(path: &Path) -> Result<Option<PublicKey>, Failure> {
    match std::fs::read_to_string(path) {
        Ok(pem) => PublicKey::from_pem(&pem)
            .map(Some)
            .map_err(|e| Failure::new(CONFIG, format!("`{}`: {e}", path.display()))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_failure("cannot read the key", path, &e)),
    }
}

fn write_public(path: &Path, key: &PublicKey) -> Result<(), Failure> {
    let pem = key.to_pem().map_err(|e| Failure::new(70, e.to_string()))?;
    write_new(path, &pem, 0o644)
}

/// Writes a file that did not exist, with the mode it is to have from its first byte on.
fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let write = || {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|e| io_failure("cannot write the key", path, &e))
}

fn find_user(name: &str) -> Result<User, Failure> {
    match User::from_name(name) {
        Ok(Some(user)) => Ok(user),
        _ => Err(Failure::new(USAGE, format!("there is no user `{name}`"))),
    }
}

fn give(path: &Path, owner: &User) -> Result<(), Failure> {
    chown(path, Some(owner.uid.as_raw()), Some(owner.gid.as_raw()))
        .map_err(|e| io_failure("cannot give away", path, &e))
}

fn io_failure(what: &str, path: &Path, error: &io::Error) -> Failure {
    let code = match error.kind() {
        io::ErrorKind::PermissionDenied => PERMISSION,
        _ => OTHER,
    };
    Failure::new(code, format!("{what} `{}`: {error}", path.display()))
}
