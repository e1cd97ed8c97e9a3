//! A file without a name that keeps contents which an upper layer seems to hide.
//!
//! "Seems": a hard link met later, or a symlink in a lower layer, may yet bring such a file back. So nothing is thrown
//! away before the tree is merged; but what stays hidden was never compressed and is not in the image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

const BUFFER: usize = 1 << 20;

/// A run of bytes in the spill file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spilled {
    pub offset: u64,
    pub length: u64,
}

/// The file, written from its beginning to its end.
#[derive(Debug)]
pub struct Spill {
    file: File,
    /// Where `buffer` goes.
    offset: u64,
    buffer: Vec<u8>,
}

impl Spill {
    pub fn new(file: File) -> Self {
        Self {
            file,
            offset: 0,
            buffer: Vec::new(),
        }
    }

    /// Where the next byte goes.
    pub fn position(&self) -> u64 {
        self.offset + self.buffer.len() as u64
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
        run: Spilled,
        mut piece: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.flush()?;
        let mut buffer = vec![0; BUFFER.min(usize::try_from(run.length).unwrap_or(BUFFER))];
        let (mut at, end) = (run.offset, run.offset + run.length);
        while at < end {
            let want = buffer
                .len()
                .min(usize::try_from(end - at).unwrap_or(usize::MAX));
            let got = match self.file.read_at(&mut buffer[..want], at) {
                // Behind the file's end: zeros that `skip` left last.
                Ok(0) => {
                    buffer[..want].fill(0);
                    want
                }
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            piece(&buffer[..got])?;
            at += got as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.offset)?;
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
        let mut spill = Spill::new(tempfile::tempfile().unwrap());
        spill.write(b"first").unwrap();
        spill.skip(3).unwrap();
        let second = Spilled {
            offset: spill.position(),
            length: 9,
        };
        spill.write(b"second").unwrap();
        spill.skip(3).unwrap();
        let read = |spill: &mut Spill, run| {
            let mut all = Vec::new();
            spill
                .read(run, |b| {
                    all.extend_from_slice(b);
                    Ok(())
                })
                .unwrap();
            all
        };
        assert_eq!(read(&mut spill, second), b"second\0\0\0");
        let first = Spilled {
            offset: 0,
            length: 8,
        };
        assert_eq!(read(&mut spill, first), b"first\0\0\0");
    }
}
