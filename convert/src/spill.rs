//! Contents which an upper layer seems to hide, in a file without a name.
//!
//! "Seems": a hard link met later, or a symlink in a lower layer, may yet bring such a file back. So nothing is thrown
//! away before the tree is merged; but what stays hidden was never compressed and is not in the image.
//!
//! The image's writer keeps things in the same file: room is taken from it in regions, each run in one of them.

use std::io;
use std::sync::Arc;

use berth_squashfs::spill::Spill;

const BUFFER: usize = 1 << 20;

/// A run of bytes in the spill file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub offset: u64,
    pub length: u64,
}

/// The file, as this side of it sees it.
#[derive(Debug)]
pub struct Runs {
    file: Arc<Spill>,
    /// Where `buffer` goes.
    offset: u64,
    /// Where the region ends.
    end: u64,
    buffer: Vec<u8>,
}

impl Runs {
    pub fn new(file: Arc<Spill>) -> Self {
        Self {
            file,
            offset: 0,
            end: 0,
            buffer: Vec::new(),
        }
    }

    /// Begins a run of exactly `length` bytes, which are then written or skipped.
    pub fn begin(&mut self, length: u64) -> io::Result<Run> {
        if length > self.end - self.position() {
            self.flush()?;
            let region = length.max(BUFFER as u64);
            self.offset = self.file.reserve(region);
            self.end = self.offset + region;
        }
        Ok(Run {
            offset: self.position(),
            length,
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Zeros, which take no space in the file.
    pub fn skip(&mut self, length: u64) -> io::Result<()> {
        self.flush()?;
        self.offset += length;
        Ok(())
    }

    /// Reads a run back, piece by piece.
    pub fn read(
        &mut self,
        run: Run,
        mut piece: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.flush()?;
        let mut buffer = vec![0; BUFFER.min(usize::try_from(run.length).unwrap_or(BUFFER))];
        let (mut at, end) = (run.offset, run.offset + run.length);
        while at < end {
            let want = buffer
                .len()
                .min(usize::try_from(end - at).unwrap_or(usize::MAX));
            self.file.get(at, &mut buffer[..want])?;
            piece(&buffer[..want])?;
            at += want as u64;
        }
        Ok(())
    }

    fn position(&self) -> u64 {
        self.offset + self.buffer.len() as u64
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.patch(self.offset, &self.buffer)?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_holes_read_back() {
        let file = Arc::new(Spill::new(tempfile::tempfile().unwrap()));
        let mut spill = Runs::new(Arc::clone(&file));
        let first = spill.begin(8).unwrap();
        spill.write(b"first").unwrap();
        spill.skip(3).unwrap();
        let large = spill.begin(3 << 20).unwrap();
        file.put(b"somebody else's").unwrap();
        spill.write(b"large").unwrap();
        spill.skip((3 << 20) - 5).unwrap();
        let last = spill.begin(9).unwrap();
        spill.write(b"second").unwrap();
        spill.skip(3).unwrap();
        let mut read = |run| {
            let mut all = Vec::new();
            spill
                .read(run, |b| {
                    all.extend_from_slice(b);
                    Ok(())
                })
                .unwrap();
            all
        };
        assert_eq!(read(last), b"second\0\0\0");
        assert_eq!(read(first), b"first\0\0\0");
        let large = read(large);
        assert!(large.starts_with(b"large\0") && large.len() == 3 << 20);
    }
}
