//! doctor on made-up machines: each fault is found, named, and has a way out.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Said, Site, http, said};
use serde_json::Value;

/// A machine with a Slurm 22.05 where all is well.
struct Machine(Site);

impl Machine {
    fn new() -> Self {
        let machine = Self(Site::new());
        machine.0.publish("a.b/c:1");
        let dir = machine.0.dir.path().display().to_string();
        machine.file(
            "slurm.conf",
            &format!("ClusterName=x\nTaskProlog={dir}/berth-guard\n"),
            0o644,
        );
        machine.file(
            "plugstack.conf",
            &format!("optional {dir}/spank_berth.so runtime={dir}/berth-runtime config={dir}/berth.toml\n"),
            0o644,
        );
        machine.file("berth-guard", "", 0o755);
        machine.file("berth-runtime", "", 0o755);
        fs::create_dir(machine.0.path("bin")).unwrap();
        machine.file("bin/scontrol", "#!/bin/sh\necho slurm-wlm 22.05.8\n", 0o755);
        plugin(&machine.0.path("spank_berth.so"), "0x160508");
        machine
    }

    fn file(&self, name: &str, text: &str, mode: u32) {
        let path = self.0.path(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn doctor(&self, args: &[&str]) -> Said {
        let path = format!("{}:/usr/bin:/bin", self.0.path("bin").display());
        let mut command = self.0.command(&["doctor"]);
        command
            .args(args)
            .env("PATH", path)
            .env("SLURM_CONF", self.0.path("slurm.conf"));
        said(command.output().unwrap())
    }

    /// Name → (state, detail, hint) of each check; of several with one name, the last.
    fn checks(&self) -> BTreeMap<String, (String, String, String)> {
        let said = self.doctor(&["--json"]);
        let value: Value =
            serde_json::from_str(&said.out).unwrap_or_else(|e| panic!("{e} {said:?}"));
        assert_eq!(said.code, Some(if value["ok"] == true { 0 } else { 1 }));
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        (value["checks"].as_array().unwrap().iter())
            .map(|c| {
                (
                    text(&c["name"]),
                    (text(&c["state"]), text(&c["detail"]), text(&c["hint"])),
                )
            })
            .collect()
    }
}

/// A shared object with the symbol by which Slurm tells plugins' releases.
fn plugin(path: &Path, version: &str) {
    let mut compiler = Command::new("cc")
        .args(["-shared", "-nostdlib", "-x", "c", "-", "-o"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let source = format!("const unsigned int plugin_version = {version};\n");
    compiler
        .stdin
        .take()
        .unwrap()
        .write_all(source.as_bytes())
        .unwrap();
    assert!(compiler.wait().unwrap().success());
}

fn root() -> bool {
    let is = nix::unistd::geteuid().is_root();
    if !is {
        eprintln!("left out: files that belong to root need root");
    }
    is
}

#[test]
fn a_well_kept_machine_passes() {
    if !root() {
        return;
    }
    let machine = Machine::new();
    let checks = machine.checks();
    for name in [
        "config",
        "key",
        "store",
        "store writers",
        "image",
        "slurm",
        "plugin",
        "runtime",
        "oci.conf",
        "guard",
    ] {
        assert_eq!(checks[name].0, "ok", "{name}: {:?}", checks[name]);
    }
    assert!(
        checks["plugin"].1.ends_with("for Slurm 22.05"),
        "{:?}",
        checks["plugin"]
    );
    // The daemon is down: cold images do not start, those in the store do.
    assert_eq!(checks["daemon"].0, "warn", "{:?}", checks["daemon"]);
    let said = machine.doctor(&["--quiet"]);
    assert!(said.out.lines().all(|l| !l.starts_with("ok")), "{said:?}");
}

#[test]
fn each_fault_is_found_and_has_a_way_out() {
    if !root() {
        return;
    }
    type Break = fn(&Machine);
    let faults: [(&str, &str, Break); 12] = [
        ("config", "unknown key", |m| {
            m.file("berth.toml", "[stor]\n", 0o644)
        }),
        ("config", "may be written by others", |m| {
            fs::set_permissions(m.0.path("berth.toml"), fs::Permissions::from_mode(0o666)).unwrap();
        }),
        ("key", "cannot read", |m| {
            fs::remove_file(m.0.path("site.pub")).unwrap()
        }),
        ("key", "belongs to uid 12345", |m| {
            std::os::unix::fs::chown(m.0.path("site.pub"), Some(12345), None).unwrap();
        }),
        ("store", "is the filesystem mounted?", |m| {
            fs::remove_file(m.0.path("store/FORMAT")).unwrap()
        }),
        ("store writers", "may be written by others", |m| {
            fs::set_permissions(m.0.path("store/images"), fs::Permissions::from_mode(0o777))
                .unwrap();
        }),
        ("plugin", "does not name spank_berth.so", |m| {
            m.file("plugstack.conf", "", 0o644)
        }),
        ("plugin", "is for Slurm 24.11, this is 22.05", |m| {
            plugin(&m.0.path("spank_berth.so"), "0x180b07");
        }),
        ("plugin", "No such file", |m| {
            fs::remove_file(m.0.path("spank_berth.so")).unwrap()
        }),
        ("runtime", "No such file", |m| {
            fs::remove_file(m.0.path("berth-runtime")).unwrap()
        }),
        ("oci.conf", "takes --container for itself", |m| {
            m.file("oci.conf", "", 0o644)
        }),
        ("guard", "sets no TaskProlog", |m| {
            m.file("slurm.conf", "ClusterName=x\n", 0o644)
        }),
    ];
    for (name, detail, fault) in faults {
        let machine = Machine::new();
        fault(&machine);
        let checks = machine.checks();
        let (state, found, hint) = &checks[name];
        assert_eq!(state, "fail", "{name}: {found}");
        assert!(found.contains(detail), "{name}: {found}");
        assert!(!hint.is_empty(), "{name}: {found}");
    }
}

#[test]
fn a_forged_record_is_found() {
    let machine = Machine::new();
    let stranger = berth_image::PrivateKey::generate()
        .unwrap()
        .public()
        .to_pem()
        .unwrap();
    machine.file("site.pub", &stranger, 0o644);
    let checks = machine.checks();
    assert_eq!(checks["image"].0, "fail");
    assert!(
        checks["image"].1.contains("is not believed"),
        "{:?}",
        checks["image"]
    );
}

#[test]
fn a_clock_that_is_far_off_fails() {
    let machine = Machine::new();
    // The answers' Date is the beginning of 2026.
    machine.0.daemon(|_, _| http(200, "{}"));
    let checks = machine.checks();
    assert_eq!(checks["clock"].0, "fail", "{:?}", checks["clock"]);
    assert_eq!(checks["daemon"].0, "warn", "{:?}", checks["daemon"]);
}

/// One is there, one is not, and one is somebody else's server.
#[test]
fn each_of_several_daemons_is_looked_at() {
    let machine = Machine::new();
    let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = deaf.local_addr().unwrap();
    drop(deaf);
    let text = fs::read_to_string(machine.0.path("berth.toml")).unwrap();
    let urls = format!("[api]\nurl = [\"http://{gone}\", \"http://{gone}/other\"]\n");
    assert!(text.contains("[api]\n"), "{text}");
    machine.file("berth.toml", &text.replace("[api]\n", &urls), 0o644);
    let details = || -> Vec<String> {
        let said = machine.doctor(&["--json"]);
        let value: Value = serde_json::from_str(&said.out).unwrap();
        let checks = value["checks"].as_array().unwrap();
        let daemons = checks.iter().filter(|check| check["name"] == "daemon");
        daemons
            .map(|d| d["detail"].as_str().unwrap().to_owned())
            .collect()
    };
    let none = details();
    assert_eq!(none.len(), 2, "{none:?}");
    for detail in none {
        assert!(detail.contains(&gone.to_string()), "{detail}");
        assert!(detail.contains("others do not"), "{detail}");
    }
    machine.0.daemon(|_, _| http(200, "{}"));
    let one = details();
    assert_eq!(one.len(), 3, "{one:?}");
    assert!(one[0].contains("did not answer as"), "{one:?}");
    assert!(one[1].contains(&format!("http://{gone}: ")), "{one:?}");
    assert!(one[1].ends_with("the others are asked instead"), "{one:?}");
}

#[test]
fn a_site_prolog_that_calls_the_guard_is_fine_and_another_is_not() {
    let machine = Machine::new();
    let prolog = machine.0.path("prolog");
    machine.file(
        "slurm.conf",
        &format!("taskprolog = {}\n", prolog.display()),
        0o644,
    );
    machine.file(
        "prolog",
        "#!/bin/sh\n/usr/libexec/berth/berth-guard || exit 1\n",
        0o755,
    );
    assert_eq!(machine.checks()["guard"].0, "ok");
    machine.file("prolog", "#!/bin/sh\n", 0o755);
    assert_eq!(machine.checks()["guard"].0, "fail");
}
