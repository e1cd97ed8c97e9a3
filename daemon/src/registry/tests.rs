//! The client against a registry that misbehaves.

use berth_client::api::{ErrorBody, ErrorKind};

use super::testing::{Fault, TestRegistry};
use super::*;

fn registries(more: &str) -> Registries {
    crate::install_tls();
    let text = format!("{more}\n[daemon]\nfetch_attempts = 3\nstall_timeout_s = 5\n");
    Registries::new(&Config::parse(&text).unwrap())
}

fn site(registry: &TestRegistry, keys: &str) -> String {
    format!(
        "[registry.\"{}\"]\nplain_http = true\n{keys}\n",
        registry.host()
    )
}

/// Any loopback registry.
const LOOPBACK: &str = "[policy]\nnetworks = ['127.0.0.0/8']\n";
const OCI: &str = "application/vnd.oci.image.manifest.v1+json";

#[tokio::test]
async fn a_loopback_registry_without_tls_is_found_by_trying() {
    let server = TestRegistry::start().await;
    let digest = server.put_manifest("a/b", "1", OCI, "{}");
    let registry = registries(LOOPBACK).get(&server.host()).unwrap();
    let raw = registry.manifest("a/b", "1", None).await.unwrap();
    assert_eq!(raw.digest, digest);
    assert_eq!(
        registry.manifest_digest("a/b", "1").await.unwrap(),
        Some(digest)
    );
}

#[tokio::test]
async fn one_token_serves_all_requests_of_a_repository() {
    let server = TestRegistry::start().await;
    server.put_manifest("a/b", "1", OCI, "{}");
    server.want_login("alice:secret", false);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "alice\nsecret\n").unwrap();
    let keys = format!("credentials = '{}'", file.path().display());
    let registries = Arc::new(registries(&site(&server, &keys)));
    let asks = (0..16).map(|_| {
        let registry = registries.get(&server.host()).unwrap();
        tokio::spawn(async move { registry.manifest("a/b", "1", None).await })
    });
    for ask in asks.collect::<Vec<_>>() {
        ask.await.unwrap().unwrap();
    }
    assert_eq!(server.count("GET", "/token"), 1);
}

#[tokio::test]
async fn a_refusal_says_which_credential_was_tried_and_never_shows_it() {
    for basic in [false, true] {
        let server = TestRegistry::start().await;
        server.want_login("alice:right", basic);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "alice\nwr0ng\n").unwrap();
        let keys = format!("credentials = '{}'", file.path().display());
        let registry = registries(&site(&server, &keys))
            .get(&server.host())
            .unwrap();
        let e = registry.manifest("a/b", "1", None).await.unwrap_err();
        let body = ErrorBody::from(e);
        assert_eq!(body.kind, ErrorKind::Unauthorized);
        assert!(
            body.message.contains("tried user `alice`"),
            "{}",
            body.message
        );
        assert!(!format!("{body:?}").contains("wr0ng"));

        let anonymous = registries(&site(&server, "")).get(&server.host()).unwrap();
        let e = anonymous.manifest("a/b", "1", None).await.unwrap_err();
        assert!(e.to_string().ends_with("tried no credential"), "{e}");
    }
}

#[tokio::test]
async fn a_redirect_to_another_host_gets_no_authorization() {
    let (server, storage) = (TestRegistry::start().await, TestRegistry::start().await);
    server.want_login("alice:secret", true);
    let digest = server.put_blob("a/b", "content");
    storage.put_blob("a/b", "content");
    let path = format!("/v2/a/b/blobs/{digest}");
    let target = format!("http://{}PATH?signature=s3cret", storage.host());
    server.fault(
        &path,
        [Fault::Redirect(target.clone()), Fault::Redirect(target)],
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "alice\nsecret\n").unwrap();
    let keys = format!("credentials = '{}'", file.path().display());
    let registry = registries(&site(&server, &keys))
        .get(&server.host())
        .unwrap();
    let mut stream = registry.blob("a/b", &digest, 7, 0).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), "content");
    assert!(!stream.url().contains("s3cret"));
    assert!(server.seen().iter().any(|s| s.authorization.is_some()));
    let there = storage.seen();
    assert!(
        !there.is_empty() && there.iter().all(|s| s.authorization.is_none()),
        "{there:?}"
    );
}

