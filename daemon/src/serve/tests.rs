//! The API as clients see it, over its real sockets where that matters.

use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use berth_client::Client;
use berth_client::api::{ErrorAnswer, PinRequest, PullRequest, PullState, ResolveRequest};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::*;
use crate::registry::testing::{Fault, TestRegistry};
use crate::testbed::{SOON, Site};

fn request(name: &str) -> PullRequest {
    PullRequest {
        reference: name.into(),
        platform: None,
        fresh: false,
    }
}

/// The API for a caller with `uid`, without a socket.
pub(super) fn as_uid(app: &Arc<App>, uid: u32) -> Router {
    let v1 = v1().merge(granted()).split_for_parts().0;
    let v1 = v1.layer(Extension(app.caller(uid)));
    finish(app.clone(), v1.layer(Extension(auth::Place::Here)))
}

pub(super) async fn ask(
    router: &Router,
    method: &str,
    path: &str,
    body: &str,
) -> (StatusCode, Vec<u8>) {
    let request = Request::builder().method(method).uri(path);
    let request = request.body(Body::from(body.to_owned())).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20)
        .await
        .unwrap();
    (status, bytes.to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_pulls_follows_lists_and_removes_over_the_unix_socket() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let image = registry.push("a/b", "1", &[&vec![7; 100_000]]);
    registry.fault(format!("/v2/a/b/blobs/{}", image.layers[0]), [Fault::Hold]);
    let app = site.daemon().await;
    let socket = site.config().api.socket;
    let listener = listen_unix(&socket).unwrap();
    assert!(matches!(
        listen_unix(&socket),
        Err(SocketError::InUse { .. })
    ));
    let stop = CancellationToken::new();
    let server = tokio::spawn(serve_unix(listener, app.clone(), stop.clone()));
    let name = format!("docker://{}/a/b:1", registry.host());
    let (digest, path) = (image.digest, socket.clone());
    let client = tokio::task::spawn_blocking(move || {
        let client = Client::unix(&path);
        let started = client.pull(&request(&name)).unwrap();
        assert!(!started.state.is_final());
        assert_eq!(client.pull(&request(&name)).unwrap().id, started.id);
        let mut events = client.events(&started.id).unwrap();
        assert!(!events.next().unwrap().unwrap().state.is_final());
        registry.release();
        let last = events.map(Result::unwrap).last().unwrap();
        assert_eq!(last.state, PullState::Ready, "{:?}", last.error);
        let waited = client.wait_pull(&started.id, SOON).unwrap();
        assert_eq!(waited, last);
        assert_eq!(
            client.pull(&request(&name)).unwrap().state,
            PullState::Ready
        );
        // The path that `berth path` prints stands for the image.
        let printed = last.path.unwrap();
        assert_eq!(client.pull(&request(&printed)).unwrap().digest, last.digest);
        let images = client.images().unwrap();
        assert_eq!(images.len(), 1);
        assert_eq!(images[0].references, [name.trim_start_matches("docker://")]);
        let detail = client.image(&digest).unwrap();
        assert_eq!(detail.record["admission"]["rule"], "allow-all/default");
        let pins = client.pin(&PinRequest {
            cluster: "c".into(),
            references: vec![name.clone()],
            platform: None,
        });
        let pins = pins.unwrap();
        assert_eq!(pins.pins[&name], digest.to_string());
        assert!(pins.pulls.is_empty());
        let status = client.status().unwrap();
        assert_eq!((status.images, status.conversions), (1, 1));
        client.remove(&digest).unwrap();
        assert!(client.images().unwrap().is_empty());
        assert!(client.image(&digest).is_err());
        let again = client.pull(&request(&name)).unwrap();
        assert_eq!(
            client.wait_pull(&again.id, SOON).unwrap().state,
            PullState::Ready
        );
    });
    client.await.unwrap();
    stop.cancel();
    tokio::time::timeout(SOON, server)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    // A socket that nobody listens on any more is no hindrance.
    assert!(socket.exists());
    drop(listen_unix(&socket).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn users_see_their_own_pulls_and_remove_nothing() {
    let site = Site::new("[daemon]\nadmin_uids = [500]\n");
    let registry = TestRegistry::start().await;
    let image = registry.push("a/b", "1", &[b"layer"]);
    let app = site.daemon().await;
    let name = crate::testbed::reference(&registry.host(), "a/b:1");
    let pull = crate::testbed::pull(&app, &name).await;
    let (owner, other, admin) = (as_uid(&app, 1000), as_uid(&app, 1001), as_uid(&app, 500));
    let path = format!("/v1/pulls/{}", pull.id);
    assert_eq!(ask(&owner, "GET", &path, "").await.0, StatusCode::OK);
    assert_eq!(ask(&other, "GET", &path, "").await.0, StatusCode::NOT_FOUND);
    assert_eq!(ask(&other, "GET", "/v1/pulls", "").await.1, b"[]");
    assert_eq!(ask(&admin, "GET", &path, "").await.0, StatusCode::OK);
    let path = format!("/v1/images/{}", image.digest);
    assert_eq!(
        ask(&owner, "DELETE", &path, "").await.0,
        StatusCode::FORBIDDEN
    );
    assert_eq!(ask(&owner, "GET", &path, "").await.0, StatusCode::OK);
    assert_eq!(
        ask(&admin, "DELETE", &path, "").await.0,
        StatusCode::NO_CONTENT
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_has_a_kind_and_one_line() {
    let site = Site::new("");
    let app = site.daemon().await;
    let router = as_uid(&app, 1000);
    for (method, path, body, status) in [
        ("POST", "/v1/pulls", "{", 400),
        (
            "POST",
            "/v1/pulls",
            r#"{"reference":"a","force":true}"#,
            400,
        ),
        ("POST", "/v1/pulls", r#"{"reference":"UPPER/x:y"}"#, 400),
        ("POST", "/v1/pulls", r#"{"reference":"/etc/passwd"}"#, 400),
        (
            "POST",
            "/v1/pulls",
            r#"{"reference":"h.example/a","platform":"!"}"#,
            400,
        ),
        ("GET", "/v1/pulls/x?wait=y", "", 400),
        ("GET", "/v1/pulls/x", "", 404),
        ("GET", "/v1/images/sha256:zz", "", 400),
        ("GET", "/v2/", "", 404),
    ] {
        let (found, bytes) = ask(&router, method, path, body).await;
        assert_eq!(found.as_u16(), status, "{method} {path} {body}");
        let answer: ErrorAnswer = serde_json::from_slice(&bytes).unwrap();
        assert!(
            !answer.error.message.contains('\n'),
            "{}",
            answer.error.message
        );
    }
    let resolve = serde_json::to_string(&ResolveRequest {
        reference: "bare".into(),
        ..ResolveRequest::default()
    });
    let (status, _) = ask(&router, "POST", "/v1/resolve", &resolve.unwrap()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_open_and_readiness_names_what_is_missing() {
    let site = Site::new("");
    let app = site.daemon().await;
    let router = as_uid(&app, 1000);
    assert_eq!(ask(&router, "GET", "/healthz", "").await.0, StatusCode::OK);
    let (status, text) = ask(&router, "GET", "/readyz", "").await;
    assert_eq!(status, StatusCode::OK, "{}", String::from_utf8_lossy(&text));
    let (_, text) = ask(&router, "GET", "/metrics", "").await;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("berth_upstream_bytes_total 0"), "{text}");
    assert!(text.contains(r#"route="/readyz""#), "{text}");
    std::fs::rename(site.dir.path().join("store"), site.dir.path().join("away")).unwrap();
    let (status, text) = ask(&router, "GET", "/readyz", "").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(
        text.starts_with(b"store: "),
        "{}",
        String::from_utf8_lossy(&text)
    );
}

#[test]
fn the_description_names_every_path() {
    let text = openapi().to_json().unwrap();
    for path in [
        "/v1/pulls/{id}/events",
        "/v1/pins",
        "/v1/images/{digest}",
        "/readyz",
    ] {
        assert!(text.contains(&format!("\"{path}\"")), "{path}");
    }
}

/// A munged of our own, ended with the test.
struct Munged(std::process::Child);

impl Drop for Munged {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn munged(dir: &std::path::Path) -> Option<Munged> {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let key = dir.join("munge.key");
    std::fs::write(&key, [7; 64]).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let at = |option: &str, name: &str| format!("--{option}={}", dir.join(name).display());
    let started = std::process::Command::new("/usr/sbin/munged")
        .args(["--foreground", "--force", "--num-threads=1"])
        .args([
            at("key-file", "munge.key"),
            at("socket", "munge.sock"),
            at("pid-file", "munge.pid"),
        ])
        .args([at("log-file", "munge.log"), at("seed-file", "munge.seed")])
        .stderr(std::process::Stdio::null())
        .spawn();
    match started {
        Ok(child) => Some(Munged(child)),
        Err(e) if std::env::var_os("CI").is_none() => {
            eprintln!("left out: munged cannot be started: {e}");
            None
        }
        Err(e) => panic!("munged cannot be started: {e}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp_munge_says_who_asks_and_for_what() {
    let site = Site::new("");
    let Some(_munged) = munged(site.dir.path()) else {
        return;
    };
    let socket = site.dir.path().join("munge.sock");
    crate::testbed::wait_file(&socket, 0).await;
    let app = site.daemon().await;
    let munge = Arc::new(Munge::load(Some(&socket)).unwrap());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let server = tokio::spawn(serve_tcp(listener, app, munge.clone(), stop.clone()));
    let asked = tokio::task::spawn_blocking(move || {
        let client = Client::tcp(&format!("http://{address}"), Some(&socket));
        assert!(client.images().unwrap().is_empty());
        let missing = client.pull(&request("/nowhere")).unwrap_err();
        assert!(
            matches!(missing, berth_client::ClientError::Api(e) if e.kind == ErrorKind::BadReference)
        );
        let plain = status_of(address, None);
        assert_eq!(plain, 401);
        // A credential of something else, and one that was used.
        let other = berth_client::request_payload("GET", "/v1/status", b"");
        assert_eq!(
            status_of(address, Some(munge.encode(other.as_bytes()).unwrap())),
            401
        );
        let good = berth_client::request_payload("GET", "/v1/images", b"");
        let good = munge.encode(good.as_bytes()).unwrap();
        assert_eq!(status_of(address, Some(good.clone())), 200);
        assert_eq!(status_of(address, Some(good)), 401);
    });
    asked.await.unwrap();
    stop.cancel();
    tokio::time::timeout(SOON, server)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

/// The status of `GET /v1/images` with that credential.
fn status_of(address: std::net::SocketAddr, credential: Option<String>) -> u16 {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let credential = credential.map(|c| format!("Authorization: Munge {c}\r\n"));
    let head = format!(
        "GET /v1/images HTTP/1.1\r\nHost: b\r\nConnection: close\r\n{}\r\n",
        credential.unwrap_or_default()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}
