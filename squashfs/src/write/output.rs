//! The file: appended to in large pieces by a thread of its own, which hashes for verity what it writes.
//!
//! The first 4 KiB go out with zeros where the superblock will be, so that an unfinished file is no
//! image, and again, complete, as the last write of all.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::{Shared, WriteError};
use crate::format::PAD;
use crate::verity::{BLOCK, DIGEST, Leaves};

/// Bytes of one write.
const PIECE: usize = 1 << 20;
/// Pieces there are: one is filled, one is written, the rest wait.
const PIECES: usize = 6;
/// The kernel is asked to write back every so many bytes.
const WRITE_BACK: u64 = 8 << 20;

/// The appending end.
#[derive(Debug)]
pub(super) struct Output {
    file: Arc<File>,
    /// What is not sent yet; begins at `sent`.
    piece: Vec<u8>,
    sent: u64,
    /// Below this everything is in the file.
    written: u64,
    pieces: Option<Sender<Vec<u8>>>,
    back: Receiver<Vec<u8>>,
    /// Pieces that came back before they were needed.
    spare: Vec<Vec<u8>>,
    writer: Option<JoinHandle<Result<Written, WriteError>>>,
    shared: Arc<Shared>,
}

/// What the writing thread leaves behind.
struct Written {
    /// The first block, still without a superblock.
    first: Vec<u8>,
    leaves: Option<Leaves>,
}

/// Where everything ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sealed {
    pub(super) hash_offset: Option<u64>,
    pub(super) verity_root: Option<[u8; DIGEST]>,
    pub(super) file_size: u64,
}

impl Output {
    pub(super) fn start(
        file: File,
        leaves: Option<Leaves>,
        shared: Arc<Shared>,
    ) -> Result<Self, WriteError> {
        let file = Arc::new(file);
        let (pieces, to_write) = unbounded();
        let (give, back) = bounded(PIECES);
        for _ in 1..PIECES {
            // The channel has room for all.
            let _ = give.send(Vec::new());
        }
        let (target, seen) = (Arc::clone(&file), Arc::clone(&shared));
        let writer = std::thread::Builder::new()
            .name("squashfs-write".into())
            .spawn(move || write_all(&target, &to_write, &give, leaves, &seen))
            .map_err(WriteError::io("start a thread"))?;
        Ok(Self {
            file,
            piece: Vec::with_capacity(PIECE),
            sent: 0,
            written: 0,
            pieces: Some(pieces),
            back,
            spare: Vec::new(),
            writer: Some(writer),
            shared,
        })
    }

    /// Where the next byte goes.
    pub(super) fn position(&self) -> u64 {
        self.sent + self.piece.len() as u64
    }

    pub(super) fn append(&mut self, mut bytes: &[u8]) -> Result<(), WriteError> {
        while !bytes.is_empty() {
            let take = bytes.len().min(PIECE - self.piece.len());
            self.piece.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.piece.len() == PIECE {
                self.send_piece()?;
            }
        }
        Ok(())
    }

    /// Appends a copy of bytes that were appended before.
    pub(super) fn append_copy(&mut self, mut at: u64, mut len: u64) -> Result<(), WriteError> {
        let mut buffer = vec![0; len.min(64 << 10) as usize];
        while len > 0 {
            buffer.truncate(len.min(64 << 10) as usize);
            self.read_back(at, &mut buffer)?;
            self.append(&buffer)?;
            at += buffer.len() as u64;
            len -= buffer.len() as u64;
        }
        Ok(())
    }

    /// Fills `out` from `at` on: from the file, and from what has not gone there yet.
    fn read_back(&mut self, at: u64, out: &mut [u8]) -> Result<(), WriteError> {
        let in_file = self.sent.saturating_sub(at).min(out.len() as u64);
        let (from_file, from_piece) = out.split_at_mut(in_file as usize);
        if !from_file.is_empty() {
            while self.written < at + in_file {
                self.reclaim()?;
            }
            let read = self.file.read_exact_at(from_file, at);
            read.map_err(WriteError::io("read the image back"))?;
        }
        if !from_piece.is_empty() {
            let start = (at + in_file - self.sent) as usize;
            from_piece.copy_from_slice(&self.piece[start..start + from_piece.len()]);
        }
        Ok(())
    }

