//! Whatever is missing or broken, a container job's command does not run on the host, the node stays in service and
//! the user reads why.

use std::fs;
use std::path::PathBuf;

use berth_tests::cluster::unique;
use berth_tests::proxy::{Fault, Wrong};
use berth_tests::suite::{WHERE, container, suite};
use berth_tests::{Cluster, Ended, Image, Options, Proxy, Run, wait_until};

/// Runs a command that leaves a mark where it runs, by srun and by sbatch; neither may leave one.
fn never_on_the_host(cluster: &Cluster, option: &str, says: &str) -> Vec<Ended> {
    let folder = cluster.scratch("closed");
    let mark = |name: &str| folder.join(name);
    let command = format!("touch {}", mark("by-srun").display());
    let by_srun = cluster.user("srun", &[option, "sh", "-c", &command]).end();
    let script = format!("#!/bin/sh\ntouch {}\n", mark("by-sbatch").display());
    let (out, by_sbatch) = cluster.try_sbatch("closed", &["--wait", option], &script);
    let output = fs::read_to_string(out.join("out")).unwrap_or_default();
    assert!(!mark("by-srun").exists(), "ran on the host: {by_srun}");
    assert!(
        !mark("by-sbatch").exists(),
        "ran on the host: {by_sbatch}{output}"
    );
    by_srun.failed();
    by_sbatch.failed();
    assert!(by_srun.says(says), "`{says}` is not in: {by_srun}");
    assert!(
        output.contains(says) || by_sbatch.says(says),
        "`{says}` is not in: {output}{by_sbatch}"
    );
    cluster.assert_nodes_idle();
    vec![by_srun, by_sbatch]
}

#[test]
fn an_unknown_image_with_an_optional_plugin() {
    let cluster = Cluster::own("test-optional", &Options::new(&["--nodes", "1"]));
    let unknown = container(&format!("{}/no/such:1", cluster.registry()));
    let ended = never_on_the_host(&cluster, &unknown, "no/such");
    let lines: Vec<&str> = ended[0]
        .stderr
        .lines()
        .filter(|line| line.contains("berth"))
        .collect();
    assert!(lines.len() <= 2, "one line, perhaps with a hint: {lines:?}");
}

#[test]
fn an_unknown_image_with_a_required_plugin() {
    let cluster = Cluster::own(
        "test-required",
        &Options::new(&["--nodes", "1", "--plugin", "required"]),
    );
    let unknown = container(&format!("{}/no/such:1", cluster.registry()));
    never_on_the_host(&cluster, &unknown, "no/such");
}

#[test]
fn malformed_references_are_refused_at_submit() {
    let cluster = &suite().cluster;
    for bad in [
        "docker://",
        "docker://UPPER/Case:1",
        "a b",
        "x@sha256:12",
        "docker://h/../x:1",
        "-x",
    ] {
        let ended = cluster
            .user("srun", &[&format!("--container={bad}"), "true"])
            .end();
        assert!(ended.failed().contains("berth"), "{bad}: {ended}");
    }
    cluster.assert_nodes_idle();
}

#[test]
fn paths_that_berth_did_not_print_are_refused() {
    let cluster = &suite().cluster;
    let folder = cluster.scratch("own-image");
    let file = folder.join("mine.squashfs");
    fs::write(&file, "hsqs").unwrap();
    never_on_the_host(cluster, &format!("--container={}", file.display()), "berth");
}

#[test]
fn a_plugin_missing_on_one_node() {
    let words = [
        "--nodes",
        "2",
        "--plugin",
        "optional",
        "--without-plugin",
        "n2",
    ];
    let cluster = Cluster::own("test-missing", &Options::new(&words));
    let image = Image::shell("missing").push(cluster.registry(), "test/missing:1");
    let folder = cluster.scratch("missing");
    let command = format!("touch {}/ran-$SLURMD_NODENAME; {WHERE}", folder.display());
    let words = ["-N2", &container(&image.name), "sh", "-c", &command];
    let ended = cluster.user("srun", &words).end();
    ended.failed();
    assert!(!folder.join("ran-n2").exists(), "ran on the host: {ended}");
    assert!(ended.says("n2") && ended.says("plugin"), "{ended}");
    cluster.assert_nodes_idle();
    // A batch job whose first node lacks it, and a nested srun that reaches that node.
    let script = format!("#!/bin/sh\ntouch {}/batch-ran\n", folder.display());
    let (out, batch) = cluster.try_sbatch(
        "missing",
        &["--wait", "--nodelist=n2", &container(&image.name)],
        &script,
    );
    let output = fs::read_to_string(out.join("out")).unwrap_or_default();
    batch.failed();
    assert!(
        !folder.join("batch-ran").exists() && output.contains("plugin"),
        "{output}"
    );
    let script = format!(
        "#!/bin/sh\nsrun -N2 sh -c 'touch {}/nested-$SLURMD_NODENAME'\n",
        folder.display()
    );
    let job = cluster.sbatch(
        "missing",
        &["-N2", "--nodelist=n1,n2", &container(&image.name)],
        &script,
    );
    job.end();
    assert!(!folder.join("nested-n2").exists(), "{}", job.output());
    cluster.assert_nodes_idle();
}

