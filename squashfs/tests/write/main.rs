//! The writer against programs that are not ours.

mod determinism;
mod failures;
mod many;
mod oracle;
mod shapes;
