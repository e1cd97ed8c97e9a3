//! Traces: which chunks of an image a start touches, in the order of their first touch (docs/FORMATS.md, "Traces").
//!
//! A trace comes from users, by way of the daemon: it can only name chunks of the image it is of, each once, and not
//! too many. The worst that a wrong one does is to fetch the wrong chunks first.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::digest::hex;
use crate::shown::parse_error;

/// Bytes of a chunk, the unit in which nodes fetch and traces count.
pub const CHUNK: u64 = 64 << 10;
/// Most runs in a trace, which keeps its JSON below [`MAX_TRACE`].
pub const MOST_RUNS: usize = 16_384;
/// Largest trace read, in bytes.
pub const MAX_TRACE: usize = 512 << 10;
/// Bytes that a trace of any image may name; of large ones a quarter.
const ALWAYS_FINE: u64 = 64 << 20;

/// Why a trace is not taken.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Not JSON of this form.
    #[error("not a trace: {0}")]
    Form(String),
    /// Of another image.
    #[error("it is the trace of another image")]
    OtherImage,
    /// It names what is not there, names something twice, or too much.
    #[error("its chunks are not possible: {0}")]
    Chunks(&'static str),
}

/// A trace of one image, whose chunks are all possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    verity_root: [u8; 32],
    runs: Vec<Range<u32>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    format: u32,
    verity_root: String,
    chunk_bytes: u64,
    /// First chunk and how many.
    runs: Vec<(u32, u32)>,
}

/// Most chunks that a trace of an image with so many bytes of data may name.
pub fn most_chunks(hash_offset: u64) -> u64 {
    (ALWAYS_FINE / CHUNK).max(hash_offset.div_ceil(CHUNK) / 4)
}

impl Trace {
    /// Reads a trace of the image with this root and so many bytes of data.
    pub fn from_json(
        verity_root: &[u8; 32],
        hash_offset: u64,
        text: &[u8],
    ) -> Result<Self, TraceError> {
        if text.len() > MAX_TRACE {
            return Err(TraceError::Form(format!("larger than {MAX_TRACE} bytes")));
        }
        let json: Json =
            serde_json::from_slice(text).map_err(|error| TraceError::Form(parse_error(&error)))?;
        if json.format != 1 || json.chunk_bytes != CHUNK {
            return Err(TraceError::Form("of another format".to_owned()));
        }
        if json.verity_root != hex(verity_root) {
            return Err(TraceError::OtherImage);
        }
        let runs = json.runs.iter();
        let runs = runs.map(|(first, count)| Some(*first..first.checked_add(*count)?));
        let runs = runs.collect::<Option<Vec<_>>>();
        let runs = runs.ok_or(TraceError::Chunks("beyond the image"))?;
        Self::new(verity_root, hash_offset, runs)
    }

    /// A trace of these runs of chunks, in the order of first touch.
    pub fn new(
        verity_root: &[u8; 32],
        hash_offset: u64,
        runs: Vec<Range<u32>>,
    ) -> Result<Self, TraceError> {
        if runs.len() > MOST_RUNS {
            return Err(TraceError::Chunks("too many runs"));
        }
        let count = hash_offset.div_ceil(CHUNK);
        let mut sorted = runs.clone();
        sorted.sort_by_key(|run| run.start);
        if sorted
            .iter()
            .any(|run| run.is_empty() || u64::from(run.end) > count)
        {
            return Err(TraceError::Chunks("beyond the image"));
        }
        if sorted.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return Err(TraceError::Chunks("one is named twice"));
        }
        let named: u64 = sorted.iter().map(|run| run.len() as u64).sum();
        if named > most_chunks(hash_offset) {
            return Err(TraceError::Chunks("too much of the image"));
        }
        Ok(Self {
            verity_root: *verity_root,
            runs,
        })
    }

    /// The trace as it is kept and sent.
    pub fn to_json(&self) -> String {
        let runs = self.runs.iter().map(|run| (run.start, run.len() as u32));
        let json = Json {
            format: 1,
            verity_root: hex(&self.verity_root),
            chunk_bytes: CHUNK,
            runs: runs.collect(),
        };
        // Numbers and a string always have a JSON form.
        serde_json::to_string(&json).unwrap_or_default()
    }

    /// Runs of chunks, in the order of first touch.
    pub fn runs(&self) -> &[Range<u32>] {
        &self.runs
    }

    /// Bytes of the chunks that it names, at most.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.len() as u64 * CHUNK).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_names_only_what_is_there_once_and_not_too_much() {
        let with = |runs: &str| {
            let root = "07".repeat(32);
            let text = format!(
                r#"{{"format":1,"verity_root":"{root}","chunk_bytes":65536,"runs":{runs}}}"#
            );
            Trace::from_json(&[7; 32], 10_000 * CHUNK, text.as_bytes())
        };
        let fine = with("[[7,1],[0,2]]").unwrap();
        assert_eq!(fine.bytes(), 3 * CHUNK);
        assert_eq!(fine, with("[[7,1],[0,2]]").unwrap());
        assert!(with("[[0,2500]]").is_ok());
        for wrong in [
            "[[0,2501]]",
            "[[9999,2]]",
            "[[0,0]]",
            "[[4294967295,4294967295]]",
            "[[5,2],[6,1]]",
            "[[-1,1]]",
        ] {
            assert!(with(wrong).is_err(), "{wrong}");
        }
        let many: Vec<_> = (0..MOST_RUNS as u32 + 1).map(|_| "[0,1]").collect();
        assert!(with(&format!("[{}]", many.join(","))).is_err());
        let text = fine.to_json();
        let again = Trace::from_json(&[7; 32], 10_000 * CHUNK, text.as_bytes());
        assert_eq!(again.unwrap(), fine);
        let other = Trace::from_json(&[8; 32], 10_000 * CHUNK, text.as_bytes());
        assert!(matches!(other, Err(TraceError::OtherImage)));
    }
}
