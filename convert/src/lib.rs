//! Layers in, image file out: what strangers wrote becomes a SquashFS image with a verity tree.
//!
//! Layers are read once each, from the top: every upper header is known when a lower entry arrives, so what is hidden
//! is not compressed. All headers are kept (about 200 bytes an entry), and at the end the tree is merged from them,
//! base first, as an unpacker would have made it; nothing is ever unpacked on a disk.
//!
//! - [`tar`], [`decode`], `gzip`, `stream`: from compressed bytes to entries;
//! - `layer`: one layer's task; `paths`, `entries`, `scan`, `spill`, `notes`: what the layers say, kept;
//! - `merge`, `image`: the tree;
//! - `policy`: what metadata stays;
//! - [`convert()`]: all of it in order; [`job`]: its words on a pipe; [`sandbox`]: its cage.
//!
//! The program `berth-convert` is this and nothing else. It parses hostile input, so it works on descriptors alone
//! and opens nothing.

mod convert;
pub mod decode;
mod entries;
mod gzip;
mod image;
pub mod job;
mod layer;
mod merge;
mod notes;
mod paths;
mod policy;
pub mod sandbox;
mod scan;
mod spill;
mod stream;
pub mod tar;

pub use convert::{Layer, convert};