#[tokio::test]
async fn busy_and_broken_answers_are_tried_again_a_bounded_number_of_times() {
    let server = TestRegistry::start().await;
    let digest = server.put_manifest("a/b", "1", OCI, "{}");
    let path = "/v2/a/b/manifests/1";
    server.fault(
        path,
        [Fault::Status(429, Some("0")), Fault::Status(503, None)],
    );
    let registries = registries(&site(&server, ""));
    let registry = registries.get(&server.host()).unwrap();
    let ask = || registries.retrying(|| registry.manifest("a/b", "1", None));
    assert_eq!(ask().await.unwrap().digest, digest);
    assert_eq!(server.count("GET", path), 3);
    server.fault(path, std::iter::repeat_n(Fault::Status(500, None), 4));
    assert!(ask().await.is_err());
    assert_eq!(server.count("GET", path), 6);
    let missing = registries
        .retrying(|| registry.manifest("a/b", "2", None))
        .await;
    assert!(matches!(missing, Err(RegistryError::NotFound { .. })));
    assert_eq!(server.count("GET", "/manifests/2"), 1);
}

#[tokio::test]
async fn a_manifest_of_another_digest_is_refused() {
    let server = TestRegistry::start().await;
    let digest = server.put_manifest("a/b", "1", OCI, "{}");
    server.fault(format!("/v2/a/b/manifests/{digest}"), [Fault::Corrupt]);
    let registry = registries(&site(&server, "")).get(&server.host()).unwrap();
    let e = registry
        .manifest("a/b", &digest.to_string(), Some(digest))
        .await;
    assert!(matches!(e, Err(RegistryError::Digest { expected, .. }) if expected == digest));
}

#[tokio::test]
async fn a_blob_is_never_shorter_or_longer_than_the_manifest_says() {
    let server = TestRegistry::start().await;
    let digest = server.put_blob("a/b", "0123456789");
    let registry = registries(&site(&server, "")).get(&server.host()).unwrap();
    let longer = registry.blob("a/b", &digest, 9, 0).await;
    assert!(matches!(longer, Err(RegistryError::Size { found: 10, .. })));
    server.fault(format!("/v2/a/b/blobs/{digest}"), [Fault::Truncate(4)]);
    let mut cut = registry.blob("a/b", &digest, 10, 0).await.unwrap();
    let mut got = Vec::new();
    let end = loop {
        match cut.next().await {
            Ok(Some(piece)) => got.extend_from_slice(&piece),
            end => break end,
        }
    };
    assert!(matches!(end, Err(RegistryError::Broken { .. })), "{end:?}");
    assert!(got.len() <= 4);
    // What a registry without Range sends from the start is skipped.
    server.forget_ranges();
    let mut tail = registry.blob("a/b", &digest, 10, 6).await.unwrap();
    assert_eq!(tail.next().await.unwrap().unwrap(), "6789");
}

#[tokio::test]
async fn nobody_listening_is_said_so() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let e = registries(LOOPBACK)
        .get(&host)
        .unwrap()
        .manifest("a/b", "1", None)
        .await
        .unwrap_err();
    assert!(matches!(e, RegistryError::Unreachable { .. }), "{e}");
    assert_eq!(ErrorBody::from(e).kind, ErrorKind::UpstreamUnavailable);
}

#[tokio::test]
async fn a_registry_in_the_sites_own_networks_is_one_that_the_site_names() {
    let server = TestRegistry::start().await;
    server.put_manifest("a/b", "1", OCI, "{}");
    let port = server.address.port();
    for host in [
        server.host(),
        format!("localhost:{port}"),
        format!("127.1:{port}"),
    ] {
        let registry = registries("").get(&host).unwrap();
        let e = registry.manifest("a/b", "1", None).await.unwrap_err();
        let body = ErrorBody::from(e);
        assert_eq!(body.kind, ErrorKind::Denied, "{}", body.message);
        assert!(
            body.message.contains("127.0.0.1") || body.message.contains("::1"),
            "{}",
            body.message
        );
    }
    assert_eq!(server.seen(), []);
    let named = registries(&site(&server, "")).get(&server.host()).unwrap();
    named.manifest("a/b", "1", None).await.unwrap();
    // Where the named one leads to has to be named as well.
    for target in [
        format!("http://127.0.0.2:{port}PATH"),
        format!("http://localhost:{port}PATH"),
    ] {
        server.fault("/v2/a/b/manifests/1", [Fault::Redirect(target)]);
        let e = named.manifest("a/b", "1", None).await.unwrap_err();
        assert_eq!(ErrorBody::from(e).kind, ErrorKind::Denied);
    }
}

#[test]
fn hosts_that_were_talked_to_are_not_remembered_without_end() {
    let registries = registries("");
    for n in 0..MAX_OPEN + 10 {
        registries.get(&format!("r{n}.example")).unwrap();
    }
    let open = registries.open.lock().unwrap();
    assert_eq!(open.len(), MAX_OPEN);
    assert!(open.contains_key("r200.example") && !open.contains_key("r0.example"));
}
