//! Layers byte by byte, for tests.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::Write as _;

/// A tar stream that is being written.
#[derive(Default, Clone)]
pub struct Tar(pub Vec<u8>);

/// A header's fields; names longer than 100 bytes and what ustar cannot say go into pax records.
#[derive(Clone)]
pub struct Head {
    pub name: Vec<u8>,
    pub kind: u8,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// As a pax value: may be negative and have a fraction.
    pub mtime: String,
    pub size: u64,
    pub pax: Vec<(Vec<u8>, Vec<u8>)>,
}

pub fn head(kind: u8, name: impl AsRef<[u8]>) -> Head {
    Head {
        name: name.as_ref().to_vec(),
        kind,
        link: Vec::new(),
        mode: if kind == b'5' { 0o755 } else { 0o644 },
        uid: 0,
        gid: 0,
        mtime: "1700000000".into(),
        size: 0,
        pax: Vec::new(),
    }
}

impl Head {
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub fn mtime(mut self, mtime: &str) -> Self {
        self.mtime = mtime.into();
        self
    }

    pub fn link(mut self, link: impl AsRef<[u8]>) -> Self {
        self.link = link.as_ref().to_vec();
        self
    }

    pub fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.pax
            .push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    pub fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax(format!("SCHILY.xattr.{name}"), value)
    }
}

/// A pax record.
pub fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = [b" ", key, b"=", value, b"\n"].concat();
    let mut length = body.len() + 1;
    while length != length.to_string().len() + body.len() {
        length = length.to_string().len() + body.len();
    }
    [length.to_string().as_bytes(), &body].concat()
}

/// A header block with its checksum.
pub fn block(kind: u8, name: &[u8], link: &[u8], numbers: [u64; 5]) -> [u8; 512] {
    let [mode, uid, gid, size, mtime] = numbers;
    let mut b = [0u8; 512];
    b[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    b[157..157 + link.len().min(100)].copy_from_slice(&link[..link.len().min(100)]);
    for (at, width, value) in [
        (100, 8, mode),
        (108, 8, uid),
        (116, 8, gid),
        (124, 12, size),
        (136, 12, mtime),
    ] {
        let digits = format!("{value:0w$o}", w = width - 1);
        b[at..at + width - 1].copy_from_slice(&digits.as_bytes()[..width - 1]);
    }
    b[156] = kind;
    b[257..265].copy_from_slice(b"ustar\x0000");
    checksum(&mut b);
    b
}

pub fn checksum(b: &mut [u8; 512]) {
    b[148..156].fill(b' ');
    let sum: u32 = b.iter().map(|b| u32::from(*b)).sum();
    b[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn add(mut self, head: Head) -> Self {
        self.push(head, b"");
        self
    }

    pub fn file(mut self, name: impl AsRef<[u8]>, contents: &[u8]) -> Self {
        self.push(head(b'0', name), contents);
        self
    }

    pub fn dir(self, name: impl AsRef<[u8]>) -> Self {
        self.add(head(b'5', name))
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.add(head(b'2', name).link(target))
    }

    pub fn hardlink(self, name: &str, target: &str) -> Self {
        self.add(head(b'1', name).link(target))
    }

    pub fn push(&mut self, head: Head, contents: &[u8]) {
        let mut pax = head.pax.clone();
        if head.name.len() > 100 {
            pax.push((b"path".to_vec(), head.name.clone()));
        }
        if head.link.len() > 100 {
            pax.push((b"linkpath".to_vec(), head.link.clone()));
        }
        for (key, value) in [("uid", head.uid), ("gid", head.gid)] {
            if value > 0o7_777_777 {
                pax.push((key.into(), value.to_string().into()));
            }
        }
        let mtime = head.mtime.parse::<u64>().ok().filter(|m| *m < 1 << 33);
        if mtime.is_none() {
            pax.push((b"mtime".to_vec(), head.mtime.clone().into()));
        }
        if !pax.is_empty() {
            let records: Vec<u8> = pax.iter().flat_map(|(k, v)| record(k, v)).collect();
            let numbers = [0o644, 0, 0, records.len() as u64, 0];
            self.raw(&block(b'x', b"pax", b"", numbers), &records);
        }
        let size = if contents.is_empty() {
            head.size
        } else {
            contents.len() as u64
        };
        let fits = |id: u64| if id > 0o7_777_777 { 0 } else { id };
        let numbers = [
            u64::from(head.mode),
            fits(head.uid),
            fits(head.gid),
            size,
            mtime.unwrap_or(0),
        ];
        self.raw(&block(head.kind, &head.name, &head.link, numbers), contents);
    }

    /// A block and contents, padded.
    pub fn raw(&mut self, block: &[u8; 512], contents: &[u8]) {
        self.0.extend_from_slice(block);
        self.0.extend_from_slice(contents);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    /// The whole stream, ended as it should be.
    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    w.write_all(bytes).unwrap();
    w.finish().unwrap()
}

pub fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut decoder = flate2::read::MultiGzDecoder::new(bytes);
    std::io::Read::read_to_end(&mut decoder, &mut stream).unwrap();
    stream
}
