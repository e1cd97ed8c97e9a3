//! From a byte stream to entries.

use std::io::{self, BufRead};
use std::sync::Arc;

use super::block::{Block, Dialect};
use super::pax::{Pax, Xattrs};
use super::sparse::{self, MAX_SEGMENTS, Segment};
use super::{BLOCK, MAX_EXTENSION, TarError};

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    File,
    Dir,
    Symlink,
    Link,
    Fifo,
    /// A character or block device.
    Device,
}

/// A header with everything that extends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As it stands: any bytes but NUL; absolute or not, perhaps with `.` and `..`.
    pub name: Vec<u8>,
    pub kind: EntryKind,
    /// Target of a symlink or link.
    pub link: Vec<u8>,
    /// Permission, set-id and sticky bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970, fractions rounded down.
    pub mtime: i64,
    /// Bytes of the file, holes included; 0 for everything else.
    pub size: u64,
    /// Of its own extended headers.
    pub xattrs: Xattrs,
    /// Of global extended headers; one of `xattrs` with the same name hides one of these.
    pub global_xattrs: Arc<Xattrs>,
}

/// Takes a file's contents in order.
pub trait Sink {
    type Error: From<TarError>;
    fn data(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;
    /// So many zeros.
    fn hole(&mut self, length: u64) -> Result<(), Self::Error>;
}

/// Most global headers: an archive has one, and each may change what all later entries have.
const MAX_GLOBALS: usize = 1024;

/// Reads entries from a stream; see the module above.
#[derive(Debug)]
pub struct TarReader<R> {
    input: R,
    /// What global headers say, but xattrs.
    global: Pax,
    global_xattrs: Arc<Xattrs>,
    /// Global headers so far.
    globals: usize,
    /// Stored bytes of the entry in hand not read yet, and the zeros after them.
    left: u64,
    padding: u64,
    /// The sparse map of the entry in hand, and its whole size.
    map: Option<Vec<Segment>>,
    size: u64,
}

impl<R: BufRead> TarReader<R> {
    pub fn new(input: R) -> Self {
        Self {
            input,
            global: Pax::default(),
            global_xattrs: Arc::default(),
            globals: 0,
            left: 0,
            padding: 0,
            map: None,
            size: 0,
        }
    }

    /// The stream, to read what follows the archive's end.
    pub fn into_inner(self) -> R {
        self.input
    }

    pub fn input(&self) -> &R {
        &self.input
    }

    pub fn input_mut(&mut self) -> &mut R {
        &mut self.input
    }

    /// Bytes that the stream holds of the entry in hand and that were not read yet.
    pub fn stored(&self) -> u64 {
        self.left
    }

    /// The next entry; `None` at the archive's end. What was not read of the one before is skipped.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_rest()?;
        let mut pax = self.global.clone();
        let (mut long_name, mut long_link) = (None, None);
        // Headers that describe the next one may not go on for ever.
        for _ in 0..16 {
            let Some(block) = self.header()? else {
                return Ok(None);
            };
            match block.kind() {
                b'x' | b'X' => {
                    let records = self.extension(&block)?;
                    pax.parse(&records)?;
                }
                b'g' => {
                    self.globals += 1;
                    if self.globals > MAX_GLOBALS {
                        return Err(TarError::Pax("too many global headers"));
                    }
                    let records = self.extension(&block)?;
                    let xattrs = Arc::make_mut(&mut self.global_xattrs);
                    self.global.parse_global(xattrs, &records)?;
                    pax = self.global.clone();
                }
                b'L' => long_name = Some(until_nul(self.extension(&block)?)),
                b'K' => long_link = Some(until_nul(self.extension(&block)?)),
                _ => return self.entry(&block, pax, long_name, long_link).map(Some),
            }
        }
        Err(TarError::Pax("too many extended headers in a row"))
    }

    /// Gives the contents of the entry in hand to `sink`.
    pub fn contents<S: Sink>(&mut self, sink: &mut S) -> Result<(), S::Error> {
        let Some(map) = self.map.take() else {
            let length = self.left;
            return self.copy(length, sink);
        };
        let mut at = 0;
        for segment in map {
            if segment.offset > at {
                sink.hole(segment.offset - at)?;
            }
            self.copy(segment.length, sink)?;
            at = segment.offset + segment.length;
        }
        if self.size > at {
            sink.hole(self.size - at)?;
        }
        Ok(())
    }

