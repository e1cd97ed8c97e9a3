//! What an image is to Berth: references, digests, platforms, the signed record, and the store's layout on disk.
//!
//! Synchronous and without network: the root code on nodes, the sealer, the daemon and the command line share it.

pub mod digest;
pub mod envelope;
pub mod key;
pub mod layout;
pub mod platform;
pub mod record;
pub mod reference;
pub mod shown;
pub mod store;
pub mod trace;

pub use digest::Digest;
pub use key::{KeyId, PrivateKey, PublicKey};
pub use platform::Platform;
pub use record::{Record, RefEntry};
pub use reference::ImageRef;
pub use store::Store;
