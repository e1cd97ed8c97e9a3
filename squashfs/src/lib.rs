//! SquashFS 4.0 images with a dm-verity tree: written from a stream, read from anything.
//!
//! - [`mod@format`]: the bytes on disk, and nothing else;
//! - [`compress`]: the compressors an image may use;
//! - [`mod@check`]: whether a finished image is fit to be signed;
//! - [`mod@write`]: writing an image, in the same bytes on any number of threads;
//! - [`spill`]: a file for what would take too much memory;
//! - [`verity`]: the dm-verity tree behind it;
//! - [`read`]: reading an image from any source.

pub mod check;
pub mod compress;
pub mod format;
pub mod read;
pub mod spill;
pub mod verity;
pub mod write;
