//! SquashFS 4.0 images with a dm-verity tree: written from a stream, read from anything.
//!
//! - [`format`]: the bytes on disk, and nothing else;
//! - [`compress`]: the compressors an image may use.

pub mod compress;
pub mod format;
