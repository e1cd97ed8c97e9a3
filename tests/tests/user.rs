//! Images without root and without the store: `berth exec` and `berth mount` of an ordinary user, and jobs that run
//! a SquashFS file of their user's own.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use berth_tests::cluster::unique;
use berth_tests::image::{Layer, noise};
use berth_tests::suite::{WHERE, suite};
use berth_tests::{Ended, Image, wait_until};

/// A copy of the shell image in a folder of the user's, as a file of his own.
fn own_file(test: &str) -> PathBuf {
    let suite = suite();
    let path = suite.cluster.berth(&["path", &suite.shell.name]);
    let file = suite.cluster.scratch(test).join("my.sqsh");
    fs::copy(path.ok(), &file).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    give(&file);
    file
}

/// Makes a file the user's.
fn give(file: &Path) {
    use std::os::unix::fs::{MetadataExt, lchown};
    let folder = fs::metadata(file.parent().unwrap()).unwrap();
    lchown(file, Some(folder.uid()), Some(folder.gid())).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn exec(words: &[&str]) -> Ended {
    suite().cluster.berth(&[&["exec"], words].concat())
}

fn srun(container: &Path, options: &[&str], command: &str) -> Ended {
    let container = format!("--container={}", container.display());
    let mut words = vec![container.as_str()];
    words.extend(options);
    words.extend(["sh", "-c", command]);
    suite().cluster.user("srun", &words).end()
}

/// Processes that have this file open.
fn holders_of(file: &Path) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|p| p.file_name().to_str()?.parse::<u32>().ok());
    let holds = |pid: &u32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        (open.flatten()).any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == file))
    };
    numbers.filter(holds).collect()
}

/// Those among them that are `berth-fuse`.
fn servers_of(file: &Path) -> Vec<u32> {
    let mut holders = holders_of(file);
    let program = |pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    holders.retain(|pid| program(pid).ends_with("berth-fuse"));
    holders
}

fn wait_nothing_left(file: &Path) {
    wait_until("the servers of the image are gone", 30, || {
        servers_of(file).is_empty().then_some(())
    });
}

#[test]
fn exec_shows_the_image_as_a_job_would() {
    let suite = suite();
    let name = format!("docker://{}", suite.shell.name);
    let look = format!(
        "{WHERE}; echo $IMAGE_SAYS $MINE; id -u; pwd; touch /new 2>&1; grep CapEff /proc/self/status; ls -d /dev/shm /tmp"
    );
    let ended = (suite.cluster)
        .user("berth", &["exec", &name, "sh", "-c", &look])
        .env("MINE", "kept")
        .end();
    let uid = suite.cluster.user("id", &["-u"]).end();
    let home = format!("/home/{}", suite.cluster.get("BERTH_USER"));
    let lines: Vec<&str> = ended.ok().lines().collect();
    assert_eq!(
        lines,
        [
            "VARIANT_ID=shell",
            "ahoy kept",
            uid.ok(),
            &home,
            "touch: /new: Read-only file system",
            "CapEff:\t0000000000000000",
            "/dev/shm",
            "/tmp",
        ],
        "{ended}"
    );
}

#[test]
fn exec_ends_as_its_command_ends() {
    let name = &suite().shell.name;
    assert_eq!(exec(&[name, "sh", "-c", "exit 7"]).code, 7);
    assert_eq!(exec(&[name, "sh", "-c", "kill -9 $$"]).code, 137);
    let absent = exec(&[name, "no-such-command"]);
    assert_eq!(absent.code, 127, "{absent}");
    assert_eq!(absent.stderr.lines().count(), 1, "{absent}");
    assert_eq!(exec(&[name, "/etc/os-release"]).code, 126);
    let absent = exec(&["./absent.sqsh", "true"]);
    assert_eq!(absent.code, 1, "{absent}");
    assert!(absent.says("absent.sqsh"), "{absent}");
}

