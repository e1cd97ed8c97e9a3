//! A layer's uncompressed bytes, made by a thread of their own and taken by another.
//!
//! The thread reads, inflates and hashes ahead of the taker by a bounded number of chunks; chunks go back and forth,
//! so that nothing is allocated while a layer flows. Dropping the taker's end ends the thread.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use berth_image::Digest;
use sha2::{Digest as _, Sha256};

use crate::decode::{DecodeError, Decoder};

/// Bytes of a chunk: fits a core's second-level cache, so that hashing finds it there.
pub const CHUNK: usize = 256 << 10;
/// Uncompressed bytes of a layer below which its ratio does not matter.
const RATIO_FLOOR: u64 = 64 << 20;

/// Why a layer's stream ended early. Travels inside an [`io::Error`] through the tar reader.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error(
        "it grows more than {0} times when uncompressed (convert.limits.max_ratio): this looks like a bomb"
    )]
    Ratio(u64),
    #[error("the layers are larger than {0} bytes uncompressed (convert.limits.max_bytes)")]
    Bytes(u64),
    #[error("the thread that uncompresses it died")]
    Died,
}

enum Message {
    Chunk(Vec<u8>),
    End(Digest),
    Failed(StreamError),
}

/// The taker's end.
#[derive(Debug)]
pub struct LayerStream {
    messages: Receiver<Message>,
    recycle: Sender<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
    taken: u64,
    /// Most bytes that may be taken, and the limit to name when there are more.
    most: u64,
    limit: u64,
    diff_id: Option<Digest>,
}

/// The thread's end: everything it needs.
pub struct LayerSource {
    messages: SyncSender<Message>,
    recycled: Receiver<Vec<u8>>,
    max_ratio: u64,
    bytes_in: Arc<AtomicU64>,
}

/// Both ends of a layer's stream that runs ahead by at most `chunks` chunks. Bytes read are added to `bytes_in`.
pub fn layer_stream(
    chunks: usize,
    max_ratio: u64,
    bytes_in: Arc<AtomicU64>,
) -> (LayerSource, LayerStream) {
    let (messages, taken) = sync_channel(chunks);
    let (recycle, recycled) = channel();
    let source = LayerSource {
        messages,
        recycled,
        max_ratio,
        bytes_in,
    };
    let stream = LayerStream {
        messages: taken,
        recycle,
        chunk: Vec::new(),
        at: 0,
        taken: 0,
        most: u64::MAX,
        limit: u64::MAX,
        diff_id: None,
    };
    (source, stream)
}

impl LayerSource {
    /// Uncompresses `input` to its end, or until the taker goes away.
    pub fn run(self, input: impl Read) {
        let last = match self.pump(input) {
            Ok(Some(diff_id)) => Message::End(diff_id),
            Ok(None) => return,
            Err(e) => Message::Failed(e),
        };
        // Nobody to tell when the taker is gone.
        let _ = self.messages.send(last);
    }

    /// `None`: the taker is gone.
    fn pump(&self, input: impl Read) -> Result<Option<Digest>, StreamError> {
        let mut decoder = Decoder::new(input, CHUNK);
        let mut hasher = Sha256::new();
        let (mut before, mut total) = (0, 0u64);
        loop {
            let mut chunk = self.recycled.try_recv().unwrap_or_default();
            chunk.resize(CHUNK, 0);
            let filled = decoder.fill(&mut chunk)?;
            chunk.truncate(filled);
            hasher.update(&chunk);
            let bytes_in = decoder.bytes_in();
            self.bytes_in
                .fetch_add(bytes_in - before, Ordering::Relaxed);
            before = bytes_in;
            total += filled as u64;
            if total > RATIO_FLOOR && total / self.max_ratio > bytes_in {
                return Err(StreamError::Ratio(self.max_ratio));
            }
            if filled > 0 && self.messages.send(Message::Chunk(chunk)).is_err() {
                return Ok(None);
            }
            if filled < CHUNK {
                return Ok(Some(Digest::from_bytes(hasher.finalize().into())));
            }
        }
    }
}

impl LayerStream {
    /// Bytes taken so far, the chunk in hand wholly counted.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// From now on the stream fails when all it gave, before and after, is more than `limit` less the `used` bytes of
    /// other layers: whatever they are, contents, headers or what follows the archive.
    pub fn limit(&mut self, limit: u64, used: u64) {
        (self.limit, self.most) = (limit, limit.saturating_sub(used));
    }

    /// Reads on to the end, whatever follows the archive, and gives the digest of the whole stream.
    pub fn finish(&mut self) -> io::Result<Digest> {
        loop {
            if let Some(diff_id) = self.diff_id {
                return Ok(diff_id);
            }
            let rest = self.fill_buf()?.len();
            self.consume(rest);
        }
    }
}

impl Read for LayerStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(out)?;
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for LayerStream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.chunk.len() && self.diff_id.is_none() {
            // The thread has ended when nobody takes it.
            let _ = self.recycle.send(std::mem::take(&mut self.chunk));
            self.at = 0;
            match self.messages.recv() {
                Ok(Message::Chunk(chunk)) => {
                    self.taken += chunk.len() as u64;
                    if self.taken > self.most {
                        return Err(io::Error::other(StreamError::Bytes(self.limit)));
                    }
                    self.chunk = chunk;
                }
                Ok(Message::End(diff_id)) => self.diff_id = Some(diff_id),
                Ok(Message::Failed(e)) => return Err(io::Error::other(e)),
                Err(_) => return Err(io::Error::other(StreamError::Died)),
            }
        }
        Ok(&self.chunk[self.at..])
    }

    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}
