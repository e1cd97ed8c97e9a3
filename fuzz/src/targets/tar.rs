//! Bytes as a tar stream. Contents add up to what the header says; how the stream is cut into pieces does not matter.

use std::io::{BufReader, Read};

use berth_convert::tar::{Entry, Sink, TarError, TarReader};

use super::Target;
use super::build::{Tar, block, checksum, head, record};

pub const TARGET: Target = Target {
    name: "tar",
    run,
    seeds,
};

/// Counts stored bytes and holes.
#[derive(Default)]
struct Count(u64);

impl Sink for Count {
    type Error = TarError;

    fn data(&mut self, bytes: &[u8]) -> Result<(), TarError> {
        self.0 += bytes.len() as u64;
        Ok(())
    }

    fn hole(&mut self, length: u64) -> Result<(), TarError> {
        self.0 = self.0.checked_add(length).expect("holes fit a file");
        Ok(())
    }
}

/// All entries, and the error's text if there was one. Every third entry's contents are skipped.
fn entries(input: impl Read, buffer: usize) -> (Vec<Entry>, Option<String>) {
    let mut reader = TarReader::new(BufReader::with_capacity(buffer, input));
    let mut found = Vec::new();
    loop {
        match reader.next_entry() {
            Ok(None) => return (found, None),
            Err(e) => return (found, Some(e.to_string())),
            Ok(Some(entry)) => {
                assert!(!entry.name.is_empty() && !entry.name.contains(&0));
                assert!(entry.size <= i64::MAX as u64);
                let (skip, size) = (found.len() % 3 == 2, entry.size);
                found.push(entry);
                if skip {
                    continue;
                }
                let mut count = Count::default();
                match reader.contents(&mut count) {
                    Ok(()) => assert_eq!(count.0, size),
                    Err(e) => return (found, Some(e.to_string())),
                }
            }
        }
    }
}

fn run(data: &[u8]) {
    let whole = entries(data, 1 << 16);
    assert_eq!(whole, entries(data, 7), "pieces of 7 bytes");
}

fn seeds() -> Vec<Vec<u8>> {
    let plain = Tar::new()
        .dir("d")
        .file("d/f", b"contents")
        .symlink("s", "d/f")
        .hardlink("h", "d/f")
        .add(head(b'3', "dev"))
        .add(head(b'6', "fifo"))
        .file("n".repeat(120), b"long")
        .add(
            head(b'0', "x")
                .xattr("user.a", "1")
                .mtime("-1.5")
                .owner(1 << 24, 70_000),
        );
    let sparse = |pairs: &[(&str, &str)], stored: &[u8]| {
        let mut tar = Tar::new();
        let head = pairs.iter().fold(head(b'0', "s"), |h, (k, v)| h.pax(k, v));
        tar.push(head, stored);
        tar.end()
    };
    let mut old = block(b'S', b"old", b"", [0o644, 0, 0, 3, 0]);
    old[257..265].copy_from_slice(b"ustar  \0");
    old[386..397].copy_from_slice(b"00000001000");
    old[398..409].copy_from_slice(b"00000000003");
    old[483..494].copy_from_slice(b"00000002000");
    checksum(&mut old);
    let mut gnu = Tar::new();
    gnu.raw(
        &block(b'L', b"././@LongLink", b"", [0, 0, 0, 5, 0]),
        b"long\0",
    );
    gnu.raw(
        &block(b'K', b"././@LongLink", b"", [0, 0, 0, 5, 0]),
        b"link\0",
    );
    gnu.raw(&block(b'2', b"short", b"x", [0o777, 0, 0, 0, 0]), b"");
    let mut global = Tar::new();
    let records = [record(b"mtime", b"7"), record(b"SCHILY.xattr.user.g", b"v")].concat();
    global.raw(
        &block(b'g', b"g", b"", [0, 0, 0, records.len() as u64, 0]),
        &records,
    );
    let mut old_sparse = Tar::new();
    old_sparse.raw(&old, b"abc");
    vec![
        plain.end(),
        sparse(
            &[
                ("GNU.sparse.map", "0,1,4096,2"),
                ("GNU.sparse.size", "9000"),
            ],
            b"abc",
        ),
        sparse(
            &[
                ("GNU.sparse.size", "9000"),
                ("GNU.sparse.numblocks", "1"),
                ("GNU.sparse.offset", "512"),
                ("GNU.sparse.numbytes", "3"),
            ],
            b"abc",
        ),
        sparse(
            &[
                ("GNU.sparse.major", "1"),
                ("GNU.sparse.minor", "0"),
                ("GNU.sparse.name", "real"),
                ("GNU.sparse.realsize", "9000"),
            ],
            &[&b"1\n512\n3\n"[..], &[0; 504], b"abc"].concat(),
        ),
        old_sparse.end(),
        gnu.end(),
        global.file("after", b"1").end(),
    ]
}