#[test]
fn a_machine_that_forbids_user_namespaces_is_named_in_one_line() {
    let file = own_file("exec-forbidden");
    // The setting holds for what is made below the namespace in which it is made.
    let script = format!(
        "echo 0 > /proc/sys/user/max_user_namespaces && exec berth exec {} true",
        file.display()
    );
    let words = ["--user", "--map-root-user", "sh", "-c", &script];
    let ended = suite().cluster.user("unshare", &words).end();
    assert_eq!(ended.code, 69, "{ended}");
    assert!(ended.says("user.max_user_namespaces = 0"), "{ended}");
    assert_eq!(ended.stderr.lines().count(), 2, "{ended}");
    wait_nothing_left(&file);
}

#[test]
fn exec_takes_a_jobs_options() {
    let suite = suite();
    let name = &suite.shell.name;
    let data = suite.cluster.scratch("exec-mounts");
    fs::write(data.join("here"), "found\n").unwrap();
    let mounts = format!("{}:/some/where:ro", text(&data));
    let words = ["--mounts", &mounts, "--workdir", "/some/where", name];
    let ended = exec(&[&words[..], &["sh", "-c", "cat here; touch new 2>&1"]].concat());
    assert!(ended.says("found\n") && ended.says("Read-only"), "{ended}");
    let write = "echo mine > /etc/new && cat /etc/new && touch /at-root && cp /etc/new /etc/os-release && cat /etc/os-release";
    let ended = exec(&["--writable", name, "sh", "-c", write]);
    assert_eq!(ended.ok(), "mine\nmine");
    assert!(exec(&[name, "sh", "-c", "ls /etc/new"]).code != 0);
    let refused = exec(&["--mounts", "/root/x", name, "true"]);
    assert_eq!(refused.code, 77, "{refused}");
}

#[test]
fn nothing_stays_of_an_exec_that_is_killed() {
    let file = own_file("exec-killed");
    let started = file.with_file_name("started");
    let script = format!("echo > {}; exec sleep 600", started.display());
    let words = ["exec", text(&file), "sh", "-c", &script];
    let running = suite().cluster.user("berth", &words).start();
    wait_until("the command runs", 30, || started.exists().then_some(()));
    assert!(!servers_of(&file).is_empty());
    running.signal("KILL");
    assert_eq!(running.end().code, 137);
    wait_nothing_left(&file);
}

#[test]
fn an_exec_outlives_its_server() {
    let file = own_file("exec-server");
    let (started, go) = (file.with_file_name("started"), file.with_file_name("go"));
    let script = format!(
        "echo > {}; while ! test -e {}; do sleep 0.1; done; {WHERE}; cat /bin/busybox | wc -c",
        started.display(),
        go.display()
    );
    let words = ["exec", text(&file), "sh", "-c", &script];
    let running = suite().cluster.user("berth", &words).start();
    wait_until("the command runs", 30, || started.exists().then_some(()));
    // The keeper is the older one.
    let servers = servers_of(&file);
    let server = servers.iter().max().unwrap();
    suite()
        .cluster
        .root("kill", &["-9", &server.to_string()])
        .end()
        .ok();
    wait_until("another server runs", 30, || {
        (servers_of(&file).iter().max() != Some(server)).then_some(())
    });
    fs::write(go, "").unwrap();
    let size = fs::metadata("/bin/busybox").unwrap().len();
    assert_eq!(running.end().ok(), format!("VARIANT_ID=shell\n{size}"));
    wait_nothing_left(&file);
}

