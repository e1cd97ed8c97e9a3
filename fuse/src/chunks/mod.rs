//! An image file that is somewhere else: fetched in pieces when they are first read, each checked against the sealed
//! root of its dm-verity tree before anybody sees it, and kept in a cache on this node.
//!
//! - [`Origin`]: where bytes come from, several in order ([`Origins`]);
//! - [`Tree`]: whether bytes are right;
//! - [`CacheFile`]: what is kept, across restarts;
//! - [`ChunkStore`]: the three together, one fetch of a piece however many readers want it.

mod cache;
mod http;
mod origin;
mod pieces;
mod store;
mod tree;

pub use cache::{CacheError, CacheFile};
pub use http::HttpOrigin;
pub use origin::{FileOrigin, Origin, OriginError, Origins};
pub use store::{ChunkStore, OpenError, Stats};
pub use tree::{Sealed, Tree, TreeError};

/// Bytes of a piece, the unit that is fetched, kept and evicted: 256 data blocks, whose digests fill two blocks of the
/// tree.
pub const PIECE: u64 = 1 << 20;