#[test]
fn a_plugin_of_another_release_on_one_node() {
    let words = ["--nodes", "2", "--without-plugin", "n2"];
    let cluster = Cluster::own("test-release", &Options::new(&words));
    let image = Image::shell("release").push(cluster.registry(), "test/release:1");
    // What Slurm compares is the release, before it calls anything: 23.11 where the node runs another.
    let folder = cluster.scratch("release");
    let source = folder.join("plugin.c");
    let text = "const char plugin_name[] = \"berth\", plugin_type[] = \"spank\";\n\
                const unsigned plugin_version = 0x170b00, spank_plugin_version = 1;\n\
                int slurm_spank_init(void *s, int c, char **v) { return 0; }\n";
    fs::write(&source, text).unwrap();
    let plugin = cluster.folder().join("bin/no-such-plugin.so");
    let (plugin, source) = (plugin.to_str().unwrap(), source.to_str().unwrap());
    let words = ["-shared", "-fPIC", "-o", plugin, source];
    Run::new("cc", &words).end().ok();
    let command = format!("touch {}/ran-$SLURMD_NODENAME; {WHERE}", folder.display());
    let words = ["-N2", &container(&image.name), "sh", "-c", &command];
    let ended = cluster.user("srun", &words).end();
    ended.failed();
    assert!(!folder.join("ran-n2").exists(), "ran on the host: {ended}");
    assert!(ended.says("n2") && ended.says("plugin"), "{ended}");
    cluster.assert_nodes_idle();
}

#[test]
fn a_helper_that_is_missing_or_dies() {
    let cluster = Cluster::own("test-helper", &Options::new(&["--nodes", "1"]));
    let image = Image::shell("helper").push(cluster.registry(), "test/helper:1");
    cluster
        .berth(&["pull", &format!("docker://{}", image.name)])
        .ok();
    // One that is started for the step; the one on standby goes on without its file.
    cluster.service("stop", "standby");
    let helper = cluster.folder().join("bin/berth-runtime");
    let aside = helper.with_extension("aside");
    fs::rename(&helper, &aside).unwrap();
    never_on_the_host(&cluster, &container(&image.name), "berth");
    fs::copy("/bin/false", &helper).unwrap();
    never_on_the_host(&cluster, &container(&image.name), "berth");
    fs::rename(&aside, &helper).unwrap();
    let ended = cluster
        .user("srun", &[&container(&image.name), "sh", "-c", WHERE])
        .end();
    assert_eq!(ended.ok(), "VARIANT_ID=helper");
    // With one on standby, and one that was killed there.
    cluster.service("start", "standby");
    for what in ["start", "kill"] {
        cluster.service(what, "standby");
        let ended = cluster
            .user("srun", &[&container(&image.name), "sh", "-c", WHERE])
            .end();
        assert_eq!(ended.ok(), "VARIANT_ID=helper", "{what}");
    }
}

