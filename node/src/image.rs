//! What a request's descriptor is: looked at before the kernel's driver sees a byte of it.

use std::os::fd::BorrowedFd;

use berth_mount::keeper::MountRequest;
use rustix::fs::{FileType, fstat};
use serde::{Deserialize, Serialize};

use crate::copies::Id;
use crate::setup::Failure;

/// What a kept mount is a mount of. Two requests share one only if they agree in all of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Key {
    /// The sealed root of the image's hash tree.
    pub(crate) root: [u8; 32],
    /// Bytes of the SquashFS part.
    pub(crate) hash_offset: u64,
    pub(crate) bytes: Bytes,
}

/// Where the bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Bytes {
    /// A file that root's runtime handed over, mounted by the kernel: device and inode.
    File(u64, u64),
    /// Served on demand, from wherever: every byte is checked against the root.
    Demand,
    /// Root's own copy on this node, mounted by the kernel.
    Copy,
}

impl Key {
    /// The mount of the file behind `image`: the runtime has verified its record, and the caller's right to it is that
    /// it could be opened. Looked at again are the facts that no later change of the store may alter.
    pub(crate) fn of_file(request: &MountRequest, image: BorrowedFd<'_>) -> Result<Self, Failure> {
        let refused = |why: &str| {
            let line = format!("the data file of {} {why}", request.digest);
            Failure::new(Failure::PERMISSION, line)
        };
        let facts = fstat(image).map_err(|e| Failure::system("cannot look at the image", e))?;
        if FileType::from_raw_mode(facts.st_mode) != FileType::RegularFile {
            return Err(refused("is not a regular file"));
        }
        if u64::try_from(facts.st_size) != Ok(request.file_size)
            || request.hash_offset > request.file_size
        {
            return Err(refused("is not as long as its record says"));
        }
        if facts.st_mode & 0o022 != 0 || (request.uid != 0 && facts.st_uid == request.uid) {
            return Err(refused("can be written by others than the sealer"));
        }
        Ok(Self {
            root: root(&request.verity_root)?,
            hash_offset: request.hash_offset,
            bytes: Bytes::File(facts.st_dev, facts.st_ino),
        })
    }

    /// What a copy of the same image is a copy of.
    pub(crate) fn id(&self) -> Id {
        Id {
            root: self.root,
            data: self.hash_offset,
        }
    }

    /// The same image, with its bytes from there.
    pub(crate) fn with(&self, bytes: Bytes) -> Self {
        Self {
            bytes,
            ..self.clone()
        }
    }

    /// The image on demand.
    pub(crate) fn of_root(request: &MountRequest) -> Result<Self, Failure> {
        Ok(Self {
            root: root(&request.verity_root)?,
            hash_offset: request.hash_offset,
            bytes: Bytes::Demand,
        })
    }
}

/// A root from its hexadecimal digits.
pub(crate) fn root(hex: &str) -> Result<[u8; 32], Failure> {
    let wrong = || Failure::new(Failure::INTERNAL, "a verity root that is none");
    let mut root = [0; 32];
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    for (at, byte) in root.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[at * 2..at * 2 + 2], 16).map_err(|_| wrong())?;
    }
    Ok(root)
}

/// How the loop device of an image is named.
pub(crate) fn label(root_hex: &str) -> String {
    format!("berth-{}", root_hex.get(..48).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_mount::keeper::Mode;
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_a_file_that_users_cannot_write_is_taken() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let mut request = MountRequest {
            digest: "sha256:00".into(),
            platform: "linux/amd64".into(),
            verity_root: "0a".repeat(32),
            hash_offset: 4096,
            file_size: 8192,
            mode: Mode::Kernel,
            job: None,
            uid: 4_000_000,
            sources: Vec::new(),
        };
        let mode = |bits| {
            file.set_permissions(PermissionsExt::from_mode(bits))
                .unwrap()
        };
        mode(0o644);
        let key = Key::of_file(&request, file.as_fd()).unwrap();
        assert_eq!(key.root, [10; 32]);
        mode(0o664);
        assert!(Key::of_file(&request, file.as_fd()).is_err());
        mode(0o644);
        for root in ["", "0A0", &"+f".repeat(32), &"é".repeat(32)] {
            request.verity_root = root.into();
            assert!(Key::of_file(&request, file.as_fd()).is_err(), "{root}");
        }
        request.verity_root = "0a".repeat(32);
        request.file_size = 8193;
        assert!(Key::of_file(&request, file.as_fd()).is_err());
        let folder = std::fs::File::open("/").unwrap();
        assert!(Key::of_file(&request, folder.as_fd()).is_err());
    }
}
