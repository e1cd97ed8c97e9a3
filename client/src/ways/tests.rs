//! Daemons of a few lines at Unix sockets, which need no credential.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};

use super::*;

const SOON: Duration = Duration::from_secs(20);
const WELL: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
const MISSING: &str =
    "HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
const OF_PROXY: &str = "HTTP/1.1 502 Bad Gateway\r\ncontent-length: 6\r\n\r\n<html>";
/// No answer: the connection ends.
const BREAKS: &str = "";

struct Site(tempfile::TempDir);

impl Site {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn ways(&self) -> Ways {
        let ways = ["a", "b"].map(|name| Way::unix(&self.socket(name)));
        Ways::new(ways.into()).unwrap()
    }

    /// A daemon that says the same to all; the first lines of what it is asked.
    fn daemon(&self, name: &str, says: &'static str) -> Receiver<String> {
        let listener = UnixListener::bind(self.socket(name)).unwrap();
        let (send, asked) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                if send.send(request(&stream)).is_err() {
                    return;
                }
                stream.write_all(says.as_bytes()).unwrap();
            }
        });
        asked
    }
}

fn request(stream: &UnixStream) -> String {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next().unwrap_or_default();
    lines.find(String::is_empty);
    first
}

/// A socket whose one place in the queue is taken: to connect there takes for ever.
fn full(path: &Path) -> (OwnedFd, UnixStream) {
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    (listener, UnixStream::connect(path).unwrap())
}

fn status(ways: &Ways, ask: &Ask<'_>) -> Result<u16, ClientError> {
    let answer = ways.ask(ask, Some(SOON))?;
    Ok(answer.response.status().as_u16())
}

#[test]
fn who_is_not_there_lets_the_next_be_asked_and_who_answered_is_asked_first() {
    let site = Site::new();
    let second = site.daemon("b", WELL);
    let ways = site.ways();
    for method in ["GET", "DELETE", "PUT"] {
        assert_eq!(status(&ways, &Ask::with(method, "/x", None)).unwrap(), 200);
        assert_eq!(second.recv().unwrap(), format!("{method} /x HTTP/1.1"));
    }
    assert_eq!(ways.first().place(), site.socket("b").to_str().unwrap());
    // It is there again, and has nothing that the other one lacks. All clients of these daemons know.
    let first = site.daemon("a", WELL);
    assert_eq!(status(&site.ways(), &Ask::get("/y")).unwrap(), 200);
    assert_eq!(second.recv().unwrap(), "GET /y HTTP/1.1");
    assert!(first.try_recv().is_err());
    std::fs::remove_file(site.socket("b")).unwrap();
    assert_eq!(status(&ways, &Ask::get("/z")).unwrap(), 200);
    assert_eq!(first.recv().unwrap(), "GET /z HTTP/1.1");
}

#[test]
fn what_may_have_been_done_is_not_asked_for_again_unless_that_does_no_harm() {
    for (method, again) in [
        ("GET", true),
        ("POST", true),
        ("DELETE", false),
        ("PUT", false),
    ] {
        let site = Site::new();
        let (first, second) = (site.daemon("a", BREAKS), site.daemon("b", WELL));
        let body = (method != "GET" && method != "DELETE").then(Vec::new);
        let said = status(&site.ways(), &Ask::with(method, "/x", body));
        assert_eq!(said.is_ok(), again, "{method}: {said:?}");
        assert!(first.recv().unwrap().starts_with(method));
        assert_eq!(second.try_recv().is_ok(), again, "{method}");
    }
}

#[test]
fn an_answer_is_final_but_not_a_proxys() {
    let site = Site::new();
    let (first, second) = (site.daemon("a", MISSING), site.daemon("b", WELL));
    assert_eq!(status(&site.ways(), &Ask::get("/x")).unwrap(), 404);
    assert!(first.recv().is_ok() && second.try_recv().is_err());
    let site = Site::new();
    let (first, second) = (site.daemon("a", OF_PROXY), site.daemon("b", WELL));
    assert_eq!(status(&site.ways(), &Ask::get("/x")).unwrap(), 200);
    assert!(first.recv().is_ok() && second.recv().is_ok());
}

#[test]
fn connecting_leaves_time_for_the_others() {
    let site = Site::new();
    let _full = full(&site.socket("a"));
    let second = site.daemon("b", WELL);
    let limit = Some(Duration::from_secs(2));
    let ways = site.ways();
    let answer = ways.ask(&Ask::with("DELETE", "/x", None), limit).unwrap();
    assert_eq!(answer.response.status(), 200);
    assert!(second.recv().is_ok());
    // However long the call may take.
    let site = Site::new();
    let _full = full(&site.socket("a"));
    let _second = site.daemon("b", WELL);
    let began = Instant::now();
    assert_eq!(status(&site.ways(), &Ask::get("/x")).unwrap(), 200);
    assert!(began.elapsed() < SOON / 2);
}

#[test]
fn one_that_hears_and_says_nothing_is_not_asked_first_again() {
    let site = Site::new();
    let _deaf = UnixListener::bind(site.socket("a")).unwrap();
    let second = site.daemon("b", WELL);
    let ways = site.ways();
    let error = ways.ask(&Ask::get("/x"), Some(Duration::from_millis(200)));
    let error = error.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error:?}");
    assert_eq!(status(&ways, &Ask::get("/y")).unwrap(), 200);
    assert_eq!(second.recv().unwrap(), "GET /y HTTP/1.1");
}

#[test]
fn where_none_answers_each_is_named() {
    let site = Site::new();
    let _deaf = UnixListener::bind(site.socket("b")).unwrap();
    let error = (site
        .ways()
        .ask(&Ask::get("/x"), Some(Duration::from_millis(200))))
    .unwrap_err();
    let text = error.to_string();
    let (a, b) = (site.socket("a"), site.socket("b"));
    let a = format!("cannot reach the daemon at {}: no such file", a.display());
    let b = format!("the daemon at {} did not answer in time", b.display());
    assert!(
        text.starts_with(&format!("no daemon answers: {a}")),
        "{text}"
    );
    assert!(text.ends_with(&b), "{text}");
    assert!(error.is_unavailable() && error.is_timeout());
    assert_eq!(error.exit_code(), 69);
}
