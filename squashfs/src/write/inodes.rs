//! The inode and directory tables, written folder by folder in the order of [`Plan`].
//!
//! The inodes of a folder's children lie together, so a listing needs few headers, and every reference
//! points backwards. A child's inode is written at its first name's folder; the root's is last.

use std::collections::HashMap;

use super::contents::Appended;
use super::metadata::MetadataBlocks;
use super::plan::Plan;
use super::tree::{Entry, Node, Tree};
use super::xattr::XattrOrder;
use super::{Settings, WriteError};
use crate::compress::Compressor;
use crate::format::{
    BlockSize, DIR_SIZE_BIAS, DeviceInode, DirEntry, DirHeader, DirIndex, DirInode, FileInode,
    Inode, InodeBody, InodeType, IpcInode, MAX_DIR_RUN, MAX_IDS, METADATA_SIZE, MetaRef, NO_XATTR,
    SymlinkInode, put32,
};

/// Both tables while they grow, and what the tables behind them will hold.
#[derive(Debug)]
pub(super) struct InodeTables {
    pub(super) compressor: Compressor,
    pub(super) inodes: MetadataBlocks,
    pub(super) directories: MetadataBlocks,
    /// Where each inode lies, by number - 1 (raw). Numbers are given in the order of writing, so an inode
    /// is written when its number is not above the length.
    pub(super) places: Vec<u64>,
    pub(super) ids: Ids,
    pub(super) xattrs: XattrOrder,
    pub(super) root: MetaRef,
    block_size: u32,
    listings: HashMap<u32, Listing>,
    /// An inode or a run of entries, before it goes into its table.
    record: Vec<u8>,
}

/// A listing that is written and waits for its folder's inode.
#[derive(Debug)]
struct Listing {
    block: u32,
    offset: u16,
    /// Bytes, with the bias that inodes want.
    size: u32,
    index: Vec<u8>,
    index_count: u16,
}

/// What all the functions below look things up in.
struct Sources<'a> {
    appended: &'a Appended,
    tree: &'a Tree,
    plan: &'a Plan,
}

impl InodeTables {
    pub(super) fn write(
        settings: &Settings,
        appended: &Appended,
        tree: &Tree,
        plan: &Plan,
    ) -> Result<Self, WriteError> {
        let mut tables = Self {
            compressor: Compressor::new(settings.compression, settings.level)?,
            inodes: MetadataBlocks::new(),
            directories: MetadataBlocks::new(),
            places: Vec::with_capacity(tree.nodes.len()),
            ids: Ids::default(),
            xattrs: XattrOrder::new(tree),
            root: MetaRef {
                block: 0,
                offset: 0,
            },
            block_size: settings.block_size,
            listings: HashMap::new(),
            record: Vec::new(),
        };
        let sources = Sources {
            appended,
            tree,
            plan,
        };
        for &folder in &plan.folders {
            tables.write_folder(&sources, folder)?;
        }
        tables.root = tables.inodes.position();
        tables.write_inode(&sources, 0, tree.nodes.len() as u32 + 1)?;
        Ok(tables)
    }

    fn write_folder(&mut self, from: &Sources<'_>, folder: u32) -> Result<(), WriteError> {
        let entries = from.plan.entries(from.tree, folder);
        for entry in entries {
            // A hard link may have been met before.
            if from.plan.numbers[entry.node as usize] as usize > self.places.len() {
                self.write_inode(from, entry.node, from.plan.numbers[folder as usize])?;
            }
        }
        let listing = self.write_listing(from, entries)?;
        self.listings.insert(folder, listing);
        Ok(())
    }

    fn write_inode(&mut self, from: &Sources<'_>, id: u32, parent: u32) -> Result<(), WriteError> {
        let node = &from.tree.nodes[id as usize];
        self.places.push(self.inodes.position().to_raw());
        let xattr = self.xattrs.use_set(node.xattrs);
        let nlink = node.links;
        let mut tail = Vec::new();
        let body = match node.kind {
            InodeType::Dir => {
                let listing = self.listings.remove(&id).ok_or(WriteError::Aborted)?;
                tail = listing.index;
                InodeBody::Dir(DirInode {
                    nlink: nlink.saturating_add(2),
                    size: listing.size,
                    block: listing.block,
                    offset: listing.offset,
                    parent,
                    index_count: listing.index_count,
                    xattr,
                })
            }
            InodeType::File => InodeBody::File(self.file(from.appended, node, xattr, &mut tail)?),
            InodeType::Symlink => {
                let target = node.target(from.tree);
                tail.extend_from_slice(target);
                let extended = xattr != NO_XATTR;
                if extended {
                    put32(&mut tail, xattr);
                }
                InodeBody::Symlink(SymlinkInode {
                    nlink,
                    target_len: target.len() as u32,
                    extended,
                })
            }
            InodeType::BlockDevice | InodeType::CharDevice => InodeBody::Device(
                node.kind,
                DeviceInode {
                    nlink,
                    rdev: node.rdev(),
                    xattr,
                },
            ),
            _ => InodeBody::Ipc(node.kind, IpcInode { nlink, xattr }),
        };
        let inode = Inode {
            mode: node.mode,
            uid_index: self.ids.index(node.uid)?,
            gid_index: self.ids.index(node.gid)?,
            mtime: node.mtime,
            number: from.plan.numbers[id as usize],
            body,
        };
        debug_assert_eq!(inode.number as usize, self.places.len());
        self.record.clear();
        inode.encode(&mut self.record);
        self.record.extend_from_slice(&tail);
        self.inodes.append(&mut self.compressor, &self.record)?;
        Ok(())
    }

