//! Batch jobs: submitting, waiting for states, reading what they left.

use std::fs;
use std::path::{Path, PathBuf};

use crate::cluster::{Cluster, write_executable};
use crate::run::{Ended, wait_until};

/// A submitted batch job. Its script and output lie in a scratch folder of its own.
#[derive(Debug)]
pub struct Job<'a> {
    cluster: &'a Cluster,
    pub id: String,
    pub folder: PathBuf,
}

/// How a job ended, as `scontrol show job` tells.
#[derive(Debug, Clone)]
pub struct JobEnd {
    pub state: String,
    /// `CODE:SIGNAL`.
    pub exit: String,
    /// Its output, both streams.
    pub output: String,
}

const FINAL: [&str; 7] = [
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
];

impl Cluster {
    /// Submits a script (its text, `#!` line included) as the ordinary user.
    ///
    /// # Panics
    /// When sbatch refuses it.
    pub fn sbatch(&self, test: &str, arguments: &[&str], script: &str) -> Job<'_> {
        let (folder, ended) = self.try_sbatch(test, arguments, script);
        let id = ended.ok().split(';').next().unwrap_or_default().to_owned();
        Job {
            cluster: self,
            id,
            folder,
        }
    }

    /// The same, for scripts that sbatch may refuse.
    pub fn try_sbatch(&self, test: &str, arguments: &[&str], script: &str) -> (PathBuf, Ended) {
        let folder = self.scratch(test);
        let file = folder.join("job.sh");
        write_executable(&file, script);
        let mut words = vec!["--parsable", "--output=out"];
        words.extend(arguments);
        words.push("job.sh");
        let ended = self.user("sbatch", &words).folder(&folder).end();
        (folder, ended)
    }

    /// One field of `scontrol show job`; empty where there is none.
    pub fn job_field(&self, id: &str, field: &str) -> String {
        let shown = self
            .root("scontrol", &["--oneliner", "show", "job", id])
            .end();
        let mark = format!(" {field}=");
        let value = shown.stdout.split_once(&mark).map_or("", |(_, rest)| rest);
        value
            .split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned()
    }

    /// Every node's state, as sinfo names it.
    pub fn node_states(&self) -> Vec<String> {
        let shown = self.root("sinfo", &["-h", "-N", "-o", "%T"]).end();
        shown
            .ok()
            .lines()
            .map(|line| line.trim().to_owned())
            .collect()
    }

    /// Waits until every node is idle: nothing was drained, and nothing runs any more.
    ///
    /// # Panics
    /// When one is not, within half a minute.
    pub fn assert_nodes_idle(&self) {
        wait_until("all nodes are idle", 30, || {
            let states = self.node_states();
            assert!(
                !states
                    .iter()
                    .any(|s| s.contains("drain") || s.contains("down")),
                "{states:?}"
            );
            states.iter().all(|state| state == "idle").then_some(())
        });
    }
}

impl Job<'_> {
    pub fn state(&self) -> String {
        self.cluster.job_field(&self.id, "JobState")
    }

    /// Waits until the job is in that state.
    ///
    /// # Panics
    /// When it does not get there in a minute.
    pub fn wait_state(&self, state: &str) {
        wait_until(&format!("job {} is {state}", self.id), 60, || {
            (self.state() == state).then_some(())
        });
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When it does not come within two minutes.
    pub fn end(&self) -> JobEnd {
        let state = wait_until(&format!("job {} ends", self.id), 120, || {
            let state = self.state();
            FINAL.contains(&state.as_str()).then_some(state)
        });
        JobEnd {
            state,
            exit: self.cluster.job_field(&self.id, "ExitCode"),
            output: self.output(),
        }
    }

    pub fn output(&self) -> String {
        read(&self.folder.join("out"))
    }

    pub fn cancel(&self) {
        self.cluster.user("scancel", &[&self.id]).end().ok();
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

impl JobEnd {
    /// Output of a job that must have completed.
    ///
    /// # Panics
    /// When it failed.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert!(self.state == "COMPLETED" && self.exit == "0:0", "{self:#?}");
        &self.output
    }
}
