//! One conversion from beginning to end.
//!
//! ```text
//! a thread a layer            this thread                        the image writer's threads
//! read, inflate, hash  ──►  parse, decide, cut into blocks  ──►  compress, write, hash
//! ```
//! Layers are taken from the top. Next layers are read ahead while one is taken, within the memory that is allowed.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use berth_image::Digest;
use berth_image::digest::{hex, unhex};
use berth_squashfs::compress::Compression as Squash;
use berth_squashfs::verity::VerityOptions;
use berth_squashfs::write::{FileHandle, ImageWriter, Lane, WriteError, WriteOptions};

use crate::entries::{Entries, What};
use crate::image::build;
use crate::job::{Compression, Done, Failure, FailureKind, Options, Progress};
use crate::merge::{Merged, full_name, merge};
use crate::paths::PathId;
use crate::scan::{Scan, failure, printable, unspill};
use crate::spill::Spill;
use crate::stream::{CHUNK, layer_stream};

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
    let mut writer =
        ImageWriter::new(output, write_options(options)?).map_err(|e| write_failure(&e))?;
    let mut lane = writer.lane();
    let expected: Vec<Digest> = layers.iter().map(|l| l.diff_id).collect();
    let mut scan = Scan::new(
        layers.len(),
        Spill::new(spill),
        &options.policy,
        &options.limits,
    );
    let read = Arc::new(AtomicU64::new(0));
    let mut reported = Instant::now();
    let mut report = |entries: u64| {
        if reported.elapsed() >= PROGRESS {
            reported = Instant::now();
            progress(Progress {
                bytes_in: read.load(Ordering::Relaxed),
                bytes_out: writer.bytes_out(),
                entries,
            });
        }
    };
    let (ahead, chunks) = read_ahead(options);
    let mut waiting = layers.into_iter().rev();
    let mut begun = VecDeque::new();
    for index in (0..expected.len()).rev() {
        while begun.len() < ahead
            && let Some(layer) = waiting.next()
        {
            let (source, stream) =
                layer_stream(chunks, options.limits.max_ratio, Arc::clone(&read));
            // Not joined: after a failure it may wait for bytes that never come.
            std::thread::Builder::new()
                .name("layer".into())
                .spawn(move || source.run(layer.input))
                .map_err(|e| internal(format!("cannot start a thread: {e}")))?;
            begun.push_back(stream);
        }
        let Some(stream) = begun.pop_front() else {
            break;
        };
        let found = scan.layer(index, stream, &mut lane, &mut report)?;
        check_diff_id(index, found, expected[index])?;
    }

    let merged = merge(&mut scan.entries).map_err(|misfit| {
        let (layer, name) = name_of(&scan.entries, misfit.header);
        Failure {
            kind: FailureKind::CorruptLayer,
            layer,
            entry: Some(name),
            message: misfit.error.to_string(),
        }
    })?;
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
        diff_ids: expected,
        entries: built.names,
        notes,
    })
}

fn check_diff_id(index: usize, found: Digest, expected: Digest) -> Result<(), Failure> {
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

/// Layers begun at a time, and chunks that each may be ahead.
fn read_ahead(options: &Options) -> (usize, usize) {
    let layers = (options.threads / 2).clamp(1, 8) + 1;
    let chunks = options.memory as usize / 6 / CHUNK / layers;
    (layers, chunks.clamp(2, 32))
}

/// Appends what was spilled and lives after all, in the order it was spilled.
fn bring_back(
    scan: &mut Scan<'_>,
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
        let spilled = scan.entries.spilled[run as usize];
        let handle = unspill(&mut scan.spill, spilled, lane);
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

fn write_options(options: &Options) -> Result<WriteOptions, Failure> {
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
        ahead: 0,
        spill: None,
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

fn internal(message: impl Into<String>) -> Failure {
    Failure {
        kind: FailureKind::Internal,
        layer: None,
        entry: None,
        message: message.into(),
    }
}
