//! What the keeper and the process that serves images on demand say to each other, in packets.
//!
//! The server is the unprivileged side: nothing it says makes the keeper do more than stop waiting for a mount, count,
//! or let go of one. It may die at any moment; another one gets every mount again, with the same descriptors.

use serde::{Deserialize, Serialize};

use crate::keeper::Source;

/// The name of the one file of an image that is served as a block device's.
pub const BLOCK_FILE: &str = "image";

/// To the server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Order {
    /// Serve this. Descriptors: the connection, the memory of its requests, and the image's file if there is one.
    Serve(Served),
    /// Read on with these newer grants.
    Renew {
        /// Which.
        id: u64,
        /// Its sources.
        sources: Vec<Source>,
    },
    /// Say how it stands: [`Report::Standing`].
    Tell,
}

/// An image that is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// The keeper's number for it.
    pub id: u64,
    /// The image manifest's, for people.
    pub digest: String,
    /// 64 hexadecimal digits.
    pub verity_root: String,
    /// Bytes of the SquashFS part.
    pub hash_offset: u64,
    /// Where the bytes can be fetched.
    pub sources: Vec<Source>,
    /// As one file, for a loop device and the kernel's driver, instead of as its files.
    #[serde(default)]
    pub block: bool,
    /// Whether another server has answered for it before.
    pub taken_over: bool,
}

impl Served {
    /// Takes the grants of a later request over; whether one was another.
    pub fn renew(&mut self, sources: &[Source]) -> bool {
        let mut changed = false;
        for source in sources.iter().filter(|source| source.grant.is_some()) {
            for mine in self.sources.iter_mut().filter(|mine| mine.at == source.at) {
                changed |= mine.grant != source.grant;
                mine.grant.clone_from(&source.grant);
            }
        }
        changed
    }
}

/// From the server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "lowercase")]
pub enum Report {
    /// The image is open, requests are answered.
    Ready {
        /// Which.
        id: u64,
    },
    /// The image cannot be opened.
    Failed {
        /// Which.
        id: u64,
        /// One line.
        why: String,
    },
    /// Its last mount is gone, or its connection was aborted.
    Ended {
        /// Which.
        id: u64,
    },
    /// The image is whole and verified in the cache, under this name in the cache's folder.
    Whole {
        /// Which.
        id: u64,
    },
    /// To [`Order::Tell`].
    Standing {
        /// Milliseconds since the oldest unanswered request came.
        oldest_ms: u64,
        /// Prometheus text.
        metrics: String,
        /// Bytes that were brought to this node for an image, by its number.
        #[serde(default)]
        fetched: Vec<(u64, u64)>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_grant_takes_the_place_of_the_same_sources_first() {
        let source = |at: &str, grant: Option<&str>| Source {
            at: at.into(),
            grant: grant.map(str::to_owned),
        };
        let mut served = Served {
            id: 1,
            digest: "sha256:00".into(),
            verity_root: "ab".repeat(32),
            hash_offset: 4096,
            sources: vec![source("http://a/", Some("old")), source("http://b/", None)],
            block: false,
            taken_over: false,
        };
        assert!(!served.renew(&[source("http://a/", None), source("http://c/", Some("x"))]));
        assert!(served.renew(&[source("http://a/", Some("new"))]));
        assert!(!served.renew(&[source("http://a/", Some("new"))]));
        assert_eq!(
            served.sources,
            [source("http://a/", Some("new")), source("http://b/", None)]
        );
    }
}
