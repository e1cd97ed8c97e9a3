//! `berth-fuse node`: serves all images of a node on demand. `berth-node` starts it, without rights of its own, with a
//! socket at descriptor 0 over which images come ([`berth_mount::serving`]).
//!
//! Each image has a thread that opens it and then its session's workers; the cache on disk is one for all. Nothing is
//! kept here that another process could not make again from the same orders: this one may be killed at any moment.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use berth_fuse::block::BlockFs;
use berth_fuse::chunks::{
    Cache, ChunkStore, FileSource, HttpSource, Policy, Sealed, Source, Sources, Stats,
    start_is_over,
};
use berth_fuse::filesystem::FileSystem;
use berth_fuse::fs::ImageFs;
use berth_fuse::meter::{BOUNDS_US, KINDS, Latency};
use berth_fuse::session::{Options, Session};
use berth_fuse::slots;
use berth_mount::keeper::{Source as Origin, decode, encode};
use berth_mount::packets::Packets;
use berth_mount::serving::{Order, Report, Served};
use berth_squashfs::read::{CacheSizes, Caches, Reader};
use clap::Args;

use crate::lazy::parse_root;
use crate::{Failure, Serving, told};

/// How long the keeper may take to read a report.
const SAYING: Duration = Duration::from_secs(20);
/// Between two tries to open an image that an earlier server had open.
const AGAIN: Duration = Duration::from_secs(1);
/// Decoded blocks kept in memory, of all images together: what the kernel's caches do not hold.
const CACHES: CacheSizes = CacheSizes {
    metadata: 24 << 20,
    data: 16 << 20,
};

/// What all images share.
#[derive(Args, Debug)]
pub struct Everything {
    /// Keep what was fetched in this folder.
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
    /// Most bytes to keep there; a tenth of its filesystem without this.
    #[arg(long, value_name = "BYTES")]
    cache_limit: Option<u64>,
    /// Fetch by this HTTP proxy.
    #[arg(long, value_name = "URL")]
    proxy: Option<String>,
    /// Seconds for which the first start of an image without a trace is recorded; 0: none is.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    record: u64,
    /// Fetch the rest of each image as well, at so many bytes a second while no reader waits; 0: it is not.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    fill: u64,
}

struct Mounted {
    store: Arc<ChunkStore>,
    session: Arc<Session>,
}

struct Server {
    link: Packets,
    options: Options,
    proxy: Option<String>,
    cache: Option<Arc<Cache>>,
    /// The cache's folder.
    folder: PathBuf,
    caches: Arc<Caches>,
    beside: Policy,
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// Orders that have not ended.
    orders: usize,
    mounted: BTreeMap<u64, Mounted>,
    /// Newer sources of images than their orders name.
    renewed: BTreeMap<u64, Vec<Origin>>,
    /// What images counted that are not served any more.
    past: Totals,
}

/// Counters of images, added up.
#[derive(Debug, Clone, Default)]
struct Totals {
    stats: Stats,
    wrong: u64,
    fetched: BTreeMap<String, u64>,
    latencies: [Latency; KINDS.len()],
}

