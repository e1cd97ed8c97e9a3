//! What one user, registry or repository may do to the pulls of another: nothing.

use std::sync::atomic::Ordering;

use berth_client::api::{ErrorKind, PullState};

use super::tests::{failure, noise};
use super::*;
use crate::registry::testing::{Fault, TestRegistry};
use crate::testbed::{SOON, Site, blob_gets, pull, reference, wait_file};

const OCTETS: &str = "application/octet-stream";

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_another_source_fails_to_send_is_made_from_ones_own() {
    let site = Site::new("[daemon]\nfetch_attempts = 1\n");
    let (evil, good) = (TestRegistry::start().await, TestRegistry::start().await);
    let layer = noise(40, 200_000);
    let image = evil.push("e/e", "1", &[&layer]);
    assert_eq!(good.push("a/b", "1", &[&layer]).digest, image.digest);
    let path = format!("/v2/e/e/blobs/{}", image.layers[0]);
    let mut garbage = layer.clone();
    garbage[0] ^= 1;
    evil.put(&path, OCTETS, garbage);
    evil.fault(&path, [Fault::Hold]);
    let app = site.daemon().await;
    let platform = Platform::host();
    let name = reference(&evil.host(), "e/e:1");
    let first = app.pulls.start(&name, &platform, 7, false).await.unwrap();
    wait_file(&site.part(&image.layers[0], &evil.host()), 100_000).await;
    let name = reference(&good.host(), "a/b:1");
    let second = app.pulls.start(&name, &platform, 8, false).await.unwrap();
    let mut news = second.news();
    let joined = news.wait_for(|p| p.bytes_fetched >= 100_000);
    tokio::time::timeout(SOON, joined).await.unwrap().unwrap();
    evil.release();
    let ended = second
        .news()
        .wait_for(|p| p.state.is_final())
        .await
        .unwrap()
        .clone();
    assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    let ended = first
        .news()
        .wait_for(|p| p.state.is_final())
        .await
        .unwrap()
        .clone();
    assert_eq!(failure(&ended).0, ErrorKind::DigestMismatch);
    assert_eq!(site.counts.sealed.load(Ordering::SeqCst), 1);
    assert_eq!(site.counts.lied.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_says_it_has_a_layer_has_to_send_it() {
    let (site, private) = (Site::new(""), TestRegistry::start().await);
    let evil = TestRegistry::start().await;
    let secret = noise(41, 50_000);
    private.push("private/a", "1", &[&secret]);
    let app = site.daemon().await;
    let owner = pull(&app, &reference(&private.host(), "private/a:1")).await;
    assert_eq!(owner.state, PullState::Ready);
    // It knows the digest, and answers HEAD with yes.
    let image = evil.push("e/e", "1", &[&secret, b"mine"]);
    let path = format!("/v2/e/e/blobs/{}", image.layers[0]);
    evil.put(&path, OCTETS, noise(42, 50_000));
    let (kind, _) = failure(&pull(&app, &reference(&evil.host(), "e/e:1")).await);
    assert_eq!(kind, ErrorKind::DigestMismatch);
    assert_eq!(site.counts.sealed.load(Ordering::SeqCst), 1);
    // One that has it, sends it once, and is believed from then on.
    evil.put(&path, OCTETS, secret.clone());
    let ended = pull(&app, &reference(&evil.host(), "e/e:1")).await;
    assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    evil.push("e/f", "1", &[&secret, b"more"]);
    let ended = pull(&app, &reference(&evil.host(), "e/f:1")).await;
    assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    assert_eq!(blob_gets(&evil)[&image.layers[0].to_string()], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_a_private_transfer_is_not_finished_by_another_registry() {
    let (site, evil) = (Site::new(""), TestRegistry::start().await);
    let secret = noise(43, 50_000);
    let image = evil.push("e/e", "1", &[&secret]);
    let app = site.daemon().await;
    // All but one byte of it came from elsewhere before a crash.
    std::fs::write(
        site.part(&image.layers[0], "private.example"),
        &secret[..49_999],
    )
    .unwrap();
    let ended = pull(&app, &reference(&evil.host(), "e/e:1")).await;
    assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    let asked = evil
        .seen()
        .into_iter()
        .find(|s| s.path.ends_with(&image.layers[0].to_string()));
    assert_eq!(asked.unwrap().range, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_the_site_names_is_believed() {
    let (one, two) = (TestRegistry::start().await, TestRegistry::start().await);
    let section = |r: &TestRegistry| format!("[registry.'{}']\nplain_http = true\n", r.host());
    let site = Site::new(&(section(&one) + &section(&two)));
    let layer = noise(44, 50_000);
    let image = one.push("a/b", "1", &[&layer]);
    two.push("c/d", "1", &[&layer, b"more"]);
    let app = site.daemon().await;
    for name in [
        reference(&one.host(), "a/b:1"),
        reference(&two.host(), "c/d:1"),
    ] {
        let ended = pull(&app, &name).await;
        assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    }
    assert_eq!(blob_gets(&two).get(&image.layers[0].to_string()), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_answers_the_tasks_of_a_large_job_and_outlives_the_daemon() {
    let site = Site::new("[daemon]\nfailure_ttl_s = 600\n");
    let registry = TestRegistry::start().await;
    let name = reference(&registry.host(), "a/b:missing");
    let id = {
        let app = site.daemon().await;
        let first = pull(&app, &name).await;
        for _ in 0..64 {
            let again = pull(&app, &name).await;
            assert_eq!(
                (failure(&again).0, &again.id),
                (ErrorKind::UnknownImage, &first.id)
            );
            let e = app
                .resolver
                .resolve(&name, &Platform::host())
                .await
                .unwrap_err();
            assert_eq!(e.kind, ErrorKind::UnknownImage);
        }
        assert_eq!(registry.count("GET", "/manifests/missing"), 1);
        // A person who asks again is not told what a machine is.
        app.pulls.forget_failure(&name, &Platform::host());
        let again = pull(&app, &name).await;
        assert_ne!(again.id, first.id);
        assert_eq!(registry.count("GET", "/manifests/missing"), 2);
        let noted = async {
            while app.catalogue.ended_pulls(1).await.unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, noted).await.unwrap();
        app.catalogue.close().await;
        first.id
    };
    let app = site.daemon().await;
    let remembered = app.pulls.get(&id).unwrap();
    assert_eq!(failure(&remembered.pull()).0, ErrorKind::UnknownImage);
    assert!(remembered.is_of(1000));
    assert!(!remembered.is_of(4242));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_policy_denies_costs_no_connection() {
    let registry = TestRegistry::start().await;
    let list = format!("[policy]\nregistries = ['{}/good']\n", registry.host());
    let site = Site::new(&list);
    for repository in ["good/a", "bad/a"] {
        registry.push(repository, "1", &[b"layer"]);
    }
    let app = site.daemon().await;
    let good = pull(&app, &reference(&registry.host(), "good/a:1")).await;
    assert_eq!(good.state, PullState::Ready, "{:?}", good.error);
    let before = registry.seen().len();
    let name = reference(&registry.host(), "bad/a:1");
    let denied = app.pulls.start(&name, &Platform::host(), 7, false).await;
    assert_eq!(denied.unwrap_err().kind, ErrorKind::Denied);
    let denied = app.resolver.resolve(&name, &Platform::host()).await;
    assert_eq!(denied.unwrap_err().kind, ErrorKind::Denied);
    assert_eq!(registry.seen().len(), before);
}
