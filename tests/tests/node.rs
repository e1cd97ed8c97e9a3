//! The node service under real jobs: what it keeps, and that no job ever depends on it.

use std::path::Path;

use berth_tests::image::{Layer, Pushed, digest, noise};
use berth_tests::suite::{WHERE, container};
use berth_tests::{Cluster, Image, Options, wait_until};
use serde_json::Value;

/// Bytes of the image's big file.
const BIG: usize = 8 << 20;

/// What `berth node status` says of each mount.
fn mounts(cluster: &Cluster) -> Vec<Value> {
    let ended = cluster.root("berth", &["--json", "node", "status"]).end();
    let status: Value = serde_json::from_str(ended.ok()).unwrap();
    status["mounts"].as_array().unwrap().clone()
}

fn unused(cluster: &Cluster) {
    wait_until("no step uses a mount", 30, || {
        mounts(cluster)
            .iter()
            .all(|mount| mount["users"] == 0)
            .then_some(())
    });
}

/// A job that goes on until its folder has a file `end`, and checks the image's big file all the while.
fn reading_job(name: &str) -> String {
    let sum = digest(&noise(3, BIG));
    let sum = &sum["sha256:".len()..];
    let check = format!("[ \"$(busybox sha256sum < /big)\" = '{sum}  -' ] || exit 9");
    format!(
        "#!/bin/sh\n#SBATCH {}\ntouch begun\nwhile [ ! -e end ]; do {check}; sleep 0.1; done\n{check}\n{WHERE}\n",
        container(name)
    )
}

fn begun(folder: &Path) {
    wait_until("the job runs", 60, || {
        folder.join("begun").exists().then_some(())
    });
}

fn image(cluster: &Cluster, variant: &str) -> Pushed {
    let layer = Layer::new().file("big", &noise(3, BIG), 0o644);
    Image::shell(variant)
        .layer(&layer)
        .push(cluster.registry(), &format!("test/{variant}:1"))
}

#[test]
fn the_second_job_gets_the_mount_that_the_first_one_left() {
    let cluster = Cluster::own("test-node-kept", &Options::new(&["--nodes", "1"]));
    let image = image(&cluster, "kept");
    let option = container(&image.name);
    for _ in 0..2 {
        let ended = cluster.user("srun", &[&option, "sh", "-c", WHERE]).end();
        assert_eq!(ended.ok().trim(), "VARIANT_ID=kept");
    }
    let kept = mounts(&cluster);
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(kept[0]["given"], 2, "{kept:?}");
    assert_eq!(kept[0]["digest"], image.digest.as_str());
    unused(&cluster);
    // Users see none of it in the node's mount table, and get nothing from the service itself.
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(&image.digest[7..]), "{table}");
    for command in ["status", "drain"] {
        let ended = cluster.berth(&["node", command]);
        assert_eq!(ended.code, 77, "{ended}");
    }

    // Drained: what is used stays, and goes with its job.
    let job = cluster.sbatch("drain", &[], &reading_job(&image.name));
    begun(&job.folder);
    let drained = cluster.root("berth", &["node", "drain"]).end();
    assert_eq!(drained.code, 1, "{drained}");
    std::fs::write(job.folder.join("end"), "").unwrap();
    assert_eq!(job.end().exit, "0:0");
    wait_until("everything is let go of", 30, || {
        let drained = cluster.root("berth", &["node", "drain"]).end();
        (drained.code == 0 && cluster.leftovers().is_empty()).then_some(())
    });
    cluster.assert_nodes_idle();
}

#[test]
fn a_job_outlives_the_service_and_others_start_without_it() {
    let cluster = Cluster::own("test-node-gone", &Options::new(&["--nodes", "1"]));
    let image = image(&cluster, "gone");
    let option = container(&image.name);
    let job = cluster.sbatch("gone", &[], &reading_job(&image.name));
    begun(&job.folder);
    cluster.service("kill", "node");
    let ended = cluster.user("srun", &[&option, "sh", "-c", WHERE]).end();
    assert_eq!(ended.ok().trim(), "VARIANT_ID=gone");
    cluster.service("start", "node");
    let ended = cluster.user("srun", &[&option, "sh", "-c", WHERE]).end();
    assert_eq!(ended.ok().trim(), "VARIANT_ID=gone");
    assert_eq!(mounts(&cluster).len(), 1);
    std::fs::write(job.folder.join("end"), "").unwrap();
    let end = job.end();
    assert!(end.ok().contains("VARIANT_ID=gone"), "{end:?}");
    cluster.assert_nodes_idle();
}

