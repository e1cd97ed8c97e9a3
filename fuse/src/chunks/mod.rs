//! An image file that is somewhere else: fetched in chunks when they are first read, each checked against the sealed
//! root of its dm-verity tree before anybody sees it, and kept in a cache that all images of this node share.
//!
//! - [`Source`]: where bytes come from, several in order ([`Sources`]), by file ([`FileSource`]) or HTTP ([`HttpSource`]);
//! - [`Tree`]: whether bytes are right;
//! - [`Cache`]: what is kept, across restarts;
//! - [`ChunkStore`]: the three together, one fetch of a chunk however many readers want it;
//! - [`Trace`](berth_image::trace::Trace): which chunks a start touches, to be fetched ahead of the next one.
//!
//! Nothing that comes from a source or from the local disk is believed: bytes are hashed each time that they enter the
//! process, so that a torn write, a bad disk or a lying proxy is a chunk to be fetched anew, or an error in time.

mod ahead;
mod cache;
mod file;
mod file_source;
mod flights;
mod follow;
mod gate;
mod http;
mod prefetch;
mod proxy;
mod source;
mod states;
mod store;
mod trace;
mod tree;

pub use cache::{Cache, CacheError};
pub use file_source::FileSource;
pub use follow::{Policy, start_is_over};
pub use http::HttpSource;
pub use prefetch::Pace;
pub use source::{Source, SourceError, Sources};
pub use store::{ChunkStore, OpenError, Stats};
pub use tree::{Sealed, Tree, TreeError};

/// Bytes of a chunk, the unit that is fetched, kept and evicted: sixteen data blocks. A Python start touches about
/// 4 % of an image in blocks, 6 % in chunks of this size and 16 % in chunks of a MiB.
pub use berth_image::trace::CHUNK;
