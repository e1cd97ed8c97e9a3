//! From a configuration to a running daemon, and to its end.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_client::{Munge, MungeError};
use berth_config::Config;
use berth_image::store::StoreError;
use berth_image::{PublicKey, Store};
use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::catalogue::{Bounds, Catalogue, CatalogueError, Present, scan};
use crate::convert::Maker;
use crate::fetch::Fetcher;
use crate::metrics::Metrics;
use crate::pulls::Pulls;
use crate::registry::Registries;
use crate::resolve::Resolver;
use crate::sealer::Sealer;
use crate::serve::{self, App, Serving, SocketError};
use crate::{install_tls, notify};

/// How long requests in flight may take once the daemon was told to end.
const GRACE: Duration = Duration::from_secs(5);
/// How often the catalogue is tidied.
const TIDY: Duration = Duration::from_secs(3600);
const META_STORE: &str = "store-uuid";

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error(
        "`{path}` is another store than this daemon worked with: its UUID is {found}, expected {expected}"
    )]
    OtherStore {
        path: PathBuf,
        found: String,
        expected: String,
    },
    #[error("cannot use `{path}`: {source}")]
    State {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("another daemon works in `{path}`")]
    Locked { path: PathBuf },
    #[error("{0}")]
    Catalogue(#[from] CatalogueError),
    #[error("{0}")]
    Socket(#[from] SocketError),
    #[error("cannot listen on {address}: {source}")]
    Listen {
        address: String,
        source: std::io::Error,
    },
    #[error("api.listen needs munge: {0}")]
    Munge(#[from] MungeError),
    #[error("the sealer cannot run (exit code {0}), its own line says why")]
    Sealer(u8),
    #[error("{0}")]
    Serve(std::io::Error),
}

impl StartError {
    /// The exit code of a daemon that ends with this (docs: README, "Exit codes").
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Store(
                StoreError::Uuid { .. } | StoreError::Owner { .. } | StoreError::Format { .. },
            )
            | Self::OtherStore { .. } => 78,
            Self::Store(_) | Self::Locked { .. } | Self::Socket(SocketError::InUse { .. }) => 69,
            Self::State { .. } | Self::Socket(_) | Self::Listen { .. } | Self::Munge(_) => 78,
            Self::Sealer(code) => *code,
            Self::Catalogue(_) | Self::Serve(_) => 70,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Store(StoreError::NoFormat { .. }) => {
                "mount the filesystem; a new store is made by `berth store init`".into()
            }
            Self::OtherStore { .. } => {
                "if the store was replaced on purpose, give the daemon an empty [daemon] state_dir"
                    .into()
            }
            Self::Munge(_) => "install munge's library, or remove api.listen".into(),
            _ => return None,
        })
    }
}

/// Runs the daemon until `stop`. `config_path` is what a sealer that it starts is given.
///
/// # Errors
/// [`StartError`] before anything was changed outside the state folder, or when serving fails.
pub async fn run(
    config: Config,
    config_path: PathBuf,
    stop: CancellationToken,
) -> Result<(), StartError> {
    let config = Arc::new(config);
    let app = assemble(config.clone()).await?;
    let sealer = app.sealer.clone();
    let unix = serve::listen_unix(&config.api.socket)?;
    let tcp = match &config.api.listen {
        None => None,
        Some(address) => {
            let munge = Arc::new(Munge::load(config.api.munge_socket.as_deref())?);
            let listener = TcpListener::bind(address).await;
            let listener = listener.map_err(|source| StartError::Listen {
                address: address.clone(),
                source,
            })?;
            Some((listener, munge))
        }
    };

    let mut sealer_runs = std::pin::pin!(own_sealer(
        &config,
        sealer.clone(),
        config_path,
        stop.clone()
    ));
    let serving = async {
        let unix = serve::serve_unix(unix, app.clone(), stop.clone());
        match tcp {
            None => unix.await,
            Some((listener, munge)) => {
                let tcp = serve::serve_tcp(listener, app.clone(), munge, stop.clone());
                tokio::try_join!(unix, tcp).map(drop)
            }
        }
    };
    let mut serving = std::pin::pin!(serving);
    let begun = async {
        if let Err(e) = begin(&app).await {
            return StartError::from(e);
        }
        // Without it what is in the store is served all the same: a second daemon on another machine has none.
        let sealed = sealer.ready().await.is_ok();
        notify::ready();
        match sealed {
            true => tracing::info!(socket = %config.api.socket.display(), "ready"),
            false => {
                tracing::error!("the sealer does not answer: nothing can be pulled until it does");
            }
        }
        match tidy(&app).await {}
    };
    let result = tokio::select! {
        biased;
        () = stop.cancelled() => {
            tracing::info!("told to end");
            notify::stopping();
            match tokio::time::timeout(GRACE, &mut serving).await {
                Ok(served) => served.map_err(StartError::Serve),
                Err(_) => Ok(()),
            }
        }
        served = &mut serving => served.map_err(StartError::Serve),
        failed = begun => Err(failed),
        Some(code) = &mut sealer_runs => Err(StartError::Sealer(code)),
    };
    stop.cancel();
    // The socket's file goes before the lock: a daemon that starts now finds nobody there.
    let _ = std::fs::remove_file(&config.api.socket);
    if tokio::time::timeout(GRACE, sealer_runs).await.is_err() {
        tracing::error!("the sealer does not end");
    }
    let _ = tokio::time::timeout(GRACE, app.catalogue.close()).await;
    result
}

