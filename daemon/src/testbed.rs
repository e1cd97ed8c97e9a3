//! For tests: a whole daemon in a temporary folder, with a sealer that reads, checks and signs but converts nothing.

use std::collections::HashMap;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use berth_client::api::{ErrorKind, Pull};
use berth_config::Config;
use berth_image::record::{Admission, Conversion, DataFile, RunConfig};
use berth_image::{Digest, ImageRef, Platform, PrivateKey, Record, RefEntry, Store, layout};
use jiff::Timestamp;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::fetch::{Lane, Spool};
use crate::resolve::manifest::{Document, parse};
use crate::seal::protocol::{Answer, Progress, Request, SealFailure, SealRequest, Sealed, Status};
use crate::serve::App;
use crate::start;

/// What tests wait for at most.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// What the fake sealer did.
#[derive(Debug, Default)]
pub(crate) struct SealerCounts {
    pub sealed: AtomicUsize,
    /// Requests whose connection was closed before the layers were whole.
    pub aborted: AtomicUsize,
    /// Layers whose end was told though they were not whole: must never happen.
    pub lied: AtomicUsize,
    pub refs: Mutex<Vec<String>>,
    /// Bytes read from pipes, and news of them.
    read: Mutex<usize>,
    news: Condvar,
}

impl SealerCounts {
    /// Waits until so many bytes were read.
    pub(crate) fn wait_read(&self, bytes: usize) {
        let read = self.read.lock().unwrap();
        let (read, timeout) = self
            .news
            .wait_timeout_while(read, SOON, |r| *r < bytes)
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "only {} bytes of {bytes} were read",
            *read
        );
    }
}

/// A store, a key, a fake sealer and a configuration. Survives the daemons that run on it.
pub(crate) struct Site {
    pub dir: tempfile::TempDir,
    pub counts: Arc<SealerCounts>,
    more: String,
}

impl Site {
    /// `more` is TOML.
    pub(crate) fn new(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(&dir.path().join("store"), "berthd").unwrap();
        let key = PrivateKey::generate().unwrap();
        std::fs::write(dir.path().join("site.pub"), key.public().to_pem().unwrap()).unwrap();
        let counts = Arc::new(SealerCounts::default());
        let listener = UnixListener::bind(dir.path().join("seal.sock")).unwrap();
        let shared = Arc::new((store, key, counts.clone()));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, shared) = (stream.unwrap(), shared.clone());
                std::thread::spawn(move || answer(stream, &shared.0, &shared.1, &shared.2));
            }
        });
        Self {
            dir,
            counts,
            more: more.into(),
        }
    }

    pub(crate) fn config(&self) -> Config {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let text = format!(
            "[store]\npath = '{}'\n[api]\nsocket = '{}'\n[seal]\nsocket = '{}'\nspawn = false\n[node]\nkeys = ['{}']\n{}",
            path("store"),
            path("api.sock"),
            path("seal.sock"),
            path("site.pub"),
            self.more
        );
        let mut config = Config::parse(&text).unwrap();
        config.daemon.state_dir = self.dir.path().join("state");
        // The registries of tests are in this process.
        config.policy.networks = vec!["127.0.0.0/8".parse().unwrap()];
        if !self.more.contains("failure_ttl_s") {
            config.daemon.failure_ttl_s = 0;
        }
        config
    }

    /// A daemon on this site, without sockets.
    pub(crate) async fn daemon(&self) -> Arc<App> {
        let app = start::assemble(Arc::new(self.config())).await.unwrap();
        start::begin(&app).await.unwrap();
        app
    }

    /// Another one over the same store and sealer, with a state of its own.
    pub(crate) async fn second_daemon(&self) -> Arc<App> {
        let mut config = self.config();
        config.daemon.state_dir = self.dir.path().join("state-2");
        let app = start::assemble(Arc::new(config)).await.unwrap();
        start::begin(&app).await.unwrap();
        app
    }

    pub(crate) fn spool(&self, digest: &Digest) -> PathBuf {
        self.dir
            .path()
            .join("state/spool/sha256")
            .join(digest.hex())
    }

    /// Where what `registry` sends is gathered.
    pub(crate) fn part(&self, digest: &Digest, registry: &str) -> PathBuf {
        let spool = Spool::open(&self.dir.path().join("state")).unwrap();
        spool.part_path(digest, &Lane::shared(registry))
    }
}

pub(crate) fn reference(host: &str, rest: &str) -> ImageRef {
    ImageRef::parse(&format!("{host}/{rest}"), None).unwrap()
}

/// Pulls and waits for the end.
pub(crate) async fn pull(app: &App, reference: &ImageRef) -> Pull {
    let entry = (app.pulls)
        .start(reference, &Platform::host(), 1000, false)
        .await
        .unwrap();
    let mut news = entry.news();
    let ended = news.wait_for(|p| p.state.is_final());
    tokio::time::timeout(SOON, ended)
        .await
        .unwrap()
        .unwrap()
        .clone()
}

