//! `berth` as people and scripts use it.

use std::fs;

use berth_tests::cluster::{repository, unique};
use berth_tests::suite::suite;
use berth_tests::{Cluster, Image, Options, Run, machine_has};
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|why| panic!("{why}: {text}"))
}

#[test]
fn pull_then_images_inspect_path_and_status_know_the_image() {
    let suite = suite();
    let image = suite.push_shell(&format!("cli-{}", unique()));
    let name = format!("docker://{}", image.name);
    let pulled = suite.cluster.berth(&["pull", &name]);
    assert!(pulled.ok().contains(&image.digest), "{pulled}");
    let listed = suite.cluster.berth(&["images"]);
    assert!(
        listed.ok().contains(image.name.split_once('/').unwrap().1),
        "{listed}"
    );
    let listed = json(suite.cluster.berth(&["images", "--json"]).ok());
    let all = listed.as_array().expect("an array of images");
    assert!(
        all.iter()
            .any(|entry| entry["digest"] == image.digest.as_str()),
        "{listed}"
    );
    let shown = suite.cluster.berth(&["inspect", &name]);
    assert!(shown.ok().contains(&image.digest), "{shown}");
    json(suite.cluster.berth(&["inspect", "--json", &name]).ok());
    assert!(json(suite.cluster.berth(&["status", "--json"]).ok())["images"].as_u64() > Some(0));
    json(suite.cluster.berth(&["pulls", "--json"]).ok());
}

#[test]
fn path_prints_a_bare_squashfs_that_others_can_use() {
    let suite = suite();
    let image = suite.push_shell(&format!("path-{}", unique()));
    // Not pulled before: path does that.
    let printed = suite.cluster.berth(&["path", &image.name]);
    let path = printed.ok();
    assert_eq!(printed.stdout.lines().count(), 1, "{printed}");
    let release = suite
        .cluster
        .user("unsquashfs", &["-cat", path, "etc/os-release"])
        .end();
    assert!(release.ok().contains("VARIANT_ID=path-"), "{release}");
    if machine_has("ch-run", "Charliecloud runs what berth path prints") {
        let python = suite.cluster.berth(&["path", &suite.python]);
        let words = [python.ok(), "--", "python3", "/opt/demo/hello.py"];
        let ended = suite.cluster.user("ch-run", &words).end();
        assert!(ended.ok().contains("Berth demo image"), "{ended}");
    }
}

#[test]
fn the_hash_tree_behind_an_image_verifies() {
    let suite = suite();
    let image = suite.push_shell(&format!("verity-{}", unique()));
    let path = suite.cluster.berth(&["path", &image.name]);
    let record = json(
        suite
            .cluster
            .berth(&["inspect", "--json", &image.name])
            .ok(),
    )
    .to_string();
    let find = |name: &str| {
        let (_, rest) = record
            .split_once(&format!("\"{name}\":"))
            .unwrap_or_else(|| panic!("{name}: {record}"));
        let value: String = rest
            .trim_start_matches('"')
            .chars()
            .take_while(char::is_ascii_hexdigit)
            .collect();
        value
    };
    let offset = format!("--hash-offset={}", find("hash_offset"));
    let root = find("verity_root");
    let words = ["verify", path.ok(), path.ok(), &root, &offset];
    suite.cluster.root("veritysetup", &words).end().ok();
}

#[test]
fn prefetch_tries_every_line_of_a_list() {
    let suite = suite();
    let one = suite.push_shell(&format!("list-{}", unique()));
    let two = suite.push_shell(&format!("list-{}", unique()));
    let list = suite.cluster.scratch("prefetch").join("list");
    let missing = format!("{}/no/such:1", suite.cluster.registry());
    fs::write(
        &list,
        format!("# images\n{}\n\n{missing}\n{}\n", one.name, two.name),
    )
    .unwrap();
    let ended = suite
        .cluster
        .berth(&["prefetch", "--file", list.to_str().unwrap()]);
    assert_eq!(ended.code, 1, "{ended}");
    assert!(ended.says("no/such"), "{ended}");
    let listed = suite.cluster.berth(&["images", "--json"]);
    assert!(
        listed.says(&one.digest) && listed.says(&two.digest),
        "{listed}"
    );
}

