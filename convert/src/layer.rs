//! One layer's task: reading its tar stream, cutting contents into a lane of the image.
//!
//! Layers count from the top, and what is hidden is known only when everything above is. So there is one [`Scan`], and
//! the layer that has it has its turn: it decides entry by entry. A layer whose turn has not come runs ahead: all its
//! contents go into its lane, compressed on whatever core is free, and its entries wait ([`Ahead`]) until the scan comes;
//! then they are decided as they would have been, and the lane learns which of its files are not wanted. So the image
//! is the same however far anybody ran ahead.
//!
//! Invariant: errors are told in the order of turns. What a layer ahead runs into waits like everything else of it.

use std::mem::size_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;

use berth_image::Digest;
use berth_squashfs::write::{FileHandle, Lane};

use crate::convert::{check_diff_id, internal};
use crate::entries::What;
use crate::job::{Failure, FailureKind};
use crate::scan::{Position, Scan, ScanError, Source, ToLane, failure, printable};
use crate::stream::LayerStream;
use crate::tar::{Entry, EntryKind, TarReader, Xattrs};

/// Bytes of entries that a layer may keep until its turn.
const MAX_AHEAD: usize = 4 << 20;

/// Everything a layer's task needs.
#[derive(Debug)]
pub struct Task {
    /// Its index: 0 = base.
    pub layer: usize,
    pub stream: LayerStream,
    /// Not settled yet.
    pub lane: Lane,
    /// What the uncompressed stream must have.
    pub diff_id: Digest,
    /// `convert.limits.max_bytes`.
    pub max_bytes: u64,
    /// Brings the scan when it is this layer's turn.
    pub turn: Receiver<Scan>,
    /// Told how many headers have been met.
    pub headers: Arc<AtomicU64>,
}

/// Entries of a layer whose turn has not come.
#[derive(Debug, Default)]
struct Ahead {
    entries: Vec<Waiting>,
    /// About what they take.
    bytes: usize,
    /// Bytes of holes in them.
    holes: u64,
    global: Arc<Xattrs>,
}

#[derive(Debug)]
struct Waiting {
    entry: Entry,
    at: Position,
    /// For an entry with contents: where they are, or why they are not.
    file: Option<Result<FileHandle, ScanError>>,
}

impl Task {
    /// Reads the layer to its end, and gives the scan back with all it says.
    ///
    /// # Errors
    /// A failure that names the layer and, where there is one, the entry.
    pub fn run(self) -> Result<Scan, Failure> {
        let Self {
            layer,
            mut stream,
            mut lane,
            diff_id,
            max_bytes,
            turn,
            headers,
        } = self;
        stream.limit(max_bytes, 0);
        let mut reader = TarReader::new(stream);
        let mut last: Option<Vec<u8>> = None;
        let mut scan: Option<Scan> = None;
        let mut first = 0;
        let mut ahead = Ahead::default();
        let broken = loop {
            if scan.is_none() {
                let come = match ahead.is_full() {
                    true => Some(turn.recv().map_err(|_| given_up())?),
                    false => turn.try_recv().ok(),
                };
                if let Some(mut come) = come {
                    first = come.entries.headers.len() as u32;
                    reader.input_mut().limit(max_bytes, come.bytes);
                    catch_up(&mut come, layer, std::mem::take(&mut ahead), &mut lane)?;
                    scan = Some(come);
                }
            }
            let entry = match reader.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => break None,
                Err(e) => break Some(e),
            };
            last = Some(entry.name.clone());
            match &mut scan {
                Some(scan) => {
                    let source = Source::Stream(&mut reader, &mut lane);
                    let taken = scan.entry(layer, &entry, source);
                    taken.map_err(|e| failure(layer, Some(&entry.name), e))?;
                    headers.store(scan.headers(), Ordering::Relaxed);
                }
                None if ahead.add(entry, &mut reader, &mut lane, max_bytes) => {}
                // Its contents cannot be read on: nothing more can be done before the turn.
                None => break None,
            }
        };
        let mut stream = reader.into_inner();
        let digest = match (&broken, ahead.has_failed()) {
            (None, false) => Some(stream.finish()),
            _ => None,
        };
        let mut scan = match scan {
            Some(scan) => scan,
            None => {
                let mut come = turn.recv().map_err(|_| given_up())?;
                first = come.entries.headers.len() as u32;
                catch_up(&mut come, layer, ahead, &mut lane)?;
                come
            }
        };
        if let Some(e) = broken {
            return Err(broken_after(layer, last.as_deref(), e.into()));
        }
        let digest = match digest {
            Some(Ok(digest)) => digest,
            Some(Err(e)) => return Err(failure(layer, None, ScanError::Tar(e.into()))),
            None => {
                return Err(internal(
                    "a layer that failed ahead did not fail in its turn",
                ));
            }
        };
        scan.bytes += stream.taken();
        if scan.bytes > max_bytes {
            return Err(failure(layer, None, ScanError::Bytes(max_bytes)));
        }
        check_diff_id(layer, digest, diff_id)?;
        let closed = lane.close();
        closed.map_err(|e| failure(layer, None, ScanError::Write(e)))?;
        scan.entries.layers[layer] = first..scan.entries.headers.len() as u32;
        headers.store(scan.headers(), Ordering::Relaxed);
        Ok(scan)
    }
}

