//! The README's first command, with binaries that are built already and under a name of its own.

use std::process::{Child, Command, Stdio};

use berth_tests::Run;
use berth_tests::cluster::repository;

const NAME: &str = "test-quickstart";

fn quickstart(arguments: &[&str]) -> Run {
    let path = repository().join("scripts/quickstart");
    Run::new(path.to_str().unwrap(), arguments)
        .env("BERTH_QUICKSTART", NAME)
        .seconds(600)
}

/// A shell in which the file that quickstart wrote was read.
fn in_its_shell(text: &str) -> Run {
    let text = format!("set -eu; . target/{NAME}/env; {text}");
    Run::new("bash", &["-c", &text]).folder(repository())
}

fn status() -> String {
    let path = repository().join("scripts/cluster");
    let ended = Run::new(path.to_str().unwrap(), &["status", NAME]).end();
    ended.stdout
}

/// Whether a process does anything yet: one that ended may wait long for a machine's init to take note of it.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // proc(5): the state is the word after the name, which stands in brackets.
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Something of the machine's that is none of quickstart's business.
struct Bystander(Child);

impl Drop for Bystander {
    fn drop(&mut self) {
        // It may have ended, which the test says elsewhere.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn it_shows_the_main_job_again_in_seconds_and_ends_what_it_started_and_only_that() {
    let child = Command::new("sleep")
        .arg("3600")
        .stdin(Stdio::null())
        .spawn();
    let mut bystander = Bystander(child.unwrap());
    let ended = quickstart(&[]).end();
    let said = ended.ok().to_owned();
    // The script's own line, and two of the inner srun.
    let inside = said.lines().filter(|l| l.contains("VARIANT=")).count();
    assert!(inside >= 3, "{said}");
    for word in [
        "COMPLETED",
        "registry",
        "store",
        "configuration",
        "daemon",
        "user",
        "--down",
    ] {
        assert!(said.contains(word), "no {word} in {said}");
    }
    let here = "command -v sbatch srun squeue scontrol berth; echo $BERTH_REGISTRY $BERTH_STORE $BERTH_CONFIG \
                $SLURM_CONF $BERTH_SOCKET $BERTH_USER; squeue; demo berth images";
    assert!(in_its_shell(here).end().ok().contains("demo/python:1"));
    let next = "demo srun -N3 --container=docker://$BERTH_REGISTRY/demo/python:1 python3 /opt/demo/hello.py";
    assert_eq!(in_its_shell(next).end().ok().lines().count(), 3);

    // Again: the same processes, and another job.
    let service = |name| {
        let path = repository().join("scripts/cluster");
        Run::new(path.to_str().unwrap(), &["service", NAME, "pid", name]).end()
    };
    let daemon = service("berthd").ok().to_owned();
    assert!(quickstart(&[]).end().ok().contains("COMPLETED"));
    assert_eq!(service("berthd").ok(), daemon);

    quickstart(&["--down"]).end().ok();
    assert!(!repository().join(format!("target/{NAME}/env")).exists());
    assert!(
        !status().contains("processes run") || status().contains(" 0 of "),
        "{}",
        status()
    );
    assert!(!runs(&daemon), "berthd runs on as {daemon}");
    assert!(bystander.0.try_wait().unwrap().is_none());
}
