//! What the sealer has for as long as it runs: store, key, state, and which images are being made.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use berth_config::Config;
use berth_image::key::KeyError;
use berth_image::store::StoreError;
use berth_image::{Digest, Platform, PrivateKey, PublicKey, Store};

use super::converter;
use super::state::State;

/// Everything a request needs.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) config: Config,
    pub(super) store: Store,
    pub(super) state: State,
    pub(super) key: PrivateKey,
    /// Our key and those of the nodes: whose records count as good.
    pub(super) trusted: Vec<PublicKey>,
    pub(super) converter: PathBuf,
    work: Work,
}

/// Why the sealer cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SealerError {
    #[error("cannot read the key `{path}`: {source}")]
    ReadKey {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the key `{path}` cannot be used: {source}")]
    Key { path: PathBuf, source: KeyError },
    #[error("the key `{path}` can be read by others (mode {mode:04o})")]
    KeyMode { path: PathBuf, mode: u32 },
    #[error("cannot use seal.state_dir `{path}`: {source}")]
    State {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot write to the store `{path}`: {source}")]
    Sweep {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot listen on `{path}`: {source}")]
    Listen {
        path: PathBuf,
        source: std::io::Error,
    },
}

impl SealerError {
    /// The exit code of `berthd seal`.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::ReadKey { source, .. } | Self::Listen { source, .. }
                if source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                77
            }
            Self::ReadKey { .. } | Self::Key { .. } | Self::KeyMode { .. } => 78,
            Self::State { .. } | Self::Store(_) | Self::Sweep { .. } | Self::Listen { .. } => 69,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::ReadKey { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Some("`berth key init` makes a key pair".into())
            }
            Self::KeyMode { path, .. } => Some(format!("chmod 600 {}", path.display())),
            Self::Store(StoreError::NoFormat { .. }) => {
                Some("mount the file system, or make a new store with `berth store init`".into())
            }
            _ => None,
        }
    }
}

impl Site {
    /// Opens everything, and sweeps the store of what an interrupted run left.
    pub(super) fn open(config: &Config) -> Result<Self, SealerError> {
        let key = read_key(&config.seal.key)?;
        let mut trusted = vec![key.public()];
        // Keys that only sign for the nodes' eyes; a machine without them has its own.
        trusted.extend(
            config
                .node
                .keys
                .iter()
                .filter_map(|path| PublicKey::from_pem(&std::fs::read_to_string(path).ok()?).ok()),
        );
        let state_error = |source| SealerError::State {
            path: config.seal.state_dir.clone(),
            source,
        };
        let state = State::open(&config.seal.state_dir).map_err(state_error)?;
        let uuid = state.store_uuid().map_err(state_error)?;
        let store = Store::open(
            &config.store.path,
            uuid.as_deref(),
            Some(&config.store.owner),
        )?;
        state.adopt(&store, &trusted).map_err(state_error)?;
        let (temps, halves) = store.sweep().map_err(|source| SealerError::Sweep {
            path: config.store.path.clone(),
            source,
        })?;
        if temps + halves > 0 {
            tracing::info!(temps, halves, "removed what an interrupted run left");
        }
        Ok(Self {
            converter: converter::program(config.seal.converter.as_deref()),
            work: Work::new(config.daemon.parallel_conversions),
            config: config.clone(),
            store,
            state,
            key,
            trusted,
        })
    }

    pub(super) fn work(&self) -> &Work {
        &self.work
    }
}

fn read_key(path: &std::path::Path) -> Result<PrivateKey, SealerError> {
    use std::os::unix::fs::PermissionsExt as _;
    let read = |source| SealerError::ReadKey {
        path: path.to_owned(),
        source,
    };
    let mode = std::fs::metadata(path).map_err(read)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(SealerError::KeyMode {
            path: path.to_owned(),
            mode,
        });
    }
    let pem = std::fs::read_to_string(path).map_err(read)?;
    PrivateKey::from_pem(&pem).map_err(|source| SealerError::Key {
        path: path.to_owned(),
        source,
    })
}

/// Which images are being worked on: one request at a time for each, and a bounded number of conversions.
#[derive(Debug)]
pub(super) struct Work {
    most: usize,
    busy: Mutex<Busy>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Busy {
    images: HashSet<(Digest, Platform)>,
    conversions: usize,
}

/// An image that is ours until this is dropped.
#[derive(Debug)]
pub(super) struct Claim<'w> {
    work: &'w Work,
    image: (Digest, Platform),
    conversion: bool,
}

impl Work {
    fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            busy: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn conversions(&self) -> usize {
        self.busy().conversions
    }

    /// Waits until nobody else works on the image. `wanted` is asked now and then; `None` when it says no.
    pub(super) fn claim(
        &self,
        manifest: Digest,
        platform: &Platform,
        wanted: impl Fn() -> bool,
    ) -> Option<Claim<'_>> {
        let image = (manifest, platform.clone());
        let mut busy = self.busy();
        while busy.images.contains(&image) {
            busy = self.wait(busy, &wanted)?;
        }
        busy.images.insert(image.clone());
        Some(Claim {
            work: self,
            image,
            conversion: false,
        })
    }

    fn wait<'b>(
        &'b self,
        busy: std::sync::MutexGuard<'b, Busy>,
        wanted: &impl Fn() -> bool,
    ) -> Option<std::sync::MutexGuard<'b, Busy>> {
        const LOOK: Duration = Duration::from_millis(500);
        let waited = self.changed.wait_timeout(busy, LOOK);
        let (busy, _) = waited.unwrap_or_else(PoisonError::into_inner);
        wanted().then_some(busy)
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, Busy> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim<'_> {
    /// Waits until one more conversion may run; `false` when it is not wanted any more.
    pub(super) fn begin_conversion(&mut self, wanted: impl Fn() -> bool) -> bool {
        let mut busy = self.work.busy();
        while busy.conversions >= self.work.most {
            match self.work.wait(busy, &wanted) {
                Some(guard) => busy = guard,
                None => return false,
            }
        }
        busy.conversions += 1;
        self.conversion = true;
        true
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut busy = self.work.busy();
        busy.images.remove(&self.image);
        busy.conversions -= usize::from(self.conversion);
        drop(busy);
        self.work.changed.notify_all();
    }
}