#[test]
fn path_works_with_the_daemon_down() {
    let cluster = Cluster::own("test-path", &Options::new(&["--nodes", "1"]));
    let image = Image::shell("down").push(cluster.registry(), "test/down:1");
    let before = cluster.berth(&["path", &image.name]);
    for service in ["berthd", "sealer", "registry"] {
        cluster.service("stop", service);
    }
    let after = cluster.berth(&["path", &image.name]);
    assert_eq!(before.ok(), after.ok());
    let status = cluster.berth(&["status"]);
    assert_eq!(status.code, 69, "{status}");
    assert!(
        status.stderr.starts_with("berth: ") && status.says("hint: "),
        "{status}"
    );
}

#[test]
fn config_check_names_the_nearest_key() {
    let suite = suite();
    let file = suite.cluster.scratch("config").join("berth.toml");
    fs::write(&file, "[store]\npaht = '/x'\n").unwrap();
    let ended = suite
        .cluster
        .berth(&["config", "check", file.to_str().unwrap()]);
    assert_eq!(ended.code, 78, "{ended}");
    assert!(ended.says("paht") && ended.says("path"), "{ended}");
    suite.cluster.berth(&["config", "check"]).ok();
    assert!(
        suite
            .cluster
            .berth(&["config", "show"])
            .ok()
            .contains("[store]")
    );
}

#[test]
fn doctor_finds_nothing_wrong_here_and_finds_what_is_broken() {
    let cluster = Cluster::own("test-doctor", &Options::new(&["--nodes", "1"]));
    let well = cluster.root("berth", &["doctor"]).end();
    assert_eq!(well.code, 0, "{well}");
    let key = cluster.folder().join("etc/site.pub");
    fs::remove_file(&key).unwrap();
    let ended = cluster.root("berth", &["doctor"]).end();
    assert_eq!(ended.code, 1, "{ended}");
    assert!(ended.says("site.pub"), "{ended}");
    cluster.service("stop", "berthd");
    fs::rename(cluster.store(), cluster.store().with_extension("aside")).unwrap();
    let ended = cluster.root("berth", &["doctor"]).end();
    assert!(ended.says("store"), "{ended}");
}

#[test]
fn completions_and_man_pages_are_made() {
    let suite = suite();
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            suite
                .cluster
                .berth(&["completions", shell])
                .ok()
                .contains("prefetch")
        );
    }
    let folder = suite.cluster.scratch("man");
    suite.cluster.berth(&["man", folder.to_str().unwrap()]).ok();
    let pages: Vec<_> = fs::read_dir(&folder).unwrap().flatten().collect();
    assert!(
        pages.iter().any(|page| page.file_name() == "berth.1"),
        "{pages:?}"
    );
}

#[test]
fn the_shipped_units_are_ones_that_systemd_takes() {
    if !machine_has("systemd-analyze", "the units are not checked") {
        return;
    }
    let folder = suite().cluster.scratch("units");
    let shipped = repository().join("scripts/packaging");
    let mut words = vec!["verify".to_owned(), "--man=no".to_owned()];
    for unit in fs::read_dir(shipped).unwrap().flatten() {
        let path = unit.path();
        let kind = path.extension();
        if kind.is_none_or(|e| e != "service" && e != "timer") {
            continue;
        }
        // The programs are not installed here.
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().map(|line| match line.split_once("=/") {
            Some((key, _)) if key.starts_with("Exec") => format!("{key}=/bin/true\n"),
            _ => format!("{line}\n"),
        });
        let copy = folder.join(unit.file_name());
        fs::write(&copy, lines.collect::<String>()).unwrap();
        words.push(copy.to_str().unwrap().to_owned());
    }
    assert!(words.len() >= 7, "{words:?}");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ended = Run::new("systemd-analyze", &words).end();
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended}");
}

#[test]
fn wrong_usage_ends_with_2() {
    let suite = suite();
    assert_eq!(suite.cluster.berth(&["pull"]).code, 2);
    assert_eq!(suite.cluster.berth(&["no-such-command"]).code, 2);
    let ended = suite.cluster.berth(&["pull", "UPPER/..//x"]);
    assert_eq!(ended.code, 2, "{ended}");
}
