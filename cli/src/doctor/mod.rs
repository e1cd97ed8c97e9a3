//! `berth doctor`: what on this machine would stop a container job. Looks, changes nothing, waits for nothing longer
//! than a few seconds.

mod daemon;
mod kernel;
mod node;
mod plugin;
mod site;
mod slurm;
mod slurm_conf;
mod trust;
mod users;

use berth_config::Config;
use serde::Serialize;

use crate::args::Global;
use crate::context;
use crate::error::{Failure, OTHER};
use crate::output;

/// What one check found.
#[derive(Debug, Serialize)]
pub struct Check {
    name: &'static str,
    state: State,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// Jobs run, but not all, or not as they should.
    Warn,
    /// Container jobs do not run here.
    Fail,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, State::Ok, detail)
    }

    fn warn(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, State::Warn, detail)
    }

    fn fail(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, State::Fail, detail)
    }

    fn new(name: &'static str, state: State, detail: impl Into<String>) -> Self {
        Self {
            name,
            state,
            detail: output::plain(detail.into()),
            hint: None,
        }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn failed(name: &'static str, failure: Failure) -> Self {
        Self {
            hint: failure.hint,
            ..Self::fail(name, failure.message)
        }
    }
}

pub fn run(global: &Global) -> Result<(), Failure> {
    let loaded = context::load(&global.config);
    let mut checks = site::config(&global.config, &loaded);
    checks.extend(kernel::checks());
    checks.extend(users::checks());
    match &loaded {
        Ok(config) => checks.extend(configured(config)),
        Err(_) => checks.push(Check::warn(
            "store",
            "keys, store and daemon were not looked at without a configuration",
        )),
    }
    checks.extend(slurm::checks(&global.config));

    let bad = checks.iter().any(|c| c.state == State::Fail);
    if global.json {
        output::json(&serde_json::json!({ "ok": !bad, "checks": checks }))?;
    } else {
        for check in checks
            .iter()
            .filter(|c| !global.quiet || c.state != State::Ok)
        {
            show(check)?;
        }
    }
    match bad {
        true => Err(Failure::silent(OTHER)),
        false => Ok(()),
    }
}

fn configured(config: &Config) -> Vec<Check> {
    let mut checks = site::keys(config);
    checks.extend(site::store(config));
    checks.extend(daemon::checks(config));
    checks.extend(node::checks(config));
    checks
}

fn show(check: &Check) -> Result<(), Failure> {
    let state = match check.state {
        State::Ok => "ok",
        State::Warn => "WARN",
        State::Fail => "FAIL",
    };
    output::line(&format!("{state:<5} {:<14} {}", check.name, check.detail))?;
    match &check.hint {
        Some(hint) => output::line(&format!("{:20} -> {hint}", "")),
        None => Ok(()),
    }
}
