//! A site in a temporary folder: configuration, keys, a store, a daemon of a few lines; and `berth` run in it with
//! nothing of the caller's environment.
#![allow(dead_code, reason = "each suite uses its part")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use berth_image::record::{Admission, Conversion, DataFile, RunConfig};
use berth_image::{Digest, ImageRef, Platform, PrivateKey, Record, RefEntry, Store, layout};

pub struct Site {
    pub dir: tempfile::TempDir,
    pub key: PrivateKey,
}

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Site {
    /// A site with key and store, and no daemon.
    pub fn new() -> Self {
        let site = Self {
            dir: tempfile::tempdir().unwrap(),
            key: PrivateKey::generate().unwrap(),
        };
        std::fs::write(site.path("site.pub"), site.key.public().to_pem().unwrap()).unwrap();
        site.configure("");
        Store::init(&site.path("store"), "berthd").unwrap();
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes the configuration; `more` comes first, where keys without a section may stand.
    pub fn configure(&self, more: &str) {
        let path = |name: &str| self.path(name).display().to_string();
        let text = format!(
            "{more}\n[store]\npath = '{}'\n[api]\nsocket = '{}'\n[seal]\nkey = '{}'\n[node]\nkeys = ['{}']\n",
            path("store"),
            path("s"),
            path("site.key"),
            path("site.pub")
        );
        std::fs::write(self.path("berth.toml"), text).unwrap();
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
        command
            .env_clear()
            .env("BERTH_CONFIG", self.path("berth.toml"))
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .args(args);
        command
    }

    pub fn berth(&self, args: &[&str]) -> Said {
        said(self.command(args).output().unwrap())
    }

    /// An image in the store, and the entry of its reference.
    pub fn publish(&self, reference: &str) -> Record {
        let record = record(reference);
        let store = Store::open(&self.path("store"), None, None).unwrap();
        let dir = layout::image_dir(&record.manifest, &record.platform);
        let data = vec![0; usize::try_from(record.file.size).unwrap()];
        store
            .publish_bytes(&dir.join(record.file.name()), &data)
            .unwrap();
        let sealed = record.seal(&self.key).unwrap();
        store
            .publish_bytes(&layout::record(&record.manifest, &record.platform), &sealed)
            .unwrap();
        let entry = RefEntry {
            reference: ImageRef::parse(reference, None).unwrap(),
            top: record.manifest,
            manifests: BTreeMap::from([(record.platform.clone(), record.manifest)]),
            serial: 1,
            resolved_at: record.signed_at,
        };
        store
            .publish_bytes(
                &layout::ref_entry(&entry.reference),
                &entry.seal(&self.key).unwrap(),
            )
            .unwrap();
        record
    }

    pub fn data_file(&self, record: &Record) -> PathBuf {
        let dir = layout::image_dir(&record.manifest, &record.platform);
        self.path("store").join(dir).join(record.file.name())
    }

    /// Serves `answer(request line, body)` on the site's socket, as long as the test runs.
    pub fn daemon(&self, answer: impl Fn(&str, &str) -> String + Send + Sync + 'static) -> Seen {
        let listener = UnixListener::bind(self.path("s")).unwrap();
        let seen = Seen::default();
        let (log, answer) = (seen.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (log, answer) = (log.clone(), answer.clone());
                std::thread::spawn(move || serve(stream, &log, &*answer));
            }
        });
        seen
    }
}

/// The requests that a daemon saw: `METHOD PATH BODY`.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

fn serve(mut stream: UnixStream, log: &Seen, answer: &dyn Fn(&str, &str) -> String) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).unwrap_or(0) == 0 {
            return;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = (head.to_ascii_lowercase().lines())
        .find_map(|l| l.strip_prefix("content-length: ")?.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    let body = String::from_utf8(body).unwrap();
    let line = head
        .lines()
        .next()
        .unwrap()
        .trim_end_matches(" HTTP/1.1")
        .to_owned();
    log.0
        .lock()
        .unwrap()
        .push(format!("{line} {body}").trim_end().to_owned());
    let _ = stream.write_all(answer(&line, &body).as_bytes());
}

pub fn http(status: u16, body: &str) -> String {
    let date = "date: Thu, 01 Jan 2026 00:00:00 GMT";
    format!(
        "HTTP/1.1 {status} X\r\n{date}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub fn error(status: u16, kind: &str, message: &str, hint: &str) -> String {
    let body = serde_json::json!({ "error": { "kind": kind, "message": message, "hint": hint } });
    http(status, &body.to_string())
}

/// Server-sent events, and the end of the stream.
pub fn events(pulls: &[String]) -> String {
    let mut text = String::from("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n");
    for pull in pulls {
        text += &format!("event: progress\ndata: {pull}\n\n");
    }
    text
}

pub fn pull(id: &str, reference: &str, state: &str, record: Option<&Record>) -> String {
    let mut pull = serde_json::json!({
        "id": id, "reference": reference, "platform": "linux/amd64", "state": state,
        "started_at": "2026-01-01T00:00:00Z",
        "bytes_fetched": 512, "bytes_total": 1024, "bytes_converted": 0,
    });
    if let Some(record) = record {
        pull["digest"] = record.manifest.to_string().into();
    }
    pull.to_string()
}

pub fn said(output: Output) -> Said {
    Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn record(name: &str) -> Record {
    let manifest = Digest::of(name.as_bytes());
    Record {
        manifest,
        platform: Platform::host(),
        config: Digest::of(b"config"),
        layers: vec![Digest::of(b"layer")],
        file: DataFile {
            size: 12_288,
            squashfs_size: 4000,
            hash_offset: 4096,
            verity_root: *manifest.as_bytes(),
            verity_salt: [8; 32],
        },
        run: RunConfig {
            env: vec!["PATH=/bin".into(), "EVIL=\x1b[31m".into()],
            ..RunConfig::default()
        },
        conversion: Conversion {
            version: "0.1.0".into(),
            compression: "zstd".into(),
            level: 3,
            block_size: 131_072,
            ownership: "readable".into(),
            keep_setid: false,
            keep_xattrs: vec![],
            entries: 1,
            notes: vec!["left out device dev/null".into()],
        },
        admission: Admission {
            rule: "default".into(),
            reasons: vec![],
        },
        serial: 1,
        signed_at: "2026-01-01T00:00:00Z".parse().unwrap(),
    }
}

pub fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