#[test]
fn a_configuration_that_cannot_be_read() {
    let cluster = Cluster::own("test-config", &Options::new(&["--nodes", "1"]));
    let image = Image::shell("config").push(cluster.registry(), "test/config:1");
    cluster
        .berth(&["pull", &format!("docker://{}", image.name)])
        .ok();
    let file = cluster.folder().join("etc/berth.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("[node]", "[nodes]")).unwrap();
    never_on_the_host(&cluster, &container(&image.name), "berth");
    fs::remove_file(&file).unwrap();
    never_on_the_host(&cluster, &container(&image.name), "berth");
}

#[test]
fn a_record_that_the_sites_key_did_not_sign() {
    let cluster = Cluster::own("test-record", &Options::new(&["--nodes", "1"]));
    let image = Image::shell("record").push(cluster.registry(), "test/record:1");
    let option = container(&image.name);
    cluster
        .berth(&["pull", &format!("docker://{}", image.name)])
        .ok();
    let (images, _) = cluster.published();
    let record = images[0].join("record.dsse.json");
    let whole = fs::read_to_string(&record).unwrap();
    let forged = whole.replace("\"sig\":\"", "\"sig\":\"AAAA");
    let forged = if forged == whole {
        whole.replace("\"sig\": \"", "\"sig\": \"AAAA")
    } else {
        forged
    };
    assert_ne!(forged, whole);
    fs::write(&record, forged).unwrap();
    never_on_the_host(&cluster, &option, "sign");
    fs::write(&record, &whole[..whole.len() / 2]).unwrap();
    never_on_the_host(&cluster, &option, "record");
    fs::write(&record, &whole).unwrap();
    cluster.user("srun", &[&option, "true"]).end().ok();
    // Another site's key on the node.
    let key = cluster.folder().join("etc/site.pub");
    let other = cluster.folder().join("etc/other.key");
    let made = format!(
        "openssl genpkey -algorithm ed25519 -out {0} && openssl pkey -in {0} -pubout -out {1}",
        other.display(),
        key.display()
    );
    cluster.root("sh", &["-c", &made]).end().ok();
    never_on_the_host(&cluster, &option, "key");
}

#[test]
fn scancel_works_while_a_task_waits_for_its_image() {
    let suite = suite();
    let cluster = &suite.cluster;
    let proxy = Proxy::start(cluster.registry());
    let image = suite.push_shell(&format!("slow-{}", unique()));
    proxy.fault(Fault::always("/blobs/", Wrong::Hold(0)));
    let option = container(&image.via(proxy.address()));
    let job = cluster.sbatch("slow", &[&option], "#!/bin/sh\necho ran\n");
    wait_until("a layer is asked for", 60, || {
        (proxy.held() > 0).then_some(())
    });
    job.wait_state("RUNNING");
    job.cancel();
    assert_eq!(job.end().state, "CANCELLED");
    cluster.assert_nodes_idle();
    proxy.release();
    assert!(!job.output().contains("ran"));
}

#[test]
fn with_daemon_and_registry_down_a_stored_image_starts_and_others_do_not() {
    let cluster = Cluster::own("test-warm", &Options::new(&["--nodes", "2"]));
    let image = Image::shell("warm").push(cluster.registry(), "test/warm:1");
    let other = Image::shell("cold").push(cluster.registry(), "test/cold:1");
    cluster
        .berth(&["pull", &format!("docker://{}", image.name)])
        .ok();
    for service in ["berthd", "sealer", "registry"] {
        cluster.service("stop", service);
    }
    let script = format!("#!/bin/sh\n{WHERE}\nsrun -N2 sh -c '{WHERE}'\n");
    let end = cluster
        .sbatch("warm", &["-N2", &container(&image.name)], &script)
        .end();
    assert_eq!(end.ok().matches("VARIANT_ID=warm\n").count(), 3);
    never_on_the_host(&cluster, &container(&other.name), "berth");
}

#[test]
fn a_daemon_that_does_not_answer_holds_no_submission_up() {
    let cluster = Cluster::own("test-silent", &Options::new(&["--nodes", "1"]));
    let image = Image::shell("silent").push(cluster.registry(), "test/silent:1");
    cluster
        .berth(&["pull", &format!("docker://{}", image.name)])
        .ok();
    let daemon = cluster.service("pid", "berthd");
    Run::new("kill", &["-STOP", &daemon]).end().ok();
    let text = format!("#!/bin/sh\n{WHERE}\n");
    let job = cluster.sbatch("silent", &[&container(&image.name)], &text);
    assert_eq!(job.end().ok(), "VARIANT_ID=silent\n");
    Run::new("kill", &["-CONT", &daemon]).end().ok();
}

/// Where a job of root's would find out that the guard let it through.
#[test]
fn the_guard_alone_stops_a_job_when_no_plugin_is_loaded_anywhere() {
    let cluster = Cluster::own(
        "test-noplugin",
        &Options::new(&["--nodes", "1", "--plugin", "none"]),
    );
    let image = Image::shell("noplugin").push(cluster.registry(), "test/noplugin:1");
    never_on_the_host(&cluster, &container(&image.name), "plugin");
    let marker: PathBuf = cluster.scratch("plain").join("ran");
    let touch = format!("touch {}", marker.display());
    cluster.user("srun", &["sh", "-c", &touch]).end().ok();
    assert!(marker.exists());
}
