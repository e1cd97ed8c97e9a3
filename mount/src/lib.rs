//! From an image file's descriptor to a detached, read-only mount of it.
//!
//! The caller opens the image (as the user who asks: the filesystem decides who may read it) and hands the descriptor
//! over; nothing in here opens an image by name. Two steps, so that the parts that can be shared are:
//!
//! 1. [`LoopDevice::attach`] finds the loop device that already serves the same file on this node, or makes one;
//! 2. [`LoopDevice::mount`] gives a mount that is attached nowhere yet, `ro,nosuid,nodev`.
//!
//! Mounts of one loop device share a superblock and so one page cache. The invariant: a loop device made here is
//! read-only, ends where the SquashFS part ends, and vanishes with its last user (`LO_FLAGS_AUTOCLEAR`), so a killed
//! process leaves nothing behind.
//!
//! [`keeper`] is how to ask the node service for a mount that is there already.
//!
//! [`fuse`] mounts what a process serves.
//!
//! The kernel's SquashFS driver must never see bytes that a user could have written. That is the caller's promise: check
//! the sealed record before calling.

mod error;
pub mod fuse;
pub mod keeper;
mod lock;
mod loopdev;
pub mod packets;
pub mod serving;
mod squashfs;
mod sys;

pub use error::MountError;
pub use loopdev::{ImageFile, LoopDevice};
