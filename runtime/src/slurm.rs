//! Slurm's client in the container: which files of the node's it takes, so that `srun` works in a job's script.
//!
//! Commands and libraries are links into a few of the node's folders, bound below [`FARM`]: a mount for each of some
//! thirty files would be a third of what a container's start costs.
//!
//! Which shared libraries the commands need is found out once a boot, and kept in the run folder.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use berth_config::Slurm;

use crate::mounts::own_path;
use crate::view::{Bind, IfAbsent, Kind, Link};

const COMMANDS: [&str; 15] = [
    "srun", "sbatch", "salloc", "scancel", "squeue", "scontrol", "sinfo", "sacct", "sacctmgr",
    "sattach", "sbcast", "sprio", "sreport", "sshare", "sstat",
];
const LIB_DIRS: [&str; 3] = [
    "/usr/lib/x86_64-linux-gnu/slurm-wlm",
    "/usr/lib64/slurm",
    "/usr/lib/slurm",
];
/// Plugins that clients load; the first letters of their names.
const PLUGINS: [&str; 8] = [
    "auth_",
    "cred_",
    "hash_",
    "mpi_",
    "select_",
    "switch_",
    "tls_",
    "topology_",
];
/// Where the node's folders lie in the container that links lead into.
const FARM: &str = "/.berth";
const OUR_PLUGIN: &str = "spank_berth.so";
/// Most files that `plugstack.conf` and its includes may be.
const MOST_FILES: usize = 32;
const LDD: &str = "/usr/bin/ldd";
const CACHE: &str = "slurm-libraries";

/// What the node's Slurm is like.
#[derive(Debug)]
pub(crate) struct Client<'a> {
    config: &'a Slurm,
    conf_dir: PathBuf,
    settings: String,
}

impl<'a> Client<'a> {
    /// Reads `slurm.conf`, which Slurm may have said is at `conf`; a node without one has defaults.
    pub(crate) fn new(config: &'a Slurm, conf: Option<&Path>) -> Self {
        let from_slurm = conf.and_then(Path::parent).filter(|p| p.is_absolute());
        let conf_dir = (config.conf_dir.clone())
            .or_else(|| from_slurm.map(Path::to_owned))
            .unwrap_or_else(|| {
                let usual = [Path::new("/etc/slurm"), Path::new("/run/slurm/conf")];
                let found = usual.iter().find(|d| d.join("slurm.conf").exists());
                found.unwrap_or(&usual[0]).to_path_buf()
            });
        let settings = fs::read_to_string(conf_dir.join("slurm.conf")).unwrap_or_default();
        Client {
            config,
            conf_dir,
            settings,
        }
    }

    /// Users that Slurm's commands look up by name.
    pub(crate) fn users(&self) -> Vec<String> {
        let user = self.setting("SlurmUser").unwrap_or("root");
        vec![user.to_owned()]
    }

    /// Binds, and links to what some of them show. Whatever a node lacks is left out.
    pub(crate) fn parts(
        &self,
        run_dir: &Path,
        munge_socket: Option<&Path>,
    ) -> (Vec<Bind>, Vec<Link>) {
        if !self.config.client {
            return Default::default();
        }
        let lib_dir = self.lib_dir();
        let srun = self.config.bin_dir.join("srun");
        let munge_dir = self.munge_dir(munge_socket);
        let mut farm = Farm::default();
        for command in COMMANDS {
            farm.link(&self.config.bin_dir.join(command), true);
        }
        let mut binds = Vec::new();
        let mut add = |what, path: &Path| {
            binds.push(own_path(what, path, Kind::Ordinary, IfAbsent::SkipAny));
        };
        add("Slurm's configuration", &self.conf_dir);
        add("munge's socket", &munge_dir);
        let plugins = self.plugstack();
        for path in &plugins {
            add("what plugstack.conf names", path);
        }
        if let Some(lib_dir) = &lib_dir {
            add("Slurm's libraries", lib_dir);
            for library in libraries(run_dir, &srun, lib_dir, &plugins) {
                farm.link(&library, false);
            }
        }
        binds.extend(farm.binds);
        (binds, farm.links)
    }