    fn copy<S: Sink>(&mut self, mut length: u64, sink: &mut S) -> Result<(), S::Error> {
        while length > 0 {
            let chunk = fill(&mut self.input).map_err(TarError::from)?;
            if chunk.is_empty() {
                return Err(TarError::Truncated("a file's contents").into());
            }
            let take = chunk
                .len()
                .min(usize::try_from(length).unwrap_or(usize::MAX));
            sink.data(&chunk[..take])?;
            self.input.consume(take);
            length -= take as u64;
            self.left -= take as u64;
        }
        Ok(())
    }

    /// A header block; `None` at the end: two blocks of zeros, one and nothing, or nothing at all.
    fn header(&mut self) -> Result<Option<Block>, TarError> {
        let Some(block) = self.block()? else {
            return Ok(None);
        };
        if !block.is_zero() {
            block.verify()?;
            return Ok(Some(block));
        }
        match self.block()? {
            None => Ok(None),
            Some(block) if block.is_zero() => Ok(None),
            Some(_) => Err(TarError::Checksum),
        }
    }

    /// `None` when the stream ends before the block.
    fn block(&mut self) -> Result<Option<Block>, TarError> {
        let mut block = Block([0; BLOCK]);
        let mut at = 0;
        while at < BLOCK {
            let chunk = fill(&mut self.input)?;
            if chunk.is_empty() {
                return match at {
                    0 => Ok(None),
                    _ => Err(TarError::Truncated("a header")),
                };
            }
            let take = chunk.len().min(BLOCK - at);
            block.0[at..at + take].copy_from_slice(&chunk[..take]);
            self.input.consume(take);
            at += take;
        }
        Ok(Some(block))
    }

    /// The contents of an extended header.
    fn extension(&mut self, block: &Block) -> Result<Vec<u8>, TarError> {
        let size = u64::try_from(block.size()?).map_err(|_| TarError::Number("size"))?;
        if size > MAX_EXTENSION {
            return Err(TarError::ExtensionSize(size));
        }
        self.begin(size);
        let mut out = Vec::new();
        while self.left > 0 {
            let chunk = fill(&mut self.input)?;
            if chunk.is_empty() {
                return Err(TarError::Truncated("an extended header"));
            }
            let take = chunk.len().min(self.left as usize);
            out.extend_from_slice(&chunk[..take]);
            self.input.consume(take);
            self.left -= take as u64;
        }
        self.skip_rest()?;
        Ok(out)
    }

    fn begin(&mut self, stored: u64) {
        self.left = stored;
        self.padding = stored.next_multiple_of(BLOCK as u64) - stored;
        self.map = None;
        self.size = stored;
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let mut skip = std::mem::take(&mut self.left);
        if skip > 0 && self.skip(&mut skip)? {
            return Err(TarError::Truncated("a file's contents"));
        }
        // Some writers leave out the padding of the last entry.
        let mut padding = std::mem::take(&mut self.padding);
        self.skip(&mut padding)?;
        Ok(())
    }

    /// Whether the stream ended first.
    fn skip(&mut self, length: &mut u64) -> Result<bool, TarError> {
        while *length > 0 {
            let available = fill(&mut self.input)?.len() as u64;
            if available == 0 {
                return Ok(true);
            }
            let take = available.min(*length);
            self.input.consume(take as usize);
            *length -= take;
        }
        Ok(false)
    }

    fn entry(
        &mut self,
        block: &Block,
        pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let mut name = (pax.sparse.name.clone())
            .or(pax.path)
            .or(long_name)
            .unwrap_or_else(|| block.name());
        let link = pax.link.or(long_link).unwrap_or_else(|| block.link());
        let kind = match block.kind() {
            // V7 marked folders by a slash alone.
            0 if name.ends_with(b"/") => EntryKind::Dir,
            0 | b'0' | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::Link,
            b'2' => EntryKind::Symlink,
            b'3' | b'4' => EntryKind::Device,
            b'5' => EntryKind::Dir,
            b'6' => EntryKind::Fifo,
            other => return Err(TarError::Type(other)),
        };
        let stored = match (kind == EntryKind::File, pax.size) {
            (false, _) => 0,
            (true, Some(size)) => size,
            (true, None) => u64::try_from(block.size()?).map_err(|_| TarError::Number("size"))?,
        };
        if stored > i64::MAX as u64 {
            return Err(TarError::Number("size"));
        }
        self.begin(stored);
        if kind == EntryKind::File {
            self.begin_sparse(block, &pax.sparse)?;
        }
        if name.contains(&0) || link.contains(&0) {
            return Err(TarError::Nul);
        }
        if name.is_empty() {
            name.push(b'.');
        }
        Ok(Entry {
            name,
            kind,
            link,
            mode: (block.mode()? & 0o7777) as u16,
            uid: id(pax.uid, || block.uid(), "user id")?,
            gid: id(pax.gid, || block.gid(), "group id")?,
            mtime: match pax.mtime {
                Some(mtime) => mtime,
                None => block.mtime()?,
            },
            size: self.size,
            xattrs: pax.xattrs,
            global_xattrs: Arc::clone(&self.global_xattrs),
        })
    }

