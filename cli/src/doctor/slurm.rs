//! Slurm's side: the plugin, its helper, the guard, and what must not be there.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::plugin::{Release, built_for};
use super::slurm_conf::{PluginLine, SlurmConf};
use super::{Check, trust};

const PLUGIN: &str = "spank_berth.so";
const GUARD: &str = "berth-guard";
const LIMIT: Duration = Duration::from_secs(5);

pub fn checks(config: &Path) -> Vec<Check> {
    let Some(conf) = SlurmConf::find() else {
        return vec![
            Check::warn(
                "slurm",
                "no slurm.conf here, so the plugin was not looked at",
            )
            .hint("on a machine with Slurm, set SLURM_CONF where it is not in /etc/slurm"),
        ];
    };
    let release = release();
    let mut checks = vec![match release {
        Some(release) => Check::ok("slurm", format!("{release}, `{}`", conf.path.display())),
        None => Check::warn(
            "slurm",
            "`scontrol --version` does not say which release this is",
        )
        .hint("put Slurm's commands into PATH"),
    }];
    match conf.plugin_line(PLUGIN) {
        None => checks.push(
            Check::fail(
                "plugin",
                format!("`{}` does not name {PLUGIN}", conf.plugstack().display()),
            )
            .hint(format!(
                "add: optional {PLUGIN} runtime=/usr/libexec/berth/berth-runtime config={}",
                config.display()
            )),
        ),
        Some(line) => {
            checks.push(plugin(&conf, &line, release));
            checks.push(helper(&line));
            checks.extend(same_config(&line, config));
        }
    }
    checks.push(oci_conf(&conf));
    checks.push(guard(&conf));
    checks
}

fn plugin(conf: &SlurmConf, line: &PluginLine, release: Option<Release>) -> Check {
    let name = "plugin";
    let file = line.file.display();
    if let Some(why) = trust::weakness(&line.file) {
        return Check::fail(name, format!("Slurm loads it as root, but {why}"))
            .hint("install the plugin's package; file and folders are root's");
    }
    let configless = conf.dir().starts_with("/run/slurm");
    match (built_for(&line.file), release) {
        (Err(why), _) => {
            Check::fail(name, format!("`{file}`: {why}")).hint("install the plugin's package")
        }
        (Ok(built), Some(release)) if built != release => Check::fail(
            name,
            format!("`{file}` is for Slurm {built}, this is {release}: Slurm leaves it out"),
        )
        .hint("install the plugin's package for this release"),
        (Ok(_), _) if line.included && configless => Check::fail(
            name,
            "a configless cluster ships plugstack.conf, but not what it includes",
        )
        .hint("write the plugin's line into plugstack.conf itself"),
        (Ok(built), _) => Check::ok(name, format!("`{file}`, for Slurm {built}")),
    }
}

/// What the plugin runs as root on each node.
fn helper(line: &PluginLine) -> Check {
    let name = "runtime";
    let path: PathBuf = argument(line, "runtime")
        .unwrap_or("/usr/libexec/berth/berth-runtime")
        .into();
    match trust::weakness(&path) {
        Some(why) => Check::fail(name, format!("the plugin runs it as root, but {why}"))
            .hint("install the package, or correct runtime= in plugstack.conf"),
        None => Check::ok(name, path.display().to_string()),
    }
}

fn same_config(line: &PluginLine, config: &Path) -> Option<Check> {
    let theirs = argument(line, "config").unwrap_or(berth_config::DEFAULT_PATH);
    let same = match (Path::new(theirs).canonicalize(), config.canonicalize()) {
        (Ok(theirs), Ok(ours)) => theirs == ours,
        _ => false,
    };
    (!same).then(|| {
        Check::warn(
            "plugin config",
            format!("jobs use `{theirs}`, this looked at `{}`", config.display()),
        )
        .hint(format!("berth --config {theirs} doctor"))
    })
}

fn argument<'a>(line: &'a PluginLine, name: &str) -> Option<&'a str> {
    line.arguments
        .iter()
        .find_map(|a| a.strip_prefix(name)?.strip_prefix('='))
}

/// With an oci.conf Slurm takes `--container` for itself.
fn oci_conf(conf: &SlurmConf) -> Check {
    let name = "oci.conf";
    let path = conf.dir().join("oci.conf");
    match path.exists() {
        true => Check::fail(
            name,
            format!("`{}`: Slurm takes --container for itself", path.display()),
        )
        .hint("remove it from nodes where Berth runs containers"),
        false => Check::ok(name, "absent, as it must be"),
    }
}

/// Without the guard, a node that lacks the plugin runs container jobs on the host, without a word.
fn guard(conf: &SlurmConf) -> Check {
    let name = "guard";
    let hint = "TaskProlog=/usr/libexec/berth/berth-guard in slurm.conf: without it a node that lacks the plugin \
                runs container jobs on the host";
    let Some(prolog) = conf.get("TaskProlog") else {
        return Check::fail(name, "slurm.conf sets no TaskProlog").hint(hint);
    };
    if Path::new(prolog).file_name().is_some_and(|n| n == GUARD) {
        return match trust::weakness(Path::new(prolog)) {
            Some(why) => Check::fail(name, why).hint("install the package, or correct TaskProlog"),
            None => Check::ok(name, prolog),
        };
    }
    match std::fs::read(prolog) {
        Ok(script) if script.windows(GUARD.len()).any(|w| w == GUARD.as_bytes()) => {
            Check::ok(name, format!("called by {prolog}"))
        }
        Ok(_) => Check::fail(name, format!("TaskProlog={prolog} does not call {GUARD}"))
            .hint("call /usr/libexec/berth/berth-guard there, and end with its exit code"),
        Err(e) => Check::fail(name, format!("TaskProlog={prolog}: {e}")).hint(hint),
    }
}

/// The release of the Slurm commands in PATH.
fn release() -> Option<Release> {
    let mut child = Command::new("scontrol")
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut out = child.stdout.take()?;
    let (send, received) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = (&mut out).take(4096).read_to_string(&mut text);
        let _ = send.send(text);
    });
    let text = received.recv_timeout(LIMIT);
    if text.is_err() {
        let _ = child.kill();
    }
    let _ = child.wait();
    Release::parse(&text.ok()?)
}
