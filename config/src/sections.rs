//! The keys, their meaning and their defaults, section by section.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::policy::Policy;
use crate::urls::Urls;

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub store: Store,
    pub daemon: Daemon,
    pub api: Api,
    pub seal: Seal,
    pub convert: Convert,
    /// The registry that completes names without a host, for example `docker.io`. None by default: then such names
    /// are refused.
    pub default_registry: Option<String>,
    /// What is special about a registry, by `HOST[:PORT]`.
    pub registry: BTreeMap<String, RegistrySite>,
    pub policy: Policy,
    pub node: Node,
}

/// `[store]`: the folder on the parallel filesystem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Store {
    /// The same path on every node. Default `/var/lib/berth/store`.
    pub path: PathBuf,
    /// The name in the store's FORMAT file of the one daemon that may write. Default `berthd`.
    pub owner: String,
}

/// `[daemon]`: the network side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Daemon {
    /// Spool and catalogue, on a local disk. Default `/var/lib/berth/daemon`.
    pub state_dir: PathBuf,
    /// Blobs fetched at a time, over all pulls. Default 8.
    pub parallel_fetches: usize,
    /// Images made at a time; others wait. Default 2.
    pub parallel_conversions: usize,
    /// Seconds that an answer for a tag is used without asking the registry again. Default 60.
    pub tag_ttl_s: u64,
    /// Seconds without a byte after which a transfer is tried again. Default 30.
    pub stall_timeout_s: u64,
    /// Tries of one blob before its pull fails. Default 5.
    pub fetch_attempts: u32,
    /// Seconds that a failure is the answer to everybody who asks for the same, so that the tasks of a large job do
    /// not ask a registry one by one. Default 5.
    pub failure_ttl_s: u64,
    /// Uids besides root that may remove images and see everybody's pulls. Default none.
    pub admin_uids: Vec<u32>,
    /// Bytes of finished layers kept in the spool, for later images that share them. Default 50 GiB.
    pub spool_bytes: u64,
    /// Most seconds that a node reads an image with one grant: no less than the longest job. Nodes ask for a day more than
    /// their job may still run where Slurm tells it (since 23.02), else for this. Default 2678400, 31 days.
    pub grant_s: u64,
    /// `json` or `text`. Default `text`.
    pub log_format: LogFormat,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// `[api]`: where the daemon is reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Api {
    /// Unix socket; who asks is known by peer credentials. Default `/run/berth/berthd.sock`.
    pub socket: PathBuf,
    /// `ADDRESS:PORT` for nodes and login nodes; who asks is known by munge. Not listening by default.
    pub listen: Option<String>,
    /// Where clients on other machines find `listen`, as `http://HOST:PORT`; a list where the site has several daemons, at
    /// most 8, asked in that order. Without it they use the socket.
    #[serde(skip_serializing_if = "Urls::is_empty")]
    pub url: Urls,
    /// munged's socket where it is not the library's default.
    pub munge_socket: Option<PathBuf>,
}

/// `[seal]`: the process that owns the store and holds the key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Seal {
    /// Private key, PKCS#8 PEM, readable by the sealer alone. Default `/etc/berth/keys/site.key`.
    pub key: PathBuf,
    /// Default `/run/berth/seal.sock`.
    pub socket: PathBuf,
    /// Small state of its own (serial, the store's UUID). Default `/var/lib/berth/seal`.
    pub state_dir: PathBuf,
    /// Uids besides its own that may ask for an image to be made: the daemon's. Default none.
    pub allow_uids: Vec<u32>,
    /// Whether `berthd` starts the sealer itself, under its own uid. Sites that give it a uid of its own run
    /// `berthd seal` as a second service and set this to false. Default true.
    pub spawn: bool,
    /// Default: `berth-convert` beside the running program, else `/usr/libexec/berth/berth-convert`.
    pub converter: Option<PathBuf>,
}

/// `[convert]`: how images are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Convert {
    /// `zstd`, `gzip` or `lz4`. Default `zstd`.
    pub compression: Compression,
    /// Of the compressor. Default 3.
    pub level: i32,
    /// Bytes; a power of two from 4 KiB to 1 MiB. Default 131072.
    pub block_size: u32,
    /// `readable` (everything readable by everybody, `a+rX`, owned by root) or `keep`. Default `readable`.
    pub ownership: Ownership,
    /// Keep set-id bits and file capabilities; the mount ignores them all the same. Default false.
    pub keep_setid: bool,
    /// Prefixes of extended attributes that stay. Default `["user."]`.
    pub keep_xattrs: Vec<String>,
    /// Compressor threads; 0 is one a core. Default 0.
    pub threads: usize,
    /// Bytes of buffers a conversion may hold. Default 192 MiB.
    pub memory: u64,
    /// Read every byte of a finished image back before it is signed. Default false.
    pub read_back: bool,
    pub limits: Limits,
}

