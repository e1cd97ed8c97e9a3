//! Several daemons with an image, each with grants of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_fuse::chunks::{CHUNK, ChunkStore, HttpSource, Source};
use berth_squashfs::read::ReadAt;

use crate::support::*;

const LIMIT: Duration = Duration::from_secs(20);

/// A daemon that gives bytes, and keeps a trace, for who shows its own grant.
struct Daemon {
    at: String,
    grant: String,
    state: Arc<State>,
}

struct State {
    file: Arc<Vec<u8>>,
    /// It hangs up on everybody.
    gone: AtomicBool,
    /// Requests, also those that were refused.
    asked: AtomicUsize,
    trace: Mutex<Option<String>>,
}

impl Daemon {
    fn start(name: &str, file: &Arc<Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = format!("http://{}/x/data", listener.local_addr().unwrap());
        let state = Arc::new(State {
            file: Arc::clone(file),
            gone: AtomicBool::default(),
            asked: AtomicUsize::default(),
            trace: Mutex::default(),
        });
        let (served, header) = (Arc::clone(&state), format!("Berth-Grant {name}"));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (served, header) = (Arc::clone(&served), header.clone());
                std::thread::spawn(move || serve(&served, &header, stream.unwrap()));
            }
        });
        let grant = name.to_owned();
        Self { at, grant, state }
    }

    fn source(&self, grant: Option<&str>) -> Box<dyn Source> {
        Box::new(HttpSource::of_daemon(&self.at, grant, None).unwrap())
    }

    fn granted(&self) -> Box<dyn Source> {
        self.source(Some(&self.grant))
    }

    fn go(&self, gone: bool) {
        self.state.gone.store(gone, Ordering::SeqCst);
    }

    fn asked(&self) -> usize {
        self.state.asked.load(Ordering::SeqCst)
    }

    fn trace(&self) -> Option<String> {
        self.state.trace.lock().unwrap().clone()
    }
}

fn serve(state: &State, grant: &str, mut stream: TcpStream) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let (mut first, mut range, mut granted, mut length) = (String::new(), None, false, 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            let line = line.trim_end();
            match line.split_once(": ") {
                _ if line.is_empty() => break,
                None => first = line.to_owned(),
                Some((name, value)) => match name.to_ascii_lowercase().as_str() {
                    "authorization" => granted = value == grant,
                    "content-length" => length = value.parse().ok()?,
                    "range" => {
                        let (from, to) = value.strip_prefix("bytes=")?.split_once('-')?;
                        range = Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?));
                    }
                    _ => {}
                },
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        state.asked.fetch_add(1, Ordering::SeqCst);
        if state.gone.load(Ordering::SeqCst) {
            return None;
        }
        let (head, body) = match (range, first.split(' ').next()?) {
            _ if !granted => ("HTTP/1.1 401 Unauthorized".to_owned(), Vec::new()),
            (Some((from, to)), _) => {
                let head = "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes";
                let total = state.file.len();
                (
                    format!("{head} {from}-{to}/{total}"),
                    state.file[from..=to].to_vec(),
                )
            }
            (None, "PUT") => {
                *state.trace.lock().unwrap() = Some(String::from_utf8(body).unwrap());
                ("HTTP/1.1 200 OK".to_owned(), Vec::new())
            }
            (None, _) => match state.trace.lock().unwrap().clone() {
                Some(trace) => ("HTTP/1.1 200 OK".to_owned(), trace.into_bytes()),
                None => ("HTTP/1.1 404 Not Found".to_owned(), Vec::new()),
            },
        };
        write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n", body.len()).ok()?;
        stream.write_all(&body).ok()?;
    }
}

fn read(store: &ChunkStore, file: &[u8], chunk: u64) {
    let at = chunk * CHUNK;
    let mut buf = [0; 8];
    store.read_exact_at(&mut buf, at).unwrap();
    assert_eq!(buf, file[at as usize..][..8], "chunk {chunk}");
}

#[test]
fn each_daemon_is_read_with_its_own_grant_and_one_goes_on_for_another() {
    let (file, sealed) = sealed_file(64 * BLOCKS_A_CHUNK);
    let daemons = ["a", "b"].map(|name| Daemon::start(name, &file));
    let all = daemons.iter().map(Daemon::granted).collect();
    let store = ChunkStore::open(sealed, sources(all), None).unwrap();
    read(&store, &file, 0);
    assert_eq!(daemons[1].asked(), 0, "the first one is asked first");
    daemons[0].go(true);
    read(&store, &file, 20);
    assert!(daemons[1].asked() > 0);
    // It comes back while the other one goes.
    daemons[0].go(false);
    daemons[1].go(true);
    let before = daemons[0].asked();
    read(&store, &file, 40);
    assert!(daemons[0].asked() > before);
}

#[test]
fn a_daemon_without_a_grant_is_asked_for_nothing_until_a_later_job_brings_one() {
    let (file, sealed) = sealed_file(64 * BLOCKS_A_CHUNK);
    let [late, first] = ["late", "first"].map(|name| Daemon::start(name, &file));
    let all = vec![late.source(None), first.granted()];
    let store = ChunkStore::open(sealed, sources(all), None).unwrap();
    read(&store, &file, 0);
    assert_eq!(store.sources().trace(LIMIT), None);
    assert!(first.asked() > 0);
    assert_eq!(late.asked(), 0);
    // A grant of the one is none of the other's.
    store.sources().renew(&late.at, &late.grant);
    first.go(true);
    read(&store, &file, 20);
    assert!(late.asked() > 0);
    // Where nobody has granted anything there is no source, and nobody waits for one.
    let none = sources(vec![late.source(None)]);
    let began = std::time::Instant::now();
    assert!(ChunkStore::open(sealed, none, None).is_err());
    assert!(began.elapsed() < LIMIT / 2);
}

#[test]
fn traces_go_to_every_daemon_and_come_from_the_first_that_has_one() {
    let (file, _) = sealed_file(BLOCKS_A_CHUNK);
    let daemons = ["a", "b", "c"].map(|name| Daemon::start(name, &file));
    let [a, b, c] = &daemons;
    let all = sources(vec![a.granted(), b.granted(), c.source(None)]);
    a.go(true);
    assert!(all.send_trace("[1]", LIMIT));
    assert_eq!(b.trace().as_deref(), Some("[1]"));
    assert_eq!((a.trace(), c.asked()), (None, 0));
    assert_eq!(all.trace(LIMIT).as_deref(), Some(&b"[1]"[..]));
    a.go(false);
    // It has none, and the next one does.
    assert_eq!(all.trace(LIMIT).as_deref(), Some(&b"[1]"[..]));
    assert!(all.send_trace("[2]", LIMIT));
    assert_eq!(a.trace().as_deref(), Some("[2]"));
    a.go(true);
    b.go(true);
    assert!(!all.send_trace("[3]", LIMIT));
}
