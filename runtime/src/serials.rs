//! The highest serial of each image's record that this node has seen: an older record that somebody put back is refused.
//!
//! One small file an image in a folder of root's on the node. It lasts as long as `node.run_dir` does, which is until the
//! next boot where that lies in `/run`: a node that has just started believes the first record it sees.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use berth_image::Record;

use crate::refusal::{Refusal, code};
use crate::trusted;

const FOLDER: &str = "serials";

/// Refuses a verified record that is older than one seen before, and remembers this one's serial.
pub(crate) fn look(run_dir: &Path, record: &Record, name: &str) -> Result<(), Refusal> {
    let folder = run_dir.join(FOLDER);
    let image = format!(
        "{}-{}",
        record.manifest.hex(),
        record.platform.to_string().replace('/', "-")
    );
    let path = folder.join(image);
    let seen = read(&path).unwrap_or(0);
    if record.serial < seen {
        let line = format!(
            "the record of `{name}` is an old one: its serial is {}, this node has seen {seen}",
            record.serial
        );
        let hint = format!(
            "tell the site's admins: was the store or the sealer's state restored? Then remove `{}` on the nodes",
            folder.display()
        );
        return Err(Refusal::new(code::PERMISSION, line).hint(hint));
    }
    if record.serial > seen {
        // A full disk must not stop jobs: the node remembers nothing new then.
        let _ = trusted::own_folder(&folder).map(|()| write(&path, record.serial));
    }
    Ok(())
}

fn read(path: &Path) -> Option<u64> {
    let mut text = String::new();
    fs::File::open(path)
        .ok()?
        .take(20)
        .read_to_string(&mut text)
        .ok()?;
    text.trim().parse().ok()
}

/// Whole, by rename. Of two steps that write at once the later wins: both have verified what they write.
fn write(path: &Path, serial: u64) -> io::Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o644);
    io::Write::write_all(
        &mut options.open(&temporary)?,
        serial.to_string().as_bytes(),
    )?;
    fs::rename(&temporary, path)
}
