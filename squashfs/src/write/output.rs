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
use crate::verity::{BLOCK, BlockHasher, DIGEST, VerityOptions, write_tree};

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
    writer: Option<JoinHandle<Result<Leaves, WriteError>>>,
    shared: Arc<Shared>,
}

/// The digests of all blocks written, in order (none without verity), and the first block.
struct Leaves {
    digests: Vec<u8>,
    hasher: Option<BlockHasher>,
    first: Vec<u8>,
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
        verity: Option<&VerityOptions>,
        shared: Arc<Shared>,
    ) -> Result<Self, WriteError> {
        let file = Arc::new(file);
        let (pieces, to_write) = unbounded();
        let (give, back) = bounded(PIECES);
        for _ in 1..PIECES {
            // The channel has room for all.
            let _ = give.send(Vec::new());
        }
        let hasher = verity.map(|v| BlockHasher::new(&v.salt));
        let (target, seen) = (Arc::clone(&file), Arc::clone(&shared));
        let writer = std::thread::Builder::new()
            .name("squashfs-write".into())
            .spawn(move || write_all(&target, &to_write, &give, hasher, &seen))
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
            let part = &mut buffer[..len.min(64 << 10) as usize];
            let part_len = part.len();
            self.read_back(at, part_len, &mut buffer)?;
            self.append(&buffer[..part_len])?;
            at += part_len as u64;
            len -= part_len as u64;
        }
        Ok(())
    }

    fn read_back(&mut self, at: u64, len: usize, out: &mut [u8]) -> Result<(), WriteError> {
        let in_file = self.sent.saturating_sub(at).min(len as u64) as usize;
        if in_file > 0 {
            while self.written < at + in_file as u64 {
                self.reclaim()?;
            }
            self.file
                .read_exact_at(&mut out[..in_file], at)
                .map_err(WriteError::io("read the image back"))?;
        }
        let from = (at + in_file as u64 - self.sent.min(at + in_file as u64)) as usize;
        out[in_file..len].copy_from_slice(&self.piece[from..from + len - in_file]);
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
    pub(super) fn seal(
        mut self,
        superblock: &[u8],
        verity: Option<&VerityOptions>,
    ) -> Result<Sealed, WriteError> {
        let fill = self.position().next_multiple_of(PAD) - self.position();
        self.append(&[0; PAD as usize][..fill as usize])?;
        let piece = std::mem::take(&mut self.piece);
        self.sent += piece.len() as u64;
        if self.pieces.take().is_none_or(|p| p.send(piece).is_err()) {
            return Err(self.failure());
        }
        let joined = self.writer.take().map(JoinHandle::join);
        let Some(Ok(leaves)) = joined else {
            return Err(self.shared.failure());
        };
        let Leaves {
            mut digests,
            hasher,
            mut first,
        } = leaves?;
        let mut end = self.sent;
        first[..superblock.len()].copy_from_slice(superblock);
        let mut verity_root = None;
        if let (Some(hasher), Some(options)) = (hasher, verity) {
            digests[..DIGEST].copy_from_slice(&hasher.digest(&first));
            let write = |bytes: &[u8]| {
                self.file.write_all_at(bytes, end)?;
                end += bytes.len() as u64;
                Ok(())
            };
            verity_root = Some(
                write_tree(options, digests, write)
                    .map_err(WriteError::io("write the hash tree"))?,
            );
        }
        self.file
            .write_all_at(&first, 0)
            .map_err(WriteError::io("write the superblock"))?;
        Ok(Sealed {
            hash_offset: verity_root.map(|_| self.sent),
            verity_root,
            file_size: end,
        })
    }
}

fn write_all(
    file: &File,
    pieces: &Receiver<Vec<u8>>,
    back: &Sender<Vec<u8>>,
    hasher: Option<BlockHasher>,
    shared: &Shared,
) -> Result<Leaves, WriteError> {
    let mut leaves = Leaves {
        digests: Vec::new(),
        hasher,
        first: Vec::new(),
    };
    let (mut at, mut asked) = (0u64, 0u64);
    for piece in pieces {
        if at == 0 {
            leaves.first = piece[..BLOCK].to_vec();
        }
        file.write_all_at(&piece, at)
            .map_err(WriteError::io("write the image"))?;
        at += piece.len() as u64;
        if let Some(hasher) = &leaves.hasher {
            piece
                .chunks(BLOCK)
                .for_each(|block| leaves.digests.extend_from_slice(&hasher.digest(block)));
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
    Ok(leaves)
}
