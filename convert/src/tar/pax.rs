//! Pax extended records: `LENGTH KEY=VALUE\n`.

use super::number::{decimal, time};
use super::sparse::{MAX_SEGMENTS, Segment};
use super::{MAX_EXTENSION, TarError};

const XATTR: &[u8] = b"SCHILY.xattr.";
/// Most xattrs that local headers give one entry, and that global ones give all. The kernel's list of names ends at 64
/// KiB.
const MAX_XATTRS: usize = 4096;

/// Full names (`user.…`) and values, sorted by name, each name once.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What the records of one extended header say. An empty value takes an earlier one back (POSIX).
#[derive(Debug, Clone, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<i64>,
    /// By name; a later one of the same name wins.
    pub(super) xattrs: Xattrs,
    pub(super) sparse: PaxSparse,
}

/// The `GNU.sparse.*` records.
#[derive(Debug, Clone, Default)]
pub(super) struct PaxSparse {
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Formats 0.0 and 0.1.
    pub(super) map: Option<Vec<Segment>>,
    offset: Option<u64>,
}

impl Pax {
    /// Adds the records of a local header.
    pub(super) fn parse(&mut self, mut rest: &[u8]) -> Result<(), TarError> {
        while !rest.is_empty() {
            let (key, value) = record(&mut rest)?;
            self.set(key, value)?;
        }
        Ok(())
    }

    /// Adds the records of a global header, but only those that can be meant for more than one file: a name, a size
    /// or a sparse map for all that follow is nonsense or malice. Xattrs go to `xattrs`, so that `self` is small and
    /// can be cloned for each entry.
    pub(super) fn parse_global(
        &mut self,
        xattrs: &mut Xattrs,
        mut rest: &[u8],
    ) -> Result<(), TarError> {
        while !rest.is_empty() {
            let (key, value) = record(&mut rest)?;
            if let Some(name) = key.strip_prefix(XATTR) {
                set_xattr(xattrs, name, value)?;
            } else if !matches!(key, b"path" | b"linkpath" | b"size") && !key.starts_with(b"GNU.") {
                self.set(key, value)?;
            }
        }
        // One header is bounded; this is for many of them.
        let held: usize = xattrs.iter().map(|(n, v)| n.len() + v.len()).sum();
        if held as u64 > MAX_EXTENSION {
            return Err(TarError::Globals);
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.link = text(value)?,
            b"size" => self.size = number(value)?,
            b"uid" => self.uid = number(value)?,
            b"gid" => self.gid = number(value)?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or(TarError::Pax("not a time"))?),
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    set_xattr(&mut self.xattrs, name, value)?;
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.set(key, value)?;
                }
            }
        }
        Ok(())
    }
}

fn set_xattr(xattrs: &mut Xattrs, name: &[u8], value: &[u8]) -> Result<(), TarError> {
    match xattrs.binary_search_by(|(there, _)| there[..].cmp(name)) {
        Ok(at) => xattrs[at].1 = value.to_vec(),
        Err(_) if xattrs.len() == MAX_XATTRS => return Err(TarError::Pax("too many xattrs")),
        Err(at) => xattrs.insert(at, (name.to_vec(), value.to_vec())),
    }
    Ok(())
}

impl PaxSparse {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        match key {
            b"major" => self.major = number(value)?,
            b"minor" => self.minor = number(value)?,
            b"name" => self.name = text(value)?,
            b"size" | b"realsize" => self.real_size = number(value)?,
            b"numblocks" => {}
            b"offset" => self.offset = number(value)?,
            b"numbytes" => {
                let (Some(offset), Some(length)) = (self.offset.take(), number(value)?) else {
                    return Err(TarError::Sparse("a length without an offset"));
                };
                self.push(Segment { offset, length })?;
            }
            b"map" => {
                self.map = Some(Vec::new());
                let mut numbers = value.split(|b| *b == b',').filter(|n| !n.is_empty());
                while let Some(offset) = numbers.next() {
                    let (Some(offset), Some(length)) =
                        (decimal(offset), numbers.next().and_then(decimal))
                    else {
                        return Err(TarError::Sparse("its map is not pairs of numbers"));
                    };
                    self.push(Segment { offset, length })?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn push(&mut self, segment: Segment) -> Result<(), TarError> {
        let map = self.map.get_or_insert_default();
        if map.len() == MAX_SEGMENTS {
            return Err(TarError::Sparse("its map is too long"));
        }
        map.push(segment);
        Ok(())
    }
}

/// Takes the first record off: key and value.
fn record<'r>(rest: &mut &'r [u8]) -> Result<(&'r [u8], &'r [u8]), TarError> {
    let space = rest.iter().take(20).position(|b| *b == b' ');
    let space = space.ok_or(TarError::Pax("no length"))?;
    let length = decimal(&rest[..space]).and_then(|n| usize::try_from(n).ok());
    let length = length
        .filter(|n| (space + 2..=rest.len()).contains(n))
        .ok_or(TarError::Pax("its length is wrong"))?;
    let (record, next) = rest.split_at(length);
    let body = record[space + 1..]
        .strip_suffix(b"\n")
        .ok_or(TarError::Pax("it does not end with a line feed"))?;
    let equals = body.iter().position(|b| *b == b'=');
    let equals = equals.filter(|at| *at > 0).ok_or(TarError::Pax("no key"))?;
    *rest = next;
    Ok((&body[..equals], &body[equals + 1..]))
}

fn text(value: &[u8]) -> Result<Option<Vec<u8>>, TarError> {
    if value.contains(&0) {
        return Err(TarError::Nul);
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn number(value: &[u8]) -> Result<Option<u64>, TarError> {
    if value.is_empty() {
        return Ok(None);
    }
    decimal(value)
        .map(Some)
        .ok_or(TarError::Pax("not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Pax, TarError> {
        let mut pax = Pax::default();
        pax.parse(bytes).map(|()| pax)
    }

    /// `LENGTH BODY\n`, where LENGTH counts itself.
    fn line(body: &str) -> String {
        let mut length = body.len() + 2;
        while format!("{length} {body}\n").len() != length {
            length += 1;
        }
        format!("{length} {body}\n")
    }

    #[test]
    fn records_are_read() {
        let records = [
            "path=a/b",
            "uid=70",
            "mtime=1.50000000",
            "SCHILY.xattr.user.x=a\n=b\0cd",
        ];
        let pax = parse(records.map(line).concat().as_bytes()).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!((pax.uid, pax.mtime), (Some(70), Some(1)));
        assert_eq!(pax.xattrs, [(b"user.x".to_vec(), b"a\n=b\0cd".to_vec())]);
    }

    #[test]
    fn an_empty_value_takes_back() {
        let records = ["path=a", "path="].map(line).concat();
        assert_eq!(parse(records.as_bytes()).unwrap().path, None);
    }

    #[test]
    fn lies_are_refused() {
        for bad in [
            &b"99 path=a\n"[..],
            b"9 path=ab\n",
            b"3 =\n",
            b"path=a\n",
            b"0 \n",
            b"10 path=\0\n\n",
            b"99999999999999999999999 a=b\n",
            b"9 size=x\n",
        ] {
            assert!(parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }
}
