//! A cluster of `scripts/cluster`, as a test uses it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::run::{Ended, Run};

/// What a cluster is to be like; words for `scripts/cluster up`.
#[derive(Debug, Clone, Default)]
pub struct Options {
    words: Vec<String>,
}

impl Options {
    pub fn new(words: &[&str]) -> Self {
        Self {
            words: words.iter().map(|word| (*word).to_owned()).collect(),
        }
    }

    /// One more setting of berth.toml, the value as TOML.
    pub fn setting(mut self, setting: &str) -> Self {
        self.words.extend(["--berth-toml".into(), setting.into()]);
        self
    }

    /// One more registry that speaks plain HTTP.
    pub fn registry(mut self, address: &str) -> Self {
        self.words
            .extend(["--plain-registry".into(), address.into()]);
        self
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    environment: HashMap<String, String>,
    purge: bool,
}

/// The root of the repository.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

fn script(arguments: &[&str]) -> Run {
    let path = repository().join("scripts/cluster");
    Run::new(path.to_str().unwrap_or_default(), arguments).seconds(180)
}

/// A word that no earlier run of the tests used.
pub fn unique() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let millis = now.map_or(0, |d| d.as_millis());
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{:x}-{}-{count}", millis, std::process::id())
}

impl Cluster {
    /// A cluster for all tests of a suite. It stays when the suite ends.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn shared(name: &str, options: &Options) -> Self {
        Self::up(name, options, false)
    }

    /// A cluster of one test's own, which is gone with it. With `BERTH_TEST_KEEP` set it stays to be looked at.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn own(name: &str, options: &Options) -> Self {
        script(&["down", "--purge", name]).end().ok();
        Self::up(name, options, std::env::var_os("BERTH_TEST_KEEP").is_none())
    }

    fn up(name: &str, options: &Options, purge: bool) -> Self {
        let mut words = vec!["up", name];
        words.extend(options.words.iter().map(String::as_str));
        let started = script(&words).end();
        assert!(started.code == 0, "{started}");
        let printed = script(&["env", name]).end();
        let exports = printed.ok().lines().filter_map(|line| {
            let (key, value) = line.strip_prefix("export ")?.split_once('=')?;
            Some((key.to_owned(), value.trim_matches('"').to_owned()))
        });
        let mut environment: HashMap<String, String> = exports.collect();
        let path =
            environment["PATH"].replace("$PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
        environment.insert("PATH".into(), path);
        Self {
            name: name.to_owned(),
            environment,
            purge,
        }
    }

    /// What `scripts/cluster env` says of `name`.
    ///
    /// # Panics
    /// When it does not name it.
    pub fn get(&self, name: &str) -> &str {
        &self.environment[name]
    }

    pub fn registry(&self) -> &str {
        self.get("BERTH_REGISTRY")
    }

    pub fn store(&self) -> PathBuf {
        self.get("BERTH_STORE").into()
    }

    pub fn folder(&self) -> PathBuf {
        self.get("BERTH_CLUSTER_FOLDER").into()
    }

    /// The log of one of its processes so far.
    pub fn log(&self, service: &str) -> String {
        let path = self.folder().join("log").join(format!("{service}.log"));
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// A command as the ordinary user, with a clean environment, in the home directory.
    pub fn user(&self, program: &str, arguments: &[&str]) -> Run {
        let user = self.get("BERTH_USER");
        let mut words = vec![
            "--reuid",
            user,
            "--regid",
            user,
            "--init-groups",
            "--",
            program,
        ];
        words.extend(arguments);
        let home = format!("/home/{user}");
        let run = self.environment_of(Run::new("setpriv", &words));
        run.env("HOME", &home)
            .env("USER", user)
            .env("LOGNAME", user)
            .folder(home)
    }

    /// A shell script's text as the ordinary user.
    pub fn user_sh(&self, text: &str) -> Run {
        self.user("sh", &["-c", text])
    }

    /// A command as root.
    pub fn root(&self, program: &str, arguments: &[&str]) -> Run {
        self.environment_of(Run::new(program, arguments))
            .env("HOME", "/root")
            .folder("/")
    }

    fn environment_of(&self, run: Run) -> Run {
        let mut run = run.clean();
        for (name, value) in &self.environment {
            run = run.env(name, value);
        }
        run.env("LANG", "C.UTF-8")
    }

    /// `berth` as the ordinary user.
    pub fn berth(&self, arguments: &[&str]) -> Ended {
        self.user("berth", arguments).end()
    }

    /// Starts, stops or kills one process of the cluster.
    ///
    /// # Panics
    /// When that fails.
    pub fn service(&self, what: &str, service: &str) -> String {
        let ended = script(&["service", &self.name, what, service]).end();
        ended.ok().to_owned()
    }

    /// A fresh folder of the ordinary user's own, under the home directory.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn scratch(&self, test: &str) -> PathBuf {
        let user = self.get("BERTH_USER");
        let home = PathBuf::from(format!("/home/{user}"));
        let folder = home.join(format!("{test}-{}", unique()));
        fs::create_dir(&folder).expect("a new folder");
        let owner = fs::metadata(&home).expect("the user has a home");
        let (uid, gid) = {
            use std::os::unix::fs::MetadataExt;
            (owner.uid(), owner.gid())
        };
        chown(&folder, Some(uid), Some(gid)).expect("root gives it away");
        folder
    }

    /// Pushes one of `scripts/demo-image`'s images as `REPOSITORY:TAG`; its reference.
    ///
    /// # Panics
    /// When it cannot be made or pushed.
    pub fn push_demo(&self, image: &str, name: &str) -> String {
        let path = repository().join("scripts/demo-image");
        let target = format!("{}/{name}", self.registry());
        let words = [image, "--push", &target];
        let ended = Run::new(path.to_str().unwrap_or_default(), &words)
            .seconds(600)
            .end();
        ended.ok();
        target
    }

    /// Entries of the store's folder `images/`, and whatever lies in `tmp/`.
    pub fn published(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let list = |folder: PathBuf| -> Vec<PathBuf> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect()
        };
        let shards = list(self.store().join("images/sha256"));
        let images = shards.into_iter().flat_map(list).collect();
        (images, list(self.store().join("tmp")))
    }

    /// Waits until no step uses the image any more: what is left of it is at most the one mount that the node service
    /// keeps, on one loop device.
    ///
    /// # Panics
    /// When something stays, for a minute.
    pub fn assert_unused(&self, digest: &str) {
        let hex = digest.trim_start_matches("sha256:");
        crate::wait_until("no step uses the image", 60, || {
            let ended = self.root("berth", &["--json", "node", "status"]).end();
            let status: serde_json::Value = serde_json::from_str(ended.ok()).ok()?;
            let of = |mount: &&serde_json::Value| mount["digest"] == digest;
            let kept = status["mounts"].as_array()?.iter().filter(of);
            let mut users = kept.map(|mount| mount["users"].as_u64());
            let left = self.leftovers();
            let left = left.iter().filter(|line| line.contains(hex)).count();
            (users.all(|users| users == Some(0)) && left <= 1).then_some(())
        });
    }

    /// Mounts and loop devices of the machine that have to do with this cluster's store.
    pub fn leftovers(&self) -> Vec<String> {
        let store = self.store();
        let store = store.to_string_lossy();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut found: Vec<String> = mounts
            .lines()
            .filter(|line| line.contains(&*store))
            .map(str::to_owned)
            .collect();
        let loops = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        for device in loops {
            let backing = fs::read_to_string(device.path().join("loop/backing_file"));
            let name = device.file_name();
            found.extend(
                backing
                    .iter()
                    .filter(|file| file.contains(&*store))
                    .map(|file| format!("{}: {file}", name.display())),
            );
        }
        found
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            save_logs(&self.folder().join("log"), &self.name);
        }
        if self.purge {
            let ended = script(&["down", "--purge", &self.name]).end();
            if ended.code != 0 {
                eprintln!("{ended}");
            }
        }
    }
}

/// Keeps the logs of a failed test's cluster in target/e2e-logs.
fn save_logs(logs: &Path, name: &str) {
    let target = repository().join("target/e2e-logs").join(name);
    let _ = fs::create_dir_all(&target);
    for entry in fs::read_dir(logs).into_iter().flatten().flatten() {
        let _ = fs::copy(entry.path(), target.join(entry.file_name()));
    }
    eprintln!("logs of cluster {name}: {}", target.display());
}

/// Writes a file that everybody may read and run.
///
/// # Panics
/// When it cannot.
pub fn write_executable(path: &Path, text: &str) {
    fs::write(path, text).expect("a file is written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("and made executable");
}
