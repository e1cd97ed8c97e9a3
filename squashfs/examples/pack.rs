//! Packs a folder into an image with a verity tree: `pack FOLDER IMAGE [THREADS]`. For measurements and
//! for trying things out; xattrs are left out.

use std::collections::HashMap;
use std::error::Error;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Instant;

use berth_squashfs::verity::VerityOptions;
use berth_squashfs::write::{
    ImageWriter, Kind, Lane, Meta, NodeId, Tree, WriteOptions, clamp_mtime,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(folder), Some(image)) = (args.next(), args.next()) else {
        return Err("usage: pack FOLDER IMAGE [THREADS]".into());
    };
    let threads = match args.next() {
        Some(n) => n.to_string_lossy().parse()?,
        None => WriteOptions::default().threads,
    };
    let started = Instant::now();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(image)?;
    let verity = Some(VerityOptions {
        salt: [1; 32],
        uuid: [2; 16],
    });
    let mut writer = ImageWriter::new(
        file,
        WriteOptions {
            verity,
            threads,
            ..WriteOptions::default()
        },
    )?;
    let mut lane = writer.lane();
    let mut tree = Tree::new(meta(&fs::metadata(&folder)?));
    let root = tree.root();
    walk(
        folder.as_ref(),
        root,
        &mut tree,
        &mut lane,
        &mut HashMap::new(),
    )?;
    lane.close()?;
    let data = started.elapsed();
    let done = writer.finish(tree)?;
    println!("{done:?} contents {data:?} all {:?}", started.elapsed());
    Ok(())
}

fn walk(
    folder: &Path,
    parent: NodeId,
    tree: &mut Tree,
    lane: &mut Lane,
    links: &mut HashMap<(u64, u64), NodeId>,
) -> Result<(), Box<dyn Error>> {
    let mut entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        let stat = fs::symlink_metadata(&path)?;
        if let Some(&node) = links.get(&(stat.dev(), stat.ino())) {
            tree.link(parent, name.as_bytes(), node)?;
            continue;
        }
        let (major, minor) = (
            rustix::fs::major(stat.rdev()),
            rustix::fs::minor(stat.rdev()),
        );
        let kind = stat.file_type();
        let target;
        let kind = if kind.is_dir() {
            Kind::Dir
        } else if kind.is_file() {
            Kind::File(lane.add_file(File::open(&path)?)?)
        } else if kind.is_symlink() {
            target = fs::read_link(&path)?;
            Kind::Symlink(target.as_os_str().as_bytes())
        } else if kind.is_char_device() {
            Kind::CharDevice { major, minor }
        } else if kind.is_block_device() {
            Kind::BlockDevice { major, minor }
        } else if kind.is_fifo() {
            Kind::Fifo
        } else {
            Kind::Socket
        };
        let node = tree.add(parent, name.as_bytes(), kind, meta(&stat))?;
        if kind == Kind::Dir {
            walk(&path, node, tree, lane, links)?;
        } else if stat.nlink() > 1 {
            links.insert((stat.dev(), stat.ino()), node);
        }
    }
    Ok(())
}

fn meta(stat: &fs::Metadata) -> Meta {
    Meta {
        mode: (stat.mode() & 0o7777) as u16,
        uid: stat.uid(),
        gid: stat.gid(),
        mtime: clamp_mtime(stat.mtime()),
        ..Meta::default()
    }
}
