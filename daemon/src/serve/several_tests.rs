//! Two daemons over one store: what the one had made, the other one finds.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::http::StatusCode;
use berth_client::api::{Grant, GrantRequest, PullState};
use berth_image::{Digest, Platform, PrivateKey, Record, layout};

use super::tests::{as_uid, ask};
use super::*;
use crate::registry::testing::TestRegistry;
use crate::testbed::{SOON, Site, pull, reference};

async fn ask_grant(app: &Arc<App>, digest: Digest) -> (StatusCode, Vec<u8>) {
    let request = GrantRequest {
        digest: digest.to_string(),
        platform: None,
        node: "n1".into(),
        seconds: None,
    };
    let body = serde_json::to_string(&request).unwrap();
    ask(&as_uid(app, 1000), "POST", "/v1/grants", &body).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_one_had_made_is_granted_and_served_by_the_other() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    // Both have compared their catalogues with the store before there is anything in it.
    let (first, second) = (site.daemon().await, site.second_daemon().await);
    let image = registry.push("a/b", "1", &[b"layer"]);
    // It is not there yet, which is remembered for a moment only.
    let (status, _) = ask_grant(&second, image.digest).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let name = reference(&registry.host(), "a/b:1");
    assert_eq!(pull(&first, &name).await.state, PullState::Ready);
    let granted = async {
        loop {
            match ask_grant(&second, image.digest).await {
                (StatusCode::OK, body) => break body,
                (status, _) => assert_eq!(status, StatusCode::NOT_FOUND),
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let body = tokio::time::timeout(SOON, granted).await.unwrap();
    let grant: Grant = serde_json::from_slice(&body).unwrap();
    assert!(!grant.grant.is_empty());
    let router = as_uid(&second, 1000);
    for what in ["record", "data"] {
        let path = format!("/v1/images/{}/{what}", image.digest);
        assert_eq!(ask(&router, "GET", &path, "").await.0, StatusCode::OK);
    }
    let detail = format!("/v1/images/{}", image.digest);
    assert_eq!(ask(&router, "GET", &detail, "").await.0, StatusCode::OK);
    // What the one takes away is gone for the other one too.
    let gone = ask(&as_uid(&first, 0), "DELETE", &detail, "").await;
    assert_eq!(gone.0, StatusCode::NO_CONTENT);
    let (digest, platform) = (&image.digest, Platform::host());
    let left = second.present.image(digest, &platform).await.unwrap();
    assert_eq!(left, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_of_what_is_there_costs_no_transfer_and_no_conversion_and_outlives_the_registry() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let (first, second) = (site.daemon().await, site.second_daemon().await);
    let image = registry.push("a/b", "1", &[b"layer"]);
    let by_tag = reference(&registry.host(), "a/b:1");
    let by_digest = by_tag.with_digest(image.digest);
    assert_eq!(pull(&first, &by_tag).await.state, PullState::Ready);
    let refs = || site.counts.refs.lock().unwrap().len();
    let written = refs();
    drop(registry);
    let pulled = pull(&second, &by_tag).await;
    assert_eq!(pulled.state, PullState::Ready, "{:?}", pulled.error);
    assert_eq!(pulled.digest, Some(image.digest.to_string()));
    assert_eq!(refs(), written, "the entry says so already");
    assert_eq!(pull(&second, &by_digest).await.state, PullState::Ready);
    assert_eq!(site.counts.sealed.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_no_key_of_the_site_signed_and_a_file_that_is_cut_off_are_not_learned() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let (first, second) = (site.daemon().await, site.second_daemon().await);
    let platform = Platform::host();
    let mut digests = Vec::new();
    for name in ["forged", "cut", "whole"] {
        let image = registry.push(name, "1", &[name.as_bytes()]);
        let pulled = pull(&first, &reference(&registry.host(), &format!("{name}:1"))).await;
        let data = pulled.path.unwrap();
        let record = layout::record(&image.digest, &platform);
        let record = site.dir.path().join("store").join(record);
        match name {
            "forged" => {
                let row = first.catalogue.image(&image.digest, &platform).await;
                let sealed: Record = serde_json::from_str(&row.unwrap().unwrap().record).unwrap();
                let stranger = PrivateKey::generate().unwrap();
                std::fs::write(&record, sealed.seal(&stranger).unwrap()).unwrap();
            }
            "cut" => std::fs::write(data, b"short").unwrap(),
            _ => {}
        }
        digests.push(image.digest);
    }
    let mut statuses = Vec::new();
    for digest in digests {
        statuses.push(ask_grant(&second, digest).await.0);
    }
    let (no, yes) = (StatusCode::NOT_FOUND, StatusCode::OK);
    assert_eq!(statuses, [no, no, yes]);
}

/// The moment at which a second daemon takes over: all nodes ask it for the same.
#[tokio::test(flavor = "multi_thread")]
async fn many_who_ask_at_once_are_all_answered() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let (first, second) = (site.daemon().await, site.second_daemon().await);
    let image = registry.push("a/b", "1", &[b"layer"]);
    pull(&first, &reference(&registry.host(), "a/b:1")).await;
    let asked = (0..200).map(|_| ask_grant(&second, image.digest));
    let answers = futures_util::future::join_all(asked).await;
    assert!(answers.iter().all(|(status, _)| *status == StatusCode::OK));
}
