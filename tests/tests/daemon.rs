//! `berthd` and its sealer as a whole: one fetch and one conversion, bad input, crashes, a store that is not there.

use std::fs;
use std::thread;

use berth_tests::cluster::unique;
use berth_tests::image::{Layer, Pushed, noise};
use berth_tests::proxy::{Fault, Wrong};
use berth_tests::suite::{WHERE, container, suite};
use berth_tests::{Cluster, Ended, Image, Options, Proxy, Run, wait_until};
use serde_json::Value;

/// `curl` of the daemon's socket as the ordinary user.
fn get(cluster: &Cluster, path: &str) -> Ended {
    let socket = cluster.get("BERTH_SOCKET");
    let url = format!("http://berth{path}");
    let words = [
        "-sS",
        "-i",
        "--max-time",
        "60",
        "--unix-socket",
        socket,
        &url,
    ];
    cluster.user("curl", &words).end()
}

fn body(answer: &Ended) -> Value {
    let text = answer
        .ok()
        .split_once("\r\n\r\n")
        .map_or("", |(_, body)| body);
    serde_json::from_str(text).unwrap_or_else(|why| panic!("{why}: {answer}"))
}

/// An image of its own for a test: two noisy layers of `bytes` over the shell.
fn noisy(cluster: &Cluster, bytes: usize) -> Pushed {
    let name = unique();
    let seed = name
        .bytes()
        .fold(7_u64, |sum, byte| sum.wrapping_mul(31) + u64::from(byte));
    let ballast = |seed| Layer::new().file(&format!("ballast-{seed}"), &noise(seed, bytes), 0o644);
    Image::shell("noisy")
        .layer(&ballast(seed))
        .layer(&ballast(seed + 1))
        .push(cluster.registry(), &format!("test/noisy-{name}:1"))
}

fn pull(cluster: &Cluster, name: &str) -> Ended {
    cluster.berth(&["pull", &format!("docker://{name}")])
}

fn is_published(cluster: &Cluster, digest: &str) -> bool {
    let hex = digest.trim_start_matches("sha256:");
    let (images, _) = cluster.published();
    images
        .iter()
        .any(|path| path.to_string_lossy().contains(hex))
}

#[test]
fn many_pulls_of_one_digest_by_different_names_fetch_and_convert_once() {
    let cluster = &suite().cluster;
    let proxy = Proxy::start(cluster.registry());
    let image = noisy(cluster, 2 << 20);
    let second = image.tag(cluster.registry(), "other-tag");
    let (repository, _) = image.name.rsplit_once(':').unwrap();
    let by_digest = format!("{repository}@{}", image.digest);
    let by_digest = by_digest.replace(cluster.registry(), proxy.address());
    let names = [
        image.via(proxy.address()),
        second.via(proxy.address()),
        by_digest,
    ];
    proxy.fault(Fault::always("/blobs/", Wrong::Hold(1000)));
    thread::scope(|scope| {
        let pulls: Vec<_> = (0..9)
            .map(|number| {
                let name = names[number % names.len()].clone();
                scope.spawn(move || pull(cluster, &name))
            })
            .collect();
        wait_until("layers are asked for", 60, || {
            (proxy.held() > 0).then_some(())
        });
        proxy.release();
        for pull in pulls {
            pull.join().unwrap().ok();
        }
    });
    for (digest, count) in proxy.blobs() {
        // A layer that another image brought is asked about (HEAD), not fetched.
        assert!(count.gets <= 1, "{digest} was fetched {} times", count.gets);
    }
    let (images, _) = cluster.published();
    let hex = image.digest.trim_start_matches("sha256:");
    let folders: Vec<_> = images
        .iter()
        .filter(|path| path.to_string_lossy().contains(hex))
        .collect();
    assert_eq!(folders.len(), 1);
    // Made once: a record's serial grows with each signature, and its folder has one data file.
    let record = || std::fs::read(folders[0].join("record.dsse.json")).unwrap();
    let before = record();
    pull(cluster, &names[0]).ok();
    assert_eq!(record(), before, "an image that is there is not made again");
    assert_eq!(std::fs::read_dir(folders[0]).unwrap().count(), 2);
}

