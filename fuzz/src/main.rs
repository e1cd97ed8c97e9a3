//! Fuzz targets for everything that parses what others wrote, on libFuzzer and stable Rust.
//!
//! One program holds all targets; `BERTH_FUZZ_TARGET` names the one to run, `BERTH_FUZZ_SEEDS=DIR` has its seeds
//! written to `DIR` instead. `scripts/fuzz` builds and runs it. A target takes bytes and returns; what it finds wrong
//! it panics about. Besides panics, one input may neither hold more than [`memory::MOST`] bytes nor take longer than
//! the time that the script allows.

#![no_main]

mod image;
mod memory;
mod plugin;
mod seal;
mod targets;

// The plugin's modules know it by this name.
use plugin::names;

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use targets::Target;

static TARGET: OnceLock<&Target> = OnceLock::new();

fn begin() {
    let wanted = std::env::var("BERTH_FUZZ_TARGET").unwrap_or_default();
    let Some(target) = targets::ALL.iter().find(|t| t.name == wanted) else {
        for target in targets::ALL {
            println!("{}", target.name);
        }
        std::process::exit(if wanted == "list" { 0 } else { 2 });
    };
    if let Some(dir) = std::env::var_os("BERTH_FUZZ_SEEDS") {
        for (i, seed) in (target.seeds)().iter().enumerate() {
            let file = std::path::Path::new(&dir).join(format!("seed-{i:02}"));
            std::fs::write(file, seed).expect("the folder for seeds can be written to");
        }
        std::process::exit(0);
    }
    let _ = TARGET.set(target);
}

fuzz_target!(init: begin(), |data: &[u8]| {
    if let Some(target) = TARGET.get() {
        memory::bounded(|| (target.run)(data));
    }
});