    fn file(
        &self,
        appended: &Appended,
        node: &Node,
        xattr: u32,
        tail: &mut Vec<u8>,
    ) -> Result<FileInode, WriteError> {
        let contents = appended.contents(node.handle(), self.block_size)?;
        let block_size = u64::from(self.block_size);
        let mut sparse = 0;
        for (i, &size) in contents.blocks.iter().enumerate() {
            if BlockSize(size).is_hole() {
                sparse += block_size.min(contents.size - i as u64 * block_size);
            }
            put32(tail, size);
        }
        Ok(FileInode {
            start: contents.start,
            size: contents.size,
            sparse,
            nlink: node.links,
            fragment: contents.fragment,
            fragment_offset: contents.fragment_offset,
            xattr,
        })
    }

    /// Writes a folder's names. A run ends when its entries' inodes do not go together, and at the border
    /// of a metadata block, so that the index can point to the next one's beginning.
    fn write_listing(
        &mut self,
        from: &Sources<'_>,
        mut entries: &[Entry],
    ) -> Result<Listing, WriteError> {
        let start = self.directories.position();
        let mut listing = Listing {
            block: small(start.block, "directory table bytes")?,
            offset: start.offset,
            size: DIR_SIZE_BIAS,
            index: Vec::new(),
            index_count: 0,
        };
        let mut indexed = start.block;
        while let Some(first) = entries.first() {
            let at = self.directories.position();
            if at.block != indexed && listing.index_count < u16::MAX {
                indexed = at.block;
                listing.index_count += 1;
                DirIndex {
                    listing_offset: listing.size - DIR_SIZE_BIAS,
                    block: small(at.block, "directory table bytes")?,
                    name: from.tree.name(first),
                }
                .encode(&mut listing.index);
            }
            let count = self.run(from, entries, METADATA_SIZE - usize::from(at.offset))?;
            self.directories
                .append(&mut self.compressor, &self.record)?;
            listing.size = small(
                u64::from(listing.size) + self.record.len() as u64,
                "bytes of one listing",
            )?;
            entries = &entries[count..];
        }
        Ok(listing)
    }

    /// Encodes the longest run that `entries` begin with, and at most one entry beyond `room` bytes.
    fn run(
        &mut self,
        from: &Sources<'_>,
        entries: &[Entry],
        room: usize,
    ) -> Result<usize, WriteError> {
        let number = |entry: &Entry| from.plan.numbers[entry.node as usize];
        let place = |entry: &Entry| self.places[number(entry) as usize - 1];
        let (base, block) = (number(&entries[0]), place(&entries[0]) >> 16);
        self.record.clear();
        let mut header = DirHeader {
            count: 1,
            inode_block: small(block, "inode table bytes")?,
            inode_number: base,
        };
        header.encode(&mut self.record);
        let mut count = 0;
        for entry in entries.iter().take(MAX_DIR_RUN) {
            let delta = i16::try_from(i64::from(number(entry)) - i64::from(base));
            let (Ok(inode_delta), true) = (
                delta,
                place(entry) >> 16 == block && self.record.len() < room,
            ) else {
                break;
            };
            DirEntry {
                inode_offset: place(entry) as u16,
                inode_delta,
                kind: from.tree.nodes[entry.node as usize].kind,
                name: from.tree.name(entry),
            }
            .encode(&mut self.record);
            count += 1;
        }
        // The head itself may reach the border: one entry is always taken.
        if count == 0 {
            let (inode_offset, kind) = (
                place(&entries[0]) as u16,
                from.tree.nodes[entries[0].node as usize].kind,
            );
            DirEntry {
                inode_offset,
                inode_delta: 0,
                kind,
                name: from.tree.name(&entries[0]),
            }
            .encode(&mut self.record);
            count = 1;
        }
        header.count = count as u32;
        let mut head = Vec::with_capacity(DirHeader::LEN);
        header.encode(&mut head);
        self.record[..DirHeader::LEN].copy_from_slice(&head);
        Ok(count)
    }
}

fn small(value: u64, what: &'static str) -> Result<u32, WriteError> {
    u32::try_from(value).map_err(|_| WriteError::TooMany {
        what,
        limit: u64::from(u32::MAX),
    })
}

/// Owners and groups, in the order they were first used.
#[derive(Debug, Default)]
pub(super) struct Ids {
    pub(super) list: Vec<u32>,
    index: HashMap<u32, u16>,
}

impl Ids {
    fn index(&mut self, id: u32) -> Result<u16, WriteError> {
        if let Some(&index) = self.index.get(&id) {
            return Ok(index);
        }
        if self.list.len() == MAX_IDS {
            return Err(WriteError::TooMany {
                what: "different owners and groups",
                limit: MAX_IDS as u64,
            });
        }
        let index = self.list.len() as u16;
        self.list.push(id);
        self.index.insert(id, index);
        Ok(index)
    }
}
