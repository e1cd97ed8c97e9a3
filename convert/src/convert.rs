//! One conversion from beginning to end.
//!
//! ```text
//! a thread a layer          another one a layer                  the image writer's threads
//! read, inflate, hash  ──►  parse, decide, cut into blocks  ──►  compress, write, hash
//! ```
//! Layers are taken from the top, as many at once as there are cores for ([`crate::layer`]); the next ones are read
//! ahead, within the memory that is allowed. The image does not depend on how many.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use berth_image::Digest;
use berth_image::digest::{hex, unhex};
use berth_squashfs::compress::Compression as Squash;
use berth_squashfs::spill::Spill;
use berth_squashfs::verity::VerityOptions;
use berth_squashfs::write::{FileHandle, ImageWriter, Lane, WriteError, WriteOptions};

use crate::entries::{Entries, Spilled, What};
use crate::image::build;
use crate::job::{Compression, Done, Failure, FailureKind, Options, Progress};
use crate::layer::Task;
use crate::merge::{Merged, full_name, merge};
use crate::paths::PathId;
use crate::scan::{Scan, ScanError, failure, printable, unspill};
use crate::spill::Runs;
use crate::stream::{CHUNK, LayerStream, layer_stream};

/// Time between two reports of progress.
const PROGRESS: Duration = Duration::from_millis(100);

/// A layer to be read.
#[derive(Debug)]
pub struct Layer {
    /// Compressed or not; a pipe or a file.
    pub input: File,
    /// Digest that the uncompressed stream must have.
    pub diff_id: Digest,
}

/// Makes the image of `layers` (base first) in `output`, which must be empty and open for reading and writing, with
/// `spill` for contents that seem hidden. `progress` is called at most ten times a second.
///
/// # Errors
/// The first thing that went wrong; `output` then holds nothing of use.
pub fn convert(
    layers: Vec<Layer>,
    output: File,
    spill: File,
    options: &Options,
    progress: &mut dyn FnMut(Progress),
) -> Result<Done, Failure> {
    let spill = Arc::new(Spill::new(spill));
    let plan = Plan::new(options);
    let write = write_options(options, &plan, Arc::clone(&spill))?;
    let mut writer = ImageWriter::new(output, write).map_err(|e| write_failure(&e))?;
    let diff_ids: Vec<Digest> = layers.iter().map(|l| l.diff_id).collect();
    let mut line = Line {
        plan,
        options: Arc::new(options.clone()),
        waiting: layers,
        streams: VecDeque::new(),
        tasks: VecDeque::new(),
        read: Arc::default(),
        headers: Arc::default(),
    };
    let scan = Scan::new(diff_ids.len(), Runs::new(spill), Arc::clone(&line.options));
    let mut scan = line.run(scan, &mut writer, progress)?;
    drop(line);

    let merged = merge(&mut scan.entries).map_err(|misfit| {
        let (layer, name) = name_of(&scan.entries, misfit.header);
        Failure {
            kind: FailureKind::CorruptLayer,
            layer,
            entry: Some(name),
            message: misfit.error.to_string(),
        }
    })?;
    let mut lane = writer.lane();
    let contents = bring_back(&mut scan, &merged, &mut lane)?;
    lane.close().map_err(|e| write_failure(&e))?;
    let built = build(&scan.entries, &merged, &mut scan.notes, &contents);
    let built = built.map_err(|(header, e)| {
        let (layer, name) = header.map_or((None, None), |h| {
            let (layer, name) = name_of(&scan.entries, h);
            (layer, Some(name))
        });
        Failure {
            kind: FailureKind::CorruptLayer,
            layer,
            entry: name,
            message: e.to_string(),
        }
    })?;
    let notes = scan.notes.lines();
    drop((scan, merged, contents));
    let finished = writer.finish(built.tree).map_err(|e| write_failure(&e))?;
    let (Some(hash_offset), Some(root)) = (finished.hash_offset, finished.verity_root) else {
        return Err(internal("the image has no verity tree"));
    };
    Ok(Done {
        squashfs_size: finished.squashfs_size,
        hash_offset,
        file_size: finished.file_size,
        verity_root: hex(&root),
        diff_ids,
        entries: built.names,
        notes,
    })
}

