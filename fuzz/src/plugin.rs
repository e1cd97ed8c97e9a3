//! What Slurm's plugin reads. The plugin is no library that others could link: these are its own files, which know
//! neither Slurm nor the system.

#![allow(dead_code, reason = "what only hooks call")]

#[path = "../../slurm-spank/src/names.rs"]
pub mod names;
#[path = "../../slurm-spank/src/plan.rs"]
pub mod plan;
#[path = "../../slurm-spank/src/settings.rs"]
pub mod settings;
#[path = "../../slurm-spank/src/wire.rs"]
pub mod wire;