/// Serves until the keeper is gone, and what is mounted too.
pub fn run(serving: Serving, node: Everything) -> Result<(), Failure> {
    // Users cannot look into it, or steer it, whatever uid it has.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let link = Packets::new(std::io::stdin().as_fd().try_clone_to_owned()?);
    let cache = match Cache::open(&node.cache, node.cache_limit) {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::error!(error = told(&error), "goes on without a cache");
            None
        }
    };
    let server = Arc::new(Server {
        link,
        options: Options {
            threads: usize::from(serving.threads),
            deadline: serving.deadline(),
            // Jobs of many users read here.
            beside_reader: false,
        },
        proxy: node.proxy,
        cache,
        folder: node.cache,
        caches: Arc::new(Caches::new(CACHES)),
        beside: Policy {
            record: (node.record > 0).then(|| Duration::from_secs(node.record)),
            fill: (node.fill > 0).then_some(node.fill),
        },
        state: Mutex::default(),
        ended: Condvar::new(),
    });
    while let Some(packet) = server.link.receive(None)? {
        match decode::<Order>(&packet.bytes) {
            Ok(Order::Serve(served)) => server.begin(served, packet.descriptors)?,
            Ok(Order::Renew { id, sources }) => server.renew(id, sources),
            Ok(Order::Limit { bytes }) => {
                if let Some(cache) = &server.cache {
                    cache.set_limit(bytes);
                }
            }
            Ok(Order::Copied { id }) => {
                if let Some(mounted) = server.state().mounted.get(&id) {
                    mounted.store.spare();
                }
            }
            Ok(Order::Tell) => server.tell(),
            Err(why) => return Err(why.into()),
        }
    }
    // The keeper is gone. Who reads goes on reading, until another keeper's server takes over or all is unmounted.
    let mut state = server.state();
    while state.orders > 0 {
        state = (server.ended.wait(state)).unwrap_or_else(PoisonError::into_inner);
    }
    Ok(())
}