    /// SPANK plugins by absolute path: a client does not start without one that is `required`. Of ours its helper and
    /// configuration too, so that a step of another image is asked for from inside as from outside.
    fn plugstack(&self) -> Vec<PathBuf> {
        let usual = self.conf_dir.join("plugstack.conf");
        let file = self.setting("PlugStackConfig").map_or(usual, PathBuf::from);
        let mut named = Vec::new();
        let mut files = vec![file];
        // Files that include each other in a circle end here.
        for _ in 0..MOST_FILES {
            let Some(file) = files.pop() else { break };
            let text = fs::read_to_string(&file).unwrap_or_default();
            let (paths, includes) = plugins(&text);
            named.extend(paths);
            let folder = file.parent().unwrap_or(Path::new("/"));
            files.extend(includes.iter().flat_map(|i| included(&folder.join(i))));
        }
        named
    }

    fn lib_dir(&self) -> Option<PathBuf> {
        let configured = self.config.lib_dir.clone();
        configured.or_else(|| {
            let mut usual = LIB_DIRS.iter().map(PathBuf::from);
            usual.find(|d| d.is_dir())
        })
    }

    /// Where munged listens for this Slurm: its AuthInfo, else the site's, else the usual place.
    fn munge_dir(&self, site: Option<&Path>) -> PathBuf {
        let from_slurm = self.setting("AuthInfo").and_then(|info| {
            let mut options = info.split(',');
            options.find_map(|o| o.strip_prefix("socket="))
        });
        let socket = from_slurm.map(Path::new).or(site);
        let folder = socket.and_then(Path::parent).filter(|p| p.is_absolute());
        folder.unwrap_or(Path::new("/run/munge")).to_owned()
    }

    /// The value of a parameter; names are in any case.
    fn setting(&self, name: &str) -> Option<&str> {
        self.settings.lines().find_map(|line| {
            let line = line.split('#').next()?;
            let (key, value) = line.split_once('=')?;
            let value = value.trim().trim_matches('"');
            (key.trim().eq_ignore_ascii_case(name) && !value.is_empty()).then_some(value)
        })
    }
}

/// Links to files of the node's, and the folders they lie in.
#[derive(Default)]
struct Farm {
    binds: Vec<Bind>,
    links: Vec<Link>,
}

impl Farm {
    fn link(&mut self, path: &Path, replace: bool) {
        let below = |path: &Path| Path::new(FARM).join(path.strip_prefix("/").unwrap_or(path));
        // Links of the node's would lead to names of the image's.
        let Ok(real) = path.canonicalize() else {
            return;
        };
        let Some(folder) = real.parent() else { return };
        if !self.binds.iter().any(|bind| bind.source == folder) {
            self.binds.push(Bind {
                target: below(folder),
                read_only: true,
                ..own_path("Slurm's client", folder, Kind::Ordinary, IfAbsent::SkipAny)
            });
        }
        self.links.push(Link {
            path: path.to_owned(),
            to: below(&real),
            replace,
        });
    }
}

/// What a `plugstack.conf` names by absolute path, and what it includes.
fn plugins(text: &str) -> (Vec<PathBuf>, Vec<&str>) {
    let (mut paths, mut includes) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("include"), Some(pattern)) => includes.push(pattern),
            (Some("required" | "optional"), Some(plugin)) => {
                let ours = plugin.ends_with(OUR_PLUGIN);
                let values = words.filter_map(|word| word.split_once('='));
                let helpers =
                    values.filter(|(key, _)| ours && matches!(*key, "runtime" | "config"));
                let all = std::iter::once(plugin).chain(helpers.map(|(_, value)| value));
                paths.extend(all.map(PathBuf::from).filter(|path| path.is_absolute()));
            }
            _ => {}
        }
    }
    (paths, includes)
}

/// The files of an `include` line, whose last part may have one `*`.
fn included(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().and_then(|name| name.to_str());
    let Some((start, end)) = name.and_then(|name| name.split_once('*')) else {
        return vec![pattern.to_owned()];
    };
    let entries = fs::read_dir(pattern.parent().unwrap_or(Path::new("/")));
    let paths = entries.into_iter().flatten().flatten().map(|e| e.path());
    let fits = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|n| {
            n.len() >= start.len() + end.len() && n.starts_with(start) && n.ends_with(end)
        })
    };
    paths.filter(fits).collect()
}

