//! What was left out of an image, in a few lines however much it was.

use crate::scan::printable;

/// Kinds of what is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftOut {
    Device,
    LinkToDevice,
}

/// Counts, and the first of each kind.
#[derive(Debug, Default)]
pub struct Notes {
    kinds: Vec<(LeftOut, u64, String)>,
}

impl Notes {
    pub fn add(&mut self, what: LeftOut, layer: usize, entry: &[u8]) {
        match self.kinds.iter_mut().find(|(kind, ..)| *kind == what) {
            Some((_, count, _)) => *count += 1,
            None => {
                let first = format!("`{}` in layer {layer}", printable(entry));
                self.kinds.push((what, 1, first));
            }
        }
    }

    /// One line for each kind.
    pub fn lines(&self) -> Vec<String> {
        let line = |(kind, count, first): &(LeftOut, u64, String)| {
            let kind = match kind {
                LeftOut::Device => "device nodes",
                LeftOut::LinkToDevice => "hard links to device nodes",
            };
            format!("left out {kind}: {count}, the first {first}")
        };
        self.kinds.iter().map(line).collect()
    }
}