#[test]
fn a_job_on_demand_outlives_its_servers_and_the_keeper() {
    let words = ["--nodes", "1", "--berth-toml", "node.mount='lazy'"];
    let cluster = Cluster::own("test-node-lazy", &Options::new(&words));
    let image = image(&cluster, "lazy");
    let job = cluster.sbatch("lazy", &[], &reading_job(&image.name));
    begun(&job.folder);
    assert_eq!(mounts(&cluster)[0]["how"], "lazy");
    let server = || {
        let ended = cluster.root("berth", &["--json", "node", "status"]).end();
        let status: Value = serde_json::from_str(ended.ok()).unwrap();
        status["server"].as_u64()
    };
    for _ in 0..5 {
        let pid = wait_until("a server", 30, server).to_string();
        std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        cluster.root("kill", &["-9", &pid]).end().ok();
        wait_until("another server", 30, || {
            server().filter(|other| other.to_string() != pid)
        });
    }
    cluster.service("kill", "node");
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    cluster.service("start", "node");
    let option = container(&image.name);
    let ended = cluster.user("srun", &[&option, "sh", "-c", WHERE]).end();
    assert_eq!(ended.ok().trim(), "VARIANT_ID=lazy");
    std::fs::write(job.folder.join("end"), "").unwrap();
    let end = job.end();
    assert!(end.ok().contains("VARIANT_ID=lazy"), "{end:?}");
    cluster.assert_nodes_idle();
}

#[test]
fn a_user_finds_an_image_at_a_folder_of_their_own() {
    let cluster = Cluster::own("test-node-path", &Options::new(&["--nodes", "1"]));
    let image = image(&cluster, "mounted");
    let reference = format!("docker://{}", image.name);
    let ended = cluster.berth(&["path", "--mounted", &reference]);
    let folder = ended.ok().trim().to_owned();
    let release = format!("cat {folder}/etc/os-release");
    let seen = cluster.user_sh(&release).end();
    assert!(seen.ok().contains("VARIANT_ID=mounted"), "{seen}");
    let again = cluster.berth(&["path", "--mounted", &reference]);
    assert_eq!(again.ok().trim(), folder, "the same folder again");
    let flags = cluster
        .root("findmnt", &["-no", "OPTIONS", "-M", &folder])
        .end();
    for flag in ["ro", "nosuid", "nodev"] {
        assert!(flags.ok().split(',').any(|f| f.trim() == flag), "{flags}");
    }
    // Others do not get in, nor does the user get to change anything on the way.
    let other = [
        "--reuid=64999",
        "--regid=64999",
        "--clear-groups",
        "ls",
        &folder,
    ];
    let ended = cluster.root("setpriv", &other).end();
    assert_ne!(ended.code, 0, "{ended}");
    let parent = Path::new(&folder).parent().unwrap().display();
    let tries =
        format!("touch {parent}/x; mkdir {parent}/y; chmod 777 {parent}; mv {folder} {parent}/z");
    assert_ne!(cluster.user_sh(&tries).end().code, 0);
    assert_eq!(std::fs::read_dir(parent.to_string()).unwrap().count(), 1);
    // An image that is nowhere is told as such.
    let none = format!("sha256:{}", "0".repeat(64));
    let ended = cluster.berth(&["path", "--mounted", &none]);
    assert_eq!(ended.code, 1, "{ended}");
    // In use it stays; then it goes.
    let held = std::fs::File::open(&folder).unwrap();
    let drained = cluster.root("berth", &["node", "drain"]).end();
    assert_eq!(drained.code, 1, "{drained}");
    drop(held);
    wait_until("the folder is taken down", 30, || {
        let drained = cluster.root("berth", &["node", "drain"]).end();
        (drained.code == 0 && cluster.leftovers().is_empty()).then_some(())
    });
}