#[test]
fn exec_shares_the_mount_that_the_node_keeps_for_jobs() {
    let suite = suite();
    let cluster = &suite.cluster;
    let image = suite.push_shell(&format!("kept-{}", berth_tests::cluster::unique()));
    let path = PathBuf::from(cluster.berth(&["path", &image.name]).ok());
    let folder = cluster.scratch("exec-kept");
    let (started, go) = (folder.join("started"), folder.join("go"));
    let script = format!(
        "echo > {}; while ! test -e {}; do sleep 0.1; done; {WHERE}",
        started.display(),
        go.display()
    );
    let words = ["exec", &image.name, "sh", "-c", &script];
    let running = cluster.user("berth", &words).start();
    wait_until("the command runs", 60, || started.exists().then_some(()));
    let own = servers_of(&path);
    assert!(own.is_empty(), "{own:?}");
    let shown = cluster.root("berth", &["inspect", &image.name]).end();
    let mounted = shown.ok().lines().find(|l| l.starts_with("mounted here:"));
    assert!(
        mounted.is_some_and(|l| l.contains("by the kernel")),
        "{shown}"
    );
    fs::write(go, "").unwrap();
    assert!(running.end().ok().starts_with("VARIANT_ID=kept-"));
}

#[test]
fn files_that_are_no_images_are_refused_and_never_hang() {
    let file = own_file("exec-hostile");
    let folder = file.parent().unwrap().to_owned();
    let good = fs::read(&file).unwrap();
    let make = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        give(&path);
        path
    };
    let noise = berth_tests::image::noise(7, 300_000);
    let cut = &good[..good.len() / 3];
    // A superblock whose tables lie nowhere, and one whose root is somewhere else.
    let mut tables = good.clone();
    tables[64..96].fill(0xff);
    let mut root = good.clone();
    root[32..40].copy_from_slice(&0x1234_5678_u64.to_le_bytes());
    let files = [
        make("noise.sqsh", &noise),
        make("empty.sqsh", b""),
        make("cut.sqsh", cut),
        make("tables.sqsh", &tables),
        make("root.sqsh", &root),
    ];
    for path in &files {
        let ended = exec(&[text(path), "true"]);
        assert!(matches!(ended.code, 1 | 70), "{}: {ended}", path.display());
        assert_eq!(ended.stderr.lines().count(), 1, "{ended}");
        let ended = srun(path, &[], "true");
        assert_eq!(ended.code, 1, "{}: {ended}", path.display());
        assert!(ended.says("cannot use the image"), "{ended}");
    }
    // Damage that shows only later is an error of the one who reads it.
    let mut data = good.clone();
    data[200..4000].fill(0x55);
    let data = make("data.sqsh", &data);
    let ended = exec(&[text(&data), "sh", "-c", WHERE]);
    assert!(ended.code != 0, "{ended}");
    for path in files.iter().chain([&data]) {
        wait_nothing_left(path);
    }
    suite().cluster.assert_nodes_idle();
}

/// The configuration of a login node that lacks the store's filesystem and the node service.
fn without_store(folder: &Path) -> PathBuf {
    let suite = suite();
    let config = fs::read_to_string(suite.cluster.folder().join("etc/berth.toml")).unwrap();
    let store = suite.cluster.store();
    assert!(config.contains(text(&store)), "{config}");
    let elsewhere = config.replace(text(&store), "/nowhere/store");
    let elsewhere = elsewhere.replace("node.sock", "none.sock");
    let path = folder.join("berth.toml");
    fs::write(&path, elsewhere).unwrap();
    path
}

