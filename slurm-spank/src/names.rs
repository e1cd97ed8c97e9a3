//! The environment variables by which client, node and tasks speak to each other.
//!
//! Slurm carries only the last value of a repeated plugin option and hands the options of an outer `salloc` to inner
//! steps, over their own. Variables named `SLURM_…` have neither fault, and survive `--export=NONE`. All of them
//! are user input on the node.

use std::ffi::CStr;

/// Slurm's own: the value of `--container`. One step's; taken away on the node and in every client.
pub const CONTAINER: &CStr = c"SLURM_CONTAINER";

/// The job's image and settings, inherited by its steps.
pub const JOB_IMAGE: &CStr = c"SLURM_BERTH_IMAGE";
pub const JOB_MOUNTS: &CStr = c"SLURM_BERTH_MOUNTS";
pub const JOB_WORKDIR: &CStr = c"SLURM_BERTH_WORKDIR";
pub const JOB_WRITABLE: &CStr = c"SLURM_BERTH_WRITABLE";
/// `REFERENCE=DIGEST,…`: which bits the job's references mean.
pub const JOB_PINS: &CStr = c"SLURM_BERTH_PIN";
pub const JOB: [&CStr; 5] = [JOB_IMAGE, JOB_MOUNTS, JOB_WORKDIR, JOB_WRITABLE, JOB_PINS];

/// The options of one step, on their way to the node only.
pub const STEP_MOUNTS: &CStr = c"SLURM_BERTH_STEP_MOUNTS";
pub const STEP_WORKDIR: &CStr = c"SLURM_BERTH_STEP_WORKDIR";
pub const STEP_WRITABLE: &CStr = c"SLURM_BERTH_STEP_WRITABLE";
/// srun's own folder, which its tasks will most likely start in. Slurm tells the node only with the tasks.
pub const STEP_CWD: &CStr = c"SLURM_BERTH_STEP_CWD";
pub const STEP: [&CStr; 5] = [
    CONTAINER,
    STEP_MOUNTS,
    STEP_WORKDIR,
    STEP_WRITABLE,
    STEP_CWD,
];

/// `JOBID@NODENAME`, set for a task that the plugin let through; `berth-guard` looks for it.
pub const TASK: &CStr = c"SLURM_BERTH_TASK";
