//! End-to-end tests: what the suites in `tests/` stand on.
//!
//! A suite drives a real Slurm, registry and daemon through `scripts/cluster`. A [`Cluster`] that several tests share
//! stays up when the suite ends, so that the next run starts in a second; `scripts/test` removes it. Tests wait for
//! events, each with a bound, and assert what a user could notice: output, exit codes, what is left on the machine.

pub mod cluster;
pub mod http;
pub mod image;
pub mod job;
pub mod proxy;
pub mod run;
pub mod suite;

pub use cluster::{Cluster, Options};
pub use image::Image;
pub use job::{Job, JobEnd};
pub use proxy::{Fault, Proxy};
pub use run::{Ended, Run, machine_has, wait_until};