#[test]
fn exec_and_mount_fetch_on_demand_where_the_store_is_not() {
    let suite = suite();
    let folder = suite.cluster.scratch("exec-demand");
    let config = without_store(&folder);
    let name = &suite.shell.name;
    let berth = |words: &[&str]| {
        let words = [&["--config", text(&config)], words].concat();
        let run = suite.cluster.user("berth", &words);
        run.env("XDG_CACHE_HOME", &folder).end()
    };
    let look = format!("{WHERE}; cat /bin/busybox | wc -c; echo $IMAGE_SAYS");
    let size = fs::metadata("/bin/busybox").unwrap().len();
    let expected = format!("VARIANT_ID=shell\n{size}\nahoy");
    assert_eq!(berth(&["exec", name, "sh", "-c", &look]).ok(), expected);
    let kept = || {
        let files = fs::read_dir(folder.join("berth")).unwrap().flatten();
        let bytes = files.map(|file| file.metadata().unwrap().len());
        bytes.sum::<u64>()
    };
    assert!(kept() > size / 4, "{} bytes are kept", kept());
    assert_eq!(berth(&["exec", name, "sh", "-c", &look]).ok(), expected);
    let at = folder.join("image");
    fs::create_dir(&at).unwrap();
    give(&at);
    berth(&["mount", name, text(&at)]).ok();
    let release = suite
        .cluster
        .user("cat", &[text(&at.join("etc/os-release"))])
        .end();
    berth(&["umount", text(&at)]).ok();
    assert!(release.ok().contains("VARIANT_ID=shell"), "{release}");
    // Another site's key: the daemon's word is not enough.
    let other = folder.join("other.pub");
    let key = suite
        .cluster
        .root("openssl", &["genpkey", "-algorithm", "ed25519"])
        .end();
    let private = folder.join("other.key");
    fs::write(&private, key.ok()).unwrap();
    let words = [
        "pkey",
        "-pubout",
        "-in",
        text(&private),
        "-out",
        text(&other),
    ];
    suite.cluster.root("openssl", &words).end().ok();
    let keys = suite.cluster.folder().join("etc/site.pub");
    let changed = fs::read_to_string(&config)
        .unwrap()
        .replace(text(&keys), text(&other));
    assert!(changed.contains(text(&other)), "{changed}");
    fs::write(&config, changed).unwrap();
    let refused = berth(&["exec", name, "true"]);
    assert_eq!(refused.code, 77, "{refused}");
}

#[test]
fn trace_records_what_a_command_reads_with_the_store_and_without() {
    let suite = suite();
    let folder = suite.cluster.scratch("trace");
    let bare = without_store(&folder);
    let site = suite.cluster.folder().join("etc/berth.toml");
    // New ones each time: the daemon keeps traces.
    let image = |variant: &str| {
        let layer = Layer::new().file("big", &noise(7, 4 << 20), 0o644);
        let layer = layer.file("new", unique().as_bytes(), 0o644);
        let image = Image::shell(variant).layer(&layer);
        let image = image.push(suite.cluster.registry(), &format!("test/{variant}:1"));
        suite.cluster.berth(&["pull", &image.name]).ok();
        image
    };
    for (config, variant) in [(&site, "trace-store"), (&bare, "trace-daemon")] {
        let image = image(variant);
        let berth = |words: &[&str]| {
            let words = [&["--config", text(config)], words].concat();
            let run = suite.cluster.user("berth", &words);
            run.env("XDG_CACHE_HOME", &folder).end()
        };
        let bytes = || {
            let ended = berth(&["--json", "trace", &image.digest]);
            let trace: serde_json::Value = serde_json::from_str(ended.ok()).unwrap();
            let runs = trace["runs"].as_array().unwrap().clone();
            let chunks = |run: &serde_json::Value| run[1].as_u64().unwrap();
            runs.iter().map(chunks).sum::<u64>() * 65536
        };
        // What reads little is traced as little; its exit code counts, and so it does where no trace is kept.
        let ended = berth(&["trace", &image.name, "--", "sh", "-c", "exit 3"]);
        assert_eq!(ended.code, 3, "{ended}");
        assert!(ended.stderr.contains("is kept"), "{ended}");
        let small = bytes();
        let read = "cat /big > /dev/null";
        let again = berth(&["trace", &image.name, "--", "sh", "-c", read]);
        assert_eq!(again.code, 1, "{again}");
        assert!(again.stderr.contains("has a trace already"), "{again}");
        // An admin's takes its place, on a cache that is warm.
        let words = ["--config", text(config), "trace", &image.name, "--"];
        let words = [&words[..], &["sh", "-c", read]].concat();
        let run = suite.cluster.root("berth", &words);
        run.env("XDG_CACHE_HOME", &folder).end().ok();
        let large = bytes();
        assert!(small > 0 && large > small, "{small} {large}");
    }
    // No signal is kept from the command, by `berth exec` either.
    let masks = ["grep", "SigBlk", "/proc/self/status"];
    for words in [
        &["trace", &suite.shell.name, "--"][..],
        &["exec", &suite.shell.name],
    ] {
        let words = [words, &["busybox"], &masks].concat();
        let ended = suite.cluster.berth(&words);
        let blocked = ended.stdout.trim();
        assert_eq!(blocked, "SigBlk:\t0000000000000000", "{ended}");
    }
    // Who ends it ends the command, and what was read until then counts.
    let (image, begun) = (image("trace-ended"), folder.join("begun"));
    let script = format!(
        "berth trace {} -- sh -c 'echo > {1}; exec sleep 1000' & trace=$!\n\
         until [ -e {1} ]; do sleep 0.05; done; kill $trace; wait $trace; echo $?",
        image.name,
        begun.display()
    );
    let ended = suite.cluster.user_sh(&script).end();
    assert_eq!(ended.ok().trim(), "143", "{ended}");
    assert!(ended.stderr.contains("is kept"), "{ended}");
    let ended = suite
        .cluster
        .berth(&["trace", text(&own_file("trace-own")), "--", "true"]);
    assert_eq!(ended.code, 2, "{ended}");
}

