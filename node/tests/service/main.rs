//! The node service, whole: what it keeps, and what it serves on demand.

mod demand;
mod harness;
mod kept;
mod ranges;
mod whole;