/// Shared libraries of the commands and plugins, other than Slurm's own.
fn libraries(run_dir: &Path, srun: &Path, lib_dir: &Path, plugins: &[PathBuf]) -> Vec<PathBuf> {
    let Ok(stamp) = stamp(srun, lib_dir, plugins) else {
        return Vec::new();
    };
    let cache = run_dir.join(CACHE);
    if let Ok(text) = fs::read_to_string(&cache)
        && let Some(rest) = text.strip_prefix(&stamp)
    {
        return rest.lines().map(PathBuf::from).collect();
    }
    // What could not be found out is asked anew by the next step.
    let Some(found) = ask_the_linker(srun, lib_dir, plugins)
        .ok()
        .filter(|found| !found.is_empty())
    else {
        return Vec::new();
    };
    let lines: Vec<&str> = found.iter().filter_map(|p| p.to_str()).collect();
    // Two steps of one boot may both write: each writes the same, and a rename is whole.
    let temporary = run_dir.join(format!("{CACHE}.{}", std::process::id()));
    if fs::write(&temporary, format!("{stamp}{}\n", lines.join("\n"))).is_ok() {
        let _ = fs::rename(&temporary, &cache);
    }
    found
}

/// One line that changes whenever Slurm or a plugin is installed anew.
fn stamp(srun: &Path, lib_dir: &Path, plugins: &[PathBuf]) -> io::Result<String> {
    let version = |path: &Path| {
        let facts = fs::metadata(path)?;
        let (size, time) = (facts.size(), (facts.mtime(), facts.mtime_nsec()));
        Ok::<_, io::Error>((facts.ino(), size, time))
    };
    let plugins: Vec<_> = plugins.iter().map(|path| version(path).ok()).collect();
    Ok(format!(
        "{:?} {:?} {plugins:?}\n",
        version(srun)?,
        version(lib_dir)?
    ))
}

fn ask_the_linker(srun: &Path, lib_dir: &Path, plugins: &[PathBuf]) -> io::Result<Vec<PathBuf>> {
    let mut command = Command::new(LDD);
    command.arg(srun).env_clear().stdin(Stdio::null());
    // ldd prints errors for what is neither program nor library, and goes on.
    command.args(plugins).stderr(Stdio::null());
    for entry in fs::read_dir(lib_dir)?.flatten() {
        let name = entry.file_name();
        let wanted = |n: &str| n.ends_with(".so") && PLUGINS.iter().any(|p| n.starts_with(p));
        if name.to_str().is_some_and(wanted) {
            command.arg(entry.path());
        }
    }
    let output = command.output()?;
    Ok(listed(&String::from_utf8_lossy(&output.stdout), lib_dir))
}

/// The paths in ldd's output: `NAME => PATH (0x…)` or `PATH (0x…)`, each file under a line `FILE:`.
fn listed(text: &str, lib_dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for line in text.lines().filter(|l| l.starts_with('\t')) {
        let line = line.rsplit("=> ").next().unwrap_or(line).trim();
        let Some((path, _)) = line.split_once(" (") else {
            continue;
        };
        let path = PathBuf::from(path);
        if path.is_absolute() && !path.starts_with(lib_dir) && !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_is_understood() {
        let text = "/usr/bin/srun:\n\tlinux-vdso.so.1 (0x00)\n\tlibslurmfull.so => /l/slurm-wlm/libslurmfull.so (0x01)\n\
            \tlibc.so.6 => /lib/libc.so.6 (0x02)\n\tlibx.so => not found\n\t/lib64/ld.so (0x03)\n\
            /l/a.so:\n\tlibc.so.6 => /lib/libc.so.6 (0x02)\n";
        let paths = listed(text, Path::new("/l/slurm-wlm"));
        assert_eq!(
            paths,
            [Path::new("/lib/libc.so.6"), Path::new("/lib64/ld.so")]
        );
    }

    #[test]
    fn plugstack_names_plugins_and_includes() {
        let text = "# required /no.so\nrequired /p/spank_berth.so runtime=/r config=/c log=/l wait=5\n\
            optional other.so\noptional /q/x.so runtime=/no\ninclude /etc/slurm/plugstack.conf.d/*\n";
        let (paths, includes) = plugins(text);
        let expected = ["/p/spank_berth.so", "/r", "/c", "/q/x.so"];
        assert_eq!(paths, expected.map(PathBuf::from));
        assert_eq!(includes, ["/etc/slurm/plugstack.conf.d/*"]);
    }

    #[test]
    fn settings_are_found_as_slurm_reads_them() {
        let config = Slurm::default();
        let client = Client {
            config: &config,
            conf_dir: "/x".into(),
            settings: "# SlurmUser=no\nslurmuser = ops # yes\nAuthInfo=socket=/s/m/sock,ttl=5\n"
                .into(),
        };
        assert_eq!(client.users(), ["ops"]);
        assert_eq!(client.munge_dir(None), Path::new("/s/m"));
    }
}