    /// Finds the map of a sparse file, wherever its format keeps it.
    fn begin_sparse(
        &mut self,
        block: &Block,
        records: &super::pax::PaxSparse,
    ) -> Result<(), TarError> {
        let (map, real_size) = if block.kind() == b'S' {
            if block.dialect() != Dialect::Gnu {
                return Err(TarError::Sparse("its header is not GNU's"));
            }
            let real_size = super::number::field(&block.0[483..495], "real size")?;
            let real_size = u64::try_from(real_size).map_err(|_| TarError::Number("real size"))?;
            (self.old_map(block)?, Some(real_size))
        } else if let (Some(1), Some(0)) = (records.major, records.minor) {
            (self.leading_map()?, records.real_size)
        } else if let Some(map) = &records.map {
            (map.clone(), records.real_size)
        } else if records.major.is_some_and(|major| major > 1) {
            return Err(TarError::Sparse("its format is newer than 1.0"));
        } else {
            return Ok(());
        };
        let real_size = real_size
            .filter(|size| *size <= i64::MAX as u64)
            .ok_or(TarError::Sparse("its real size is missing"))?;
        sparse::check(&map, real_size, self.left)?;
        self.map = Some(map);
        self.size = real_size;
        Ok(())
    }

    /// Four segments in the header, 21 in each extension block that follows.
    fn old_map(&mut self, block: &Block) -> Result<Vec<Segment>, TarError> {
        let mut map = Vec::new();
        sparse::old_slots(&mut map, &block.0[386..482])?;
        let mut more = block.0[482] != 0;
        while more {
            let extension = self.block()?;
            let extension = extension.ok_or(TarError::Truncated("a sparse map"))?;
            let before = map.len();
            sparse::old_slots(&mut map, &extension.0[..504])?;
            if map.len() == before {
                return Err(TarError::Sparse("its map has an empty block"));
            }
            more = extension.0[504] != 0;
        }
        Ok(map)
    }

    /// Pax 1.0: decimal lines in the first stored blocks, the number of segments first.
    fn leading_map(&mut self) -> Result<Vec<Segment>, TarError> {
        let mut lines = Lines {
            reader: self,
            block: [0; BLOCK],
            at: BLOCK,
        };
        let count = lines.number()?;
        if count > MAX_SEGMENTS as u64 {
            return Err(TarError::Sparse("its map is too long"));
        }
        let mut map = Vec::new();
        for _ in 0..count {
            let (offset, length) = (lines.number()?, lines.number()?);
            map.push(Segment { offset, length });
        }
        Ok(map)
    }
}

/// The numbers at the beginning of a pax 1.0 sparse file.
struct Lines<'r, R> {
    reader: &'r mut TarReader<R>,
    block: [u8; BLOCK],
    at: usize,
}

impl<R: BufRead> Lines<'_, R> {
    fn number(&mut self) -> Result<u64, TarError> {
        let mut digits = [0; 20];
        let mut length = 0;
        loop {
            match self.byte()? {
                b'\n' => break,
                b if length < digits.len() => digits[length] = b,
                _ => return Err(TarError::Sparse("its map is not numbers")),
            }
            length += 1;
        }
        super::number::decimal(&digits[..length]).ok_or(TarError::Sparse("its map is not numbers"))
    }

    fn byte(&mut self) -> Result<u8, TarError> {
        if self.at == BLOCK {
            if self.reader.left < BLOCK as u64 {
                return Err(TarError::Sparse("its map does not end"));
            }
            let block = self.reader.block()?;
            self.block = block.ok_or(TarError::Truncated("a sparse map"))?.0;
            self.reader.left -= BLOCK as u64;
            self.at = 0;
        }
        self.at += 1;
        Ok(self.block[self.at - 1])
    }
}

fn id(
    pax: Option<u64>,
    header: impl FnOnce() -> Result<i64, TarError>,
    what: &'static str,
) -> Result<u32, TarError> {
    let value = match pax {
        Some(value) => Some(value),
        None => u64::try_from(header()?).ok(),
    };
    value
        .and_then(|v| u32::try_from(v).ok())
        .ok_or(TarError::Number(what))
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn fill<R: BufRead>(input: &mut R) -> io::Result<&[u8]> {
    // Two calls, because a borrow that is returned from a loop's arm lasts for the whole loop.
    loop {
        match input.fill_buf() {
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    input.fill_buf()
}
