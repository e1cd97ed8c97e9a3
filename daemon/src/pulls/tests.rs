//! Whole pulls, from a registry that misbehaves to a sealer that checks what it gets.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use berth_client::api::{ErrorKind, Job, PullState};
use berth_image::layout;

use super::*;
use crate::registry::testing::{Fault, TestRegistry};
use crate::testbed::{SOON, Site, blob_gets, pull, reference, wait_file};

pub(super) fn noise(seed: u8, size: usize) -> Vec<u8> {
    let mut state = u32::from(seed) + 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..size).map(next).collect()
}

pub(super) fn failure(pull: &Pull) -> (ErrorKind, String) {
    assert_eq!(pull.state, PullState::Failed);
    let error = pull.error.clone().unwrap();
    (error.kind, error.message)
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_askers_with_four_tags_cost_one_get_a_blob_and_one_conversion() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let layers = [noise(1, 300_000), noise(2, 200_000), noise(3, 100_000)];
    let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    let image = registry.push("a/b", "t0", &layers);
    for tag in ["t1", "t2", "t3"] {
        registry.push("a/b", tag, &layers);
    }
    let app = site.daemon().await;
    let askers: Vec<_> = (0..64)
        .map(|n| {
            let (app, name) = (
                app.clone(),
                reference(&registry.host(), &format!("a/b:t{}", n % 4)),
            );
            tokio::spawn(async move { pull(&app, &name).await })
        })
        .collect();
    for asker in askers {
        let pull = asker.await.unwrap();
        assert_eq!(pull.state, PullState::Ready, "{:?}", pull.error);
        assert_eq!(pull.digest, Some(image.digest.to_string()));
        assert!(std::path::Path::new(&pull.path.unwrap()).exists());
    }
    let gets = blob_gets(&registry);
    assert_eq!(gets.len(), 4, "{gets:?}");
    assert!(gets.values().all(|n| *n == 1), "{gets:?}");
    for tag in ["t0", "t1", "t2", "t3"] {
        assert_eq!(registry.count("GET", &format!("/manifests/{tag}")), 1);
    }
    assert_eq!(site.counts.sealed.load(Ordering::SeqCst), 1);
    assert_eq!(site.counts.refs.lock().unwrap().len(), 4);
    assert_eq!(
        app.catalogue.references(&image.digest).await.unwrap().len(),
        4
    );
    // Another image with a layer of this one fetches only what is new.
    registry.push("a/c", "1", &[layers[0], b"more"]);
    let other = pull(&app, &reference(&registry.host(), "a/c:1")).await;
    assert_eq!(other.state, PullState::Ready);
    let shared = berth_image::Digest::of(layers[0]).to_string();
    assert_eq!(blob_gets(&registry)[&shared], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_of_another_repository_is_not_had_by_knowing_its_digest() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let secret = noise(20, 50_000);
    registry.push("private/a", "1", &[&secret]);
    let app = site.daemon().await;
    let owner = pull(&app, &reference(&registry.host(), "private/a:1")).await;
    assert_eq!(owner.state, PullState::Ready);
    // A manifest that names the layer, in a repository that does not hold it.
    let image = registry.push("evil/b", "1", &[&secret, b"mine"]);
    registry.remove(&format!("/v2/evil/b/blobs/{}", image.layers[0]));
    let (kind, _) = failure(&pull(&app, &reference(&registry.host(), "evil/b:1")).await);
    assert_eq!(kind, ErrorKind::UnknownImage);
    assert_eq!(site.counts.sealed.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_reach_the_converter_while_they_arrive() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let layer = noise(4, 400_000);
    let image = registry.push("a/b", "1", &[&layer]);
    let path = format!("/v2/a/b/blobs/{}", image.layers[0]);
    registry.fault(path, [Fault::Hold]);
    let app = site.daemon().await;
    let name = reference(&registry.host(), "a/b:1");
    let entry = app
        .pulls
        .start(&name, &Platform::host(), 7, false)
        .await
        .unwrap();
    let counts = site.counts.clone();
    let read = tokio::task::spawn_blocking(move || counts.wait_read(200_000));
    read.await.unwrap();
    assert_eq!(entry.pull().state, PullState::Fetching);
    let mut news = entry.news();
    let told = news.wait_for(|p| p.bytes_fetched == 200_000 && p.bytes_total == 400_000);
    tokio::time::timeout(SOON, told).await.unwrap().unwrap();
    registry.release();
    assert_eq!(pull(&app, &name).await.state, PullState::Ready);
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_bytes_are_never_called_whole_and_the_next_pull_is_good() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let image = registry.push("a/b", "1", &[&noise(5, 100_000), &noise(6, 50_000)]);
    registry.fault(
        format!("/v2/a/b/blobs/{}", image.layers[0]),
        [Fault::Corrupt],
    );
    let app = site.daemon().await;
    let name = reference(&registry.host(), "a/b:1");
    let (kind, message) = failure(&pull(&app, &name).await);
    assert_eq!(kind, ErrorKind::DigestMismatch);
    assert!(message.contains(&registry.host()) && message.contains(&image.layers[0].to_string()));
    assert!(!site.spool(&image.layers[0]).exists());
    assert!(!site.part(&image.layers[0], &registry.host()).exists());
    let again = pull(&app, &name).await;
    assert_eq!(again.state, PullState::Ready, "{:?}", again.error);
    assert_eq!(site.counts.lied.load(Ordering::SeqCst), 0);
    // The failed pull may have let go of it on the way; then the rest was asked for.
    assert!(blob_gets(&registry)[&image.layers[1].to_string()] <= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_sources_garbage_or_wrong_size_is_not_ones_own_failure() {
    let site = Site::new("[daemon]\nfetch_attempts = 1\n");
    let (evil, good) = (TestRegistry::start().await, TestRegistry::start().await);
    let layer = noise(30, 200_000);
    let bad = evil.push("e/e", "1", &[&layer, b"mine"]);
    good.push("a/b", "1", &[&layer]);
    let path = format!("/v2/e/e/blobs/{}", bad.layers[0]);
    // The first half of something else, for as long as it likes.
    let mut garbage = layer.clone();
    garbage[0] ^= 1;
    evil.put(&path, "application/octet-stream", garbage);
    evil.fault(&path, [Fault::Hold]);
    let app = site.daemon().await;
    let (name, platform) = (reference(&evil.host(), "e/e:1"), Platform::host());
    let first = app.pulls.start(&name, &platform, 7, false).await.unwrap();
    wait_file(&site.part(&bad.layers[0], &evil.host()), 100_000).await;
    let name = reference(&good.host(), "a/b:1");
    let second = app.pulls.start(&name, &platform, 8, false).await.unwrap();
    let mut news = second.news();
    let joined = news.wait_for(|p| p.bytes_fetched >= 100_000);
    tokio::time::timeout(SOON, joined).await.unwrap().unwrap();
    evil.release();
    let ended = pull(&app, &name).await;
    assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    drop(first);
    // A manifest that lies about the size of what is here.
    let text = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":7}},"layers":[]}}"#,
        bad.layers[0]
    );
    evil.put_manifest("e/e", "2", "application/json", &text);
    let (kind, _) = failure(&pull(&app, &reference(&evil.host(), "e/e:2")).await);
    assert_eq!(kind, ErrorKind::DigestMismatch);
    assert!(site.spool(&bad.layers[0]).exists());
    assert_eq!(site.counts.lied.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_transfer_goes_on_where_it_broke() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let image = registry.push("a/b", "1", &[&noise(7, 300_000)]);
    let path = format!("/v2/a/b/blobs/{}", image.layers[0]);
    let cut = Fault::Truncate(100_000);
    registry.fault(&path, [Fault::Status(503, None), cut.clone(), cut]);
    let app = site.daemon().await;
    let ended = pull(&app, &reference(&registry.host(), "a/b:1")).await;
    assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    let asked: Vec<_> = (registry.seen().into_iter())
        .filter(|s| s.path == path)
        .map(|s| s.range.unwrap_or_default())
        .collect();
    assert_eq!(asked, ["", "", "bytes=100000-", "bytes=200000-"]);
    // And the configuration, of some hundred bytes.
    assert!((300_000..300_200).contains(&app.metrics.upstream_bytes.get()));
}

#[test]
fn a_killed_daemon_goes_on_under_the_same_id_with_what_it_had() {
    let outer = tokio::runtime::Runtime::new().unwrap();
    let (site, registry) = (Site::new(""), outer.block_on(TestRegistry::start()));
    let image = registry.push("a/b", "1", &[&noise(8, 300_000)]);
    let path = format!("/v2/a/b/blobs/{}", image.layers[0]);
    registry.fault(&path, [Fault::Hold]);
    let name = reference(&registry.host(), "a/b:1");
    let first = tokio::runtime::Runtime::new().unwrap();
    let id = first.block_on(async {
        let app = site.daemon().await;
        let entry = app
            .pulls
            .start(&name, &Platform::host(), 7, false)
            .await
            .unwrap();
        let counts = site.counts.clone();
        let read = tokio::task::spawn_blocking(move || counts.wait_read(150_000));
        read.await.unwrap();
        entry.pull().id
    });
    first.shutdown_timeout(SOON);
    outer.block_on(async {
        let app = site.daemon().await;
        let entry = app.pulls.get(&id).unwrap();
        assert!(entry.is_of(7) && !entry.is_of(8));
        let mut news = entry.news();
        let ended = news.wait_for(|p| p.state.is_final());
        let ended = tokio::time::timeout(SOON, ended)
            .await
            .unwrap()
            .unwrap()
            .clone();
        assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
        // The catalogue hears of the end after those who wait.
        let forgotten = async {
            while !app.catalogue.open_pulls().await.unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, forgotten).await.unwrap();
    });
    let last = registry
        .seen()
        .into_iter()
        .rfind(|s| s.path == path)
        .unwrap();
    assert_eq!(last.range.as_deref(), Some("bytes=150000-"));
    // The sealer's thread may still be on its way to notice.
    let noticed = std::time::Instant::now() + SOON;
    while site.counts.aborted.load(Ordering::SeqCst) == 0 {
        assert!(std::time::Instant::now() < noticed);
        std::thread::yield_now();
    }
    assert_eq!(site.counts.lied.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_a_crash_spoiled_is_fetched_anew() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let image = registry.push("a/b", "1", &[&noise(9, 100_000)]);
    let app = site.daemon().await;
    std::fs::write(
        site.part(&image.layers[0], &registry.host()),
        vec![0; 40_000],
    )
    .unwrap();
    let ended = pull(&app, &reference(&registry.host(), "a/b:1")).await;
    assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    assert_eq!(site.counts.lied.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_catalogue_is_made_from_the_store() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let image = registry.push("a/b", "1", &[b"layer"]);
    let name = reference(&registry.host(), "a/b:1");
    {
        let app = site.daemon().await;
        assert_eq!(pull(&app, &name).await.state, PullState::Ready);
        app.catalogue.close().await;
    }
    for file in std::fs::read_dir(site.dir.path().join("state"))
        .unwrap()
        .flatten()
    {
        if file.file_name().to_string_lossy().starts_with("catalogue") {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    let app = site.daemon().await;
    assert_eq!(app.catalogue.images().await.unwrap().len(), 1);
    let references = app.catalogue.references(&image.digest).await.unwrap();
    assert_eq!(references, [name.to_string()]);
    // The image's own digest needs no registry.
    drop(registry);
    let ended = pull(&app, &name.with_digest(image.digest)).await;
    assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    assert_eq!(site.counts.sealed.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_is_asked_for_again_after_its_time_and_an_old_answer_is_called_stale() {
    let site = Site::new("[daemon]\ntag_ttl_s = 0\nfetch_attempts = 2\n");
    let registry = TestRegistry::start().await;
    let first = registry.push("a/b", "1", &[b"one"]);
    let app = site.daemon().await;
    let (name, platform) = (reference(&registry.host(), "a/b:1"), Platform::host());
    let job = Job {
        cluster: "c".into(),
        id: 7,
    };
    let answer = app
        .resolver
        .resolve_for_job((7, &job), &name, &platform)
        .await
        .unwrap();
    assert_eq!((answer.manifest, answer.stale), (first.digest, false));
    // Unchanged: a HEAD is enough.
    app.resolver.resolve(&name, &platform).await.unwrap();
    assert_eq!(registry.count("GET", "/manifests/1"), 1);
    let second = registry.push("a/b", "1", &[b"two"]);
    let answer = app.resolver.resolve(&name, &platform).await.unwrap();
    assert_eq!(answer.manifest, second.digest);
    // The job keeps what it was told.
    let answer = app
        .resolver
        .resolve_for_job((7, &job), &name, &platform)
        .await
        .unwrap();
    assert_eq!(answer.manifest, first.digest);
    // Another user's word about that job is another answer.
    let answer = (app.resolver).resolve_for_job((8, &job), &name, &platform);
    assert_eq!(answer.await.unwrap().manifest, second.digest);
    registry.fault(
        "/v2/a/b/manifests/1",
        [Fault::Status(500, None), Fault::Status(500, None)],
    );
    let answer = app.resolver.resolve(&name, &platform).await.unwrap();
    assert_eq!((answer.manifest, answer.stale), (second.digest, true));
    // For a while the registry is left alone.
    let before = registry.seen().len();
    assert!(app.resolver.resolve(&name, &platform).await.unwrap().stale);
    assert_eq!(registry.seen().len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_an_image_fails_with_its_reason() {
    let site = Site::new("[daemon]\nfetch_attempts = 1\n");
    let registry = TestRegistry::start().await;
    let app = site.daemon().await;
    let ask = async |tag: &str| {
        failure(&pull(&app, &reference(&registry.host(), &format!("a/b:{tag}"))).await)
    };
    let (kind, _) = ask("missing").await;
    assert_eq!(kind, ErrorKind::UnknownImage);

    let image = registry.push("a/b", "1", &[b"layer"]);
    let index = |os: &str| {
        format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":1,"platform":{{"os":"{os}","architecture":"{}"}}}}]}}"#,
            image.digest,
            Platform::host().architecture()
        )
    };
    let index_type = "application/vnd.oci.image.index.v1+json";
    registry.put_manifest("a/b", "plan9", index_type, &index("plan9"));
    let (kind, message) = ask("plan9").await;
    assert_eq!(kind, ErrorKind::NoPlatform);
    assert!(message.contains("only for plan9/"), "{message}");
    registry.put_manifest("a/b", "many", index_type, &index("linux"));
    let ended = pull(&app, &reference(&registry.host(), "a/b:many")).await;
    assert_eq!(ended.digest, Some(image.digest.to_string()));

    // What a registry calls a document is not what it is.
    registry.put_manifest(
        "a/b",
        "odd",
        "text/html",
        &index("linux").replace(":1,", ":2,"),
    );
    let ended = pull(&app, &reference(&registry.host(), "a/b:odd")).await;
    assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);

    registry.put_manifest("a/b", "old", "application/json", r#"{"schemaVersion":1}"#);
    let (kind, message) = ask("old").await;
    assert_eq!(kind, ErrorKind::ConversionFailed);
    assert!(message.contains("schema 1"), "{message}");
    let old = berth_image::Digest::of(br#"{"schemaVersion":1}"#);
    assert!(app.catalogue.manifest(&old).await.unwrap().is_none());
    registry.put_manifest("a/b", "huge", index_type, &" ".repeat(5 << 20));
    let (_, message) = ask("huge").await;
    assert!(message.contains("larger than 4194304 bytes"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spool_is_trimmed_to_its_size() {
    let site = Site::new("[daemon]\nspool_bytes = 150000\n");
    let registry = TestRegistry::start().await;
    let app = site.daemon().await;
    for (tag, seed) in [("1", 10), ("2", 11), ("3", 12)] {
        registry.push("a/b", tag, &[&noise(seed, 100_000)]);
        let ended = pull(&app, &reference(&registry.host(), &format!("a/b:{tag}"))).await;
        assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
    }
    app.fetcher.trim();
    assert!(app.fetcher.spool_bytes().unwrap() <= 150_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_was_taken_out_of_the_store_is_forgotten_and_made_anew() {
    let (site, registry) = (Site::new(""), TestRegistry::start().await);
    let image = registry.push("a/b", "1", &[&noise(50, 100_000)]);
    let app = site.daemon().await;
    let name = reference(&registry.host(), "a/b:1");
    let store = site.dir.path().join("store");
    let dir = store.join(layout::image_dir(&image.digest, &Platform::host()));
    let data = PathBuf::from(pull(&app, &name).await.path.unwrap());
    let made = || site.counts.sealed.load(Ordering::SeqCst);
    let removals: [&dyn Fn(); 4] = [
        &|| std::fs::remove_dir_all(&dir).unwrap(),
        &|| std::fs::remove_file(dir.join(layout::RECORD)).unwrap(),
        &|| std::fs::remove_file(&data).unwrap(),
        &|| std::fs::write(&data, b"cut").unwrap(),
    ];
    for (before, remove) in (1..).zip(removals) {
        assert_eq!(made(), before);
        remove();
        let ended = pull(&app, &name).await;
        assert_eq!(ended.state, PullState::Ready, "{:?}", ended.error);
        assert_eq!(ended.path.as_deref().map(Path::new), Some(&*data));
        assert_eq!(made(), before + 1);
        assert_eq!(std::fs::metadata(&data).unwrap().len(), 8192);
    }
    // What the reference stands for is said anew, too.
    let told = || site.counts.refs.lock().unwrap().len();
    let before = told();
    std::fs::remove_dir_all(store.join(layout::REFS)).unwrap();
    assert_eq!(pull(&app, &name).await.state, PullState::Ready);
    assert_eq!((told(), made()), (before + 1, 5));
    // A store that is not there is not an empty one.
    std::fs::remove_file(store.join(layout::FORMAT)).unwrap();
    std::fs::rename(store.join(layout::IMAGES), store.join("away")).unwrap();
    assert_eq!(pull(&app, &name).await.state, PullState::Ready);
    assert_eq!(
        (made(), app.catalogue.images().await.unwrap().len()),
        (5, 1)
    );
}
