//! `spank_berth.so`: Slurm's plugin that runs jobs in container images.
//!
//! It speaks SPANK and nothing else: the work is done by `berth-runtime`, which it starts on clients (`submit`) and once
//! per step on nodes (`step`), and whose prepared mount namespace each task enters. The rooms:
//!
//! - `hooks`: what Slurm calls, by hook and context; `ffi`: Slurm's and libc's calls, and the guard against panics;
//! - `client`, `options`: sbatch, salloc, srun; `node`: slurmstepd; `task`, `caps`: the task's own process;
//! - `plan`: the decisions, pure; `names`: the environment variables; `settings`, `slurmconf`: what the site says;
//! - `wire`, `sockets`, `spawn`: speaking to the helper and starting it.
//!
//! **A job never runs on the host because its container failed.** What each hook does on each failure:
//!
//! | hook, where | on what | does |
//! |---|---|---|
//! | `init`, client | a panic | goes on; the node decides |
//! | `init_post_opt`, client | contradiction, malformed reference, container in a heterogeneous job or step | one line, `_exit(2)`: not submitted |
//! | | helper exits 2, 65 or 77 | its line, `_exit` with that code: not submitted |
//! | | helper missing, failing, silent for 2 s, killed; a panic | at most one warning, submitted without a pin |
//! | `init`, node | a panic | options are not registered; the rest works |
//! | `init_post_opt`, node | environment unreadable or too long, Slurm items missing, no socket, no fork, too many mounts, a panic | kept; every task ends with 77, the first of the node prints the line |
//! | | helper missing or dead | its last words stay in the socket; as above |
//! | `task_init_privileged` | helper says `E` | kept; `task_init` prints its text and ends with its code |
//! | | helper ends, hangs past `wait=`, answers nonsense; no socket; capabilities cannot be kept | kept; `task_init` ends with 77 |
//! | | scancel | the process has SIGTERM's default and its own name: it dies at once (143) |
//! | | a panic | `task_init` finds no container: 77 |
//! | `task_init` | `setns`, dropping, checking or `chdir` fails; environment refused; a panic | one line, `_exit(77)` |
//! | `exit`, node | – | closes the socket; the helper ends by itself |
//!
//! No hook returns anything but 0, none in slurmstepd's own process waits, and none but a task's ends its process.
//! `docs/SLURM-HOOKS.md` has the same with what was run on a real Slurm.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
#![deny(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    clippy::todo,
    clippy::unreachable
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]
#![allow(
    non_upper_case_globals,
    reason = "plugin_name and its like are Slurm's names"
)]

mod caps;
mod client;
mod ffi;
mod hooks;
mod names;
mod node;
mod options;
mod plan;
mod settings;
mod slurmconf;
mod sockets;
mod spawn;
mod task;
mod wire;