impl Mounted {
    fn renew(&self, sources: &[Origin]) {
        for source in sources {
            if let Some(grant) = &source.grant {
                self.store.sources().renew(&source.at, grant);
            }
        }
    }
}

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, report: &Report) {
        let said =
            encode(report).and_then(|bytes| self.link.send(&bytes, &[], Instant::now() + SAYING));
        if let Err(error) = said {
            tracing::debug!(%error, "the keeper does not listen");
        }
    }

    fn begin(self: &Arc<Self>, served: Served, descriptors: Vec<OwnedFd>) -> Result<(), Failure> {
        let mut descriptors = descriptors.into_iter();
        let (Some(device), Some(memory)) = (descriptors.next(), descriptors.next()) else {
            return Err("an image without its connection".into());
        };
        let image = descriptors.next();
        self.state().orders += 1;
        let server = Arc::clone(self);
        let thread = std::thread::Builder::new().name(format!("image-{}", served.id));
        thread.spawn(move || {
            let id = served.id;
            if let Err(error) = server.serve(&served, device, &memory, image) {
                let why = told(error.as_ref());
                tracing::error!(digest = served.digest, why, "cannot serve an image");
                server.report(&Report::Failed { id, why });
            }
            let mut state = server.state();
            state.orders -= 1;
            state.renewed.remove(&id);
            drop(state);
            server.ended.notify_all();
        })?;
        Ok(())
    }

    fn renew(&self, id: u64, sources: Vec<Origin>) {
        let mut state = self.state();
        if let Some(mounted) = state.mounted.get(&id) {
            mounted.renew(&sources);
        }
        state.renewed.insert(id, sources);
    }

    /// The life of one image here.
    fn serve(
        self: &Arc<Self>,
        served: &Served,
        device: OwnedFd,
        memory: &OwnedFd,
        image: Option<OwnedFd>,
    ) -> Result<(), Failure> {
        let id = served.id;
        let (store, fs) = loop {
            match self.open(served, image.as_ref()) {
                Ok(opened) => break opened,
                // Readers wait for it, and can be killed meanwhile: nothing was taken from the kernel yet.
                Err(error) if served.taken_over => {
                    tracing::warn!(
                        digest = served.digest,
                        error = told(error.as_ref()),
                        "tries again to open an image"
                    );
                    std::thread::sleep(AGAIN);
                }
                Err(error) => return Err(error),
            }
        };
        let session = Session::new(fs, device, slots::map(memory)?, self.options);
        let mounted = Mounted {
            store: Arc::clone(&store),
            session: Arc::clone(&session),
        };
        let mut state = self.state();
        if let Some(sources) = state.renewed.get(&id) {
            mounted.renew(sources);
        }
        state.mounted.insert(id, mounted);
        drop(state);
        self.report(&Report::Ready { id });
        let tells = Arc::downgrade(self);
        store.when_whole(move || {
            if let Some(server) = tells.upgrade() {
                server.report(&Report::Whole { id });
            }
        });
        drop(store);
        let end = session.run();
        let mut state = self.state();
        if let Some(mounted) = state.mounted.remove(&id) {
            state.past.add(&mounted);
        }
        drop(state);
        if let Err(error) = end {
            tracing::warn!(digest = served.digest, %error, "an image is served no more");
        }
        self.report(&Report::Ended { id });
        Ok(())
    }

    fn open(
        &self,
        served: &Served,
        image: Option<&OwnedFd>,
    ) -> Result<(Arc<ChunkStore>, Arc<dyn FileSystem>), Failure> {
        let sealed = Sealed {
            root: parse_root(&served.verity_root)?.0,
            hash_offset: served.hash_offset,
        };
        let mut sources: Vec<Box<dyn Source>> = Vec::new();
        if let Some(image) = image {
            let file = image.try_clone()?.into();
            sources.push(Box::new(FileSource::new(file, "the image file")));
        }
        let renewed = self.state().renewed.get(&served.id).cloned();
        for source in renewed.as_ref().unwrap_or(&served.sources) {
            let proxy = self.proxy.as_deref();
            match HttpSource::of_daemon(&source.at, source.grant.as_deref(), proxy) {
                Ok(source) => sources.push(Box::new(source)),
                Err(error) => tracing::warn!(source = source.at, %error, "a source is left out"),
            }
        }
        let sources = Sources::new(sources, self.options.deadline * 4 / 5);
        let store = ChunkStore::open(sealed, sources, self.cache.as_ref())?;
        store.follow(self.beside);
        if served.block {
            let fs = BlockFs::new(Arc::clone(&store))?;
            return Ok((store, Arc::new(fs)));
        }
        let reader = Reader::open_in(Arc::clone(&store), Arc::clone(&self.caches))?;
        let fs = Arc::new(ImageFs::new(reader)?);
        if image.is_some() || self.beside.fill.is_some() {
            self.keep_tables(&store, &fs);
        }
        Ok((store, fs))
    }

    /// Keeps an image's tables decoded in a file, once its start is over: a start reads a little of them, which the
    /// caches hold, and is not to wait behind the rest, nor to have it in its trace. For an image that is fetched from
    /// afar as it is read they would be megabytes that nobody asked for: its tables stay in the caches.
    fn keep_tables(&self, store: &Arc<ChunkStore>, fs: &Arc<ImageFs<Arc<ChunkStore>>>) {
        /// One image at a time: each takes a MiB of memory meanwhile.
        static TURN: Mutex<()> = Mutex::new(());
        let (store, fs) = (Arc::downgrade(store), Arc::downgrade(fs));
        let folder = self.folder.clone();
        let start = self.beside.record.unwrap_or_default();
        let thread = std::thread::Builder::new().name("tables".to_owned());
        let started = thread.spawn(move || {
            if !start_is_over(&store, start) {
                return;
            }
            let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(fs) = fs.upgrade() {
                fs.decode_tables(Some(&folder));
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "an image's tables are not kept decoded");
        }
    }

    fn tell(&self) {
        let state = self.state();
        let mut totals = state.past.clone();
        let mut oldest = Duration::ZERO;
        let mut fetched = Vec::with_capacity(state.mounted.len());
        for (id, mounted) in &state.mounted {
            totals.add(mounted);
            oldest = oldest.max(mounted.session.oldest());
            let of_sources = mounted.store.sources().fetched();
            fetched.push((*id, of_sources.iter().map(|(_, bytes)| bytes).sum()));
        }
        drop(state);
        self.report(&Report::Standing {
            oldest_ms: u64::try_from(oldest.as_millis()).unwrap_or(u64::MAX),
            metrics: totals.text(self.cache.as_deref()),
            fetched,
        });
    }
}