/// What is done at once. Decides nothing of the image.
#[derive(Debug, Clone, Copy)]
struct Plan {
    /// Layers being parsed.
    tasks: usize,
    /// Layers being inflated, these included.
    streams: usize,
    /// Chunks that each of them may be ahead of its parser.
    chunks: usize,
    /// Bytes of compressed contents that may wait in memory for their layer's turn.
    ahead: u64,
}

impl Plan {
    fn new(options: &Options) -> Self {
        // One inflating thread keeps one and a half that compress busy.
        let busy = (options.threads / 2).clamp(1, 8);
        // Few cores are full with one layer, and gain nothing from what runs ahead.
        let tasks = if options.threads < 4 { 1 } else { busy };
        let chunks = options.memory as usize / 6 / CHUNK / (busy + 1);
        Self {
            tasks,
            streams: busy + 1,
            chunks: chunks.clamp(2, 32),
            ahead: options.memory / 6,
        }
    }
}

/// The layers, in the order of their turns.
struct Line {
    plan: Plan,
    options: Arc<Options>,
    /// Not begun; the next one is the last.
    waiting: Vec<Layer>,
    /// Being inflated only.
    streams: VecDeque<(usize, Digest, LayerStream)>,
    /// Being parsed; the first one has the scan.
    tasks: VecDeque<Begun>,
    read: Arc<AtomicU64>,
    headers: Arc<AtomicU64>,
}

/// A task that runs.
struct Begun {
    layer: usize,
    turn: Sender<Scan>,
    done: Receiver<Result<Scan, Failure>>,
}

impl Line {
    /// Takes the scan through all layers.
    fn run(
        &mut self,
        scan: Scan,
        writer: &mut ImageWriter,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Scan, Failure> {
        let mut scan = Some(scan);
        loop {
            self.begin(&mut scan, writer)?;
            let Some(first) = self.tasks.pop_front() else {
                return scan.ok_or_else(|| internal("what the layers say got lost"));
            };
            if let Some(scan) = scan.take() {
                // One that has died says so below.
                let _ = first.turn.send(scan);
            }
            let done = loop {
                match first.done.recv_timeout(PROGRESS) {
                    Ok(done) => break done,
                    Err(RecvTimeoutError::Timeout) => progress(Progress {
                        bytes_in: self.read.load(Ordering::Relaxed),
                        bytes_out: writer.bytes_out(),
                        entries: self.headers.load(Ordering::Relaxed),
                    }),
                    Err(RecvTimeoutError::Disconnected) => {
                        let layer = first.layer;
                        return Err(internal(format!("the thread of layer {layer} died")));
                    }
                }
            };
            scan = Some(done?);
        }
    }

    /// Begins as many layers as there may be. Nobody waits for their threads: after a failure one may wait for bytes
    /// that never come.
    fn begin(&mut self, scan: &mut Option<Scan>, writer: &mut ImageWriter) -> Result<(), Failure> {
        while self.streams.len() + self.tasks.len() < self.plan.streams
            && let Some(layer) = self.waiting.pop()
        {
            let ratio = self.options.limits.max_ratio;
            let (source, stream) = layer_stream(self.plan.chunks, ratio, Arc::clone(&self.read));
            thread("layer", move || source.run(layer.input))?;
            self.streams
                .push_back((self.waiting.len(), layer.diff_id, stream));
        }
        while self.tasks.len() < self.plan.tasks
            && let Some((layer, diff_id, stream)) = self.streams.pop_front()
        {
            let (turn, comes) = channel();
            let (tell, done) = channel();
            // Before it begins, so that the first layer never runs ahead.
            if let Some(scan) = scan.take_if(|_| self.tasks.is_empty()) {
                let _ = turn.send(scan);
            }
            let task = Task {
                layer,
                stream,
                lane: writer.open_lane(),
                diff_id,
                max_bytes: self.options.limits.max_bytes,
                turn: comes,
                headers: Arc::clone(&self.headers),
            };
            thread("parse", move || {
                // Nobody hears it when another layer has failed.
                let _ = tell.send(task.run());
            })?;
            self.tasks.push_back(Begun { layer, turn, done });
        }
        Ok(())
    }
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let spawned = std::thread::Builder::new().name(name.into()).spawn(run);
    spawned
        .map(drop)
        .map_err(|e| internal(format!("cannot start a thread: {e}")))
}

pub(crate) fn check_diff_id(index: usize, found: Digest, expected: Digest) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    Err(Failure {
        kind: FailureKind::DigestMismatch,
        layer: Some(index),
        entry: None,
        message: format!(
            "uncompressed it is {found}, but the image's configuration says {expected}"
        ),
    })
}