#[test]
fn layers_that_other_images_brought_are_not_fetched_again() {
    let cluster = &suite().cluster;
    let proxy = Proxy::start(cluster.registry());
    let base = Layer::new().file("base", &noise(unique().len() as u64 + 99, 1 << 20), 0o644);
    let name = unique();
    let one = Image::shell(&name)
        .layer(&base)
        .push(cluster.registry(), &format!("test/{name}-a:1"));
    let two = Image::shell(&name)
        .layer(&base)
        .layer(&Layer::new().file("more", b"x", 0o644))
        .push(cluster.registry(), &format!("test/{name}-a:2"));
    pull(cluster, &one.via(proxy.address())).ok();
    pull(cluster, &two.via(proxy.address())).ok();
    for (digest, count) in proxy.blobs() {
        assert!(count.gets <= 1, "{digest} was fetched {} times", count.gets);
    }
}

#[test]
fn killed_in_mid_conversion_it_restarts_and_makes_the_right_image() {
    let cluster = Cluster::own("test-killed", &Options::new(&["--nodes", "1"]));
    for victims in [["berthd"].as_slice(), &["sealer"], &["sealer", "berthd"]] {
        let proxy = Proxy::start(cluster.registry());
        let image = noisy(&cluster, 4 << 20);
        let top = image.layers.last().unwrap();
        proxy.fault(Fault::some(top, 1, Wrong::Hold(2 << 20)));
        let name = image.via(proxy.address());
        let asked = cluster
            .user("berth", &["pull", &format!("docker://{name}")])
            .start();
        wait_until("the conversion waits in the middle of a layer", 60, || {
            let (_, unfinished) = cluster.published();
            (proxy.held() > 0 && !unfinished.is_empty()).then_some(())
        });
        for victim in victims {
            cluster.service("kill", victim);
        }
        proxy.release();
        for victim in victims {
            cluster.service("start", victim);
        }
        // It may have failed, or been gone on with after the restart.
        asked.end();
        pull(&cluster, &name).ok();
        let words = [&container(&name), "sh", "-c", WHERE];
        assert_eq!(cluster.user("srun", &words).end().ok(), "VARIANT_ID=noisy");
        let (_, unfinished) = cluster.published();
        assert!(
            unfinished.is_empty(),
            "after killing {victims:?}: {unfinished:?}"
        );
        let spool = cluster.folder().join("daemon/spool/sha256");
        let parts: Vec<_> = fs::read_dir(spool)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.path().extension().is_some_and(|e| e == "part"))
            .collect();
        assert!(parts.is_empty(), "after killing {victims:?}: {parts:?}");
    }
}

#[test]
fn a_store_that_is_not_mounted_stops_the_daemon_and_gets_nothing() {
    let cluster = Cluster::own("test-store", &Options::new(&["--nodes", "1"]));
    let image = noisy(&cluster, 10_000);
    for service in ["berthd", "sealer"] {
        cluster.service("stop", service);
    }
    let store = cluster.store();
    let aside = store.with_extension("aside");
    fs::rename(&store, &aside).unwrap();
    fs::create_dir(&store).unwrap();
    cluster
        .root("chmod", &["777", store.to_str().unwrap()])
        .end()
        .ok();
    let script = berth_tests::cluster::repository().join("scripts/cluster");
    let mut refused = 0;
    for service in ["sealer", "berthd"] {
        let words = ["service", "test-store", "start", service];
        let ended = Run::new(script.to_str().unwrap(), &words).end();
        refused += u32::from(ended.code != 0);
        if ended.code != 0 {
            assert!(
                cluster.log(service).contains("FORMAT") || ended.says("store"),
                "{ended}"
            );
        }
    }
    assert!(refused > 0, "neither noticed");
    pull(&cluster, &image.name).failed();
    assert_eq!(
        fs::read_dir(&store).unwrap().count(),
        0,
        "something was put into the empty folder"
    );
    fs::remove_dir(&store).unwrap();
    fs::rename(&aside, &store).unwrap();
    for service in ["sealer", "berthd"] {
        cluster.service("start", service);
    }
    pull(&cluster, &image.name).ok();
}