    /// Waits for a piece to be written.
    fn reclaim(&mut self) -> Result<(), WriteError> {
        let mut piece = self.back.recv().map_err(|_| self.failure())?;
        self.written += piece.len() as u64;
        piece.clear();
        self.spare.push(piece);
        Ok(())
    }

    fn send_piece(&mut self) -> Result<(), WriteError> {
        if self.spare.is_empty() {
            self.reclaim()?;
        }
        let mut next = self.spare.pop().unwrap_or_default();
        next.reserve_exact(PIECE);
        let piece = std::mem::replace(&mut self.piece, next);
        self.sent += piece.len() as u64;
        self.pieces
            .as_ref()
            .and_then(|p| p.send(piece).ok())
            .ok_or_else(|| self.failure())
    }

    fn failure(&mut self) -> WriteError {
        match self.writer.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => error,
            _ => self.shared.failure(),
        }
    }

    /// Pads the file, appends the verity tree and writes the first block with this superblock.
    pub(super) fn seal(mut self, superblock: &[u8]) -> Result<Sealed, WriteError> {
        let fill = self.position().next_multiple_of(PAD) - self.position();
        self.append(&[0; PAD as usize][..fill as usize])?;
        let piece = std::mem::take(&mut self.piece);
        self.sent += piece.len() as u64;
        if self.pieces.take().is_none_or(|p| p.send(piece).is_err()) {
            return Err(self.failure());
        }
        let Some(Ok(written)) = self.writer.take().map(JoinHandle::join) else {
            return Err(self.shared.failure());
        };
        let Written { mut first, leaves } = written?;
        first[..superblock.len()].copy_from_slice(superblock);
        let mut file_size = self.sent;
        let tree = leaves.map(|mut leaves| {
            leaves.replace_first(&first)?;
            leaves.write_tree(|bytes| {
                self.file.write_all_at(bytes, file_size)?;
                file_size += bytes.len() as u64;
                Ok(())
            })
        });
        let verity_root = tree
            .transpose()
            .map_err(WriteError::io("write the hash tree"))?;
        let sealed = self.file.write_all_at(&first, 0);
        sealed.map_err(WriteError::io("write the superblock"))?;
        Ok(Sealed {
            hash_offset: verity_root.map(|_| self.sent),
            verity_root,
            file_size,
        })
    }
}

fn write_all(
    file: &File,
    pieces: &Receiver<Vec<u8>>,
    back: &Sender<Vec<u8>>,
    mut leaves: Option<Leaves>,
    shared: &Shared,
) -> Result<Written, WriteError> {
    let mut first = Vec::new();
    let (mut at, mut asked) = (0u64, 0u64);
    for piece in pieces {
        if at == 0 {
            first = piece[..BLOCK].to_vec();
        }
        file.write_all_at(&piece, at)
            .map_err(WriteError::io("write the image"))?;
        at += piece.len() as u64;
        if let Some(leaves) = &mut leaves {
            let added = piece.chunks(BLOCK).try_for_each(|block| leaves.add(block));
            added.map_err(WriteError::io("write the spill file"))?;
        }
        shared.bytes_out.store(at, Ordering::Relaxed);
        if at - asked >= WRITE_BACK {
            // For dirty pages this advice means "start writing them out"; without it fsync finds it all to do.
            let _ = rustix::fs::fadvise(
                file,
                asked,
                NonZeroU64::new(at - asked),
                rustix::fs::Advice::DontNeed,
            );
            asked = at;
        }
        // Nobody may be left who wants it.
        let _ = back.send(piece);
    }
    Ok(Written { first, leaves })
}
