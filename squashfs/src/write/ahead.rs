//! What lanes whose turn has not come have sent: kept aside in as little memory as it needs, so that
//! buffers go on circulating; beyond a limit, in the spill file.

use std::sync::Arc;

use super::append::Step;
use super::worker::{Form, Pool, Slot};
use super::{Shared, WriteError};
use crate::spill::Spill;

/// A step of a lane whose turn has not come: contents without their buffers.
#[derive(Debug)]
pub(super) struct Kept {
    step: Step,
    bytes: KeptBytes,
}

/// Contents, wherever they are.
#[derive(Debug)]
pub(super) enum KeptBytes {
    None,
    Memory(Box<[u8]>),
    Spilled { at: u64, len: usize },
}

impl Kept {
    /// A step that keeps its buffers: it will be carried out soon.
    pub(super) fn whole(step: Step) -> Self {
        Self {
            step,
            bytes: KeptBytes::None,
        }
    }
}

/// The place aside.
#[derive(Debug)]
pub(super) struct Ahead {
    shared: Arc<Shared>,
    /// Bytes that may be in memory.
    limit: u64,
    spill: Option<Arc<Spill>>,
}

impl Ahead {
    pub(super) fn new(shared: Arc<Shared>, limit: u64, spill: Option<Arc<Spill>>) -> Self {
        // With a spill file nobody has to wait.
        shared
            .gate
            .set_limit(if spill.is_some() { u64::MAX } else { limit });
        Self {
            shared,
            limit,
            spill,
        }
    }

    /// Puts a step of a later lane aside and frees its buffers.
    pub(super) fn keep(&self, step: Step, pool: &Pool) -> Result<Kept, WriteError> {
        self.put(step, pool, self.limit)
    }

    /// The same with a step that nobody may ever ask for: into the spill file, if there is one.
    pub(super) fn put_away(&self, step: Step, pool: &Pool) -> Result<Kept, WriteError> {
        self.put(step, pool, 0)
    }

    /// The same with the contents of a small file.
    pub(super) fn stow(&self, bytes: &[u8]) -> Result<KeptBytes, WriteError> {
        self.put_bytes(bytes, 0)
    }

    fn put(&self, step: Step, pool: &Pool, limit: u64) -> Result<Kept, WriteError> {
        let (slot, step) = match step {
            Step::Block { slot, hash, form } => (
                slot,
                Step::Block {
                    slot: Slot::default(),
                    hash,
                    form,
                },
            ),
            Step::Small { slot, files } => (
                slot,
                Step::Small {
                    slot: Slot::default(),
                    files,
                },
            ),
            other => {
                return Ok(Kept {
                    step: other,
                    bytes: KeptBytes::None,
                });
            }
        };
        let bytes = match &step {
            Step::Block {
                form: Form::Hole | Form::Known,
                ..
            } => &[][..],
            Step::Block {
                form: Form::Packed, ..
            } => &slot.packed[..],
            _ => &slot.raw[..slot.used],
        };
        let bytes = self.put_bytes(bytes, limit)?;
        pool.give_back(slot);
        Ok(Kept { step, bytes })
    }

    fn put_bytes(&self, bytes: &[u8], limit: u64) -> Result<KeptBytes, WriteError> {
        let len = bytes.len();
        Ok(match &self.spill {
            Some(spill) if self.shared.gate.kept() + len as u64 > limit => {
                let at = spill.put(bytes);
                let at = at.map_err(WriteError::io("write the spill file"))?;
                KeptBytes::Spilled { at, len }
            }
            _ => {
                self.shared.gate.keep(len as u64);
                KeptBytes::Memory(bytes.into())
            }
        })
    }

    /// Makes a kept step what it was.
    pub(super) fn restore(&self, kept: Kept) -> Result<Step, WriteError> {
        let Kept { mut step, bytes } = kept;
        if let KeptBytes::None = bytes {
            return Ok(step);
        }
        let bytes = self.bytes(bytes)?;
        match &mut step {
            Step::Block {
                slot,
                form: Form::Packed,
                ..
            } => slot.packed = bytes,
            Step::Block { slot, .. } | Step::Small { slot, .. } => {
                slot.used = bytes.len();
                slot.raw = bytes;
            }
            _ => {}
        }
        Ok(step)
    }

    /// What was kept.
    pub(super) fn bytes(&self, kept: KeptBytes) -> Result<Vec<u8>, WriteError> {
        Ok(match kept {
            KeptBytes::None => Vec::new(),
            KeptBytes::Memory(bytes) => {
                self.shared.gate.release(bytes.len() as u64);
                bytes.into_vec()
            }
            KeptBytes::Spilled { at, len } => {
                let mut bytes = vec![0; len];
                let spill = self.spill.as_ref().ok_or(WriteError::Aborted)?;
                let got = spill.get(at, &mut bytes);
                got.map_err(WriteError::io("read the spill file"))?;
                bytes
            }
        })
    }
}