/// `[convert.limits]`: where a hostile or mistaken image is refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of all layers uncompressed. Default 200 GiB.
    pub max_bytes: u64,
    /// Headers in all layers. Default 20 million.
    pub max_entries: u64,
    /// Uncompressed to compressed size of a layer, once it is past 64 MiB. Default 200.
    pub max_ratio: u64,
}

/// What squashes blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    Zstd,
    Gzip,
    Lz4,
}

/// Whose the files in an image are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ownership {
    Keep,
    Readable,
}

/// `[registry."HOST[:PORT]"]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistrySite {
    /// Speak plain HTTP. Loopback registries are spoken to in HTTP when they do not speak TLS, without this.
    pub plain_http: bool,
    /// PEM file of certificates to trust besides the system's.
    pub ca: Option<PathBuf>,
    /// A file in the form of Docker's `config.json`, or two lines, user and password; readable by the daemon alone.
    pub credentials: Option<PathBuf>,
}

/// `[node]`: what `berth-runtime` does on login and compute nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// Public keys (PEM) whose records are believed; files and folders owned by root. Default
    /// `["/etc/berth/keys/site.pub"]`.
    pub keys: Vec<PathBuf>,
    /// Locks of the runtime, on a local filesystem. Default `/run/berth-node`, a folder that only root can change.
    pub run_dir: PathBuf,
    /// Seconds that a task waits for its image; below the plugin's own `wait=`, which is 600 where plugstack.conf says
    /// nothing. Default 570.
    pub wait_s: u64,
    /// Seconds that `sbatch` waits for the daemon at submit. Default 2.
    pub submit_wait_s: u64,
    /// Bytes of memory for what a `--container-writable` container writes; 0 forbids the option. Default 8 GiB.
    pub writable_bytes: u64,
    /// Whether `--container-mounts` is allowed. Default true.
    pub user_mounts: bool,
    /// Whether a job may name a SquashFS file of its user's own (`--container=/path/my.sqsh`), which nobody sealed or
    /// admitted: Berth's own reader serves it, the kernel's driver never sees it. Default true.
    pub user_images: bool,
    /// Bind the user's home directory. Default true.
    pub home: bool,
    /// How jobs get images: `auto` (the kernel's driver where the store has the file or all of it is on the node, else on
    /// demand), `kernel` or `lazy` (always on demand). Default `auto`.
    pub mount: MountMode,
    /// Folders of the node that every container gets.
    pub binds: Vec<SiteBind>,
    pub slurm: Slurm,
    pub service: NodeService,
}

/// How jobs get images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountMode {
    Auto,
    Kernel,
    Lazy,
}

/// `[node.service]`: `berth-node`, which keeps mounts between jobs and serves images on demand.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeService {
    /// Default `/run/berth-node/node.sock`, in a folder that only root can change. Root's requests go by one of their own
    /// beside it, with `.root` added to the name.
    pub socket: PathBuf,
    /// Seconds that a mount stays after its last job; 0 keeps none. Default 600.
    pub keep_s: u64,
    /// Most mounts kept at a time; the one that was idle longest goes first. Default 16.
    pub keep_images: usize,
    /// Whose rights the process that serves images has: a name or a number, nobody else's. Default `berth-fuse`.
    pub user: String,
    /// Where bytes fetched on demand stay, and root's copies of images of which all was fetched: on a local disk, in folders
    /// that only root can change. Default `/var/cache/berth`.
    pub cache_dir: PathBuf,
    /// Most bytes there, half of them for copies; 0 is a tenth of its filesystem. Default 0.
    pub cache_bytes: u64,
    /// How images are served on demand. Default `filesystem`.
    pub mode: ServeMode,
    /// Seconds for which the first start of an image is recorded, so that later starts fetch first what it read; 0
    /// records none. Default 30.
    pub record_s: u64,
    /// Bytes a second at which the rest of an image is fetched while nobody waits for bytes; 0 fetches only what is
    /// read. Default 0.
    pub fill_bytes_per_s: u64,
    /// An HTTP proxy to fetch by, as `http://HOST:PORT`. None by default.
    pub proxy: Option<String>,
}