#[test]
fn mount_and_umount_of_an_ordinary_user() {
    let suite = suite();
    let folder = suite.cluster.scratch("mount");
    let at = folder.join("image");
    fs::create_dir(&at).unwrap();
    give(&at);
    let mounted = suite
        .cluster
        .berth(&["mount", &suite.shell.name, text(&at)]);
    assert_eq!(mounted.ok(), text(&at));
    let release = at.join("etc/os-release");
    let shown = suite.cluster.user("cat", &[text(&release)]).end();
    assert!(shown.ok().contains("VARIANT_ID=shell"), "{shown}");
    let written = suite.cluster.user("touch", &[text(&at.join("new"))]).end();
    assert!(written.says("Read-only file system"), "{written}");
    suite.cluster.berth(&["umount", text(&at)]).ok();
    let again = suite.cluster.berth(&["umount", text(&at)]);
    assert_eq!(again.code, 2, "{again}");
    assert!(fs::read_dir(&at).unwrap().next().is_none());
    let image = PathBuf::from(suite.cluster.berth(&["path", &suite.shell.name]).ok());
    wait_until("its server is gone", 30, || {
        let mounts = |pid: &u32| {
            let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.contains(text(&at))
        };
        (!servers_of(&image).iter().any(mounts)).then_some(())
    });
    let nowhere = suite
        .cluster
        .berth(&["mount", &suite.shell.name, "/nowhere"]);
    assert_eq!(nowhere.code, 2, "{nowhere}");
}

#[test]
fn a_job_runs_in_a_file_of_its_users_on_every_node() {
    let file = own_file("job-own");
    let kernels = || suite().cluster.root("losetup", &["-j", text(&file)]).end();
    let look = format!("{WHERE}; id -u; cat /bin/busybox | wc -c; touch /new 2>&1");
    let ended = srun(&file, &["-N2", "-n4", "--overcommit"], &look);
    let size = fs::metadata("/bin/busybox").unwrap().len().to_string();
    let count = |line: &str| ended.stdout.lines().filter(|l| *l == line).count();
    assert_eq!(count("VARIANT_ID=shell"), 4, "{ended}");
    assert_eq!(count(&size), 4, "{ended}");
    assert!(ended.says("Read-only file system"), "{ended}");
    assert_eq!(kernels().ok(), "", "the kernel's driver must not see it");
    wait_nothing_left(&file);
    // Batch script and nested steps run in it as well.
    let option = format!("--container={}", file.display());
    let script = format!("#!/bin/sh\n{WHERE}\nsrun -N2 sh -c '{WHERE}'\n");
    let job = suite()
        .cluster
        .sbatch("job-own", &["-N2", &option], &script);
    let end = job.end();
    assert_eq!(end.ok().matches("VARIANT_ID=shell").count(), 3, "{end:?}");
    wait_nothing_left(&file);
    suite().cluster.assert_nodes_idle();
}

