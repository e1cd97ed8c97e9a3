//! What a task sees and may do inside its container.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use berth_tests::cluster::{unique, write_executable};
use berth_tests::image::Layer;
use berth_tests::suite::{WHERE, container, suite};
use berth_tests::{Cluster, Ended, Image, Options};

/// A shell command in the shared shell image, with more options for srun.
fn inside(options: &[&str], command: &str) -> Ended {
    let image = suite().shell_option();
    let mut words = vec![image.as_str()];
    words.extend(options);
    words.extend(["sh", "-c", command]);
    suite().cluster.user("srun", &words).end()
}

#[test]
fn the_task_is_the_user_and_holds_no_power() {
    let ended = inside(
        &[],
        "id -u; grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups)' /proc/self/status",
    );
    let uid = suite().cluster.user("id", &["-u"]).end();
    let mut lines = ended.ok().lines();
    assert_eq!(lines.next(), Some(uid.ok()));
    for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let none = format!("{name}:\t0000000000000000");
        assert!(ended.stdout.lines().any(|line| line == none), "{ended}");
    }
    assert!(ended.says("NoNewPrivs:\t1"), "{ended}");
}

#[test]
fn the_image_is_read_only_without_suid_and_devices() {
    let ended = inside(
        &[],
        "grep ' / / ' /proc/self/mountinfo; touch /new 2>&1; echo rc=$?",
    );
    let root = ended.ok().lines().next().unwrap_or_default();
    for option in ["ro", "nosuid", "nodev"] {
        assert!(
            root.split([' ', ',']).any(|word| word == option),
            "{option}: {root}"
        );
    }
    assert!(
        ended.says("Read-only file system") && ended.says("rc=1"),
        "{ended}"
    );
}

#[test]
fn a_writable_container_keeps_nothing_and_changes_nothing() {
    let suite = suite();
    let open =
        Layer::new()
            .entry("open/", b'5', 0o777, "", b"")
            .file("open/file", b"image\n", 0o666);
    let image = Image::shell("writable")
        .layer(&open)
        .push(suite.cluster.registry(), "test/writable:1");
    let image = container(&image.name);
    let write = "echo mine > /open/new && echo changed > /open/file && cat /open/new /open/file";
    let refused = suite
        .cluster
        .user("srun", &[&image, "sh", "-c", write])
        .end();
    assert!(
        refused.failed().contains("Read-only file system"),
        "{refused}"
    );
    let words = [&image, "--container-writable", "sh", "-c", write];
    assert_eq!(
        suite.cluster.user("srun", &words).end().ok(),
        "mine\nchanged"
    );
    let after = suite
        .cluster
        .user("srun", &[&image, "sh", "-c", "ls /open; cat /open/file"])
        .end();
    assert_eq!(after.ok(), "file\nimage");
}

#[test]
fn proc_sys_dev_and_tmp_are_there() {
    let look = "test -r /proc/self/status && test -d /sys/class && echo x > /dev/null && \
                head -c 4 /dev/urandom | wc -c && ls -d /dev/shm /dev/pts && echo t > /tmp/t-$$ && cat /tmp/t-$$";
    let ended = inside(&[], look);
    assert_eq!(
        ended.ok().lines().collect::<Vec<_>>(),
        ["4", "/dev/pts", "/dev/shm", "t"]
    );
}

#[test]
fn the_images_environment_applies_and_the_users_and_slurms_stay() {
    let suite = suite();
    let image = suite.shell_option();
    let show = "echo $IMAGE_SAYS $MINE $SLURM_JOB_ID $SLURM_PROCID; echo $PATH; echo home=$HOME";
    let ended = suite
        .cluster
        .user("srun", &[&image, "sh", "-c", show])
        .env("MINE", "kept")
        .end();
    let mut lines = ended.ok().lines();
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    assert!(
        matches!(words[..], ["ahoy", "kept", id, "0"] if id.parse::<u32>().is_ok()),
        "{ended}"
    );
    assert!(
        lines
            .next()
            .unwrap_or_default()
            .split(':')
            .any(|folder| folder == "/bin"),
        "{ended}"
    );
    assert!(
        ended.says(&format!("home=/home/{}", suite.cluster.get("BERTH_USER"))),
        "{ended}"
    );
    assert!(!ended.says("SLURM_CONTAINER="), "{ended}");
}

