//! Who could change a file that root believes: its owner, whoever may write it, and the same for each folder above.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const STICKY: u32 = 0o1000;
const WRITABLE: u32 = 0o022;

/// Why somebody besides root could change what `path` names; `None` when nobody could.
pub fn weakness(path: &Path) -> Option<String> {
    let real = match fs::canonicalize(path) {
        Ok(real) => real,
        Err(e) => return Some(format!("`{}`: {e}", path.display())),
    };
    real.ancestors().find_map(|part| {
        let facts = match fs::metadata(part) {
            Ok(facts) => facts,
            Err(e) => return Some(format!("`{}`: {e}", part.display())),
        };
        if facts.uid() != 0 {
            return Some(format!(
                "`{}` belongs to uid {}",
                part.display(),
                facts.uid()
            ));
        }
        // In a sticky folder nobody replaces what is root's.
        let open = facts.mode() & WRITABLE != 0 && facts.mode() & STICKY == 0;
        open.then(|| {
            format!(
                "`{}` may be written by others (mode {:04o})",
                part.display(),
                facts.mode() & 0o7777
            )
        })
    })
}

/// The same for one folder that is not root's: whether anybody but its owner may write it.
pub fn written_by_others(path: &Path) -> Option<u32> {
    let mode = fs::metadata(path).ok()?.mode() & 0o7777;
    (mode & WRITABLE != 0).then_some(mode)
}
