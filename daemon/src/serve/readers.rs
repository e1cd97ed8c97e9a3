//! Who may read an image: whom its file's mode and its access list let, on the store, as the kernel would have it for
//! a process of that user. Images are readable by everybody unless somebody restricted them there.
//!
//! The file's own rights decide, and those of its folder; what lies above is the store's, and readable.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use berth_client::api::ErrorKind;
use berth_image::{Digest, Platform, Record};
use rustix::io::Errno;

use super::error::ApiError;
use super::{App, Caller};
use crate::catalogue::ImageRow;

/// How long an answer holds: a right that was taken away is gone after this time.
const FRESH: Duration = Duration::from_secs(30);
/// Answers remembered.
const MOST: usize = 10_000;
const READ: u32 = 4;
const SEARCH: u32 = 1;

/// An image that the caller may read.
#[derive(Debug)]
pub(super) struct Readable {
    pub row: ImageRow,
    pub record: Record,
    pub by_everybody: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    Everybody,
    This,
    No,
}

/// Answers given lately, by file and uid.
#[derive(Debug, Default)]
pub struct Answers(Mutex<HashMap<(PathBuf, u32), (Right, Instant)>>);

/// The image, if it is there and the caller may read it. Who may not is told that it is not there.
pub(super) async fn readable(
    app: &App,
    caller: &Caller,
    digest: &Digest,
    platform: &Platform,
) -> Result<Readable, ApiError> {
    let missing = || {
        let message = format!("image {digest} for {platform} is not in the store");
        ApiError::new(ErrorKind::NotFound, message)
    };
    let row = app.present.known(digest, platform).await?;
    let row = row.ok_or_else(missing)?;
    let record: Record = serde_json::from_str(&row.record)
        .map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))?;
    let right = app.serving.answers.right(&row.path, caller.uid).await?;
    if right == Right::No && !caller.is_admin {
        tracing::warn!(uid = caller.uid, %digest, "may not read this image");
        return Err(missing());
    }
    Ok(Readable {
        row,
        record,
        by_everybody: right == Right::Everybody,
    })
}

/// Whether the caller may read the image, or is an admin.
pub(super) async fn may_read(app: &App, caller: &Caller, row: &ImageRow) -> Result<bool, ApiError> {
    if caller.is_admin {
        return Ok(true);
    }
    let right = app.serving.answers.right(&row.path, caller.uid).await?;
    Ok(right != Right::No)
}

/// A file that is not there, or that the daemon itself may not look at, is nobody's.
fn hidden(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | PermissionDenied)
}

impl Answers {
    async fn right(&self, path: &str, uid: u32) -> Result<Right, ApiError> {
        let key = (PathBuf::from(path), uid);
        if let Some((right, since)) = self.lock().get(&key)
            && since.elapsed() < FRESH
        {
            return Ok(*right);
        }
        let path = key.0.clone();
        let looked = tokio::task::spawn_blocking(move || look(&path, uid)).await;
        let right = match looked {
            Ok(Ok(right)) => right,
            Ok(Err(e)) if hidden(&e) => Right::No,
            Ok(Err(e)) => return Err(ApiError::new(ErrorKind::StoreUnavailable, e.to_string())),
            Err(e) => return Err(ApiError::new(ErrorKind::Internal, e.to_string())),
        };
        let mut answers = self.lock();
        if answers.len() >= MOST {
            answers.retain(|_, (_, since)| since.elapsed() < FRESH);
        }
        if answers.len() < MOST {
            answers.insert(key, (right, Instant::now()));
        }
        Ok(right)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(PathBuf, u32), (Right, Instant)>> {
        // Every change is one call.
        (self.0.lock()).unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn look(file: &Path, uid: u32) -> std::io::Result<Right> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let rights = [(Rights::of(file)?, READ), (Rights::of(folder)?, SEARCH)];
    if rights
        .iter()
        .all(|(rights, wanted)| rights.everybody(*wanted))
    {
        return Ok(Right::Everybody);
    }
    let groups = groups_of(uid)?;
    let allowed = rights
        .iter()
        .all(|(rights, wanted)| rights.allow(uid, &groups, *wanted));
    Ok(if allowed { Right::This } else { Right::No })
}

/// All groups of a user; none for a uid that nobody here has.
fn groups_of(uid: u32) -> std::io::Result<Vec<u32>> {
    let Some(user) = nix::unistd::User::from_uid(uid.into())? else {
        return Ok(Vec::new());
    };
    let name = std::ffi::CString::new(user.name)?;
    let groups = nix::unistd::getgrouplist(&name, user.gid)?;
    Ok(groups.iter().map(|group| group.as_raw()).collect())
}

/// Mode, owner and POSIX access list of a file (acl(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rights {
    mode: u32,
    uid: u32,
    gid: u32,
    acl: Vec<Entry>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    tag: u16,
    perm: u32,
    id: u32,
}

const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 16;

impl Rights {
    fn of(path: &Path) -> std::io::Result<Self> {
        let meta = std::fs::symlink_metadata(path)?;
        let mut bytes = vec![0u8; 64 << 10];
        let len = match rustix::fs::getxattr(path, "system.posix_acl_access", &mut bytes) {
            Ok(len) => len,
            Err(Errno::NODATA | Errno::OPNOTSUPP) => 0,
            Err(e) => return Err(e.into()),
        };
        Ok(Self {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            acl: parse(&bytes[..len]),
        })
    }

