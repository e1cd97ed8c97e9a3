//! Images on a node that has no store: from the daemon, on demand.

use berth_tests::image::{Layer, digest, noise};
use berth_tests::suite::{WHERE, container};
use berth_tests::{Cluster, Image, Options, wait_until};
use serde_json::Value;

const HIDDEN: &str = "/nonexistent/store";
/// Bytes of the image's big file: enough to be worth a trace.
const BIG: usize = 3 << 20;

/// Whether jobs find the store on this node; the daemon, once started, has it all the same.
fn show_store(cluster: &Cluster, shown: bool) {
    let file = cluster.folder().join("etc/berth.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let store = cluster.store().display().to_string();
    let text = match shown {
        true => text.replace(HIDDEN, &store),
        false => text.replace(&store, HIDDEN),
    };
    assert_ne!(text.contains(HIDDEN), shown);
    std::fs::write(&file, text).unwrap();
}

fn json(cluster: &Cluster, words: &[&str]) -> Option<Value> {
    let words = [&["--json"], words].concat();
    let ended = cluster.root("berth", &words).end();
    (ended.code == 0).then(|| serde_json::from_str(ended.ok()).unwrap())
}

/// The store as nodes have it is a copy, which fails under a running job.
#[test]
fn a_job_on_demand_outlives_its_store() {
    let words = ["--nodes", "1", "--berth-toml", "node.mount='lazy'"];
    let cluster = Cluster::own("test-lazy-store", &Options::new(&words));
    let big = noise(5, BIG);
    let layer = Layer::new().file("big", &big, 0o644);
    let image = Image::shell("store").layer(&layer);
    let image = image.push(cluster.registry(), "test/store:1");
    cluster.berth(&["pull", &image.name]).ok();
    let copy = cluster.folder().join("copy");
    let (from, to) = (cluster.store(), copy.display().to_string());
    let copied = cluster.root("cp", &["-a", from.to_str().unwrap(), &to]);
    copied.end().ok();
    let file = cluster.folder().join("etc/berth.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace(from.to_str().unwrap(), &to)).unwrap();
    let sum = digest(&big)["sha256:".len()..].to_owned();
    let script = format!(
        "#!/bin/sh\n#SBATCH {}\ntouch begun\nwhile [ ! -e end ]; do sleep 0.1; done\n\
         [ \"$(busybox sha256sum < /big)\" = '{sum}  -' ] || exit 9\n{WHERE}\n",
        container(&image.name)
    );
    let job = cluster.sbatch("store", &[], &script);
    wait_until("the job runs", 60, || {
        job.folder.join("begun").exists().then_some(())
    });
    let data = cluster
        .root("find", &[&to, "-name", "rootfs-*.squashfs"])
        .end();
    for data in data.ok().lines() {
        let data = std::fs::File::options().write(true).open(data).unwrap();
        data.set_len(4096).unwrap();
    }
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    std::fs::write(job.folder.join("end"), "").unwrap();
    let end = job.end();
    assert!(end.ok().contains("VARIANT_ID=store"), "{end:?}");
    let figures = cluster
        .root("berth", &["node", "status", "--metrics"])
        .end();
    let daemon = "berth_node_fetched_bytes_total{source=\"daemon\"} ";
    let fetched = figures.ok().lines().find_map(|l| l.strip_prefix(daemon));
    let fetched: usize = fetched.expect("from the daemon").parse().unwrap();
    assert!(fetched > BIG / 2, "{fetched} bytes");
    // A store that nodes share with a daemon that is down starts jobs as ever.
    std::fs::write(&file, text).unwrap();
    cluster.service("kill", "berthd");
    let option = container(&image.name);
    let ended = cluster.user("srun", &[&option, "sh", "-c", WHERE]).end();
    assert_eq!(ended.ok().trim(), "VARIANT_ID=store");
    cluster.assert_nodes_idle();
}

#[test]
fn a_job_on_a_node_without_the_store_reads_from_the_daemon_and_leaves_a_trace_and_a_copy() {
    let options = Options::new(&["--nodes", "1"])
        .setting("node.service.record_s=3")
        .setting("node.service.fill_bytes_per_s=1000000000");
    let cluster = Cluster::own("test-lazy", &options);
    show_store(&cluster, false);
    let big = noise(3, BIG);
    let layer = Layer::new().file("big", &big, 0o644);
    let image = Image::shell("lazy").layer(&layer);
    let image = image.push(cluster.registry(), "test/lazy:1");
    let sum = digest(&big)["sha256:".len()..].to_owned();
    let read = format!("busybox sha256sum < /big; {WHERE}");
    let option = container(&image.name);
    let ended = cluster.user("srun", &[&option, "sh", "-c", &read]).end();
    assert_eq!(ended.ok().trim(), format!("{sum}  -\nVARIANT_ID=lazy"));
    // All of it comes soon, and then the kernel serves it to the next job.
    let status = || json(&cluster, &["node", "status"]).unwrap();
    let mounts = |how: &str| {
        let mounts = status()["mounts"].as_array().unwrap().clone();
        mounts
            .into_iter()
            .filter(|mount| mount["how"] == how)
            .count()
    };
    assert_eq!(mounts("kernel") + mounts("cache"), 0);
    wait_until("a copy", 60, || {
        (status()["copies"]["count"] == 1).then_some(())
    });
    // The first start is recorded for the next ones.
    let trace = wait_until("a trace", 60, || json(&cluster, &["trace", &image.digest]));
    assert!(!trace["runs"].as_array().unwrap().is_empty());
    // Without store and daemon nobody says what the image is: the job ends, and not on the host.
    cluster.service("kill", "berthd");
    let again = cluster.user("srun", &[&option, "sh", "-c", &read]).end();
    show_store(&cluster, true);
    cluster.service("start", "berthd");
    show_store(&cluster, false);
    assert_ne!(again.code, 0, "{again}");
    assert!(again.stderr.contains("berth: "), "{again}");
    let ended = cluster.user("srun", &[&option, "sh", "-c", &read]).end();
    assert_eq!(ended.ok().trim(), format!("{sum}  -\nVARIANT_ID=lazy"));
    assert_eq!(mounts("cache"), 1);
    cluster.assert_nodes_idle();
}
