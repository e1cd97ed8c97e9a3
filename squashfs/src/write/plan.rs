//! Numbers and order of inodes: folders bottom-up, siblings by name; at a folder's turn its children.

use super::WriteError;
use super::tree::{Entry, Tree};
use crate::format::InodeType;

/// Numbers and order, decided before anything is written: a folder's inode names its parent's number,
/// which comes later.
#[derive(Debug)]
pub(super) struct Plan {
    /// The entries of node n are `first[n]..first[n + 1]`.
    first: Vec<u32>,
    /// All folders, bottom-up.
    pub(super) folders: Vec<u32>,
    /// Inode numbers by node.
    pub(super) numbers: Vec<u32>,
}

impl Plan {
    pub(super) fn new(tree: &Tree) -> Result<Self, WriteError> {
        let mut first = vec![0; tree.nodes.len() + 1];
        tree.entries
            .iter()
            .for_each(|entry| first[entry.parent as usize + 1] += 1);
        let mut sum = 0;
        first.iter_mut().for_each(|count| {
            sum += *count;
            *count = sum;
        });
        for pair in tree.entries.windows(2) {
            if pair[0].parent == pair[1].parent && tree.name(&pair[0]) == tree.name(&pair[1]) {
                return Err(WriteError::DuplicateName(tree.name(&pair[0]).to_vec()));
            }
        }
        let mut plan = Self {
            first,
            folders: Vec::new(),
            numbers: vec![0; tree.nodes.len()],
        };
        plan.order(tree);
        plan.number(tree);
        Ok(plan)
    }

    pub(super) fn entries<'t>(&self, tree: &'t Tree, folder: u32) -> &'t [Entry] {
        &tree.entries
            [self.first[folder as usize] as usize..self.first[folder as usize + 1] as usize]
    }

    /// Depth first without recursion: a tree may be as deep as it likes.
    fn order(&mut self, tree: &Tree) {
        let mut path = vec![(0, self.first[0])];
        while let Some((folder, next)) = path.last_mut() {
            let end = self.first[*folder as usize + 1];
            let below = (*next..end).find(|&e| {
                tree.nodes[tree.entries[e as usize].node as usize].kind == InodeType::Dir
            });
            match below {
                Some(entry) => {
                    *next = entry + 1;
                    let child = tree.entries[entry as usize].node;
                    path.push((child, self.first[child as usize]));
                }
                None => {
                    self.folders.push(*folder);
                    path.pop();
                }
            }
        }
    }

    fn number(&mut self, tree: &Tree) {
        let mut last = 0;
        for folder in std::mem::take(&mut self.folders) {
            for entry in self.entries(tree, folder) {
                let number = &mut self.numbers[entry.node as usize];
                if *number == 0 {
                    last += 1;
                    *number = last;
                }
            }
            self.folders.push(folder);
        }
        self.numbers[0] = last + 1;
    }
}
