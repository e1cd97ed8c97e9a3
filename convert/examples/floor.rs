//! What converting layers costs in CPU time when nothing but the work that cannot be left out is done: hashing the
//! blobs, inflating them, hashing what comes out, compressing the files' contents in blocks.
//!
//! `floor LAYER...` prints the seconds of each as JSON. `scripts/bench convert` compares a pull with them.

use std::io::{self, BufRead, Read};
use std::time::Duration;

use berth_convert::decode::Decoder;
use berth_convert::tar::{EntryKind, Sink, TarReader};
use berth_squashfs::compress::{Compression, Compressor};
use nix::time::{ClockId, clock_gettime};
use sha2::{Digest as _, Sha256};

/// As the converter has it.
const CHUNK: usize = 256 << 10;
const BLOCK: usize = 128 << 10;
const LEVEL: i32 = 3;

/// CPU seconds, and bytes.
#[derive(Default)]
struct Spent {
    blob_sha256: f64,
    inflate: f64,
    tar_sha256: f64,
    zstd: f64,
    bytes: u64,
    contents: u64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut spent = Spent::default();
    for path in std::env::args_os().skip(1) {
        // Read before, so that no disk is in it.
        let blob = std::fs::read(path)?;
        measure(&blob, &mut spent)?;
    }
    let Spent {
        blob_sha256,
        inflate,
        tar_sha256,
        zstd,
        bytes,
        contents,
    } = spent;
    println!(
        r#"{{"blob_sha256": {blob_sha256}, "inflate": {inflate}, "tar_sha256": {tar_sha256}, "zstd": {zstd}, "bytes": {bytes}, "contents": {contents}}}"#
    );
    Ok(())
}

fn measure(blob: &[u8], spent: &mut Spent) -> Result<(), Box<dyn std::error::Error>> {
    let begun = now();
    let mut hasher = Sha256::new();
    blob.chunks(CHUNK).for_each(|chunk| hasher.update(chunk));
    std::hint::black_box(hasher.finalize());
    spent.blob_sha256 += since(begun);

    let mut reader = TarReader::new(Layer {
        decoder: Decoder::new(blob, CHUNK),
        hasher: Sha256::new(),
        chunk: vec![0; CHUNK],
        at: 0,
        end: 0,
        inflate: 0.0,
        hash: 0.0,
        bytes: 0,
    });
    let mut blocks = Blocks {
        compressor: Compressor::new(Compression::Zstd, LEVEL)?,
        raw: Vec::with_capacity(BLOCK),
        packed: Vec::new(),
        zstd: 0.0,
        bytes: 0,
    };
    while let Some(entry) = reader.next_entry()? {
        if entry.kind == EntryKind::File {
            reader.contents(&mut blocks)?;
        }
    }
    blocks.flush()?;
    let mut layer = reader.into_inner();
    io::copy(&mut layer, &mut io::sink())?;
    std::hint::black_box(layer.hasher.finalize());
    spent.inflate += layer.inflate;
    spent.tar_sha256 += layer.hash;
    spent.zstd += blocks.zstd;
    spent.bytes += layer.bytes;
    spent.contents += blocks.bytes;
    Ok(())
}

/// A layer's uncompressed bytes, in chunks that are hashed while they are in the cache.
struct Layer<'b> {
    decoder: Decoder<&'b [u8]>,
    hasher: Sha256,
    chunk: Vec<u8>,
    at: usize,
    end: usize,
    inflate: f64,
    hash: f64,
    bytes: u64,
}

impl Read for Layer<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.fill_buf()?.read(out)?;
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Layer<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.end {
            let begun = now();
            self.at = 0;
            self.end = self
                .decoder
                .fill(&mut self.chunk)
                .map_err(io::Error::other)?;
            self.inflate += since(begun);
            let begun = now();
            self.hasher.update(&self.chunk[..self.end]);
            self.hash += since(begun);
            self.bytes += self.end as u64;
        }
        Ok(&self.chunk[self.at..self.end])
    }

    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}

/// Contents of one file after another, compressed in whole blocks.
struct Blocks {
    compressor: Compressor,
    raw: Vec<u8>,
    packed: Vec<u8>,
    zstd: f64,
    bytes: u64,
}

impl Blocks {
    fn flush(&mut self) -> io::Result<()> {
        let begun = now();
        let packed = self.compressor.compress(&self.raw, &mut self.packed);
        packed.map_err(io::Error::other)?;
        self.zstd += since(begun);
        self.bytes += self.raw.len() as u64;
        self.raw.clear();
        Ok(())
    }
}

impl Sink for Blocks {
    type Error = Box<dyn std::error::Error>;

    fn data(&mut self, mut bytes: &[u8]) -> Result<(), Self::Error> {
        while !bytes.is_empty() {
            let take = bytes.len().min(BLOCK - self.raw.len());
            self.raw.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.raw.len() == BLOCK {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Holes cost nothing.
    fn hole(&mut self, _length: u64) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// CPU time of this thread.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map(Duration::from)
        .unwrap_or_default()
}

fn since(begun: Duration) -> f64 {
    (now() - begun).as_secs_f64()
}