/// A stream that broke between entries.
fn broken_after(layer: usize, last: Option<&[u8]>, error: ScanError) -> Failure {
    let mut failure = failure(layer, None, error);
    if let Some(last) = last.filter(|_| failure.kind == FailureKind::CorruptLayer) {
        failure.message += &format!(" (after entry `{}`)", printable(last));
    }
    failure
}

/// Nobody brings the scan: another layer has failed, and nobody hears this.
fn given_up() -> Failure {
    internal("another layer failed")
}

/// Decides what a layer said before its turn.
fn catch_up(scan: &mut Scan, layer: usize, ahead: Ahead, lane: &mut Lane) -> Result<(), Failure> {
    let mut unwanted = Vec::new();
    for waiting in ahead.entries {
        let Waiting {
            entry,
            at,
            mut file,
        } = waiting;
        let handle = file.as_ref().and_then(|file| file.as_ref().ok().copied());
        let source = Source::Lane {
            file: &mut file,
            at,
        };
        let taken = scan.entry(layer, &entry, source);
        taken.map_err(|e| failure(layer, Some(&entry.name), e))?;
        if let Some(Err(e)) = file {
            // Nobody wants its contents, but the layer ends in them.
            return Err(broken_after(layer, Some(&entry.name), e));
        }
        let last = scan.entries.headers.last().map(|header| header.what);
        unwanted.extend(handle.filter(|&handle| last != Some(What::File(handle))));
    }
    let settled = lane.settle(unwanted);
    settled.map_err(|e| failure(layer, None, ScanError::Write(e)))
}

impl Ahead {
    fn is_full(&self) -> bool {
        self.bytes > MAX_AHEAD
    }

    fn has_failed(&self) -> bool {
        let last = self.entries.last().and_then(|last| last.file.as_ref());
        last.is_some_and(|file| file.is_err())
    }

    /// Takes an entry and its contents. Whether there may be more.
    fn add(
        &mut self,
        entry: Entry,
        reader: &mut TarReader<LayerStream>,
        lane: &mut Lane,
        max_bytes: u64,
    ) -> bool {
        let at = Position::of(reader);
        let file = (entry.kind == EntryKind::File && entry.size > 0).then(|| {
            // The layer alone; all of them are counted at its turn.
            let most = (at.taken + self.holes).saturating_add(entry.size.max(at.stored));
            if most > max_bytes {
                return Err(ScanError::Bytes(max_bytes));
            }
            self.holes += entry.size.saturating_sub(at.stored);
            reader.contents(&mut ToLane(lane))?;
            Ok(lane.end_file()?)
        });
        let length = |xattrs: &Xattrs| -> usize {
            let pairs = xattrs.iter();
            pairs
                .map(|(name, value)| name.len() + value.len() + 64)
                .sum()
        };
        self.bytes += size_of::<Waiting>() + entry.name.len() + entry.link.len();
        self.bytes += length(&entry.xattrs);
        if !Arc::ptr_eq(&self.global, &entry.global_xattrs) {
            self.bytes += length(&entry.global_xattrs);
            self.global = Arc::clone(&entry.global_xattrs);
        }
        self.entries.push(Waiting { entry, at, file });
        !self.has_failed()
    }
}
