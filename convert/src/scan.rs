//! What all layers say, header by header from the top layer down: headers are kept, contents go to the image or, when
//! an upper layer seems to hide them, to the spill file. What is decided here only saves compression; [`crate::merge`]
//! decides what is in the image.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use berth_squashfs::write::{FileHandle, Lane, WriteError, clamp_mtime};

use crate::entries::{Entries, Flood, Header, Spilled, What, XattrId, XattrPairs};
use crate::job::{Failure, FailureKind, Options};
use crate::notes::{LeftOut, Notes};
use crate::paths::{PathError, PathId};
use crate::spill::{Run, Runs};
use crate::stream::{LayerStream, StreamError};
use crate::tar::{Entry, EntryKind, Sink, TarError, TarReader, Xattrs};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that AUFS kept for itself; every engine skips them.
const AUFS: &[u8] = b".wh..wh.";
/// Longest symlink target, in bytes: what `symlink(2)` takes.
const MAX_TARGET: usize = 4095;

/// What is wrong with one entry.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(transparent)]
    Flood(#[from] Flood),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("cannot write to the spill file: {0}")]
    Spill(std::io::Error),
    #[error("{0}")]
    Malformed(&'static str),
    #[error("the layers are larger than {0} bytes uncompressed (convert.limits.max_bytes)")]
    Bytes(u64),
    #[error("the layers have more than {0} entries (convert.limits.max_entries)")]
    Entries(u64),
}

/// Everything that lasts from layer to layer. Handed from one layer's task to the next.
#[derive(Debug)]
pub struct Scan {
    pub entries: Entries,
    pub notes: Notes,
    pub spill: Runs,
    pub options: Arc<Options>,
    /// By place: what layers above hide there.
    cover: Vec<Cover>,
    /// Uncompressed bytes of the layers that are done, and holes.
    pub bytes: u64,
    /// The global xattrs met last, and what they come to with an entry's own.
    global: Arc<Xattrs>,
    with_global: HashMap<XattrId, XattrId>,
}

/// Where the contents of an entry are, if it has any.
pub enum Source<'s> {
    /// Next in the layer's stream.
    Stream(&'s mut TarReader<LayerStream>, &'s mut Lane),
    /// In the lane already: what became of them (taken when it is asked for), and how far the layer was then.
    Lane {
        file: &'s mut Option<Result<FileHandle, ScanError>>,
        at: Position,
    },
}

/// Where in its layer an entry is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Position {
    /// Uncompressed bytes taken.
    pub taken: u64,
    /// Bytes that the stream holds of the entry.
    pub stored: u64,
}

impl Position {
    pub fn of(reader: &TarReader<LayerStream>) -> Self {
        Self {
            taken: reader.input().taken(),
            stored: reader.stored(),
        }
    }
}

/// The highest layer, plus one, that replaces or removes a place, and the highest that hides what lower layers have
/// below it. Layers are read from the top, so the first mark is the highest.
#[derive(Debug, Clone, Copy, Default)]
struct Cover {
    this: u16,
    below: u16,
}

impl Scan {
    pub fn new(layers: usize, spill: Runs, options: Arc<Options>) -> Self {
        Self {
            entries: Entries::new(layers),
            notes: Notes::default(),
            spill,
            options,
            cover: Vec::new(),
            bytes: 0,
            global: Arc::default(),
            with_global: HashMap::new(),
        }
    }

    /// Headers so far.
    pub fn headers(&self) -> u64 {
        self.entries.headers.len() as u64
    }

    /// Takes the next entry of layer `layer`.
    pub fn entry(
        &mut self,
        layer: usize,
        entry: &Entry,
        source: Source<'_>,
    ) -> Result<(), ScanError> {
        let most = self.options.limits.max_entries;
        if self.headers() >= most {
            return Err(ScanError::Entries(most));
        }
        let Some((path, mark)) = self.place(entry)? else {
            return Ok(());
        };
        // Folders that only names imply, and whiteouts of nothing, take memory too.
        if self.entries.paths.len() as u64 > most.saturating_mul(2) {
            return Err(ScanError::Entries(most));
        }
        self.cover
            .resize(self.entries.paths.len(), Cover::default());
        let what = match mark {
            Some(mark) => mark,
            None => self.what(layer, entry, path, source)?,
        };
        self.mark(layer, path, what);
        self.push(entry, path, what)
    }

