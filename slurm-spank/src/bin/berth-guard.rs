//! TaskProlog guard: ends a task that was to run in a container on a node where the plugin did not act.
//!
//! A missing or wrong-version SPANK plugin is silent: Slurm runs the command on the host with exit code 0. This program
//! is what notices. A loaded plugin has taken `SLURM_CONTAINER` out of the task's environment, and has put
//! `SLURM_BERTH_TASK=<job>@<node>` into that of every task of a job whose image is named in `SLURM_BERTH_IMAGE`.
//!
//! Slurm runs it inside the image, so it is linked statically and needs nothing there: no shell, no libc, no file.
//! The environment is the user's own; who forges it only takes the guard away from himself.

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::process::ExitCode;

#[cfg(not(any(target_feature = "crt-static", clippy)))]
compile_error!(
    "berth-guard must be static: cargo rustc -p spank-berth --features guard --bin berth-guard -- -C target-feature=+crt-static"
);

fn main() -> ExitCode {
    let value = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if plugin_acted(&value) {
        return ExitCode::SUCCESS;
    }
    let node = value("SLURMD_NODENAME").unwrap_or_else(|| "this node".into());
    let mut line = b"print berth: not started: the container plugin is missing on ".to_vec();
    line.extend(node.as_bytes().iter().filter(|byte| **byte > b' '));
    line.extend(b", so the command would have run outside its container\n");
    line.extend(
        b"print hint: tell the site's admin; 'berth doctor' on that node says what is wrong\n",
    );
    // Slurm shows what follows `print` to the user. If nobody reads it the exit code still ends the task.
    let _ = std::io::stdout().write_all(&line);
    ExitCode::from(1)
}

fn plugin_acted(value: &dyn Fn(&str) -> Option<OsString>) -> bool {
    match value("SLURM_CONTAINER") {
        Some(reference) if reference == "none" => return true,
        Some(_) => return false,
        None => {}
    }
    if value("SLURM_BERTH_IMAGE").is_none() {
        return true;
    }
    let (Some(job), Some(node)) = (value("SLURM_JOB_ID"), value("SLURMD_NODENAME")) else {
        return false;
    };
    let mut expected = job;
    expected.push("@");
    expected.push(node);
    value("SLURM_BERTH_TASK") == Some(expected)
}
