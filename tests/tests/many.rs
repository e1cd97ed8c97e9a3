//! Many nodes at once: 64 slurmd on this machine, and one image that nobody has yet.

use berth_tests::image::{Layer, noise};
use berth_tests::suite::container;
use berth_tests::{Cluster, Image, Options, Proxy};

#[test]
fn five_hundred_cold_starts_fetch_each_blob_once_and_make_one_image() {
    let cluster = Cluster::own("test-many", &Options::new(&["--nodes", "64"]));
    let proxy = Proxy::start(cluster.registry());
    let ballast =
        |seed| Layer::new().file(&format!("ballast-{seed}"), &noise(seed, 3 << 20), 0o644);
    let image = Image::shell("many")
        .layer(&ballast(1))
        .layer(&ballast(2))
        .push(cluster.registry(), "test/many:1");
    let option = container(&image.via(proxy.address()));
    let words = [
        "-N64",
        "-n512",
        &option,
        "grep",
        "VARIANT_ID",
        "/etc/os-release",
    ];
    let ended = cluster.user("srun", &words).seconds(300).end();
    let right = ended
        .ok()
        .lines()
        .filter(|line| *line == "VARIANT_ID=many")
        .count();
    assert_eq!(right, 512, "{}", ended.stderr);

    let blobs = proxy.blobs();
    assert_eq!(blobs.len(), image.layers.len() + 1, "{blobs:?}");
    for (digest, count) in &blobs {
        assert_eq!(count.gets, 1, "{digest} was fetched {} times", count.gets);
    }
    let (images, unfinished) = cluster.published();
    assert_eq!(
        (images.len(), unfinished.len()),
        (1, 0),
        "{images:?} {unfinished:?}"
    );
    cluster.assert_nodes_idle();
    cluster.assert_unused(&image.digest);
}
