//! One loop device per image file and node: found if there is one, made if not.
//!
//! Owns the device's descriptor. While it is held the kernel does not clear the device, so what was read of its state
//! stays true; that is why every candidate is opened first and looked at afterwards.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, open};
use rustix::io::Errno;

use crate::lock::LoopLock;
use crate::sys::{
    LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY, LoopInfo, loop_configure, loop_get_free, loop_status,
};
use crate::{MountError, squashfs};

/// How many devices to try before giving up; others on the node may make loop devices without our lock.
const TRIES: u32 = 100;

/// What is to be mounted.
#[derive(Clone, Copy, Debug)]
pub struct ImageFile<'a> {
    /// The image, opened for reading by someone who may read it. The loop driver reads with that opener's rights.
    pub file: BorrowedFd<'a>,
    /// Bytes of the SquashFS part, from the file's start; a multiple of 512. What follows (the hash tree) stays outside.
    pub data_size: u64,
    /// Names the content, 1 to 63 bytes: devices are shared only where file, size and label agree, so that a file
    /// number which a remote filesystem used again is not mistaken for the same file.
    pub label: &'a str,
}

/// A loop device that serves one image file, held open.
#[derive(Debug)]
pub struct LoopDevice {
    device: OwnedFd,
    path: PathBuf,
    shared: bool,
}

impl LoopDevice {
    /// Finds or makes the loop device of `image`. `run_dir` is a folder on this node that only root can write; the lock
    /// for making devices lies in it. Finding takes no lock.
    ///
    /// # Errors
    /// See [`MountError`]; a file that ends before its SquashFS part does is refused here.
    pub fn attach(image: ImageFile<'_>, run_dir: &Path) -> Result<LoopDevice, MountError> {
        let wanted = Wanted::new(image)?;
        if let Some(found) = wanted.find() {
            return Ok(found);
        }
        let lock = LoopLock::take(run_dir)?;
        // Whoever held the lock before may have made it.
        let device = match wanted.find() {
            Some(found) => found,
            None => wanted.make()?,
        };
        drop(lock);
        Ok(device)
    }

    /// The loop device of `image` that is there already, if one is.
    ///
    /// # Errors
    /// When `image` is nothing that a device could serve.
    pub fn find(image: ImageFile<'_>) -> Result<Option<LoopDevice>, MountError> {
        Ok(Wanted::new(image)?.find())
    }

    /// A new mount of the image, read-only, nosuid, nodev, attached nowhere. Mounts of one device share the page cache.
    ///
    /// # Errors
    /// [`MountError::Kernel`] with the kernel's own words when it does not take the file for a SquashFS.
    pub fn mount(&self) -> Result<OwnedFd, MountError> {
        squashfs::mount(&self.path)
    }

    /// The device's path, `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the device was there already.
    pub fn was_shared(&self) -> bool {
        self.shared
    }
}

/// What a device must look like to serve an image.
struct Wanted<'a> {
    image: ImageFile<'a>,
    stat: Stat,
    name: [u8; 64],
}

impl<'a> Wanted<'a> {
    fn new(image: ImageFile<'a>) -> Result<Self, MountError> {
        let stat = fstat(image.file).map_err(|e| MountError::Stat(e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MountError::NotAFile);
        }
        let size = image.data_size;
        if size == 0 || !size.is_multiple_of(512) {
            return Err(MountError::BadSize { size });
        }
        let found = u64::try_from(stat.st_size).unwrap_or(0);
        if found < size {
            let expected = size;
            return Err(MountError::Truncated { expected, found });
        }
        let label = image.label.as_bytes();
        if label.is_empty() || label.len() > 63 || label.contains(&0) {
            return Err(MountError::BadLabel(image.label.to_owned()));
        }
        let mut name = [0; 64];
        name[..label.len()].copy_from_slice(label);
        Ok(Wanted { image, stat, name })
    }

    /// A device that serves this file now. Failures on one device mean it is not the one.
    fn find(&self) -> Option<LoopDevice> {
        let entries = fs::read_dir("/sys/block").ok()?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|n| n.starts_with("loop")) else {
                continue;
            };
            // Devices of others are not even opened: that would hold off their clearing.
            let limit = entry.path().join("loop/sizelimit");
            match fs::read_to_string(limit) {
                Ok(text) if text.trim().parse() == Ok(self.image.data_size) => {}
                _ => continue,
            }
            let path = Path::new("/dev").join(name);
            let Ok(device) = open_device(&path) else {
                continue;
            };
            if loop_status(device.as_fd()).is_ok_and(|info| self.is_served_by(&info)) {
                let shared = true;
                return Some(LoopDevice {
                    device,
                    path,
                    shared,
                });
            }
        }
        None
    }

    fn is_served_by(&self, info: &LoopInfo) -> bool {
        let flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
        info.device == self.stat.st_dev
            && info.inode == self.stat.st_ino
            && info.offset == 0
            && info.sizelimit == self.image.data_size
            && info.flags & flags == flags
            && info.file_name == self.name
    }

    /// Makes a device. Taken ones are passed over: somebody without our lock was faster.
    fn make(&self) -> Result<LoopDevice, MountError> {
        let control_path = PathBuf::from("/dev/loop-control");
        let control = open(&control_path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| fail("open", control_path.clone(), e))?;
        let mut info = LoopInfo::empty();
        info.sizelimit = self.image.data_size;
        info.flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
        info.file_name = self.name;
        let mut pause = Duration::from_micros(100);
        for _ in 0..TRIES {
            let number = loop_get_free(&control)
                .map_err(|e| fail("ask for a free device at", control_path.clone(), e))?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = match open_device(&path) {
                Ok(device) => device,
                // Removed again, being cleared, or its node is not made yet.
                Err(Errno::NOENT | Errno::NXIO | Errno::NODEV | Errno::BUSY) => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(20));
                    continue;
                }
                Err(errno) => return Err(fail("open", path, errno)),
            };
            match loop_configure(device.as_fd(), self.image.file, info) {
                Ok(()) => {
                    let shared = false;
                    return Ok(LoopDevice {
                        device,
                        path,
                        shared,
                    });
                }
                Err(Errno::BUSY | Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(fail("configure", path, errno)),
            }
        }
        Err(MountError::NoFreeLoop { tries: TRIES })
    }
}

impl AsFd for LoopDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

fn open_device(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    open(path, flags, Mode::empty())
}

fn fail(step: &'static str, device: PathBuf, errno: Errno) -> MountError {
    MountError::Loop {
        step,
        device,
        source: io::Error::from(errno),
    }
}
