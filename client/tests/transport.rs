//! Calls against a server of a few lines: what the wire carries, and how each kind of bad server ends.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use berth_client::api::{ErrorKind, PullRequest, PullState};
use berth_client::{Client, ClientError};
use berth_config::Config;

const PULL: &str = r#"{"id":"p1","reference":"a.b/c:1","platform":"linux/amd64","state":"fetching","started_at":"2026-01-01T00:00:00Z","bytes_fetched":1,"bytes_total":2,"bytes_converted":0}"#;

/// Serves `answers` in turn, one a connection, and hands out the requests it saw.
fn serve(answers: Vec<String>) -> (tempfile::TempDir, PathBuf, mpsc::Receiver<String>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let (send, seen) = mpsc::channel();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            send.send(request(&mut stream)).unwrap();
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    (dir, path, seen)
}

/// One request: head, and the body that its content-length announces.
fn request(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        text.push(byte[0]);
    }
    let head = String::from_utf8(text).unwrap();
    let length = (head.lines())
        .find_map(|l| {
            l.to_ascii_lowercase()
                .strip_prefix("content-length: ")
                .map(str::to_owned)
        })
        .map_or(0, |n| n.parse::<usize>().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    head + &String::from_utf8(body).unwrap()
}

fn http(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn a_pull_is_posted_and_its_answer_read() {
    let (_dir, path, seen) = serve(vec![http("202 Accepted", PULL)]);
    let request = PullRequest {
        reference: "a.b/c:1".into(),
        platform: None,
        fresh: false,
    };
    let pull = Client::unix(&path).pull(&request).unwrap();
    assert_eq!((pull.id.as_str(), pull.state), ("p1", PullState::Fetching));
    let request = seen.recv().unwrap();
    assert!(
        request.starts_with("POST /v1/pulls HTTP/1.1\r\n"),
        "{request}"
    );
    assert!(request.ends_with(r#"{"reference":"a.b/c:1"}"#), "{request}");
    assert!(!request.contains("uthorization"), "{request}");
}

#[test]
fn the_daemons_error_arrives_whole() {
    let body = r#"{"error":{"kind":"unauthorized","message":"the registry a.b refuses user x","hint":"do y"}}"#;
    let (_dir, path, _seen) = serve(vec![http("403 Forbidden", body)]);
    let error = Client::unix(&path).pulls().unwrap_err();
    assert_eq!(error.to_string(), "the registry a.b refuses user x");
    assert_eq!(
        (error.hint().as_deref(), error.exit_code()),
        (Some("do y"), 77)
    );
    assert!(matches!(error, ClientError::Api(b) if b.kind == ErrorKind::Unauthorized));
}

#[test]
fn what_is_not_the_daemon_is_told_as_such() {
    let (_dir, path, _seen) = serve(vec![
        http("502 Bad Gateway", "<html>\x1b[31m"),
        http("200 OK", "[{}]"),
        "SSH-2.0-OpenSSH\r\n".into(),
    ]);
    let client = Client::unix(&path);
    for expected in ["HTTP 502 Bad Gateway <html>\\u{1b}", "missing field", ""] {
        let error = client.pulls().unwrap_err();
        assert!(matches!(error, ClientError::Protocol { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!error.to_string().contains('\x1b'), "{error}");
    }
}

#[test]
fn events_are_followed_to_the_end() {
    let ready = PULL.replace("fetching", "ready");
    let body = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n:hello\n\nevent: progress\ndata: {PULL}\n\nevent: done\ndata: {ready}\n\n"
    );
    let (_dir, path, seen) = serve(vec![body]);
    let states: Vec<PullState> = (Client::unix(&path).events("p1").unwrap())
        .map(|pull| pull.unwrap().state)
        .collect();
    assert_eq!(states, [PullState::Fetching, PullState::Ready]);
    assert!(seen.recv().unwrap().starts_with("GET /v1/pulls/p1/events "));
}

#[test]
fn an_id_chooses_no_other_path() {
    let client = Client::unix(&PathBuf::from("/nonexistent"));
    for id in ["", "../x", "a/b", "a?b", "a b", "a\r\nx"] {
        assert!(matches!(
            client.wait_pull(id, Duration::ZERO),
            Err(ClientError::Protocol { .. })
        ));
    }
}

#[test]
fn nobody_there_and_nobody_answering_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let error = Client::unix(&path).pulls().unwrap_err();
    assert!(
        matches!(error, ClientError::Unreachable { .. }),
        "{error:?}"
    );
    assert!(
        error.to_string().ends_with("no such file or directory"),
        "{error}"
    );

    let _deaf = UnixListener::bind(&path).unwrap();
    let client = Client::unix(&path).within(Duration::from_millis(50));
    let error = client.pulls().unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error:?}");
    assert_eq!(error.exit_code(), 69);
}

#[test]
fn the_socket_comes_first_then_the_url_then_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.api.socket = dir.path().join("s");
    assert!(matches!(
        Client::from_config(&config),
        Err(ClientError::NoAddress { .. })
    ));
    config.api.url = "http://127.0.0.1:9/".into();
    assert_eq!(
        Client::from_config(&config).unwrap().place(),
        "http://127.0.0.1:9/"
    );
    let _socket = UnixListener::bind(&config.api.socket).unwrap();
    let place = config.api.socket.display().to_string();
    assert_eq!(Client::from_config(&config).unwrap().place(), place);
    let places = |config: &Config| -> Vec<String> {
        let each = Client::each_from_config(config).unwrap();
        each.iter().map(|one| one.place().to_owned()).collect()
    };
    // A single URL is that of the socket's daemon, several are other daemons' too.
    assert_eq!(places(&config), [place.as_str()]);
    config.api.url = vec!["http://127.0.0.1:9".into(), "http://127.0.0.1:8".into()].into();
    let all = [&place, "http://127.0.0.1:9", "http://127.0.0.1:8"];
    assert_eq!(places(&config), all);
    std::fs::remove_file(&config.api.socket).unwrap();
    assert_eq!(places(&config), all[1..]);
}

#[test]
fn over_tcp_nothing_is_sent_without_a_credential() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let error = Client::tcp(&url, Some(&PathBuf::from("/nonexistent/munge")))
        .pulls()
        .unwrap_err();
    assert!(matches!(error, ClientError::Munge(_)), "{error:?}");
    assert!(listener.accept().is_err());
}
