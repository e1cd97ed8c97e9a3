//! `berth config check` and `berth config show`.

use std::collections::HashSet;
use std::path::Path;

use berth_config::{Config, ConfigError};
use serde_json::json;

use crate::context::Context;
use crate::error::{CONFIG, Failure};
use crate::output;

/// Everything that is wrong with the file, one line each.
pub fn check(file: &Path, json: bool) -> Result<(), Failure> {
    let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Read {
        path: file.to_owned(),
        source,
    })?;
    let problems: Vec<String> = match Config::parse(&text) {
        Ok(config) => config.problems().iter().map(ToString::to_string).collect(),
        Err(message) => vec![message],
    };
    if json {
        output::json(&json!({ "file": file, "ok": problems.is_empty(), "problems": problems }))?;
    } else if problems.is_empty() {
        output::line(&format!("{}: ok", file.display()))?;
    }
    for problem in &problems {
        Failure::new(CONFIG, format!("`{}`: {problem}", file.display())).report();
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Failure::silent(CONFIG)),
    }
}

/// The configuration in effect, as TOML that may be read back; lines that say what the default says are marked.
pub fn show(context: &Context) -> Result<(), Failure> {
    if context.json {
        return output::json(&context.config);
    }
    let failed =
        |e: toml::ser::Error| Failure::new(70, format!("cannot write the configuration: {e}"));
    let effective = toml::to_string(&context.config).map_err(failed)?;
    let default = toml::to_string(&Config::default()).map_err(failed)?;
    let defaults: HashSet<(String, &str)> = sectioned(&default).collect();
    output::line(&format!("# {}", context.config_path.display()))?;
    for (section, text) in sectioned(&effective) {
        let is_value = !text.is_empty() && !text.starts_with('[');
        match is_value && defaults.contains(&(section, text)) {
            true => output::line(&format!("{text}  # default"))?,
            false => output::line(text)?,
        }
    }
    Ok(())
}

/// Each line with the section it stands in.
fn sectioned(text: &str) -> impl Iterator<Item = (String, &str)> {
    let mut section = String::new();
    text.lines().map(move |line| {
        if line.starts_with('[') {
            section = line.to_owned();
        }
        (section.clone(), line)
    })
}