#[test]
fn a_store_that_goes_away_under_a_running_daemon_gets_nothing() {
    let cluster = Cluster::own("test-gone", &Options::new(&["--nodes", "1"]));
    let image = noisy(&cluster, 10_000);
    let store = cluster.store();
    let aside = store.with_extension("aside");
    fs::rename(&store, &aside).unwrap();
    fs::create_dir(&store).unwrap();
    cluster
        .root("chmod", &["777", store.to_str().unwrap()])
        .end()
        .ok();
    let ended = pull(&cluster, &image.name);
    assert_eq!(
        fs::read_dir(&store).unwrap().count(),
        0,
        "something was put into the empty folder"
    );
    // Whoever holds the real store open may go on with it; that is not wrong either.
    assert!(ended.code != 0 || aside.join("images").exists(), "{ended}");
    fs::remove_dir(&store).unwrap();
    fs::rename(&aside, &store).unwrap();
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let cluster = Cluster::own("test-full", &Options::new(&["--nodes", "1"]));
    let image = noisy(&cluster, 8 << 20);
    let small = noisy(&cluster, 10_000);
    for service in ["berthd", "sealer"] {
        cluster.service("stop", service);
    }
    // The whole store on a small filesystem: publishing renames within it.
    let store = cluster.store();
    let path = store.to_str().unwrap();
    let size = "size=6m,mode=755,uid=64302,gid=64302";
    let saved = cluster
        .root("cp", &["-a", path, &format!("{path}.saved")])
        .end();
    saved.ok();
    cluster
        .root("mount", &["-t", "tmpfs", "-o", size, "small", path])
        .end()
        .ok();
    cluster
        .root("cp", &["-a", &format!("{path}.saved/."), path])
        .end()
        .ok();
    for service in ["sealer", "berthd"] {
        cluster.service("start", service);
    }
    let ended = pull(&cluster, &image.name);
    let left = cluster.published();
    let after = pull(&cluster, &small.name);
    for service in ["berthd", "sealer"] {
        cluster.service("stop", service);
    }
    cluster.root("umount", &[path]).end().ok();
    assert_eq!(ended.code, 69, "{ended}");
    assert!(ended.says("full") || ended.says("space"), "{ended}");
    assert!(left.0.is_empty() && left.1.is_empty(), "{left:?}");
    after.ok();
}

