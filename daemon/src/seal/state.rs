//! What the sealer remembers on its local disk (`seal.state_dir`): which store is its own, and the last serial.
//!
//! One process at a time holds the folder's lock, so one process at a time sweeps and writes the store.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use berth_image::record::Record;
use berth_image::{PublicKey, Store, layout};
use rustix::fs::{FlockOperation, flock};

const UUID: &str = "store-uuid";
const SERIAL: &str = "serial";
const LOCK: &str = "lock";

/// The folder, locked for as long as this lives.
#[derive(Debug)]
pub(super) struct State {
    dir: PathBuf,
    last_serial: Mutex<u64>,
    _lock: File,
}

impl State {
    /// Opens the folder, making it where it does not exist, and waits for its lock: a sealer that was told to end may
    /// take a moment.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let lock =
            (OpenOptions::new().write(true).create(true).truncate(false)).open(dir.join(LOCK))?;
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while let Err(e) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if e != rustix::io::Errno::WOULDBLOCK || std::time::Instant::now() > end {
                return Err(match e {
                    rustix::io::Errno::WOULDBLOCK => io::Error::new(
                        io::ErrorKind::ResourceBusy,
                        "another sealer runs with the same seal.state_dir",
                    ),
                    other => other.into(),
                });
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Ok(Self {
            dir: dir.to_owned(),
            last_serial: Mutex::new(0),
            _lock: lock,
        })
    }

    /// The UUID of the store that was opened before, if one ever was.
    pub(super) fn store_uuid(&self) -> io::Result<Option<String>> {
        match std::fs::read_to_string(self.dir.join(UUID)) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Remembers the store, and finds the last serial: here, or, after this folder was lost, in the store's records.
    pub(super) fn adopt(&self, store: &Store, trusted: &[PublicKey]) -> io::Result<()> {
        self.write(UUID, &store.format().uuid)?;
        let last = match std::fs::read_to_string(self.dir.join(SERIAL)) {
            Ok(text) => (text.trim().parse()).map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidData, "its serial is no number")
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => highest_serial(store, trusted)?,
            Err(e) => return Err(e),
        };
        *self
            .last_serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = last;
        Ok(())
    }

    /// A serial that was never given before, also not before a crash.
    pub(super) fn next_serial(&self) -> io::Result<u64> {
        let mut last = self
            .last_serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let next = *last + 1;
        self.write(SERIAL, &next.to_string())?;
        *last = next;
        Ok(next)
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let temp = self.dir.join(format!("{name}.new"));
        let mut file = File::create(&temp)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temp, self.dir.join(name))?;
        File::open(&self.dir)?.sync_all()
    }
}

fn highest_serial(store: &Store, trusted: &[PublicKey]) -> io::Result<u64> {
    let mut highest = 0;
    for (manifest, platform) in store.image_dirs()? {
        let path = layout::record(&manifest, &platform);
        // What cannot be read or believed gives no serial that a node could hold against us.
        if let Ok(bytes) = store.read(&path, berth_image::envelope::MAX_ENVELOPE)
            && let Ok((record, _)) = Record::open(&bytes, trusted, &manifest, &platform)
        {
            highest = highest.max(record.serial);
        }
    }
    Ok(highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_only_grow() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(&dir.path().join("store"), "x").unwrap();
        let state_dir = dir.path().join("state");
        let state = State::open(&state_dir).unwrap();
        assert_eq!(state.store_uuid().unwrap(), None);
        state.adopt(&store, &[]).unwrap();
        assert_eq!(state.next_serial().unwrap(), 1);
        drop(state);
        let state = State::open(&state_dir).unwrap();
        state.adopt(&store, &[]).unwrap();
        assert_eq!(state.next_serial().unwrap(), 2);
        assert_eq!(
            state.store_uuid().unwrap(),
            Some(store.format().uuid.clone())
        );
    }
}
