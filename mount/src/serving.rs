//! What the keeper and the process that serves images on demand say to each other, in packets.
//!
//! The server is the unprivileged side: nothing it says makes the keeper do more than stop waiting for a mount, count,
//! let go of one, or look at what it has of an image. It may die at any moment; another one gets every mount again, with the same descriptors.

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
    /// Keep at most so many bytes in the cache from now on: the keeper's copies take the rest.
    Limit {
        /// Of all images.
        bytes: u64,
    },
    /// The keeper has a copy of all of this one: what the cache has of it goes first when room is wanted.
    Copied {
        /// Which.
        id: u64,
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
    /// Takes those grants of a later request over that last longer: a job that goes on does not end with a shorter
    /// one's. Whether there was one.
    pub fn renew(&mut self, sources: &[Source]) -> bool {
        let mut changed = false;
        for source in sources.iter().filter(|source| source.grant.is_some()) {
            for mine in self.sources.iter_mut().filter(|mine| mine.at == source.at) {
                if mine.grant.is_none() || mine.until < source.until {
                    mine.clone_from(source);
                    changed = true;
                }
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
    /// Every chunk of the image, its hash tree's too, was checked and lies in the cache: the keeper may want a copy.
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
    fn a_grant_gives_way_to_one_of_the_same_source_that_lasts_longer() {
        let source = |at: &str, grant: Option<(&str, u64)>| Source {
            at: at.into(),
            grant: grant.map(|(grant, _)| grant.to_owned()),
            until: grant.map(|(_, until)| until),
        };
        let mut served = Served {
            id: 1,
            digest: "sha256:00".into(),
            verity_root: "ab".repeat(32),
            hash_offset: 4096,
            sources: vec![source("http://a/", None), source("http://b/", None)],
            block: false,
            taken_over: false,
        };
        assert!(!served.renew(&[
            source("http://a/", None),
            source("http://c/", Some(("x", 9)))
        ]));
        for (grant, until, taken) in [
            ("first", 5, true),
            ("again", 5, false),
            ("shorter", 4, false),
            ("longer", 6, true),
        ] {
            let said = served.renew(&[source("http://a/", Some((grant, until)))]);
            assert_eq!(said, taken, "{grant}");
        }
        assert_eq!(
            served.sources,
            [
                source("http://a/", Some(("longer", 6))),
                source("http://b/", None)
            ]
        );
    }
}