#[test]
fn the_working_directory_is_the_users_the_images_or_the_one_asked_for() {
    let suite = suite();
    let image = format!("--container={}", suite.python);
    let asked = |options: &[&str]| {
        let mut words = vec![image.as_str()];
        words.extend(options);
        words.push("pwd");
        let folder = suite.cluster.scratch("workdir");
        let ended = suite.cluster.user("srun", &words).folder(&folder).end();
        (ended.ok().to_owned(), folder)
    };
    // At home (bound) the job stays where it was submitted, as every Slurm job does.
    let (here, folder) = asked(&[]);
    assert_eq!(here, folder.to_str().unwrap());
    assert_eq!(asked(&["--container-workdir=/opt/demo"]).0, "/opt/demo");
    // From a folder that the image does not have, the image's own applies.
    let ended = suite
        .cluster
        .user("srun", &[&image, "pwd"])
        .folder("/var/lib")
        .end();
    assert_eq!(ended.code, 0, "{ended}");
}

#[test]
fn names_of_users_and_machines_are_those_of_the_node() {
    let ended = inside(
        &[],
        "cat /etc/hosts; echo --; cat /etc/resolv.conf; echo --; cat /etc/passwd; echo --; cat /etc/group",
    );
    let parts: Vec<&str> = ended.ok().split("--\n").collect();
    let of_the_node = |path| fs::read_to_string(path).unwrap_or_default();
    assert_eq!(parts[0], of_the_node("/etc/hosts"));
    assert_eq!(parts[1], of_the_node("/etc/resolv.conf"));
    let id = |flags| suite().cluster.user("id", &[flags]).end().ok().to_owned();
    let (name, uid, group, gid) = (id("-un"), id("-u"), id("-gn"), id("-g"));
    let user = format!("{name}:x:{uid}:{gid}:");
    assert_eq!(
        parts[2].lines().filter(|l| l.starts_with(&user)).count(),
        1,
        "{ended}"
    );
    let group = format!("{group}:x:{gid}:");
    assert_eq!(
        parts[3].lines().filter(|l| l.starts_with(&group)).count(),
        1,
        "{ended}"
    );
}

#[test]
fn home_is_there_and_writable() {
    let folder = suite().cluster.scratch("home");
    let file = folder.join("made-inside");
    inside(&[], &format!("echo text > {}", file.display())).ok();
    assert_eq!(fs::read_to_string(file).unwrap(), "text\n");
}

#[test]
fn mounts_appear_where_asked_and_as_asked() {
    let folder = suite().cluster.scratch("mounts");
    fs::write(folder.join("file"), "from the host\n").unwrap();
    let source = folder.display();
    // The image has no such folders: they appear all the same.
    let mounts =
        format!("--container-mounts={source}:/data/in/deep:ro,{source}/file:/etc/site-file");
    let ended = inside(
        &[&mounts],
        "cat /data/in/deep/file /etc/site-file; touch /data/in/deep/new 2>&1; echo rc=$?",
    );
    assert!(
        ended.ok().starts_with("from the host\nfrom the host\n"),
        "{ended}"
    );
    assert!(ended.says("Read-only") && ended.says("rc=1"), "{ended}");
    let plain = inside(
        &[&format!("--container-mounts={source}:/w")],
        "echo x > /w/written",
    );
    plain.ok();
    assert!(folder.join("written").exists());
}

