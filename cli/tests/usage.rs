//! The command line itself: help, bad use, configuration, generated files.

mod common;

use std::io::Read;
use std::process::Stdio;

use common::Site;

#[test]
fn bad_use_is_one_line_a_hint_and_2() {
    let site = Site::new();
    for (args, line, hint) in [
        (
            &["config"][..],
            "`berth config` needs a command",
            "`berth config --help`",
        ),
        (
            &["pul"][..],
            "unrecognized subcommand 'pul'",
            "did you mean `pull`?",
        ),
        (
            &["images", "--jsn"],
            "unexpected argument '--jsn' found",
            "did you mean `--json`?",
        ),
        (
            &["pull"],
            "the following required arguments were not provided: <REF>...",
            "`berth --help`",
        ),
        (
            &["pull", "UPPER/x"],
            "`UPPER/x` names no registry and this site has no default one",
            "write HOST/",
        ),
        (
            &["pull", "a.b/c:1", "a.b/C"],
            "`a.b/C` is not an image reference",
            "write HOST/",
        ),
        (
            &["path", "/etc/passwd"],
            "`/etc/passwd` is not a path of an image in the store",
            "give a reference",
        ),
        (
            &["inspect", "sha256:abc"],
            "`sha256:abc` is not a digest",
            "at least 8",
        ),
        (
            &["path", "a.b/c", "--platform", "vax"],
            "invalid value 'vax' for '--platform",
            "`berth --help`",
        ),
        (
            &["prefetch"],
            "the following required arguments were not provided: <REF>...",
            "`berth --help`",
        ),
        (
            &["trace", "a.b/c:1", "--set", "trace.json", "--", "true"],
            "the argument '--set <FILE>' cannot be used with",
            "`berth --help`",
        ),
        (
            &["trace", "a.b/c:1", "--writable"],
            "the following required arguments were not provided: <COMMAND>...",
            "`berth --help`",
        ),
        (
            &["prefetch", "--file", "absent"],
            "cannot read the list `absent`",
            "",
        ),
        (
            &["store", "init", "--user", "no-such-user"],
            "there is no user `no-such-user`",
            "",
        ),
    ] {
        let said = site.berth(args);
        assert_eq!(
            (said.code, said.out.as_str()),
            (Some(2), ""),
            "{args:?} {said:?}"
        );
        let mut lines = said.err.lines();
        let first = lines.next().unwrap();
        assert!(
            first.starts_with(&format!("berth: {line}")),
            "{args:?} {said:?}"
        );
        let second = lines.next().unwrap_or("hint: ");
        assert!(
            second.starts_with(&format!("hint: {hint}")),
            "{args:?} {said:?}"
        );
        assert_eq!(lines.next(), None, "{args:?} {said:?}");
    }
}

#[test]
fn help_is_grouped_and_ends_with_examples() {
    let said = Site::new().berth(&["--help"]);
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
    let at = |text: &str| {
        said.out
            .find(text)
            .unwrap_or_else(|| panic!("{text} in {}", said.out))
    };
    assert!(at("Images:") < at("The daemon:") && at("This machine and site:") < at("Examples:"));
    assert!(at("sbatch --container=docker://") > at("--config"));
}

#[test]
fn no_command_shows_the_help_and_ends_with_2() {
    let said = Site::new().berth(&[]);
    assert_eq!((said.code, said.out.as_str()), (Some(2), ""));
    assert!(said.err.contains("Usage:"));
}

#[test]
fn every_command_has_a_man_page_and_completions() {
    let site = Site::new();
    assert_eq!(site.berth(&["man", "pages/man1"]).code, Some(0));
    for page in [
        "berth.1",
        "berth-pull.1",
        "berth-config-check.1",
        "berth-store-init.1",
    ] {
        let text = std::fs::read_to_string(site.path("pages/man1").join(page)).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let said = site.berth(&["completions", shell]);
        assert!(
            said.code == Some(0) && said.out.contains("prefetch"),
            "{shell}"
        );
    }
}

#[test]
fn a_good_configuration_is_ok_and_each_fault_of_a_bad_one_is_named() {
    let site = Site::new();
    let said = site.berth(&["config", "check"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.out.ends_with("berth.toml: ok\n"));

    std::fs::write(site.path("bad"), "[store]\npath = 'x'\n[node]\nkeys = []\n").unwrap();
    let said = site.berth(&["config", "check", "bad"]);
    assert_eq!(said.code, Some(78));
    assert_eq!(
        said.err,
        "berth: `bad`: store.path: must be an absolute path\nberth: `bad`: node.keys: must name at least one public key\n"
    );
    std::fs::write(site.path("bad"), "[store]\npaht = 'x'\n").unwrap();
    let said = site.berth(&["config", "check", "bad"]);
    assert_eq!(
        said.err,
        "berth: `bad`: line 2: unknown key `paht`, did you mean `path`?\n"
    );

    let said = site.berth(&["--config", "bad", "images"]);
    assert_eq!(said.code, Some(78));
    assert!(said.err.contains("hint: `berth config check`"), "{said:?}");
    let said = site.berth(&["--config", "absent.toml", "images"]);
    assert_eq!(said.code, Some(78));
    assert!(
        said.err
            .contains("cannot read the configuration `absent.toml`"),
        "{said:?}"
    );
}

#[test]
fn the_configuration_in_effect_reads_back_and_marks_defaults() {
    let site = Site::new();
    site.configure("default_registry = 'docker.io'");
    let said = site.berth(&["config", "show"]);
    assert!(
        said.out.contains("default_registry = \"docker.io\"\n"),
        "{said:?}"
    );
    assert!(
        said.out.contains("owner = \"berthd\"  # default\n"),
        "{said:?}"
    );
    std::fs::write(site.path("again.toml"), &said.out).unwrap();
    let again = site.berth(&["--config", "again.toml", "config", "show"]);
    let without_name = |text: &str| text.split_once('\n').unwrap().1.to_owned();
    assert_eq!(without_name(&again.out), without_name(&said.out));
    let json = site.berth(&["config", "show", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(value["default_registry"], "docker.io");
}

#[test]
fn a_reader_that_goes_away_ends_it_silently() {
    let site = Site::new();
    let mut child = site
        .command(&["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Closed before anything is read. The script is larger than a pipe, so it cannot all be written.
    drop(child.stdout.take());
    let mut err = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}

#[test]
fn the_configuration_in_the_admins_guide_is_good() {
    let guide = include_str!("../../docs/ADMIN.md");
    let (_, rest) = guide
        .split_once("reach the daemon over the network:\n")
        .unwrap();
    let example: Vec<&str> = (rest.lines())
        .take_while(|l| l.is_empty() || l.starts_with("    "))
        .map(str::trim_start)
        .collect();
    assert!(example.contains(&"[store]"), "{example:?}");
    let site = Site::new();
    std::fs::write(site.path("example.toml"), example.join("\n")).unwrap();
    let said = site.berth(&["config", "check", "example.toml"]);
    assert_eq!(said.code, Some(0), "{said:?}");
}
