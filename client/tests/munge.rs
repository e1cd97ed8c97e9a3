//! Credentials against a real munged of our own. Needs munged and libmunge; CI=true makes their absence a failure.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use berth_client::{Client, Munge, MungeError, request_payload};
use berth_config::Config;

struct Munged {
    child: Child,
    dir: tempfile::TempDir,
}

impl Munged {
    fn start() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        // munged wants the way to its socket open to everybody, and its other files closed.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir(path("p")).unwrap();
        std::fs::set_permissions(path("p"), std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(path("p/key"), [7u8; 128]).unwrap();
        std::fs::set_permissions(path("p/key"), std::fs::Permissions::from_mode(0o600)).unwrap();
        let option = |name: &str, file: &str| format!("--{name}={}", path(file).display());
        let child = Command::new("munged")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .args(["--foreground", "--force"])
            .arg(option("socket", "s"))
            .arg(option("key-file", "p/key"))
            .arg(option("log-file", "p/log"))
            .arg(option("pid-file", "p/pid"))
            .arg(option("seed-file", "p/seed"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            assert!(
                std::env::var_os("CI").is_none(),
                "munged is not installed, and CI leaves nothing out"
            );
            eprintln!("left out: munged is not installed");
            return None;
        };
        // It says on stderr that it started once its socket is there; the end of stderr is its own end.
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            if path("s").exists() {
                break;
            }
            eprintln!("{line}");
        }
        let munged = Self { child, dir };
        while !munged.socket().exists() {
            assert!(munged.running(), "munged ended");
            std::thread::yield_now();
        }
        Some(munged)
    }

    fn running(&self) -> bool {
        Path::new(&format!("/proc/{}/exe", self.child.id())).exists()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }
}

impl Drop for Munged {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_credential_says_who_and_is_good_once() {
    let Some(munged) = Munged::start() else {
        return;
    };
    let munge = Munge::load(Some(&munged.socket())).unwrap();
    let credential = munge.encode(b"what").unwrap();
    let good = munge.decode(&credential).unwrap();
    assert_eq!(good.payload, b"what");
    assert_eq!(good.uid, rustix::process::getuid().as_raw());
    let again = munge.decode(&credential).unwrap_err();
    assert!(
        again.to_string().to_lowercase().contains("replay"),
        "{again}"
    );
    assert!(matches!(munge.decode("MUNGE:x:"), Err(MungeError::Call(_))));
    assert!(munge.decode("a\0b").is_err());
    assert!(munge.encode(b"").is_ok());
}

#[test]
fn a_request_over_tcp_carries_a_credential_for_just_that_request() {
    let Some(munged) = Munged::start() else {
        return;
    };
    let (url, server) = serve_one();
    assert_eq!(
        Client::tcp(&url, Some(&munged.socket())).pulls().unwrap(),
        []
    );
    let munge = Munge::load(Some(&munged.socket())).unwrap();
    let shown = munge.decode(&server.join().unwrap()).unwrap();
    let expected = request_payload("GET", "/v1/pulls", b"");
    assert_eq!(shown.payload, expected.as_bytes());
}

#[test]
fn each_of_several_daemons_is_shown_a_credential_of_its_own() {
    let Some(munged) = Munged::start() else {
        return;
    };
    // It takes the request, and the credential with it, and goes.
    let broken = TcpListener::bind("127.0.0.1:0").unwrap();
    let broken_url = format!("http://{}", broken.local_addr().unwrap());
    let first = std::thread::spawn(move || credential(&broken.accept().unwrap().0));
    let (url, second) = serve_one();
    let mut config = Config::default();
    config.api.socket = "/nonexistent/berthd.sock".into();
    config.api.url = vec![broken_url, url].into();
    config.api.munge_socket = Some(munged.socket());
    let client = Client::from_config(&config).unwrap();
    assert_eq!(client.pulls().unwrap(), []);
    let munge = Munge::load(Some(&munged.socket())).unwrap();
    for shown in [first.join().unwrap(), second.join().unwrap()] {
        assert!(munge.decode(&shown).is_ok(), "{shown}");
    }
}

/// A daemon that answers once that there is nothing; the credential that it was shown.
fn serve_one() -> (String, std::thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let shown = credential(&stream);
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]")
            .unwrap();
        shown
    });
    (url, server)
}

/// Reads a request's head.
fn credential(stream: &TcpStream) -> String {
    let mut credential = String::new();
    for line in BufReader::new(stream).lines() {
        let line = line.unwrap();
        if let Some(value) = line.strip_prefix("authorization: Munge ") {
            credential = value.to_owned();
        }
        if line.is_empty() {
            break;
        }
    }
    credential
}