impl Totals {
    fn add(&mut self, mounted: &Mounted) {
        let stats = mounted.store.stats();
        self.stats.hits += stats.hits;
        self.stats.misses += stats.misses;
        self.stats.ahead += stats.ahead;
        self.stats.damaged += stats.damaged;
        self.stats.not_kept += stats.not_kept;
        let sources = mounted.store.sources();
        self.wrong += sources.wrong();
        for (name, bytes) in sources.fetched() {
            *self.fetched.entry(kind(&name).to_owned()).or_default() += bytes;
        }
        for (mine, theirs) in self.latencies.iter_mut().zip(mounted.session.latencies()) {
            mine.add(&theirs);
        }
    }

    /// In the Prometheus text format.
    fn text(&self, cache: Option<&Cache>) -> String {
        let mut text = String::new();
        let mut counter = |name: &str, help: &str, rows: &[(String, u64)]| {
            let _ = writeln!(
                text,
                "# HELP berth_node_{name} {help}\n# TYPE berth_node_{name} counter"
            );
            for (labels, value) in rows {
                let _ = writeln!(text, "berth_node_{name}{labels} {value}");
            }
        };
        let one = |value| [(String::new(), value)];
        let stats = &self.stats;
        counter(
            "chunk_hits_total",
            "Reads that found their chunk on this node.",
            &one(stats.hits),
        );
        counter(
            "chunk_misses_total",
            "Chunks fetched while a reader waited.",
            &one(stats.misses),
        );
        counter(
            "chunks_ahead_total",
            "Chunks fetched before anybody asked.",
            &one(stats.ahead),
        );
        counter(
            "chunks_not_kept_total",
            "Chunks that found no room in the cache.",
            &one(stats.not_kept),
        );
        let failures = [
            ("{where=\"cache\"}".to_owned(), stats.damaged),
            ("{where=\"source\"}".to_owned(), self.wrong),
        ];
        counter(
            "verification_failures_total",
            "Chunks that were not what was sealed.",
            &failures,
        );
        let fetched: Vec<_> = (self.fetched.iter())
            .map(|(name, bytes)| (format!("{{source=\"{name}\"}}"), *bytes))
            .collect();
        counter(
            "fetched_bytes_total",
            "Bytes that came from elsewhere.",
            &fetched,
        );
        if let Some(cache) = cache {
            counter(
                "evicted_bytes_total",
                "Bytes thrown out of the cache.",
                &one(cache.evicted()),
            );
            let _ = writeln!(
                text,
                "# HELP berth_node_cache_bytes Bytes in the cache.\n# TYPE berth_node_cache_bytes gauge\nberth_node_cache_bytes {}\n# HELP berth_node_cache_limit_bytes Most bytes in the cache.\n# TYPE berth_node_cache_limit_bytes gauge\nberth_node_cache_limit_bytes {}",
                cache.used(),
                cache.limit()
            );
        }
        let _ = writeln!(
            text,
            "# HELP berth_node_request_seconds How long readers waited.\n# TYPE berth_node_request_seconds histogram"
        );
        for (kind, latency) in KINDS.iter().zip(&self.latencies) {
            let mut sum = 0;
            for (at, count) in latency.buckets.iter().enumerate() {
                sum += count;
                let le = BOUNDS_US
                    .get(at)
                    .map_or("+Inf".to_owned(), |us| (*us as f64 / 1e6).to_string());
                let _ = writeln!(
                    text,
                    "berth_node_request_seconds_bucket{{kind=\"{kind}\",le=\"{le}\"}} {sum}"
                );
            }
            let seconds = latency.sum_us as f64 / 1e6;
            let _ = writeln!(
                text,
                "berth_node_request_seconds_sum{{kind=\"{kind}\"}} {seconds}\nberth_node_request_seconds_count{{kind=\"{kind}\"}} {sum}"
            );
        }
        text
    }
}

/// Sources by kind: a name may hold anything, and there may be many.
fn kind(name: &str) -> &'static str {
    match name {
        name if name.contains("://") => "http",
        name if name.starts_with('/') => "daemon",
        _ => "file",
    }
}
