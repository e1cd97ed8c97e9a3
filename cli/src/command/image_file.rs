//! The image that a command line names, as bytes to be served: an image of the store's, pulled first where needed, or
//! a SquashFS file of the user's own. Where the store is not on this machine, the daemon gives the bytes as they are
//! read, or several do; each byte is checked against the signed record.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use berth_client::api::PullRequest;
use berth_image::digest::hex;
use berth_image::{Digest, Platform, Record, layout};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};

use crate::command::{follow, path};
use crate::context::{self, Context};
use crate::error::{Failure, OTHER, PERMISSION, USAGE};
use crate::local::{self, Wanted};
use crate::progress::Display;

/// Most bytes that images fetched on demand take in a user's cache folder.
const CACHE_BYTES: u64 = 8 << 30;

/// An image, found.
pub struct ImageFile {
    /// For messages.
    pub name: String,
    pub bytes: Bytes,
    /// What is signed about it; none for a file of the user's own.
    pub record: Option<Record>,
}

/// Where its bytes are.
pub enum Bytes {
    /// A file, opened with the rights of whoever runs this.
    File { path: PathBuf, file: OwnedFd },
    /// The daemons'.
    Daemon {
        /// Options of `berth-fuse`.
        options: Vec<OsString>,
        /// For its environment: each daemon's own.
        grant: String,
    },
}

/// Opens what `text` names. A path is what starts with `/`, `./` or `../`.
pub fn open_image(
    context: &Context,
    text: &str,
    platform: Option<Platform>,
) -> Result<ImageFile, Failure> {
    let is_path = ["/", "./", "../"].iter().any(|s| text.starts_with(s));
    let store = &context.config.store.path;
    let (path, record) = if is_path && layout::parse_data_path(store, Path::new(text)).is_none() {
        (PathBuf::from(text), None)
    } else if store.join(layout::FORMAT).exists() {
        let found = path::find(context, text, platform).map_err(|f| or_a_file(f, text))?;
        (found.path, Some(found.record))
    } else {
        return on_demand(context, text, platform).map_err(|f| or_a_file(f, text));
    };
    let file = open_file(&path)?;
    Ok(ImageFile {
        name: text.to_owned(),
        bytes: Bytes::File { path, file },
        record,
    })
}

/// A hint for those who meant a file in the current folder.
fn or_a_file(failure: Failure, text: &str) -> Failure {
    match failure.code == USAGE && Path::new(text).is_file() {
        true => failure.hint(format!("for the file in this folder write ./{text}")),
        false => failure,
    }
}

fn open_file(path: &Path) -> Result<OwnedFd, Failure> {
    let shown = path.display();
    // Without waiting for anybody, should it be a FIFO.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let file = open(path, flags, Mode::empty()).map_err(|e| {
        let code = match e {
            nix::errno::Errno::EACCES | nix::errno::Errno::EPERM => PERMISSION,
            _ => OTHER,
        };
        let why = e.desc().to_lowercase();
        Failure::new(code, format!("cannot open the image `{shown}`: {why}"))
    })?;
    let kind = fstat(&file).map(|s| SFlag::from_bits_truncate(s.st_mode) & SFlag::S_IFMT);
    match kind {
        Ok(SFlag::S_IFREG) => Ok(file),
        _ => Err(Failure::new(USAGE, format!("`{shown}` is not a file"))
            .hint("give a reference (docker://…) or a SquashFS file")),
    }
}

/// An image whose bytes the daemon gives. Its word is taken for nothing: the record must be signed by a key that this
/// machine trusts, and says what each byte must be.
fn on_demand(
    context: &Context,
    text: &str,
    platform: Option<Platform>,
) -> Result<ImageFile, Failure> {
    let nonsense = |what: String| Failure::new(70, format!("the daemon sent no {what}"));
    let client = context.client()?;
    let wanted = Wanted::parse(text, context)?;
    let (digest, platform) = match wanted {
        Wanted::Reference(_) => {
            let request = PullRequest {
                reference: text.to_owned(),
                platform: platform.as_ref().map(ToString::to_string),
                fresh: false,
            };
            let pull = follow::one(&client, &request, &Display::new(context))?;
            let digest = pull.digest.and_then(|d| d.parse::<Digest>().ok());
            let digest = digest.ok_or_else(|| nonsense("digest".into()))?;
            (digest, context::platform(platform))
        }
        Wanted::Digest(digest, named) => (digest, context::platform(platform.or(named))),
        Wanted::Digits(_) => {
            return Err(Failure::new(USAGE, "a shortened digest is not enough here")
                .hint("the store is not on this machine: give a reference, or the whole digest"));
        }
    };
    let signed = client.record(&digest, &platform)?;
    let keys = local::keys(&context.config)?;
    let (record, _) = Record::open(&signed, &keys, &digest, &platform).map_err(|e| {
        Failure::new(
            PERMISSION,
            format!("the record of `{text}` is not to be trusted: {e}"),
        )
        .hint("the site's public key must be in `node.keys` here")
    })?;
    let granted = berth_runtime::granted(&context.config, &digest, &platform)?;
    let (sources, grants): (Vec<_>, Vec<_>) = granted.into_iter().unzip();
    Ok(ImageFile {
        name: text.to_owned(),
        bytes: Bytes::Daemon {
            options: options(&record, &sources, cache_folder()),
            grant: grants.join(" "),
        },
        record: Some(record),
    })
}

/// Options of `berth-fuse` for what is to be checked against a record.
pub fn sealed_as(record: &Record) -> [OsString; 2] {
    let file = &record.file;
    [
        format!("--verity-root={}", hex(&file.verity_root)).into(),
        format!("--hash-offset={}", file.hash_offset).into(),
    ]
}

fn options(record: &Record, sources: &[String], cache: Option<PathBuf>) -> Vec<OsString> {
    let mut options = sealed_as(record).to_vec();
    let sources = sources
        .iter()
        .map(|source| format!("--from={source}").into());
    options.extend(sources);
    if let Some(folder) = cache {
        let mut cache = OsString::from("--cache=");
        cache.push(folder);
        options.extend([cache, format!("--cache-limit={CACHE_BYTES}").into()]);
    }
    options
}

/// A folder that is the user's alone; without one nothing is kept.
fn cache_folder() -> Option<PathBuf> {
    let given = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let base = given.filter(|path| path.is_absolute()).or_else(home)?;
    let folder = base.join("berth");
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(&folder).ok().map(|()| folder)
}
