//! Whether what was found is what the sealer made: the last look before the kernel's driver sees a byte.

use std::os::fd::BorrowedFd;

use berth_image::envelope::EnvelopeError;
use berth_image::{Digest, PublicKey, Record};
use rustix::fs::{FileType, fstat};

use crate::refusal::{Refusal, code};
use crate::user::User;
use crate::wanted::Wanted;

/// The verified record of an image whose bytes come from elsewhere, each checked against it.
pub(crate) fn believe(
    wanted: &Wanted,
    digest: &Digest,
    record: &[u8],
    keys: &[PublicKey],
) -> Result<Record, Refusal> {
    let opened = Record::open(record, keys, digest, &wanted.platform);
    let (record, _) = opened.map_err(|e| not_believed(&wanted.name(), &e))?;
    Ok(record)
}

/// The verified record of the image, when `data` is the file that it names.
///
/// A plain mount hashes nothing, so who could have written the file decides: it must be a regular file of the right
/// size that neither its group nor others may write, and not the job's user's own.
pub(crate) fn verify(
    wanted: &Wanted,
    digest: &Digest,
    record: &[u8],
    keys: &[PublicKey],
    data: BorrowedFd<'_>,
    user: &User,
) -> Result<Record, Refusal> {
    let name = wanted.name();
    let record = believe(wanted, digest, record, keys)?;
    let damaged = |why: String| {
        Refusal::new(
            code::UNAVAILABLE,
            format!("the data file of `{name}` {why}"),
        )
        .hint("tell the site's admins: `berth rm` and a new pull replace it")
    };
    let stat = fstat(data).map_err(|e| damaged(format!("cannot be looked at: {e}")))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(damaged("is not a regular file".into()));
    }
    if u64::try_from(stat.st_size) != Ok(record.file.size) {
        return Err(damaged(format!(
            "has {} bytes, its record says {}",
            stat.st_size, record.file.size
        )));
    }
    let users_own = user.uid != 0 && stat.st_uid == user.uid;
    if stat.st_mode & 0o022 != 0 || users_own {
        let line = format!("the data file of `{name}` can be written by others than the sealer");
        return Err(Refusal::new(code::PERMISSION, line)
            .hint("tell the site's admins: the store must belong to a user that runs no jobs"));
    }
    Ok(record)
}

/// The data file belongs to whom the store belongs to: the owner of its FORMAT file, or root, who may have restored it.
pub(crate) fn belongs_to_store(
    wanted: &Wanted,
    data: BorrowedFd<'_>,
    format: BorrowedFd<'_>,
) -> Result<(), Refusal> {
    let owner = |fd| fstat(fd).map(|stat| stat.st_uid);
    match (owner(data), owner(format)) {
        (Ok(0), Ok(_)) => Ok(()),
        (Ok(of_data), Ok(of_store)) if of_data == of_store => Ok(()),
        _ => {
            let name = wanted.name();
            let line = format!("the data file of `{name}` does not belong to the store's owner");
            Err(Refusal::new(code::PERMISSION, line).hint(
                "tell the site's admins: files in the store belong to the sealer, as its FORMAT file does, or to root",
            ))
        }
    }
}

pub(crate) fn not_believed(name: &str, error: &EnvelopeError) -> Refusal {
    Refusal::new(
        code::PERMISSION,
        format!("the record of `{name}` is not to be trusted: {error}"),
    )
    .hint("tell the site's admins: the record must be signed by a key in `node.keys`")
}