#[test]
fn mount_points_are_never_made_in_somebodys_real_folder() {
    let folder = suite().cluster.scratch("points");
    fs::create_dir(folder.join("outer")).unwrap();
    fs::set_permissions(folder.join("outer"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(folder.join("file"), "x").unwrap();
    let f = folder.display();
    let mounts = format!("--container-mounts={f}/outer:/mnt/a,{f}/file:/mnt/a/inner");
    let _ = inside(&[&mounts], "cat /mnt/a/inner");
    let made: Vec<_> = fs::read_dir(folder.join("outer"))
        .unwrap()
        .flatten()
        .collect();
    assert!(made.is_empty(), "{made:?}");
}

#[test]
fn a_bind_reaches_nothing_that_the_user_could_not() {
    let suite = suite();
    let secret = std::path::Path::new("/root").join(format!(".berth-test-{}", unique()));
    fs::create_dir_all(secret.join("open")).unwrap();
    fs::write(secret.join("open/secret"), "roots own").unwrap();
    let mut sources = vec![format!("{}/open", secret.display())];
    for number in 3..12 {
        sources.push(format!("/proc/self/fd/{number}"));
    }
    sources.extend([
        "/proc/self/root/root".into(),
        "/proc/self/cwd/../root".into(),
        "/proc/1/root/root".into(),
    ]);
    let image = suite.shell_option();
    for source in sources {
        let mounts = format!("--container-mounts={source}:/stolen");
        let words = [
            &image,
            &mounts,
            "sh",
            "-c",
            "ls -la /stolen/ /stolen/open; cat /stolen /stolen/secret /stolen/open/secret",
        ];
        let ended = suite.cluster.user("srun", &words).end();
        assert!(
            !ended.says("roots own") && !ended.says("root:"),
            "{source}: {ended}"
        );
        assert!(ended.code != 0, "{source}: {ended}");
        assert!(ended.says("berth"), "{source}: {ended}");
    }
    fs::remove_dir_all(secret).unwrap();
    // What the user may name but not read can be bound, and not read there either.
    let words = [
        &image,
        "--container-mounts=/etc/shadow:/stolen",
        "cat",
        "/stolen",
    ];
    let ended = suite.cluster.user("srun", &words).end();
    assert!(ended.failed().contains("Permission denied"), "{ended}");
    suite.cluster.assert_nodes_idle();
}

#[test]
fn targets_of_mounts_resolve_inside_the_image_only() {
    let suite = suite();
    let trap = Layer::new()
        .symlink("escape", "/../../../../../../etc")
        .symlink("up", "../../../../tmp");
    let name = Image::shell("trap")
        .layer(&trap)
        .push(suite.cluster.registry(), "test/trap:1");
    let folder = suite.cluster.scratch("targets");
    fs::write(folder.join("marker"), "bound\n").unwrap();
    let before = fs::read_to_string("/etc/hostname").unwrap_or_default();
    for target in [
        "/escape/hostname",
        "/up/../escape/hostname",
        "/../../etc/hostname",
    ] {
        let mounts = format!("--container-mounts={}/marker:{target}", folder.display());
        let image = container(&name.name);
        let words = [&image, &mounts, "cat", "/etc/hostname"];
        let ended = suite.cluster.user("srun", &words).end();
        assert!(
            ended.code != 0 || ended.stdout == "bound\n",
            "{target}: {ended}"
        );
        assert_eq!(
            fs::read_to_string("/etc/hostname").unwrap_or_default(),
            before
        );
    }
}

#[test]
fn an_image_without_a_shell_runs_its_program() {
    let suite = suite();
    let tiny = suite.cluster.push_demo("tiny", "demo/tiny:1");
    let words = [&container(&tiny), "-N2", "/busybox", "cat", "/marker"];
    let ended = suite.cluster.user("srun", &words).end();
    assert_eq!(ended.ok(), "no shell in here\nno shell in here");
    let missing = suite
        .cluster
        .user("srun", &[&container(&tiny), "sh", "-c", "id"])
        .end();
    assert!(missing.failed().contains("sh"), "{missing}");
    suite.cluster.assert_nodes_idle();
}

#[test]
fn docker_manifests_work_as_oci_ones_do() {
    let suite = suite();
    let script = berth_tests::cluster::repository().join("scripts/demo-image");
    let target = format!("{}/demo/tiny:docker", suite.cluster.registry());
    let words = ["tiny", "--format", "v2s2", "--push", &target];
    berth_tests::Run::new(script.to_str().unwrap(), &words)
        .end()
        .ok();
    let words = [&container(&target), "/busybox", "cat", "/marker"];
    assert_eq!(
        suite.cluster.user("srun", &words).end().ok(),
        "no shell in here"
    );
}

#[test]
fn srun_works_inside_a_batch_container() {
    let suite = suite();
    // A job's file has its errors too, and among them how long the image takes to come.
    suite.cluster.berth(&["pull", &suite.python]).ok();
    // Slurm's client comes from the node: the image has neither it nor its libraries.
    let script = format!("#!/bin/sh\nsqueue -h -j $SLURM_JOB_ID -o %i\nsrun -N2 sh -c '{WHERE}'\n");
    let image = format!("--container={}", suite.python);
    let job = suite.cluster.sbatch("inner", &["-N2", &image], &script);
    let end = job.end();
    assert_eq!(
        end.ok(),
        format!("{}\nVARIANT_ID=berth-demo\nVARIANT_ID=berth-demo\n", job.id)
    );
}

#[test]
fn a_sites_own_task_prolog_still_speaks_to_the_task() {
    let site = std::path::Path::new("/var/tmp").join(format!("berth-prolog-{}", unique()));
    fs::create_dir(&site).unwrap();
    fs::set_permissions(&site, fs::Permissions::from_mode(0o755)).unwrap();
    let prolog = site.join("prolog.sh");
    let text = "#!/bin/sh\necho export FROM_PROLOG=yes\necho print the prolog says hello\n";
    write_executable(&prolog, text);
    let words = ["--nodes", "1", "--task-prolog", prolog.to_str().unwrap()];
    let cluster = Cluster::own("test-prolog", &Options::new(&words));
    let image = Image::shell("prolog").push(cluster.registry(), "test/prolog:1");
    let show = format!("{WHERE}; echo $FROM_PROLOG");
    let ended = cluster
        .user("srun", &[&container(&image.name), "sh", "-c", &show])
        .end();
    fs::remove_dir_all(site).unwrap();
    assert!(ended.ok().ends_with("VARIANT_ID=prolog\nyes"), "{ended}");
    assert!(ended.says("the prolog says hello"), "{ended}");
}