    /// Where an entry belongs, and whether it is a whiteout; `None` for what is skipped.
    fn place(&mut self, entry: &Entry) -> Result<Option<(PathId, Option<What>)>, ScanError> {
        let path = self.entries.paths.intern(&entry.name)?;
        let mut above = self.entries.paths.parent(path);
        while above != PathId::ROOT {
            let name = self.entries.paths.name(above);
            if name.starts_with(AUFS) {
                return Ok(None);
            }
            if name.starts_with(WHITEOUT) {
                return Err(ScanError::Malformed("it lies in a folder named `.wh.…`"));
            }
            above = self.entries.paths.parent(above);
        }
        let parent = self.entries.paths.parent(path);
        let name = self.entries.paths.name(path);
        if name == OPAQUE {
            return Ok(Some((parent, Some(What::Opaque))));
        }
        if name.starts_with(AUFS) {
            return Ok(None);
        }
        let Some(hidden) = name.strip_prefix(WHITEOUT) else {
            return Ok(Some((path, None)));
        };
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(ScanError::Malformed("a whiteout of no file"));
        }
        let hidden = hidden.to_vec();
        let hidden = self.entries.paths.intern_child(parent, &hidden)?;
        Ok(Some((hidden, Some(What::Whiteout))))
    }

    fn what(
        &mut self,
        layer: usize,
        entry: &Entry,
        path: PathId,
        source: Source<'_>,
    ) -> Result<What, ScanError> {
        if path == PathId::ROOT && entry.kind != EntryKind::Dir {
            return Err(ScanError::Malformed("the root must be a folder"));
        }
        Ok(match entry.kind {
            EntryKind::Dir => What::Dir,
            EntryKind::Fifo => What::Fifo,
            EntryKind::Device => {
                self.notes.add(LeftOut::Device, layer, &entry.name);
                What::Device
            }
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > MAX_TARGET {
                    return Err(ScanError::Malformed(
                        "a symlink's target must be 1 to 4095 bytes long",
                    ));
                }
                self.entries.add_target(&entry.link)?
            }
            EntryKind::Link => {
                let target = self.entries.paths.intern(&entry.link);
                What::Link(target.map_err(|e| match e {
                    PathError::DotDot => ScanError::Malformed("its link target contains `..`"),
                    other => other.into(),
                })?)
            }
            EntryKind::File if entry.size == 0 => What::Empty,
            EntryKind::File => self.contents(layer, path, entry, source)?,
        })
    }

    fn contents(
        &mut self,
        layer: usize,
        path: PathId,
        entry: &Entry,
        source: Source<'_>,
    ) -> Result<What, ScanError> {
        let at = match &source {
            Source::Stream(reader, _) => Position::of(reader),
            Source::Lane { at, .. } => *at,
        };
        // What a header claims counts before a byte of it is read.
        let most = self.options.limits.max_bytes;
        if (self.bytes + at.taken).saturating_add(entry.size.max(at.stored)) > most {
            return Err(ScanError::Bytes(most));
        }
        self.bytes += entry.size.saturating_sub(at.stored);
        let hidden = self.is_hidden(layer, path);
        let spilled = match source {
            Source::Stream(reader, lane) if !hidden => {
                reader.contents(&mut ToLane(lane))?;
                return Ok(What::File(lane.end_file()?));
            }
            Source::Lane { file, .. } => {
                let none = || Err(ScanError::Malformed("it has no contents"));
                let handle = file.take().unwrap_or_else(none)?;
                if !hidden {
                    return Ok(What::File(handle));
                }
                Spilled::Aside(handle)
            }
            Source::Stream(reader, _) => {
                let run = self.spill.begin(entry.size).map_err(ScanError::Spill)?;
                reader.contents(&mut ToSpill(&mut self.spill))?;
                Spilled::Run(run)
            }
        };
        let index = self.entries.spilled.len() as u32;
        self.entries.spilled.push(spilled);
        Ok(What::Spilled(index))
    }

    fn push(&mut self, entry: &Entry, path: PathId, what: What) -> Result<(), ScanError> {
        let dir = what == What::Dir;
        let xattrs = self.xattrs(entry)?;
        let (uid, gid) = self.options.policy.owner(entry.uid, entry.gid);
        self.entries.headers.push(Header {
            path,
            what,
            mode: match what {
                // Linux knows no other mode of a symlink.
                What::Symlink { .. } => 0o777,
                _ => self.options.policy.mode(entry.mode, dir),
            },
            uid,
            gid,
            mtime: clamp_mtime(entry.mtime),
            xattrs,
        });
        Ok(())
    }

    /// The set of xattrs that an entry keeps. Global ones are many entries': they are put together with the same own
    /// ones only once.
    fn xattrs(&mut self, entry: &Entry) -> Result<XattrId, ScanError> {
        let own = self.entries.intern_xattrs(self.kept(&entry.xattrs)?)?;
        if entry.global_xattrs.is_empty() {
            return Ok(own);
        }
        if !Arc::ptr_eq(&self.global, &entry.global_xattrs) {
            self.global = Arc::clone(&entry.global_xattrs);
            self.with_global.clear();
        }
        if let Some(&both) = self.with_global.get(&own) {
            return Ok(both);
        }
        let names: HashSet<&[u8]> = entry.xattrs.iter().map(|(name, _)| &name[..]).collect();
        let mut both = self.kept(&entry.global_xattrs)?;
        both.retain(|(name, _)| !names.contains(&name[..]));
        both.extend(self.kept(&entry.xattrs)?);
        let both = self.entries.intern_xattrs(both)?;
        self.with_global.insert(own, both);
        Ok(both)
    }

    fn kept(&self, xattrs: &Xattrs) -> Result<XattrPairs, ScanError> {
        let kept: XattrPairs = (xattrs.iter())
            .filter(|(name, _)| self.options.policy.keeps(name))
            .cloned()
            .collect();
        if (kept.iter()).any(|(n, v)| n.len() > 255 || v.len() > 65_536 || n.contains(&0)) {
            return Err(ScanError::Malformed(
                "an xattr's name is longer than 255 bytes or its value than 65536",
            ));
        }
        Ok(kept)
    }

    fn is_hidden(&self, layer: usize, path: PathId) -> bool {
        let higher = |mark: u16| usize::from(mark) > layer + 1;
        if higher(self.cover[path.index()].this) {
            return true;
        }
        let mut at = path;
        while at != PathId::ROOT {
            at = self.entries.paths.parent(at);
            if higher(self.cover[at.index()].below) {
                return true;
            }
        }
        false
    }

    fn mark(&mut self, layer: usize, path: PathId, what: What) {
        let mark = layer as u16 + 1;
        let cover = &mut self.cover[path.index()];
        if cover.this == 0 && what != What::Opaque {
            cover.this = mark;
        }
        if cover.below == 0 && what != What::Dir {
            cover.below = mark;
        }
    }
}