/// How images are served on demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServeMode {
    /// Berth's own reader answers for each file.
    Filesystem,
    /// The image is one file served on demand, which the kernel's SquashFS driver mounts.
    Block,
}

/// One of `[[node.binds]]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteBind {
    pub source: PathBuf,
    /// Default: `source`.
    #[serde(default)]
    pub target: Option<PathBuf>,
    #[serde(default)]
    pub read_only: bool,
    /// Go on without it where `source` does not exist.
    #[serde(default)]
    pub optional: bool,
}

/// `[node.slurm]`: Slurm's client inside containers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Slurm {
    /// Bind Slurm's commands, libraries, configuration and the munge socket. Default true.
    pub client: bool,
    /// Where the commands lie. Default `/usr/bin`.
    pub bin_dir: PathBuf,
    /// Plugins and the private library. Default: the first that exists of
    /// `/usr/lib/x86_64-linux-gnu/slurm-wlm`, `/usr/lib64/slurm`, `/usr/lib/slurm`.
    pub lib_dir: Option<PathBuf>,
    /// Default: the folder of `$SLURM_CONF` as slurmd has it, else `/etc/slurm`.
    pub conf_dir: Option<PathBuf>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            path: "/var/lib/berth/store".into(),
            owner: "berthd".into(),
        }
    }
}

impl Default for Daemon {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/berth/daemon".into(),
            parallel_fetches: 8,
            parallel_conversions: 2,
            tag_ttl_s: 60,
            stall_timeout_s: 30,
            fetch_attempts: 5,
            failure_ttl_s: 5,
            admin_uids: Vec::new(),
            spool_bytes: 50 << 30,
            grant_s: 31 * 24 * 3600,
            log_format: LogFormat::Text,
        }
    }
}

impl Default for Api {
    fn default() -> Self {
        Self {
            socket: "/run/berth/berthd.sock".into(),
            listen: None,
            url: Urls::default(),
            munge_socket: None,
        }
    }
}

impl Default for Seal {
    fn default() -> Self {
        Self {
            key: "/etc/berth/keys/site.key".into(),
            socket: "/run/berth/seal.sock".into(),
            state_dir: "/var/lib/berth/seal".into(),
            allow_uids: Vec::new(),
            spawn: true,
            converter: None,
        }
    }
}

impl Default for Convert {
    fn default() -> Self {
        Self {
            compression: Compression::Zstd,
            level: 3,
            block_size: 131_072,
            ownership: Ownership::Readable,
            keep_setid: false,
            keep_xattrs: vec!["user.".into()],
            threads: 0,
            memory: 192 << 20,
            read_back: false,
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_bytes: 200 << 30,
            max_entries: 20_000_000,
            max_ratio: 200,
        }
    }
}

impl Node {
    /// Where a helper of this release is on standby for the plugin, which builds the same name.
    pub fn step_socket(&self) -> PathBuf {
        let name = concat!("step-", env!("CARGO_PKG_VERSION"), ".sock");
        self.run_dir.join(name)
    }
}

impl Default for Node {
    fn default() -> Self {
        Self {
            keys: vec!["/etc/berth/keys/site.pub".into()],
            run_dir: "/run/berth-node".into(),
            wait_s: 570,
            submit_wait_s: 2,
            writable_bytes: 8 << 30,
            user_mounts: true,
            user_images: true,
            home: true,
            mount: MountMode::Auto,
            binds: Vec::new(),
            slurm: Slurm::default(),
            service: NodeService::default(),
        }
    }
}

impl Default for NodeService {
    fn default() -> Self {
        Self {
            socket: "/run/berth-node/node.sock".into(),
            keep_s: 600,
            keep_images: 16,
            user: "berth-fuse".into(),
            cache_dir: "/var/cache/berth".into(),
            cache_bytes: 0,
            mode: ServeMode::Filesystem,
            record_s: 30,
            fill_bytes_per_s: 0,
            proxy: None,
        }
    }
}

impl Default for Slurm {
    fn default() -> Self {
        Self {
            client: true,
            bin_dir: "/usr/bin".into(),
            lib_dir: None,
            conf_dir: None,
        }
    }
}
