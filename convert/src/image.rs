//! From the merged tree to the tree of the image writer.

use std::collections::HashMap;

use berth_squashfs::write::{FileHandle, Kind, Meta, NodeId, Tree, TreeError, XattrSet};

use crate::entries::{Entries, Header, What};
use crate::merge::{Merged, full_name};
use crate::notes::{LeftOut, Notes};
use crate::paths::PathId;

/// What a folder has that no layer describes.
fn implied() -> Meta {
    Meta {
        mode: 0o755,
        ..Meta::default()
    }
}

/// The tree, and how many names are in it.
pub struct Built {
    pub tree: Tree,
    pub names: u64,
}

/// Builds the tree. `contents` gives the handle of a spilled file.
pub fn build(
    entries: &Entries,
    merged: &Merged,
    notes: &mut Notes,
    contents: &HashMap<u32, FileHandle>,
) -> Result<Built, (Option<u32>, TreeError)> {
    let mut tree = Tree::new(implied());
    let mut sets = vec![None; entries.xattr_sets()];
    if let Some(index) = merged.living(PathId::ROOT).header {
        let header = &entries.headers[index as usize];
        let meta = meta(entries, header, &mut sets, &mut tree).map_err(|e| (Some(index), e))?;
        tree.set_meta(tree.root(), meta);
    }
    let mut links: HashMap<u32, NodeId> = HashMap::new();
    let mut names = 0;
    let mut folders = vec![(PathId::ROOT, tree.root())];
    while let Some((path, folder)) = folders.pop() {
        for living in merged.children(path) {
            let name = entries.paths.name(living.path);
            let at = |e| (living.header, e);
            let Some(index) = living.header else {
                let node = tree.add(folder, name, Kind::Dir, implied()).map_err(at)?;
                folders.push((living.path, node));
                names += 1;
                continue;
            };
            let header = &entries.headers[index as usize];
            if header.what == What::Device {
                // The place itself was noted when its header was read.
                if header.path != living.path {
                    let layer = entries.layers.iter().position(|l| l.contains(&index));
                    let name = full_name(&entries.paths, living.path);
                    notes.add(LeftOut::LinkToDevice, layer.unwrap_or(0), &name);
                }
                continue;
            }
            names += 1;
            if let Some(&node) = links.get(&index) {
                tree.link(folder, name, node).map_err(at)?;
                continue;
            }
            let meta = meta(entries, header, &mut sets, &mut tree).map_err(at)?;
            let kind = kind(entries, header, contents);
            let node = tree.add(folder, name, kind, meta).map_err(at)?;
            match kind {
                Kind::Dir => folders.push((living.path, node)),
                _ if living.linked => drop(links.insert(index, node)),
                _ => {}
            }
        }
    }
    Ok(Built { tree, names })
}

fn meta(
    entries: &Entries,
    header: &Header,
    sets: &mut [Option<XattrSet>],
    tree: &mut Tree,
) -> Result<Meta, TreeError> {
    let index = header.xattrs.index();
    let xattrs = match sets[index] {
        Some(set) => set,
        None => tree.xattrs(&entries.xattr_set(index))?,
    };
    sets[index] = Some(xattrs);
    Ok(Meta {
        mode: header.mode,
        uid: header.uid,
        gid: header.gid,
        mtime: header.mtime,
        xattrs,
    })
}

fn kind<'e>(
    entries: &'e Entries,
    header: &Header,
    contents: &HashMap<u32, FileHandle>,
) -> Kind<'e> {
    match header.what {
        What::Dir => Kind::Dir,
        What::File(handle) => Kind::File(handle),
        What::Spilled(run) => contents
            .get(&run)
            .map_or(Kind::EmptyFile, |handle| Kind::File(*handle)),
        What::Symlink { at, length } => Kind::Symlink(entries.target(at, length)),
        What::Fifo => Kind::Fifo,
        // The others make nothing of their own that could live.
        What::Empty | What::Device | What::Link(_) | What::Whiteout | What::Opaque => {
            Kind::EmptyFile
        }
    }
}