/// Appends what was spilled and lives after all, in the order it was spilled.
fn bring_back(
    scan: &mut Scan,
    merged: &Merged,
    lane: &mut Lane,
) -> Result<HashMap<u32, FileHandle>, Failure> {
    let mut needed: Vec<(u32, u32)> = Vec::new();
    let mut folders = vec![PathId::ROOT];
    while !scan.entries.spilled.is_empty()
        && let Some(folder) = folders.pop()
    {
        for living in merged.children(folder) {
            let Some(header) = living.header else {
                folders.push(living.path);
                continue;
            };
            match scan.entries.headers[header as usize].what {
                What::Dir => folders.push(living.path),
                What::Spilled(run) => needed.push((run, header)),
                _ => {}
            }
        }
    }
    needed.sort_unstable();
    needed.dedup();
    let mut contents = HashMap::new();
    for (run, header) in needed {
        let handle = match scan.entries.spilled[run as usize] {
            Spilled::Run(run) => unspill(&mut scan.spill, run, lane),
            Spilled::Aside(handle) => lane.bring_back(handle).map_err(ScanError::Write),
        };
        let handle = handle.map_err(|e| {
            let (layer, name) = name_of(&scan.entries, header);
            failure(layer.unwrap_or(0), Some(name.as_bytes()), e)
        })?;
        contents.insert(run, handle);
    }
    Ok(contents)
}

fn name_of(entries: &Entries, header: u32) -> (Option<usize>, String) {
    let layer = entries
        .layers
        .iter()
        .position(|range| range.contains(&header));
    let path = entries.headers[header as usize].path;
    (layer, printable(&full_name(&entries.paths, path)))
}

fn write_options(
    options: &Options,
    plan: &Plan,
    spill: Arc<Spill>,
) -> Result<WriteOptions, Failure> {
    let (Some(salt), Some(uuid)) = (unhex(&options.salt), unhex(&options.uuid)) else {
        return Err(internal("salt and uuid must be hexadecimal digits"));
    };
    Ok(WriteOptions {
        compression: match options.compression {
            Compression::Zstd => Squash::Zstd,
            Compression::Gzip => Squash::Gzip,
            Compression::Lz4 => Squash::Lz4,
        },
        level: options.level,
        block_size: options.block_size,
        mkfs_time: 0,
        verity: Some(VerityOptions { salt, uuid }),
        threads: options.threads.clamp(1, 256),
        ahead: plan.ahead,
        spill: Some(spill),
    })
}

fn write_failure(error: &WriteError) -> Failure {
    Failure {
        kind: write_kind(error),
        layer: None,
        entry: None,
        message: error.to_string(),
    }
}

pub(crate) fn write_kind(error: &WriteError) -> FailureKind {
    match error {
        WriteError::Io { source, .. } => io_kind(source),
        WriteError::TooMany { .. } => FailureKind::Limit,
        _ => FailureKind::Internal,
    }
}

/// No space and no quota are the admin's to mend.
pub(crate) fn io_kind(error: &io::Error) -> FailureKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            FailureKind::DiskFull
        }
        _ => FailureKind::Internal,
    }
}

pub(crate) fn internal(message: impl Into<String>) -> Failure {
    Failure {
        kind: FailureKind::Internal,
        layer: None,
        entry: None,
        message: message.into(),
    }
}