/// What was wrong, how it was asked for, the exit code, and a word the user reads.
#[test]
fn bad_input_gets_a_clear_error_and_changes_nothing() {
    let cluster = &suite().cluster;
    let registry = cluster.registry();
    let proxy = Proxy::start(registry);
    let through = |image: &Pushed| image.via(proxy.address());
    let fresh = || noisy(cluster, 200_000);
    let status = |code: u16| Wrong::Status(code, vec![]);

    let (repository, _) = suite().shell.name.rsplit_once(':').unwrap();
    let mut cases: Vec<(&str, String, &[i32], &str)> = vec![
        (
            "malformed reference",
            "UPPER/..//x".into(),
            &[2],
            "reference",
        ),
        ("unknown tag", format!("{repository}:nope"), &[1], "nope"),
        (
            "unknown repository",
            format!("{registry}/no/such:1"),
            &[1],
            "no/such",
        ),
        (
            "unknown digest",
            format!("{repository}@sha256:{}", "0".repeat(64)),
            &[1],
            "000",
        ),
        (
            "registry down",
            "127.0.0.1:1/x/y:1".into(),
            &[69],
            "127.0.0.1:1",
        ),
    ];
    let unauthorized = fresh();
    let basic = vec![(
        "www-authenticate".to_owned(),
        "Basic realm=\"x\"".to_owned(),
    )];
    let path = unauthorized
        .name
        .split_once('/')
        .unwrap()
        .1
        .split(':')
        .next()
        .unwrap()
        .to_owned();
    proxy.fault(Fault::always(&path, Wrong::Status(401, basic)).any_method());
    cases.push(("401", through(&unauthorized), &[77], "credential"));

    let truncated = fresh();
    proxy.fault(Fault::always(&truncated.layers[2], Wrong::Truncate(5000)));
    cases.push((
        "truncated layer",
        through(&truncated),
        &[69, 1],
        "broke off",
    ));

    let corrupt = fresh();
    proxy.fault(Fault::always(&corrupt.layers[2], Wrong::Corrupt(5000)));
    cases.push(("corrupted layer", through(&corrupt), &[1], "sha256"));

    let lost = fresh();
    proxy.fault(Fault::always(&lost.layers[3], status(404)).any_method());
    cases.push((
        "layer not in the registry",
        through(&lost),
        &[1, 69],
        "and not its blob sha256",
    ));

    let broken = fresh();
    proxy.fault(Fault::always(&broken.layers[3], status(500)).any_method());
    cases.push(("500 for a layer", through(&broken), &[69], "500"));

    let foreign = Image::shell("arm")
        .architecture("arm64")
        .push(registry, &format!("test/arm-{}:1", unique()));
    cases.push((
        "image for another platform",
        foreign.name.clone(),
        &[1],
        "arm64",
    ));

    let good = Layer::new().file("x", b"x", 0o644);
    let liar = Image::new()
        .layer(&good)
        .raw_layer(
            b"this is not gzip".to_vec(),
            &format!("sha256:{}", "1".repeat(64)),
        )
        .push(registry, &format!("test/liar-{}:1", unique()));
    cases.push(("layer that is no archive", liar.name.clone(), &[1], "layer"));

    let mut wrong_id = Image::shell("wrong-id");
    wrong_id = wrong_id.raw_layer(gzip_of_empty_tar(), &format!("sha256:{}", "2".repeat(64)));
    let wrong_id = wrong_id.push(registry, &format!("test/wrong-id-{}:1", unique()));
    cases.push((
        "layer whose diff id is a lie",
        wrong_id.name.clone(),
        &[1],
        "configuration says",
    ));

    let before = cluster.published().0.len();
    let mut complaints = Vec::new();
    for (what, name, codes, word) in &cases {
        let ended = pull(cluster, name);
        let lines = ended
            .stderr
            .lines()
            .filter(|line| line.starts_with("berth: "));
        let said = ended.stderr.to_lowercase().contains(word);
        if !codes.contains(&ended.code) || !said || lines.count() != 1 {
            complaints.push(format!(
                "{what}: expected code {codes:?} and '{word}' in one line: {ended}"
            ));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    for image in [
        &unauthorized,
        &truncated,
        &corrupt,
        &lost,
        &broken,
        &foreign,
        &liar,
        &wrong_id,
    ] {
        assert!(!is_published(cluster, &image.digest), "{}", image.name);
    }
    assert!(cluster.published().0.len() >= before);
    // What failed for a passing reason works when the reason has passed.
    proxy.behave();
    pull(cluster, &through(&truncated)).ok();
    pull(cluster, &through(&corrupt)).ok();
    let words = [&container(&through(&corrupt)), "sh", "-c", WHERE];
    assert_eq!(cluster.user("srun", &words).end().ok(), "VARIANT_ID=noisy");
}

fn gzip_of_empty_tar() -> Vec<u8> {
    use std::io::Write;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&[0; 1024]).unwrap();
    gzip.finish().unwrap()
}

#[test]
fn passing_trouble_of_a_registry_is_sat_out() {
    let cluster = &suite().cluster;
    let proxy = Proxy::start(cluster.registry());
    let image = noisy(cluster, 500_000);
    let slow_down = vec![("retry-after".to_owned(), "35.852µs".to_owned())];
    proxy.fault(Fault::some(
        &image.layers[1],
        1,
        Wrong::Status(429, slow_down),
    ));
    proxy.fault(Fault::some(&image.layers[2], 1, Wrong::Truncate(100_000)));
    proxy.fault(Fault::some(&image.layers[3], 1, Wrong::Status(503, vec![])));
    proxy.fault(Fault::some(&image.config, 1, Wrong::Drop));
    pull(cluster, &image.via(proxy.address())).ok();
    // What had arrived of the truncated layer was not asked for again.
    let counts = proxy.blobs();
    let (_, cut) = counts
        .iter()
        .find(|(digest, _)| *digest == image.layers[2])
        .unwrap();
    let whole = 500_000;
    assert!(cut.gets == 2 && cut.bytes < whole + 50_000, "{cut:?}");
}

#[test]
fn a_known_tag_is_served_while_the_registry_is_down() {
    let cluster = &suite().cluster;
    let proxy = Proxy::start(cluster.registry());
    let image = noisy(cluster, 10_000);
    let name = image.via(proxy.address());
    pull(cluster, &name).ok();
    proxy.refuse(true);
    pull(cluster, &name).ok();
    let words = [&container(&name), "sh", "-c", WHERE];
    assert_eq!(cluster.user("srun", &words).end().ok(), "VARIANT_ID=noisy");
}

#[test]
fn health_metrics_and_the_description_are_open_to_all() {
    let cluster = &suite().cluster;
    for path in ["/healthz", "/readyz", "/metrics", "/openapi.json"] {
        assert!(
            get(cluster, path).ok().starts_with("HTTP/1.1 200"),
            "{path}"
        );
    }
    let description = body(&get(cluster, "/openapi.json"));
    for path in [
        "/v1/pulls",
        "/v1/pulls/{id}",
        "/v1/pulls/{id}/events",
        "/v1/images",
        "/v1/pins",
        "/v1/resolve",
        "/v1/status",
    ] {
        assert!(
            description["paths"][path].is_object(),
            "{path} is not described"
        );
    }
    let metrics = get(cluster, "/metrics");
    assert!(metrics.says("# TYPE berth"), "{metrics}");
}

#[test]
fn a_pull_can_be_followed_to_its_end() {
    let cluster = &suite().cluster;
    let proxy = Proxy::start(cluster.registry());
    let image = noisy(cluster, 1 << 20);
    proxy.fault(Fault::always(&image.layers[3], Wrong::Hold(1000)));
    let socket = cluster.get("BERTH_SOCKET");
    let request = format!(
        "{{\"reference\":\"docker://{}\"}}",
        image.via(proxy.address())
    );
    let words = [
        "-sS",
        "--unix-socket",
        socket,
        "-H",
        "content-type: application/json",
        "-d",
        &request,
        "http://berth/v1/pulls",
    ];
    let started = cluster.user("curl", &words).end();
    let started: Value = serde_json::from_str(started.ok()).unwrap_or_else(|_| panic!("{started}"));
    let id = started["id"].as_str().unwrap_or_default();
    let url = format!("http://berth/v1/pulls/{id}/events");
    let words = ["-sSN", "--max-time", "60", "--unix-socket", socket, &url];
    let follower = cluster.user("curl", &words).start();
    wait_until("a layer is held", 60, || (proxy.held() > 0).then_some(()));
    let listed = body(&get(cluster, "/v1/pulls"));
    assert!(
        listed
            .as_array()
            .is_some_and(|all| all.iter().any(|pull| pull["id"] == id)),
        "{listed}"
    );
    proxy.release();
    let events = follower.end();
    assert!(
        events.says("event: progress") || events.says("event:progress"),
        "{events}"
    );
    let last = events.ok().rsplit("event:").next().unwrap_or_default();
    assert!(last.trim_start().starts_with("done"), "{events}");
    assert!(last.contains(&image.digest), "{events}");
}

#[test]
fn over_the_network_munge_says_who_asks() {
    let cluster = &suite().cluster;
    let config = fs::read_to_string(cluster.get("BERTH_CONFIG")).unwrap();
    let listen = config
        .lines()
        .find_map(|line| line.strip_prefix("listen = "))
        .unwrap();
    let address = listen.trim_matches('"');
    let ask = |headers: &[(&str, &str)]| {
        let answer =
            berth_tests::http::request(address, "GET", "/v1/images", headers, b"").unwrap();
        answer.head.status()
    };
    assert_eq!(ask(&[]), 401);
    assert_eq!(ask(&[("Authorization", "Munge MUNGE:AwQFAAC:")]), 401);
    // A credential of something else is none for this.
    let socket = cluster.get("BERTH_MUNGE_SOCKET");
    let words = ["-S", socket, "-s", "GET\n/v1/other\n"];
    let credential = cluster.user("munge", &words).end();
    let header = format!("Munge {}", credential.ok());
    assert_eq!(ask(&[("Authorization", &header)]), 401);
    let health = berth_tests::http::request(address, "GET", "/healthz", &[], b"").unwrap();
    assert_eq!(health.head.status(), 200);
}

#[test]
fn only_admins_remove_images() {
    let cluster = &suite().cluster;
    let image = noisy(cluster, 10_000);
    pull(cluster, &image.name).ok();
    let name = format!("docker://{}", image.name);
    let refused = cluster.berth(&["rm", &name]);
    assert_eq!(refused.code, 77, "{refused}");
    assert!(is_published(cluster, &image.digest));
    cluster.root("berth", &["rm", &name]).end().ok();
    assert!(!is_published(cluster, &image.digest));
    pull(cluster, &image.name).ok();
}
