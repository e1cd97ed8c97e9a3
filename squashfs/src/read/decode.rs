//! Decompression of one block, with contexts and buffers that each thread keeps.

use std::cell::RefCell;

use crate::format::Compressor;

/// Decompresses blocks of one compressor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Decoder(Compressor);

/// What a thread keeps between blocks; built when first needed.
#[derive(Default)]
struct Contexts {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    zlib: Option<flate2::Decompress>,
    /// Compressed bytes as they were read.
    stored: Vec<u8>,
}

thread_local! {
    static CONTEXTS: RefCell<Contexts> = RefCell::default();
}

impl Decoder {
    /// `None` if the compressor is one that is not supported: lzma and lzo, which no current tool chooses, and xz.
    pub(crate) fn new(compressor: Compressor) -> Option<Self> {
        match compressor {
            Compressor::Gzip | Compressor::Zstd | Compressor::Lz4 | Compressor::Xz => {
                Some(Self(compressor))
            }
            Compressor::Lzma | Compressor::Lzo => None,
        }
    }

    /// Decompresses the whole of `stored` into `out` and says how many bytes that gave; `None` when `stored` is
    /// damaged, is followed by anything, or gives more than `out` holds.
    pub(crate) fn decode(self, stored: &[u8], out: &mut [u8]) -> Option<usize> {
        match self.0 {
            Compressor::Zstd => with_contexts(|contexts| {
                let zstd = match &mut contexts.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Decompressor::new().ok()?),
                };
                zstd.decompress_to_buffer(stored, out).ok()
            }),
            Compressor::Gzip => with_contexts(|contexts| {
                let zlib = contexts
                    .zlib
                    .get_or_insert_with(|| flate2::Decompress::new(true));
                zlib.reset(true);
                let status = zlib
                    .decompress(stored, out, flate2::FlushDecompress::Finish)
                    .ok()?;
                let whole = status == flate2::Status::StreamEnd
                    && zlib.total_in() == stored.len() as u64;
                whole.then_some(zlib.total_out() as usize)
            }),
            Compressor::Lz4 => lz4_flex::block::decompress_into(stored, out).ok(),
            Compressor::Xz => decode_xz(stored, out),
            Compressor::Lzma | Compressor::Lzo => None,
        }
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
