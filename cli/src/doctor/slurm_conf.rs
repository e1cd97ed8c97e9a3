//! As much of slurm.conf and plugstack.conf as says where the plugin is (slurm.conf(5), spank(7)).

use std::fs;
use std::path::{Path, PathBuf};

/// How deep files may include files.
const DEPTH: usize = 8;
/// Where slurm.conf lies, besides $SLURM_CONF; the second is a configless node's.
const PLACES: [&str; 3] = [
    "/etc/slurm/slurm.conf",
    "/run/slurm/conf/slurm.conf",
    "/etc/slurm-llnl/slurm.conf",
];
/// Where plugins lie when `PluginDir` does not say.
const PLUGIN_DIRS: [&str; 4] = [
    "/usr/lib/x86_64-linux-gnu/slurm-wlm",
    "/usr/lib/aarch64-linux-gnu/slurm-wlm",
    "/usr/lib64/slurm",
    "/usr/lib/slurm",
];

/// slurm.conf, with what it includes.
#[derive(Debug)]
pub struct SlurmConf {
    pub path: PathBuf,
    /// Keys in lower case.
    lines: Vec<(String, String)>,
}

/// The plugin's line in plugstack.conf.
#[derive(Debug, PartialEq, Eq)]
pub struct PluginLine {
    pub file: PathBuf,
    pub arguments: Vec<String>,
    /// It stands in a file that plugstack.conf includes.
    pub included: bool,
}

impl SlurmConf {
    /// The configuration that Slurm's commands would read here.
    pub fn find() -> Option<Self> {
        let named = std::env::var_os("SLURM_CONF").map(PathBuf::from);
        let places = PLACES.iter().map(PathBuf::from);
        let path = named.into_iter().chain(places).find(|p| p.is_file())?;
        let mut lines = Vec::new();
        read_keys(&path, &mut lines, DEPTH);
        Some(Self { path, lines })
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        let found = self
            .lines
            .iter()
            .rev()
            .find(|(k, _)| *k == key.to_ascii_lowercase());
        found.map(|(_, value)| value.as_str())
    }

    pub fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    pub fn plugstack(&self) -> PathBuf {
        match self.get("PlugStackConfig") {
            Some(path) => path.into(),
            None => self.dir().join("plugstack.conf"),
        }
    }

    /// The first line of plugstack.conf and its includes that names `plugin`.
    pub fn plugin_line(&self, plugin: &str) -> Option<PluginLine> {
        self.search(&self.plugstack(), plugin, DEPTH)
    }

    fn search(&self, file: &Path, plugin: &str, depth: usize) -> Option<PluginLine> {
        let depth = depth.checked_sub(1)?;
        let text = fs::read_to_string(file).ok()?;
        let lines = text
            .lines()
            .map(|l| l.split('#').next().unwrap_or_default());
        lines.into_iter().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["include", pattern, ..] => self.search_all(pattern, plugin, depth),
                ["required" | "optional", path, arguments @ ..]
                    if Path::new(path).file_name().is_some_and(|n| n == plugin) =>
                {
                    Some(PluginLine {
                        file: self.plugin_path(path),
                        arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
                        included: false,
                    })
                }
                _ => None,
            }
        })
    }

    fn search_all(&self, pattern: &str, plugin: &str, depth: usize) -> Option<PluginLine> {
        let pattern = self.dir().join(pattern);
        let files = glob::glob(&pattern.to_string_lossy()).ok()?;
        let found = files
            .flatten()
            .find_map(|f| self.search(&f, plugin, depth))?;
        Some(PluginLine {
            included: true,
            ..found
        })
    }

    fn plugin_path(&self, path: &str) -> PathBuf {
        let configured = self.get("PluginDir").into_iter().flat_map(|d| d.split(':'));
        let dirs = configured.chain(PLUGIN_DIRS);
        let path = Path::new(path);
        match dirs.map(|d| Path::new(d).join(path)).find(|p| p.exists()) {
            Some(found) if path.is_relative() => found,
            _ => path.to_owned(),
        }
    }
}

fn read_keys(path: &Path, lines: &mut Vec<(String, String)>, depth: usize) {
    let (Some(depth), Ok(text)) = (depth.checked_sub(1), fs::read_to_string(path)) else {
        return;
    };
    let text = text.replace("\\\n", " ");
    for line in text
        .lines()
        .map(|l| l.split('#').next().unwrap_or_default().trim())
    {
        let first = line.split_whitespace().next().unwrap_or_default();
        if first.eq_ignore_ascii_case("include") {
            let dir = path.parent().unwrap_or(Path::new("/"));
            read_keys(&dir.join(line[first.len()..].trim()), lines, depth);
        } else if let Some((key, value)) = line.split_once('=') {
            lines.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugin_is_found_through_includes() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        fs::create_dir(dir.path().join("plugstack.d")).unwrap();
        write("slurm.conf", "ClusterName=x # y\ninclude more.conf\n");
        write("more.conf", "taskprolog=/p \\\n\n");
        write(
            "plugstack.conf",
            "# optional spank_berth.so\nrequired other.so\ninclude plugstack.d/*.conf\n",
        );
        write(
            "plugstack.d/berth.conf",
            "optional /x/spank_berth.so runtime=/r config=/c\n",
        );
        let mut lines = Vec::new();
        read_keys(&dir.path().join("slurm.conf"), &mut lines, DEPTH);
        let conf = SlurmConf {
            path: dir.path().join("slurm.conf"),
            lines,
        };
        assert_eq!(conf.get("TaskProlog"), Some("/p"));
        assert_eq!(
            conf.plugin_line("spank_berth.so"),
            Some(PluginLine {
                file: "/x/spank_berth.so".into(),
                arguments: vec!["runtime=/r".into(), "config=/c".into()],
                included: true,
            })
        );
        assert_eq!(conf.plugin_line("absent.so"), None);
    }

    #[test]
    fn a_file_that_includes_itself_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slurm.conf");
        fs::write(&path, "include slurm.conf\nA=1\n").unwrap();
        let mut lines = Vec::new();
        read_keys(&path, &mut lines, DEPTH);
        assert_eq!(lines.len(), DEPTH);
    }
}
