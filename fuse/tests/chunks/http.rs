//! Bytes by HTTP, from a server that does all that servers do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_fuse::chunks::{ChunkStore, HttpSource, Sealed, Source};

use crate::support::*;

/// A small HTTP server: `faults` for its first answers, then ranges of `file`.
fn http(file: Arc<Vec<u8>>, faults: Vec<&'static str>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/image", listener.local_addr().unwrap());
    let faults = Arc::new(Mutex::new(faults));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (file, faults) = (Arc::clone(&file), Arc::clone(&faults));
            std::thread::spawn(move || answer(stream.unwrap(), &file, &faults));
        }
    });
    url
}

fn answer(stream: TcpStream, file: &[u8], faults: &Mutex<Vec<&'static str>>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let mut stream = stream;
    loop {
        let mut range = None;
        loop {
            let line = lines.next()?.ok()?;
            if line.is_empty() {
                break;
            }
            if line.starts_with("GET /absolute") {
                // A proxy is not told which server it is.
                return None;
            }
            if line == "authorization: Berth-Grant ended" {
                return None;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                let (from, to) = value.split_once('-')?;
                range = Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?));
            }
        }
        let (from, to) = range?;
        let total = file.len();
        let head =
            format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{to}/{total}\r\n");
        let body = &file[from..=to];
        let fault = faults.lock().unwrap().pop();
        match fault {
            Some("busy") => {
                let busy =
                    "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n";
                stream.write_all(busy.as_bytes()).ok()?;
            }
            Some("whole") => {
                let whole = format!("HTTP/1.1 200 OK\r\nContent-Length: {total}\r\n\r\n");
                stream.write_all(whole.as_bytes()).ok()?;
                stream.write_all(file).ok()?;
            }
            Some("short") => {
                write!(stream, "{head}Content-Length: {}\r\n\r\n", body.len()).ok()?;
                stream.write_all(&body[..body.len() / 2]).ok()?;
                return None;
            }
            Some("redirect") => {
                let away = "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n";
                stream.write_all(away.as_bytes()).ok()?;
            }
            Some("other range") => {
                let length = body.len();
                write!(stream, "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-{}/{total}\r\nContent-Length: {length}\r\n\r\n", length - 1).ok()?;
                stream.write_all(&file[..length]).ok()?;
            }
            Some("hang up") => return None,
            _ => {
                write!(stream, "{head}Content-Length: {}\r\n\r\n", body.len()).ok()?;
                stream.write_all(body).ok()?;
            }
        }
    }
}

fn http_store(file: &Arc<Vec<u8>>, sealed: Sealed, source: HttpSource, folder: &Path) {
    let sources = sources(vec![Box::new(source)]);
    let store = ChunkStore::open(sealed, sources, Some(&cache(folder, u64::MAX))).unwrap();
    read_all(&store, file, &sealed, 700_000);
    let given: u64 = store
        .sources()
        .fetched()
        .iter()
        .map(|(_, bytes)| bytes)
        .sum();
    assert_eq!(given, file.len() as u64);
}

#[test]
fn ranges_by_http_survive_all_that_servers_do() {
    let (file, sealed) = sealed_file(96 * BLOCKS_A_CHUNK + 5);
    let faults = vec![
        "short",
        "busy",
        "whole",
        "hang up",
        "redirect",
        "busy",
        "short",
        "other range",
    ];
    let url = http(Arc::clone(&file), faults);
    let dir = tempfile::tempdir().unwrap();
    let source = HttpSource::new(&url, None, None).unwrap();
    http_store(&file, sealed, source, dir.path());
}

#[test]
fn a_later_grant_is_read_with_where_the_first_has_ended() {
    let (file, _) = sealed_file(BLOCKS_A_CHUNK);
    let url = http(Arc::clone(&file), vec![]);
    let source = HttpSource::new(&url, Some("ended"), None).unwrap();
    let first = || {
        let mut bytes = [0; 8];
        let mut stream = source.open(0..8, Duration::from_secs(30)).ok()?;
        stream.read_exact(&mut bytes).ok()?;
        Some(bytes)
    };
    source.renew("http://another/image", "later");
    assert_eq!(first(), None);
    source.renew(&url, "later");
    assert_eq!(first().as_ref().map(|bytes| &bytes[..]), Some(&file[..8]));
}

#[test]
fn a_proxy_is_asked_in_absolute_form() {
    let (file, sealed) = sealed_file(20 * BLOCKS_A_CHUNK);
    // The server that is named does not exist: only the proxy is spoken to.
    let proxy = http(Arc::clone(&file), vec![]).replace("/image", "");
    let dir = tempfile::tempdir().unwrap();
    let at = "http://image.invalid:7/absolute/image";
    let source = HttpSource::new(at, Some("secret"), Some(&proxy)).unwrap();
    assert!(!format!("{source:?}").contains("secret"));
    http_store(&file, sealed, source, dir.path());
    for wrong in ["ftp://x", "http://", "nonsense"] {
        assert!(HttpSource::new(at, None, Some(wrong)).is_err(), "{wrong}");
    }
    assert!(HttpSource::new("file:///x", None, None).is_err());
}

#[test]
fn traces_are_asked_for_and_sent_beside_the_data_with_the_grant() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let mut seen = Vec::new();
        for body in ["{}", ""] {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut head = Vec::new();
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                match line.trim_end() {
                    "" => break,
                    line => head.push(line.to_owned()),
                }
            }
            let length = head.iter().find_map(|line| {
                let (name, value) = line.split_once(": ")?;
                let is_length = name.eq_ignore_ascii_case("content-length");
                is_length.then(|| value.parse::<usize>().unwrap())
            });
            let mut sent = vec![0; length.unwrap_or(0)];
            reader.read_exact(&mut sent).unwrap();
            let mut stream = stream;
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
            )
            .unwrap();
            seen.push((head, String::from_utf8(sent).unwrap()));
        }
        seen
    });
    let at = format!("http://{address}/v1/images/x/data?platform=linux/amd64");
    let source = HttpSource::new(&at, Some("word"), None).unwrap();
    let limit = Duration::from_secs(20);
    assert_eq!(source.trace(limit).as_deref(), Some(&b"{}"[..]));
    assert!(source.send_trace("[1]", limit));
    let seen = server.join().unwrap();
    for ((head, sent), (method, body)) in seen.iter().zip([("GET", ""), ("PUT", "[1]")]) {
        let first = format!("{method} /v1/images/x/trace?platform=linux/amd64 HTTP/1.1");
        assert_eq!((head[0].as_str(), sent.as_str()), (first.as_str(), body));
        let mut lines = head.iter().map(|line| line.to_ascii_lowercase());
        assert!(lines.any(|line| line == "authorization: berth-grant word"));
    }
    // What is not the daemon's has no traces.
    let other = HttpSource::new(&format!("http://{address}/image"), None, None).unwrap();
    assert_eq!(other.trace(limit), None);
}
