//! Metadata blocks: bytes in, compressed 8 KiB blocks out, and where one is at any time.

use super::WriteError;
use crate::compress::{CompressError, Compressor};
use crate::format::{METADATA_SIZE, MetaHeader, MetaRef, put64};

/// One table's metadata blocks, collected in memory.
#[derive(Debug)]
pub(super) struct MetadataBlocks {
    /// Finished blocks with their headers.
    done: Vec<u8>,
    /// Offset of every finished block.
    starts: Vec<u64>,
    open: Vec<u8>,
    packed: Vec<u8>,
}

impl MetadataBlocks {
    pub(super) fn new() -> Self {
        Self {
            done: Vec::new(),
            starts: Vec::new(),
            open: Vec::with_capacity(METADATA_SIZE),
            packed: Vec::new(),
        }
    }

    /// Where the next byte goes.
    pub(super) fn position(&self) -> MetaRef {
        MetaRef {
            block: self.done.len() as u64,
            offset: self.open.len() as u16,
        }
    }

    pub(super) fn append(
        &mut self,
        compressor: &mut Compressor,
        mut bytes: &[u8],
    ) -> Result<(), CompressError> {
        while !bytes.is_empty() {
            let take = bytes.len().min(METADATA_SIZE - self.open.len());
            self.open.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.open.len() == METADATA_SIZE {
                self.close_block(compressor)?;
            }
        }
        Ok(())
    }

    fn close_block(&mut self, compressor: &mut Compressor) -> Result<(), CompressError> {
        let compressed = compressor.compress(&self.open, &mut self.packed)?;
        let stored = if compressed { &self.packed } else { &self.open };
        self.starts.push(self.done.len() as u64);
        let header = MetaHeader {
            size: stored.len() as u16,
            compressed,
        };
        self.done.extend_from_slice(&header.to_raw().to_le_bytes());
        self.done.extend_from_slice(stored);
        self.open.clear();
        Ok(())
    }

    /// All blocks, and the offset of each.
    pub(super) fn finish(
        mut self,
        compressor: &mut Compressor,
    ) -> Result<(Vec<u8>, Vec<u64>), CompressError> {
        if !self.open.is_empty() {
            self.close_block(compressor)?;
        }
        Ok((self.done, self.starts))
    }
}

/// A table of records with its list of block offsets, as it lies from `at` on: the bytes, and the
/// absolute offset of the list.
pub(super) fn table(
    compressor: &mut Compressor,
    records: &[u8],
    at: u64,
) -> Result<(Vec<u8>, u64), WriteError> {
    let mut blocks = MetadataBlocks::new();
    blocks.append(compressor, records)?;
    let (mut bytes, starts) = blocks.finish(compressor)?;
    let list = at + bytes.len() as u64;
    starts
        .iter()
        .for_each(|start| put64(&mut bytes, at + start));
    Ok((bytes, list))
}
