//! Who we are to a registry, read from the file that the site's configuration names. Never printed.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

/// Largest credentials file read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// What is shown to one registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    Anonymous,
    Password {
        user: String,
        password: String,
        source: PathBuf,
    },
    /// An OAuth2 refresh token (`identitytoken` in Docker's `config.json`).
    Identity {
        token: String,
        source: PathBuf,
    },
}

impl Credential {
    /// Reads the credential for `host` from `path`: a file in the form of Docker's `config.json`, or two lines,
    /// user and password. A `config.json` without that host is nobody.
    ///
    /// # Errors
    /// One line that names the file and no part of its content.
    pub fn load(path: &Path, host: &str) -> Result<Self, String> {
        let shown = path.display();
        let text = read(path).map_err(|e| format!("cannot read credentials `{shown}`: {e}"))?;
        if text.trim_start().starts_with('{') {
            let file: DockerConfig = serde_json::from_str(&text)
                .map_err(|e| format!("`{shown}`, line {}: not Docker's config.json", e.line()))?;
            return file.credential(host, path);
        }
        let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
        match (lines.next(), lines.next(), lines.next()) {
            (Some(user), Some(password), None) => Ok(Self::password(user, password, path)),
            _ => Err(format!(
                "`{shown}`: expected Docker's config.json, or two lines, user and password"
            )),
        }
    }

    fn password(user: &str, password: &str, source: &Path) -> Self {
        Self::Password {
            user: user.into(),
            password: password.into(),
            source: source.into(),
        }
    }

    /// `user:password` in base64, for `Authorization: Basic`.
    pub fn basic(&self) -> Option<String> {
        match self {
            Self::Password { user, password, .. } => {
                Some(STANDARD.encode(format!("{user}:{password}")))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Credential {
    /// What people may read: who, never with what.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("no credential"),
            Self::Password { user, source, .. } => {
                write!(f, "user `{user}` of `{}`", source.display())
            }
            Self::Identity { source, .. } => {
                write!(f, "the identity token of `{}`", source.display())
            }
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, DockerAuth>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct DockerAuth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

impl DockerConfig {
    fn credential(&self, host: &str, path: &Path) -> Result<Credential, String> {
        let Some((_, auth)) = self.auths.iter().find(|(key, _)| names(key, host)) else {
            return Ok(Credential::Anonymous);
        };
        if !auth.identitytoken.is_empty() {
            return Ok(Credential::Identity {
                token: auth.identitytoken.clone(),
                source: path.into(),
            });
        }
        if !auth.username.is_empty() {
            return Ok(Credential::password(&auth.username, &auth.password, path));
        }
        let decoded = STANDARD.decode(auth.auth.trim()).ok();
        let decoded = decoded.and_then(|b| String::from_utf8(b).ok());
        match decoded.as_deref().and_then(|d| d.split_once(':')) {
            Some((user, password)) => Ok(Credential::password(
                user,
                password.trim_end_matches('\0'),
                path,
            )),
            None => Err(format!(
                "`{}`: the entry for `{host}` has no usable `auth`",
                path.display()
            )),
        }
    }
}

/// Whether a key of `auths` (`HOST`, `https://HOST`, `https://HOST/v1/`) is about `host`.
fn names(key: &str, host: &str) -> bool {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    let key = key.split('/').next().unwrap_or_default();
    let key = match key {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        other => other,
    };
    key.eq_ignore_ascii_case(host)
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MAX_FILE)
        .read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn dockers_file_is_understood() {
        let auth = STANDARD.encode("alice:pa:ss");
        let f = file(&format!(
            r#"{{"auths":{{"https://index.docker.io/v1/":{{"auth":"{auth}"}},"r.example":{{"identitytoken":"t0k"}},"bad.example":{{"auth":"?"}}}},"credsStore":"x"}}"#
        ));
        let c = Credential::load(f.path(), "docker.io").unwrap();
        assert!(
            matches!(&c, Credential::Password { user, password, .. } if user == "alice" && password == "pa:ss")
        );
        assert!(matches!(
            Credential::load(f.path(), "r.example").unwrap(),
            Credential::Identity { .. }
        ));
        assert_eq!(
            Credential::load(f.path(), "other.example").unwrap(),
            Credential::Anonymous
        );
        assert!(Credential::load(f.path(), "bad.example").is_err());
    }

    #[test]
    fn two_lines_are_user_and_password_and_neither_is_shown() {
        let f = file("bob\nhunter2\n");
        let c = Credential::load(f.path(), "r.example").unwrap();
        assert_eq!(c.basic().unwrap(), STANDARD.encode("bob:hunter2"));
        let shown = format!("{c} {c:?}");
        assert!(
            shown.contains("bob") && !shown.contains("hunter2"),
            "{shown}"
        );
        assert!(Credential::load(file("only\n").path(), "r").is_err());
    }
}