/// Contents into a lane.
pub struct ToLane<'l>(pub &'l mut Lane);

impl Sink for ToLane<'_> {
    type Error = ScanError;

    fn data(&mut self, bytes: &[u8]) -> Result<(), ScanError> {
        Ok(self.0.write(bytes)?)
    }

    fn hole(&mut self, length: u64) -> Result<(), ScanError> {
        Ok(self.0.write_hole(length)?)
    }
}

struct ToSpill<'s>(&'s mut Runs);

impl Sink for ToSpill<'_> {
    type Error = ScanError;

    fn data(&mut self, bytes: &[u8]) -> Result<(), ScanError> {
        self.0.write(bytes).map_err(ScanError::Spill)
    }

    fn hole(&mut self, length: u64) -> Result<(), ScanError> {
        self.0.skip(length).map_err(ScanError::Spill)
    }
}

/// Brings contents back from the spill file, because the merged tree needs them after all.
pub fn unspill(spill: &mut Runs, run: Run, lane: &mut Lane) -> Result<FileHandle, ScanError> {
    let mut written = Ok(());
    let read = spill.read(run, |piece| {
        written = lane.write(piece);
        match &written {
            Ok(()) => Ok(()),
            Err(_) => Err(std::io::ErrorKind::Other.into()),
        }
    });
    written?;
    read.map_err(ScanError::Spill)?;
    Ok(lane.end_file()?)
}

/// A layer's error with its place.
pub fn failure(layer: usize, entry: Option<&[u8]>, error: ScanError) -> Failure {
    let kind = match &error {
        ScanError::Tar(TarError::Read(e)) => match e.get_ref().and_then(|e| e.downcast_ref()) {
            Some(StreamError::Ratio(_) | StreamError::Bytes(_)) => FailureKind::Limit,
            Some(StreamError::Decode(crate::decode::DecodeError::Read(_)) | StreamError::Died)
            | None => FailureKind::Internal,
            Some(StreamError::Decode(_)) => FailureKind::CorruptLayer,
        },
        ScanError::Tar(_) | ScanError::Path(_) | ScanError::Malformed(_) => {
            FailureKind::CorruptLayer
        }
        ScanError::Flood(_) | ScanError::Bytes(_) | ScanError::Entries(_) => FailureKind::Limit,
        ScanError::Write(e) => crate::convert::write_kind(e),
        ScanError::Spill(e) => crate::convert::io_kind(e),
    };
    Failure {
        kind,
        layer: Some(layer),
        entry: entry.map(printable),
        message: error.to_string(),
    }
}

/// A name for an error line: unprintable bytes escaped, clipped.
pub fn printable(name: &[u8]) -> String {
    let mut out = name[..name.len().min(200)].escape_ascii().to_string();
    if name.len() > 200 {
        out.push('…');
    }
    out
}