fn answer(mut stream: UnixStream, store: &Store, key: &PrivateKey, counts: &SealerCounts) {
    let mut length = [0; 4];
    if stream.read_exact(&mut length).is_err() {
        return;
    }
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut body).unwrap();
    let answer = match serde_json::from_slice(&body).unwrap() {
        Request::Status {} => Answer::Status(Status {
            version: "test".into(),
            store_uuid: store.format().uuid.clone(),
            key_id: key.public().id().hex(),
            conversions: 0,
        }),
        Request::Ref(r) => {
            let text = format!("{} {}", r.reference, r.manifest);
            counts.refs.lock().unwrap().push(text);
            let entry = RefEntry {
                reference: r.reference.clone(),
                top: r.top,
                manifests: [(r.platform, r.manifest)].into(),
                serial: 1,
                resolved_at: r.resolved_at,
            };
            store
                .publish_bytes(&layout::ref_entry(&r.reference), &entry.seal(key).unwrap())
                .unwrap();
            Answer::RefWritten { serial: 1 }
        }
        Request::Remove { manifest, platform } => Answer::Removed {
            existed: store.remove_image(&manifest, &platform).unwrap(),
        },
        Request::EmptyTrash {} => Answer::TrashEmptied { removed: 0 },
        Request::Seal(request) => match seal(&mut stream, &request, store, key, counts) {
            Some(answer) => answer,
            None => return,
        },
    };
    send(&mut stream, &answer);
}

fn send(stream: &mut UnixStream, answer: &Answer) {
    let body = serde_json::to_vec(answer).unwrap();
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend(body);
    // A daemon that ended meanwhile hears nothing.
    let _ = stream.write_all(&frame);
}

fn seal(
    stream: &mut UnixStream,
    request: &SealRequest,
    store: &Store,
    key: &PrivateKey,
    counts: &SealerCounts,
) -> Option<Answer> {
    let manifest = request.manifest.as_bytes();
    assert_eq!(Digest::of(manifest), request.manifest_digest);
    let Ok(Document::Image(image)) = parse(request.manifest_digest, manifest) else {
        panic!("not a manifest");
    };
    assert_eq!(Digest::of(request.config.as_bytes()), image.config.digest);
    let mut pipes = receive(stream, image.layers.len());
    let mut total = 0;
    // The top layer first, as the converter does.
    for (layer, pipe) in image.layers.iter().zip(&mut pipes).rev() {
        let mut bytes = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match pipe.read(&mut buffer).unwrap() {
                0 => break,
                n => {
                    bytes.extend_from_slice(&buffer[..n]);
                    total += n;
                    *counts.read.lock().unwrap() += n;
                    counts.news.notify_all();
                    let news = Progress {
                        bytes_in: total as u64,
                        ..Progress::default()
                    };
                    send(stream, &Answer::Progress(news));
                }
            }
        }
        if Digest::of(&bytes) != layer.digest {
            stream.set_nonblocking(true).unwrap();
            // Unread progress makes a reset of an orderly end.
            let closed = match stream.read(&mut [0]) {
                Ok(n) => n == 0,
                Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
            };
            let count = if closed {
                &counts.aborted
            } else {
                &counts.lied
            };
            count.fetch_add(1, Ordering::SeqCst);
            return None;
        }
    }
    if request.config.contains("no good") {
        return Some(Answer::Error(SealFailure::new(
            ErrorKind::CorruptLayer,
            "no good",
        )));
    }
    counts.sealed.fetch_add(1, Ordering::SeqCst);
    let record = record(
        request,
        &image.layers.iter().map(|l| l.digest).collect::<Vec<_>>(),
    );
    let dir = layout::image_dir(&record.manifest, &record.platform);
    store
        .publish_bytes(&dir.join(record.file.name()), &[7; 8192])
        .unwrap();
    store
        .publish_bytes(&dir.join(layout::RECORD), &record.seal(key).unwrap())
        .unwrap();
    Some(Answer::Sealed(Box::new(Sealed {
        path: store.path().join(dir).join(record.file.name()),
        record,
        existing: false,
    })))
}

fn receive(stream: &UnixStream, wanted: usize) -> Vec<std::fs::File> {
    let mut pipes: Vec<std::fs::File> = Vec::new();
    while pipes.len() < wanted {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            flags,
        )
        .unwrap();
        assert_eq!(got.bytes, 1);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                pipes.extend(fds.map(|fd: OwnedFd| std::fs::File::from(fd)));
            }
        }
    }
    pipes
}

fn record(request: &SealRequest, layers: &[Digest]) -> Record {
    Record {
        manifest: request.manifest_digest,
        platform: request.platform.clone(),
        config: Digest::of(request.config.as_bytes()),
        layers: layers.to_vec(),
        file: DataFile {
            size: 8192,
            squashfs_size: 4096,
            hash_offset: 4096,
            verity_root: *request.manifest_digest.as_bytes(),
            verity_salt: [0; 32],
        },
        run: RunConfig::default(),
        conversion: Conversion {
            version: "test".into(),
            compression: "zstd".into(),
            level: 3,
            block_size: 131_072,
            ownership: "readable".into(),
            keep_setid: false,
            keep_xattrs: Vec::new(),
            entries: 0,
            notes: Vec::new(),
        },
        admission: Admission {
            rule: request.admission.rule.clone(),
            reasons: Vec::new(),
        },
        serial: 1,
        signed_at: Timestamp::now(),
    }
}

/// How often each blob was asked for.
pub(crate) fn blob_gets(
    registry: &crate::registry::testing::TestRegistry,
) -> HashMap<String, usize> {
    let mut gets = HashMap::new();
    for seen in registry.seen() {
        if seen.method == "GET"
            && let Some((_, digest)) = seen.path.split_once("/blobs/")
        {
            *gets.entry(digest.to_owned()).or_default() += 1;
        }
    }
    gets
}

/// Waits until `path` exists and has at least `bytes`.
pub(crate) async fn wait_file(path: &Path, bytes: u64) {
    let there = async {
        while !std::fs::metadata(path).is_ok_and(|m| m.len() >= bytes) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, there).await.unwrap();
}
