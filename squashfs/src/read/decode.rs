//! Decompression with contexts and buffers that each thread keeps.

use std::cell::RefCell;

use crate::compress::{CompressError, Compression, Decompressor};

/// Decompresses blocks of one compressor, on any thread.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Decoder(Compression);

#[derive(Default)]
struct Contexts {
    /// One a compressor, made when a thread first needs it.
    decompressors: Vec<(Compression, Decompressor)>,
    /// Compressed bytes as they were read.
    stored: Vec<u8>,
}

thread_local! {
    static CONTEXTS: RefCell<Contexts> = RefCell::default();
}

impl Decoder {
    /// Fails for a compressor that this build cannot read.
    pub(crate) fn new(compression: Compression) -> Result<Self, CompressError> {
        Decompressor::new(compression)?;
        Ok(Self(compression))
    }

    /// Decompresses one whole block into `out` and gives its length.
    pub(crate) fn decode(self, stored: &[u8], out: &mut [u8]) -> Result<usize, CompressError> {
        with_contexts(|contexts| {
            let all = &mut contexts.decompressors;
            let found = match all
                .iter()
                .position(|(compression, _)| *compression == self.0)
            {
                Some(found) => found,
                None => {
                    all.push((self.0, Decompressor::new(self.0)?));
                    all.len() - 1
                }
            };
            all[found].1.decompress(stored, out)
        })
    }
}

/// Gives `work` a buffer of `len` bytes that this thread keeps.
pub(crate) fn with_buffer<R>(len: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    // Taken out for the time of the work: decoding, which borrows the contexts too, happens inside it.
    let mut buffer = with_contexts(|contexts| std::mem::take(&mut contexts.stored));
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let result = work(&mut buffer[..len]);
    with_contexts(|contexts| contexts.stored = buffer);
    result
}

fn with_contexts<R>(work: impl FnOnce(&mut Contexts) -> R) -> R {
    CONTEXTS.with(|contexts| work(&mut contexts.borrow_mut()))
}
