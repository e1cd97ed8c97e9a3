//! The arguments of the plugin's line in plugstack.conf.

use std::time::Duration;

/// The site's choices, the defaults where nothing is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `runtime=PATH`: the helper, run on clients and nodes.
    pub runtime: String,
    /// `config=PATH`: the site's one configuration file, handed to the helper.
    pub config: String,
    /// `run_dir=PATH`: `node.run_dir` of that file, where a helper may wait for steps.
    pub run_dir: String,
    /// `wait=SECONDS`: how long a task waits for its container.
    pub wait: Duration,
    /// `image_option=0`: leave `--image` to another plugin.
    pub image_option: bool,
    /// `log=FILE`: where the node's helper appends its own messages.
    pub log: Option<String>,
    /// Arguments that mean nothing here; said to the user of a container job, who can tell the admin.
    pub unknown: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            runtime: "/usr/libexec/berth/berth-runtime".into(),
            config: "/etc/berth/berth.toml".into(),
            run_dir: "/run/berth-node".into(),
            wait: Duration::from_secs(600),
            image_option: true,
            log: None,
            unknown: Vec::new(),
        }
    }
}

impl Settings {
    pub fn parse(arguments: &[String]) -> Self {
        let mut settings = Self::default();
        for argument in arguments {
            match argument.split_once('=') {
                Some(("runtime", path)) if path.starts_with('/') => settings.runtime = path.into(),
                Some(("config", path)) if path.starts_with('/') => settings.config = path.into(),
                Some(("run_dir", path)) if path.starts_with('/') => settings.run_dir = path.into(),
                Some(("log", path)) if path.starts_with('/') => settings.log = Some(path.into()),
                Some(("wait", seconds))
                    if seconds.parse::<u32>().is_ok_and(|seconds| seconds > 0) =>
                {
                    settings.wait = Duration::from_secs(seconds.parse().unwrap_or(600));
                }
                Some(("image_option", "0")) => settings.image_option = false,
                Some(("image_option", "1")) => settings.image_option = true,
                _ => settings.unknown.push(argument.clone()),
            }
        }
        settings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_and_unknown_ones_kept() {
        let arguments = [
            "runtime=/r",
            "run_dir=/d",
            "wait=5",
            "image_option=0",
            "log=/l",
            "wait=never",
            "colour=red",
        ];
        let settings = Settings::parse(&arguments.map(String::from));
        assert_eq!(settings.runtime, "/r");
        assert_eq!(settings.run_dir, "/d");
        assert_eq!(settings.wait, Duration::from_secs(5));
        assert!(!settings.image_option);
        assert_eq!(settings.log.as_deref(), Some("/l"));
        assert_eq!(settings.unknown, ["wait=never", "colour=red"]);
        assert_eq!(settings.config, Settings::default().config);
    }
}
