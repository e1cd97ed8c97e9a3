//! From a file to a [`Config`], or to one line that says what is wrong with it.

use std::path::{Path, PathBuf};

use crate::check::Problem;
use crate::sections::Config;

/// Where the file lies when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/berth/berth.toml";

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{path}`: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("`{path}`: {problem}")]
    Check { path: PathBuf, problem: Problem },
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`], whose text is one line with file, line, key, and the nearest known key for an unknown one.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config = Self::parse(&text).map_err(|message| ConfigError::Parse {
            path: path.to_owned(),
            message,
        })?;
        match config.problems().into_iter().next() {
            Some(problem) => Err(ConfigError::Check {
                path: path.to_owned(),
                problem,
            }),
            None => Ok(config),
        }
    }

    /// Reads the text of a configuration file. The error is one line.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e| one_line(text, &e))
    }
}

/// `line 3: unknown key `stroe`, did you mean `store`?`
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let line = error
        .span()
        .map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let message = error.message().trim().replace('\n', ", ");
    let message = unknown_key(&message).unwrap_or(message);
    match line {
        Some(line) => format!("line {line}: {message}"),
        None => message,
    }
}

/// Serde's "unknown field `a`, expected one of `b`, `c`" as a line for people.
fn unknown_key(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    let (key, expected) = rest.split_once('`')?;
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    let nearest = known
        .iter()
        .copied()
        .max_by(|a, b| strsim::jaro_winkler(key, a).total_cmp(&strsim::jaro_winkler(key, b)));
    Some(match nearest {
        Some(near) if strsim::jaro_winkler(key, near) > 0.75 => {
            format!("unknown key `{key}`, did you mean `{near}`?")
        }
        _ => format!("unknown key `{key}`, known here: {}", known.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_file_is_the_default_site() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn what_is_written_reads_back() {
        let text = toml::to_string(&Config::default()).unwrap();
        assert_eq!(Config::parse(&text).unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let e = Config::parse("\n[store]\npaht = '/x'\n").unwrap_err();
        assert_eq!(e, "line 3: unknown key `paht`, did you mean `path`?");
        let e = Config::parse("[node.slurm]\nzzz = 1\n").unwrap_err();
        assert!(e.contains("known here: client, bin_dir"), "{e}");
        let e = Config::parse("[daemon]\ntag_ttl_s = 'x'\n").unwrap_err();
        assert!(e.starts_with("line 2: ") && !e.contains('\n'), "{e}");
    }
}
