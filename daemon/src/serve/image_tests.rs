//! Image bytes, records, grants and traces as nodes see them.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use berth_client::Client;
use berth_client::api::{Grant, GrantRequest, TraceKept};
use berth_image::trace::{CHUNK, Trace};
use berth_image::{Digest, Platform, Record};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::tests::{as_uid, ask};
use super::*;
use crate::registry::testing::TestRegistry;
use crate::testbed::{SOON, Site};

/// An image in the store, with bytes that can be told from each other.
async fn image(app: &Arc<App>, registry: &TestRegistry, name: &str) -> (Digest, Vec<u8>) {
    let image = registry.push(name, "1", &[name.as_bytes()]);
    let reference = crate::testbed::reference(&registry.host(), &format!("{name}:1"));
    let pull = crate::testbed::pull(app, &reference).await;
    let bytes: Vec<u8> = (0..8192u32).map(|at| (at / 7) as u8).collect();
    std::fs::write(pull.path.unwrap(), &bytes).unwrap();
    (image.digest, bytes)
}

async fn get(router: &Router, path: &str, headers: &[(&str, &str)]) -> (u16, HeaderMap, Vec<u8>) {
    let mut request = Request::builder().uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = router.clone().oneshot(request.body(Body::empty()).unwrap());
    let response = response.await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let body = axum::body::to_bytes(response.into_body(), 1 << 20)
        .await
        .unwrap();
    (status, headers, body.to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_images_file_is_sent_by_range_and_its_record_as_it_is_signed() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let app = site.daemon().await;
    let (digest, bytes) = image(&app, &registry, "a/b").await;
    let router = as_uid(&app, 1000);
    let path = format!("/v1/images/{digest}/data");
    let (status, headers, body) = get(&router, &path, &[]).await;
    assert_eq!((status, &body), (200, &bytes));
    let etag = headers["etag"].to_str().unwrap().to_owned();
    assert_eq!(etag, format!("\"{}\"", digest.hex()));
    let (status, headers, body) = get(&router, &path, &[("range", "bytes=4090-5000")]).await;
    assert_eq!((status, &body[..]), (206, &bytes[4090..5001]));
    assert_eq!(headers["content-range"], "bytes 4090-5000/8192");
    assert_eq!(headers["content-length"], "911");
    for (name, value, expected) in [
        ("if-none-match", etag.as_str(), 304),
        ("range", "bytes=8192-", 416),
        ("range", "bytes=1-2,4-5", 200),
    ] {
        assert_eq!(get(&router, &path, &[(name, value)]).await.0, expected);
    }
    let of_other = [("range", "bytes=0-1"), ("if-range", "\"other\"")];
    assert_eq!(get(&router, &path, &of_other).await.0, 200);
    let other_platform = format!("{path}?platform=linux/s390x");
    assert_eq!(get(&router, &other_platform, &[]).await.0, 404);
    assert_eq!(get(&router, &format!("{path}?x=y"), &[]).await.0, 400);
    let record = get(&router, &format!("/v1/images/{digest}/record"), &[]).await;
    let key = std::fs::read_to_string(site.dir.path().join("site.pub")).unwrap();
    let key = berth_image::PublicKey::from_pem(&key).unwrap();
    let (record, _) = Record::open(&record.2, &[key], &digest, &Platform::host()).unwrap();
    assert_eq!(record.manifest, digest);
    // A file that is not the one that was sealed is not sent.
    let row = app.catalogue.images_of(&digest).await.unwrap().remove(0);
    std::fs::write(&row.path, &bytes[..100]).unwrap();
    assert_eq!(get(&router, &path, &[]).await.0, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_opens_one_image_to_who_has_it_and_a_restricted_one_to_those_who_may() {
    let site = Site::new("[daemon]\ngrant_s = 90\n");
    let registry = TestRegistry::start().await;
    let app = site.daemon().await;
    let (digest, bytes) = image(&app, &registry, "a/b").await;
    let (other, _) = image(&app, &registry, "c/d").await;
    let socket = site.config().api.socket;
    let listener = listen_unix(&socket).unwrap();
    let stop = CancellationToken::new();
    let server = tokio::spawn(serve_unix(listener, app.clone(), stop.clone()));
    let ask_grant_for = |seconds: u64, uid: u32, digest: Digest| {
        let router = as_uid(&app, uid);
        async move {
            let request = GrantRequest {
                digest: digest.to_string(),
                platform: None,
                node: "n1".into(),
                seconds: Some(seconds),
            };
            let body = serde_json::to_string(&request).unwrap();
            ask(&router, "POST", "/v1/grants", &body).await
        }
    };
    let ask_grant = |uid: u32, digest: Digest| ask_grant_for(60, uid, digest);
    // A node that does not know when its job ends asks for as much as there is.
    let (_, body) = ask_grant_for(u64::MAX, 1000, digest).await;
    let longest: Grant = serde_json::from_slice(&body).unwrap();
    assert_eq!(longest.seconds, 90);
    let (status, body) = ask_grant(1000, digest).await;
    assert_eq!(status, StatusCode::OK);
    let grant: Grant = serde_json::from_slice(&body).unwrap();
    assert_eq!(grant.seconds, 60);
    // The store's owner takes the right of others away.
    let row = app.catalogue.images_of(&other).await.unwrap().remove(0);
    std::fs::set_permissions(&row.path, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(ask_grant(1000, other).await.0, StatusCode::NOT_FOUND);
    let router = as_uid(&app, 1000);
    for what in ["data", "record", "trace"] {
        let path = format!("/v1/images/{other}/{what}");
        assert_eq!(get(&router, &path, &[]).await.0, 404, "{what}");
    }
    // Nor is he told what there is; root is.
    let detail = format!("/v1/images/{other}");
    let listed = |uid: u32| {
        let router = as_uid(&app, uid);
        async move {
            let text = String::from_utf8(get(&router, "/v1/images", &[]).await.2).unwrap();
            [digest, other].map(|digest| text.contains(&digest.to_string()))
        }
    };
    assert_eq!(get(&router, &detail, &[]).await.0, 404);
    assert_eq!(listed(1000).await, [true, false]);
    assert_eq!(get(&as_uid(&app, 0), &detail, &[]).await.0, 200);
    assert_eq!(listed(0).await, [true, true]);
    let platform = Platform::host();
    let asked = tokio::task::spawn_blocking(move || {
        let client = Client::unix(&socket);
        let source = client.data_source(&digest, &platform);
        let path = source.split_once(':').unwrap().1.to_owned();
        let with = |path: &str, grant: &str| {
            let mut stream = UnixStream::connect(&socket).unwrap();
            write!(
                stream,
                "GET {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\nRange: bytes=0-99\r\n\
                 Authorization: Berth-Grant {grant}\r\n\r\n"
            )
            .unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            let status = String::from_utf8_lossy(&answer[9..12])
                .parse::<u16>()
                .unwrap();
            (status, answer)
        };
        let (status, answer) = with(&path, &grant.grant);
        assert_eq!(status, 206);
        assert!(answer.ends_with(&bytes[..100]));
        assert_eq!(with(&path, &grant.grant[1..]).0, 401);
        let of_other = path.replace(&digest.to_string(), &other.to_string());
        assert_eq!(with(&of_other, &grant.grant).0, 403);
        // It opens nothing else.
        assert_ne!(with("/v1/status", &grant.grant).0, 403);
        let body = client.record(&digest, &platform).unwrap();
        assert!(!body.is_empty());
    });
    asked.await.unwrap();
    stop.cancel();
    let ended = tokio::time::timeout(SOON, server).await;
    ended.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_stays_for_a_day_and_an_admins_until_an_admin_sends_another() {
    let site = Site::new("[daemon]\nadmin_uids = [500]\n");
    let registry = TestRegistry::start().await;
    let app = site.daemon().await;
    let (digest, _) = image(&app, &registry, "a/b").await;
    let (user, admin) = (as_uid(&app, 1000), as_uid(&app, 500));
    let another = as_uid(&app, 1001);
    let path = format!("/v1/images/{digest}/trace");
    assert_eq!(ask(&user, "GET", &path, "").await.0, StatusCode::NOT_FOUND);
    let root = *digest.as_bytes();
    let trace = |root: &[u8; 32], data: u64, chunk: Option<u32>| {
        let runs = chunk.map(|chunk| chunk..chunk + 1).into_iter().collect();
        Trace::new(root, data, runs).unwrap().to_json()
    };
    let (one, none) = (trace(&root, 4096, Some(0)), trace(&root, 4096, None));
    let kept = |body: Vec<u8>| serde_json::from_slice::<TraceKept>(&body).unwrap().kept;
    assert!(kept(ask(&user, "PUT", &path, &one).await.1));
    for who in [&user, &another] {
        assert!(!kept(ask(who, "PUT", &path, &none).await.1));
    }
    assert_eq!(ask(&user, "GET", &path, "").await.1, one.as_bytes());
    let dir = std::fs::read_dir(&app.serving.traces).unwrap();
    let file = dir.map(|e| e.unwrap().path()).next().unwrap();
    let age = || {
        let then = std::time::SystemTime::now() - std::time::Duration::from_secs(25 * 3600);
        let file = std::fs::File::options().write(true).open(&file).unwrap();
        file.set_modified(then).unwrap();
    };
    age();
    assert!(!kept(ask(&user, "PUT", &path, &none).await.1));
    assert!(kept(ask(&another, "PUT", &path, &none).await.1));
    assert!(!kept(ask(&user, "PUT", &path, &one).await.1));
    assert!(kept(ask(&admin, "PUT", &path, &one).await.1));
    age();
    assert!(!kept(ask(&user, "PUT", &path, &none).await.1));
    assert_eq!(ask(&user, "GET", &path, "").await.1, one.as_bytes());
    assert!(kept(ask(&admin, "PUT", &path, &none).await.1));
    assert_eq!(ask(&user, "GET", &path, "").await.1, none.as_bytes());
    // Of another image, and beyond this one.
    let foreign = trace(&[9; 32], 4096, Some(0));
    let beyond = trace(&root, 9 * CHUNK, Some(5));
    for wrong in [foreign.as_str(), beyond.as_str(), "{}", ""] {
        let (status, _) = ask(&admin, "PUT", &path, wrong).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{wrong}");
    }
    // What lies there of an earlier conversion is no trace, and gives way.
    let of_earlier = format!(r#"{{"uid":0,"by_admin":true,"trace":{foreign}}}"#);
    for text in [of_earlier, foreign] {
        std::fs::write(&file, text).unwrap();
        assert_eq!(ask(&user, "GET", &path, "").await.0, StatusCode::NOT_FOUND);
        assert!(kept(ask(&user, "PUT", &path, &one).await.1));
    }
    let image = format!("/v1/images/{digest}");
    assert_eq!(
        ask(&admin, "DELETE", &image, "").await.0,
        StatusCode::NO_CONTENT
    );
    assert!(!file.exists());
}

#[test]
fn the_description_names_what_nodes_read() {
    let text = openapi().to_json().unwrap();
    for what in [
        "grants",
        "images/{digest}/data",
        "images/{digest}/record",
        "images/{digest}/trace",
    ] {
        assert!(text.contains(&format!("\"/v1/{what}\"")), "{what}");
    }
}