#[test]
fn a_job_gets_no_file_that_its_user_may_not_read() {
    let suite = suite();
    let folder = suite.cluster.scratch("job-refused");
    let secret = folder.join("secret.sqsh");
    fs::copy("/bin/busybox", &secret).unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let link = folder.join("link.sqsh");
    symlink(&secret, &link).unwrap();
    let magic = folder.join("magic.sqsh");
    symlink("/proc/self/exe", &magic).unwrap();
    let fifo = folder.join("fifo.sqsh");
    suite
        .cluster
        .root("mkfifo", &["-m", "666", text(&fifo)])
        .end()
        .ok();
    for (path, code, why) in [
        (&secret, 77, "permission denied"),
        (&link, 77, "permission denied"),
        (&magic, 2, "too many levels of symbolic links"),
        (&fifo, 2, "is not a file"),
        (&folder, 2, "is not a file"),
        (&folder.join("absent.sqsh"), 2, "no such file"),
        (&PathBuf::from("/dev/null"), 2, "is not a file"),
    ] {
        let ended = srun(path, &[], WHERE);
        assert_eq!(ended.code, code, "{}: {ended}", path.display());
        assert!(ended.says(why), "{}: {ended}", path.display());
        assert!(!ended.says("VARIANT_ID"), "{ended}");
    }
    suite.cluster.assert_nodes_idle();
}

#[test]
fn a_file_that_changes_under_its_job_harms_that_job_alone() {
    let file = own_file("job-changed");
    let (started, go) = (file.with_file_name("started"), file.with_file_name("go"));
    let script = format!(
        "echo > {}; while ! test -e {}; do sleep 0.1; done; cat /bin/busybox | wc -c; echo the end",
        started.display(),
        go.display()
    );
    let container = format!("--container={}", file.display());
    let words = [container.as_str(), "sh", "-c", &script];
    let running = suite().cluster.user("srun", &words).start();
    wait_until("the task runs", 60, || started.exists().then_some(()));
    // The user can neither stop nor end what serves the file: that could hang the node.
    let servers = servers_of(&file);
    assert!(!servers.is_empty());
    // Nor does anybody else hold the file: closing it may be for the user to delay.
    assert_eq!(holders_of(&file), servers);
    let service = suite().cluster.folder().join("etc/berth.toml");
    let service = fs::read_to_string(service).unwrap();
    for pid in &servers {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let value = |name: &str| {
            let mut lines = status.lines();
            let line = lines.find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default()
                .split_whitespace()
                .next()
                .unwrap_or_default()
        };
        assert_eq!(
            (value("Seccomp:"), value("NoNewPrivs:")),
            ("2", "1"),
            "{status}"
        );
        let uid = value("Uid:");
        assert!(uid.parse::<u32>().unwrap() > 0, "{status}");
        assert!(!service.contains(uid), "{status}");
    }
    for pid in servers {
        let ended = suite()
            .cluster
            .user("kill", &["-STOP", &pid.to_string()])
            .end();
        assert!(ended.says("not permitted"), "{ended}");
    }
    let length = fs::metadata(&file).unwrap().len();
    fs::write(&file, vec![0x55; usize::try_from(length / 2).unwrap()]).unwrap();
    fs::write(&go, "").unwrap();
    // The shell may be gone with its pages, or it sees a file that cannot be read; it ends in time.
    running.end();
    wait_nothing_left(&file);
    suite().cluster.assert_nodes_idle();
}

#[test]
fn a_cancelled_job_leaves_no_server() {
    let file = own_file("job-cancelled");
    let option = format!("--container={}", file.display());
    let script = "#!/bin/sh\necho started\nexec sleep 600\n";
    let job = suite().cluster.sbatch("job-cancelled", &[&option], script);
    wait_until("the script runs", 60, || {
        job.output().contains("started").then_some(())
    });
    assert!(!servers_of(&file).is_empty());
    job.cancel();
    assert_eq!(job.end().state, "CANCELLED");
    wait_nothing_left(&file);
    suite().cluster.assert_nodes_idle();
}