    fn everybody(&self, wanted: u32) -> bool {
        // Named entries may take away from single users what others have: then it is not everybody's.
        self.mode & wanted == wanted && self.acl.is_empty()
    }

    fn allow(&self, uid: u32, groups: &[u32], wanted: u32) -> bool {
        let has = |perm: u32| perm & wanted == wanted;
        if uid == self.uid {
            return has(self.mode >> 6);
        }
        let mask = self.acl.iter().find(|entry| entry.tag == MASK);
        let mask = mask.map_or(7, |entry| entry.perm);
        if let Some(entry) = (self.acl.iter()).find(|entry| entry.tag == USER && entry.id == uid) {
            return has(entry.perm & mask);
        }
        // Without a list the mode's group bits are the owning group's; with one they are the mask.
        let own = self.acl.iter().find(|entry| entry.tag == GROUP_OBJ);
        let own = own.map_or(self.mode >> 3, |entry| entry.perm);
        let named = self.acl.iter().filter(|entry| entry.tag == GROUP);
        let named = named.map(|entry| (entry.id, entry.perm));
        let mut of_mine = std::iter::once((self.gid, own))
            .chain(named)
            .filter(|(group, _)| groups.contains(group))
            .map(|(_, perm)| perm & mask)
            .peekable();
        match of_mine.peek() {
            Some(_) => of_mine.any(has),
            None => has(self.mode),
        }
    }
}

/// `system.posix_acl_access`: a version, then eight bytes an entry, little-endian.
fn parse(bytes: &[u8]) -> Vec<Entry> {
    let entries = bytes.get(4..).unwrap_or_default().chunks_exact(8);
    let entry = |e: &[u8]| Entry {
        tag: u16::from_le_bytes([e[0], e[1]]),
        perm: u32::from(u16::from_le_bytes([e[2], e[3]])),
        id: u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
    };
    entries.map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(mode: u32, acl: &[(u16, u32, u32)]) -> Rights {
        let entry = |(tag, perm, id): &(u16, u32, u32)| Entry {
            tag: *tag,
            perm: *perm,
            id: *id,
        };
        Rights {
            mode,
            uid: 1,
            gid: 10,
            acl: acl.iter().map(entry).collect(),
        }
    }

    #[test]
    fn modes_decide_as_the_kernel_does() {
        let public = rights(0o644, &[]);
        assert!(public.everybody(READ) && public.allow(99, &[], READ));
        let group = rights(0o640, &[]);
        assert!(!group.everybody(READ));
        assert!(group.allow(1, &[], READ) && group.allow(5, &[10], READ));
        assert!(!group.allow(5, &[11], READ));
        // Who is in the owning group gets its bits, though others have more.
        assert!(!rights(0o604, &[]).allow(5, &[10], READ));
    }

    #[test]
    fn access_lists_decide_as_the_kernel_does() {
        const NOBODY: u32 = u32::MAX;
        let list = rights(
            0o650,
            &[
                (1, 6, NOBODY),
                (USER, 4, 7),
                (USER, 0, 8),
                (GROUP_OBJ, 0, NOBODY),
                (GROUP, 4, 20),
                (GROUP, 2, 30),
                (MASK, 5, NOBODY),
                (32, 0, NOBODY),
            ],
        );
        assert!(!list.everybody(READ));
        assert!(list.allow(7, &[], READ) && list.allow(9, &[20], READ));
        assert!(list.allow(9, &[10, 20], READ));
        assert!(
            !list.allow(8, &[20], READ),
            "named, so groups do not matter"
        );
        assert!(!list.allow(9, &[30], READ) && !list.allow(9, &[10], READ));
        assert!(!list.allow(9, &[], READ));
        let masked = rights(0o600, &[(USER, 4, 7), (MASK, 0, NOBODY)]);
        assert!(!masked.allow(7, &[], READ));
    }

    #[test]
    fn a_list_is_read_from_its_bytes() {
        let bytes = [
            2, 0, 0, 0, 2, 0, 4, 0, 7, 0, 0, 0, 16, 0, 5, 0, 255, 255, 255, 255, 9,
        ];
        let entries = parse(&bytes);
        assert_eq!(entries.len(), 2);
        assert_eq!(
            (entries[0].tag, entries[0].perm, entries[0].id),
            (USER, 4, 7)
        );
        assert!(parse(&[]).is_empty() && parse(&[1, 2]).is_empty());
    }
}
