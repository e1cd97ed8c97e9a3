//! The node service under real jobs: what it keeps, and that no job ever depends on it.

use std::path::Path;

use berth_tests::cluster::repository;
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
    // A helper that waits for a next step of the kind is a user for half a minute.
    wait_until("no step uses a mount", 60, || {
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

/// How the last task's view came to be.
fn view(cluster: &Cluster) -> String {
    let log = cluster.log("berth-runtime");
    let last = log.lines().rfind(|line| line.contains(" view=")).unwrap();
    last.rsplit('=').next().unwrap().to_owned()
}

/// Processes of the steps' helper on standby: itself, and who serves or waits for steps.
fn helpers(cluster: &Cluster) -> usize {
    let config = cluster.get("BERTH_CONFIG");
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
    lines
        .filter(|line| line.contains("\0standby\0") && line.contains(config))
        .count()
}

#[test]
fn steps_of_a_kind_share_what_was_built_for_half_a_minute_and_others_do_not() {
    let cluster = Cluster::own("test-node-stays", &Options::new(&["--nodes", "1"]));
    let image = image(&cluster, "stays");
    let option = container(&image.name);
    let step = |words: &[&str]| {
        let words = [words, &["sh", "-c", WHERE]].concat();
        let ended = cluster.user("srun", &words).end();
        let mut lines = ended.ok().lines();
        assert!(lines.all(|line| line == "VARIANT_ID=stays"), "{ended}");
        view(&cluster)
    };
    // The half minute may be over on a busy machine, and tests beside this one mount things: then a later step does.
    let shared = |words: &[&str]| {
        wait_until("a step has what one before it left", 120, || {
            (step(words) == "before").then_some(())
        });
    };
    assert_eq!(step(&[&option]), "ahead");
    let given = mounts(&cluster)[0]["given"].as_u64().unwrap();
    shared(&[&option]);
    // It was another job's, and the service was told.
    let mount = &mounts(&cluster)[0];
    assert!(mount["given"].as_u64().unwrap() > given, "{mount:?}");
    // A test beside this one may make who waits leave: then one of a later step is looked for.
    wait_until("one user, who waits", 120, || {
        step(&[&option]);
        (mounts(&cluster)[0]["users"] == 1).then_some(())
    });
    // Two tasks, two steps at a time, another command.
    shared(&[&option, "--overcommit", "-n2"]);
    let both = format!("srun {option} sh -c '{WHERE}' & srun {option} sh -c '{WHERE}'; wait");
    let ended = cluster.user_sh(&both).end();
    assert_eq!(ended.ok().matches("VARIANT_ID=stays").count(), 2, "{ended}");
    shared(&[&option]);

    // Whatever is another wish is another view.
    let mounted = "--container-mounts=/tmp:/mnt";
    assert_eq!(step(&[&option, mounted]), "ahead");
    let seen = [
        "srun",
        &option,
        "sh",
        "-c",
        "ls -d /mnt/* >/dev/null 2>&1 || echo nothing",
    ];
    let ended = cluster.user(seen[0], &seen[1..]).end();
    assert_eq!(ended.ok().trim(), "nothing");
    let there = cluster.user_sh(&format!("cd /usr && srun {option} sh -c '{WHERE}; pwd'"));
    let there = there.end();
    assert!(there.ok().trim().ends_with("/usr"), "{there}");
    assert_eq!(view(&cluster), "ahead");
    // Nor is another user served with it.
    let root = cluster.root("srun", &[&option, "sh", "-c", "id -u"]).end();
    assert_eq!(root.ok().trim(), "0");
    assert_ne!(view(&cluster), "before");
    // What a user writes is one step's.
    for _ in 0..2 {
        let write = "test ! -e /tmp2 && mkdir /tmp2";
        let words = [&option, "--container-writable", "sh", "-c", write];
        cluster.user("srun", &words).end().ok();
        assert_ne!(view(&cluster), "before");
    }

    // The site has another configuration from now on.
    shared(&[&option]);
    let config = cluster.get("BERTH_CONFIG");
    let text = std::fs::read_to_string(config).unwrap();
    std::fs::write(config, text + "# changed\n").unwrap();
    assert_eq!(step(&[&option]), "ahead");
    // Nobody stays where mounts are to be let go of, nor without the one who knows.
    shared(&[&option]);
    let drained = cluster.root("berth", &["node", "drain"]).end();
    assert_eq!(drained.code, 0, "who waited left at once: {drained}");
    assert!(mounts(&cluster).is_empty());
    wait_until("one helper", 10, || (helpers(&cluster) == 1).then_some(()));
    assert_eq!(step(&[&option]), "ahead");
    assert_eq!(step(&[&option]), "ahead");
    cluster.service("stop", "node");
    cluster.service("start", "node");
    assert_eq!(step(&[&option]), "ahead");
    shared(&[&option]);
    cluster.service("kill", "standby");
    wait_until("who waited leaves", 10, || {
        (helpers(&cluster) == 0).then_some(())
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
    // Its figures for a collector, which are there as long as it is.
    let collector = cluster.scratch("collector");
    let script = repository().join("scripts/packaging/berth-node-metrics");
    let words = [script.to_str().unwrap(), collector.to_str().unwrap()];
    let figures = || cluster.root("sh", &words).end();
    let file = collector.join("berth.prom");
    figures().ok();
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("\nberth_node_mounts_used 1\n"), "{text}");
    cluster.service("kill", "node");
    assert_ne!(figures().code, 0);
    assert_eq!(std::fs::read_dir(&collector).unwrap().count(), 0);
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
