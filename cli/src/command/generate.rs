//! `berth completions` and `berth man`: made from the same definitions as the help.

use std::io;
use std::path::Path;

use clap_complete::Shell;

use crate::error::{Failure, OTHER};
use crate::output;

pub fn completions(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::args::command(), "berth", &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())
}

pub fn man(dir: &Path) -> Result<(), Failure> {
    let failed = |e: io::Error| {
        Failure::new(
            OTHER,
            format!("cannot write man pages into `{}`: {e}", dir.display()),
        )
    };
    std::fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(crate::args::command(), dir).map_err(failed)
}