/// Opens state and store and puts the parts together. Nothing runs yet.
pub(crate) async fn assemble(config: Arc<Config>) -> Result<Arc<App>, StartError> {
    install_tls();
    let owner = Some(config.store.owner.as_str());
    let store = Arc::new(Store::open(&config.store.path, None, owner)?);
    let state_dir = &config.daemon.state_dir;
    let lock = lock_state(state_dir)?;
    let catalogue = Catalogue::open(state_dir).await?;
    check_same_store(&catalogue, &store).await?;
    let keys = trusted_keys(&config);
    let present = Present::new(catalogue.clone(), store.clone(), keys);
    let metrics = Arc::new(Metrics::default());
    let registries = Arc::new(Registries::new(&config));
    let fetcher = Fetcher::new(&config, registries.clone(), metrics.clone());
    let fetcher = fetcher.map_err(|source| StartError::State {
        path: state_dir.clone(),
        source,
    })?;
    let serving = Serving::open(state_dir).map_err(|source| StartError::State {
        path: state_dir.clone(),
        source,
    })?;
    let resolver = Resolver::new(&config, registries, catalogue.clone(), present.clone());
    let sealer = Sealer::new(&config, &store.format().uuid, metrics.clone());
    let maker = Maker::new(
        &config,
        resolver.clone(),
        fetcher.clone(),
        sealer.clone(),
        (catalogue.clone(), present.clone()),
        metrics.clone(),
    );
    let pulls = Pulls::new(
        &config,
        resolver.clone(),
        maker,
        sealer.clone(),
        (catalogue.clone(), present.clone()),
        metrics.clone(),
    );
    Ok(Arc::new(App {
        config,
        store,
        catalogue,
        present,
        resolver,
        fetcher,
        pulls,
        sealer,
        metrics,
        serving,
        started_at: Timestamp::now(),
        _lock: lock,
    }))
}

/// Brings the catalogue into line with the store, and goes on with what the last daemon left.
pub(crate) async fn begin(app: &App) -> Result<(), CatalogueError> {
    let scanned = scan(&app.catalogue, app.store.clone(), app.present.keys()).await?;
    tracing::info!(
        added = scanned.added,
        removed = scanned.removed,
        refused = scanned.refused,
        references = scanned.references,
        "the store was compared with the catalogue"
    );
    app.fetcher.trim();
    let resumed = app.pulls.resume().await;
    resumed.map_err(|e| CatalogueError::Content(e.message))?;
    Ok(())
}

/// Forgets what is too old or too much, now and then. Never ends.
async fn tidy(app: &App) -> std::convert::Infallible {
    let mut tick = tokio::time::interval(TIDY);
    loop {
        tick.tick().await;
        match app
            .catalogue
            .prune(Timestamp::now(), &Bounds::default())
            .await
        {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "the catalogue forgot what is old"),
            Err(e) => tracing::error!(error = %e, "the catalogue cannot forget what is old"),
        }
    }
}

/// The sealer as our child, where the site wants that and none runs. Ends with its code when it can never run.
async fn own_sealer(
    config: &Config,
    sealer: Sealer,
    config_path: PathBuf,
    stop: CancellationToken,
) -> Option<u8> {
    let code = if config.seal.spawn && sealer.status().await.is_err() {
        sealer.supervise(config_path, stop.clone()).await
    } else {
        None
    };
    if code.is_none() {
        stop.cancelled().await;
    }
    code
}

/// Makes the state folder and locks it. The lock is on a local disk and ends with the process.
fn lock_state(state_dir: &Path) -> Result<File, StartError> {
    let failed = |source| StartError::State {
        path: state_dir.into(),
        source,
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)
        .map_err(failed)?;
    let lock = OpenOptions::new()
        .create(true)
        .append(true)
        .open(state_dir.join("lock"))
        .map_err(failed)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::Locked {
            path: state_dir.into(),
        }),
        Err(e) => Err(failed(e.into())),
    }
}

async fn check_same_store(catalogue: &Catalogue, store: &Store) -> Result<(), StartError> {
    let found = &store.format().uuid;
    match catalogue.meta(META_STORE).await? {
        Some(expected) if expected != *found => Err(StartError::OtherStore {
            path: store.path().into(),
            found: found.escape_default().to_string(),
            expected,
        }),
        Some(_) => Ok(()),
        None => Ok(catalogue.set_meta(META_STORE, found).await?),
    }
}

/// The keys whose records are believed. One that cannot be read is said and left out: then its images are not listed.
fn trusted_keys(config: &Config) -> Vec<PublicKey> {
    let read = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
        PublicKey::from_pem(&text).map_err(|e| e.to_string())
    };
    let mut keys = Vec::new();
    for path in &config.node.keys {
        match read(path) {
            Ok(key) => keys.push(key),
            Err(why) => {
                tracing::error!(path = %path.display(), why, "cannot use a key of node.keys")
            }
        }
    }
    keys
}
