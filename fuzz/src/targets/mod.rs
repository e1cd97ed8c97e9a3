//! The targets.

mod blocks;
mod cache;
mod decode;
mod envelope;
mod layers;
mod manifest;
mod merge;
mod node;
mod reference;
mod squashfs;
mod step;
mod tar;
mod trace;

/// Layers byte by byte, as convert's own tests write them.
#[path = "../../../convert/tests/layers/build.rs"]
pub(crate) mod build;

/// Sealed images and a source of their bytes, as the lazy loader's own tests make them.
#[path = "../../../fuse/tests/chunks/support.rs"]
#[allow(dead_code, reason = "not all of it is wanted here")]
mod chunks;

/// One thing to fuzz.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    /// Inputs to begin with, besides those below `fuzz/seeds/` and `fuzz/regressions/`.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

pub const ALL: &[Target] = &[
    tar::TARGET,
    decode::TARGET,
    layers::TARGET,
    merge::TARGET,
    squashfs::TARGET,
    blocks::TARGET,
    manifest::TARGET,
    envelope::TARGET,
    reference::TARGET,
    trace::TARGET,
    node::TARGET,
    cache::TARGET,
    step::TARGET,
];
