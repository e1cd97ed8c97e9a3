//! Bytes by HTTPS: from a server whose certificate is believed, and from no other.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use berth_fuse::chunks::{ChunkStore, HttpSource, Sources};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::support::{BLOCKS_A_CHUNK, read_all, sealed_file};

const URL: &str = "BERTH_TEST_TLS_URL";

/// An authority, and a certificate of its for 127.0.0.1: `ca.pem`, `cert.pem` and `key.pem`.
fn certificate(folder: &Path) {
    std::fs::write(folder.join("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    for arguments in [
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.pem",
        "req -newkey rsa:2048 -nodes -subj /CN=server -keyout key.pem -out request.pem",
        "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -set_serial 7 -days 2 -extfile names \
         -out cert.pem",
    ] {
        let made = Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(folder)
            .output()
            .expect("openssl can be run");
        assert!(made.status.success(), "{made:?}");
    }
}

/// Serves ranges of `file` over TLS.
fn serve(folder: &Path, file: Arc<Vec<u8>>) -> String {
    let certificates = CertificateDer::pem_file_iter(folder.join("cert.pem")).unwrap();
    let certificates = certificates.map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(folder.join("key.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/image", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (file, config) = (Arc::clone(&file), Arc::clone(&config));
            std::thread::spawn(move || {
                let connection = ServerConnection::new(config).unwrap();
                // A client that does not believe us goes away.
                let _ = answer(StreamOwned::new(connection, stream.unwrap()), &file);
            });
        }
    });
    url
}

fn answer(mut stream: impl Read + Write, file: &[u8]) -> std::io::Result<()> {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let range = head.split("range: bytes=").nth(1).unwrap();
        let (from, to) = range.lines().next().unwrap().split_once('-').unwrap();
        let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{to}/{}\r\nContent-Length: {}\r\n\r\n",
            file.len(),
            to + 1 - from
        )?;
        stream.write_all(&file[from..=to])?;
        stream.flush()?;
    }
}

/// Not a test of its own: what [`a_server_is_believed_by_its_certificate_alone`] runs with other certificates to
/// believe.
#[test]
fn reads_by_tls() {
    let Some(url) = std::env::var_os(URL) else {
        return;
    };
    let (file, sealed) = sealed_file(30 * BLOCKS_A_CHUNK);
    let source = HttpSource::new(url.to_str().unwrap(), None, None).unwrap();
    let sources = Sources::new(vec![Box::new(source)], Duration::from_secs(5));
    let store = ChunkStore::open(sealed, sources, None).unwrap();
    read_all(&store, &file, &sealed, 1 << 20);
}

#[test]
fn a_server_is_believed_by_its_certificate_alone() {
    let (right, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    certificate(right.path());
    certificate(other.path());
    let (file, _) = sealed_file(30 * BLOCKS_A_CHUNK);
    let url = serve(right.path(), file);
    let believing = |folder: &Path| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tls::reads_by_tls"])
            .env(URL, &url)
            .env("SSL_CERT_FILE", folder.join("ca.pem"))
            .env_remove("SSL_CERT_DIR")
            .output()
            .unwrap()
            .status
            .success()
    };
    assert!(believing(right.path()));
    assert!(!believing(other.path()));
}
