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

#[test]
fn a_job_on_a_node_without_the_store_reads_from_the_daemon_and_leaves_a_trace() {
    let options = Options::new(&["--nodes", "1"]).setting("node.service.record_s=3");
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
    let status = json(&cluster, &["node", "status"]).unwrap();
    assert_eq!(status["mounts"][0]["how"], "lazy", "{status}");
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
    cluster.assert_nodes_idle();
}
