//! Loop devices under contention, on the real kernel. Needs root, loop devices and mksquashfs.

mod able;

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use able::able;
use berth_mount::{ImageFile, LoopDevice, MountError};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

/// An image with one file `word`, and after its data something that is not to be served.
struct Image {
    folder: tempfile::TempDir,
    path: PathBuf,
    data_size: u64,
}

impl Image {
    fn new(word: &str) -> Image {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("word"), word).unwrap();
        let path = folder.path().join("image");
        let made = Command::new("mksquashfs")
            .args([&tree, &path])
            .args(["-quiet", "-no-progress"])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let mut file = File::options().append(true).open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        let data_size = size.next_multiple_of(4096);
        file.write_all(&vec![0; (data_size - size) as usize + 8192])
            .unwrap();
        Image {
            folder,
            path,
            data_size,
        }
    }

    fn open(&self) -> File {
        File::open(&self.path).unwrap()
    }

    fn attach(&self, file: &File) -> Result<LoopDevice, MountError> {
        let image = ImageFile {
            file: file.as_fd(),
            data_size: self.data_size,
            label: "test-image",
        };
        LoopDevice::attach(image, self.folder.path())
    }

    /// Numbers of the loop devices that serve this file now.
    fn devices(&self) -> Vec<String> {
        let wanted = self.path.to_str().unwrap();
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
            if backing.is_ok_and(|b| b.trim_end() == wanted) {
                found.push(entry.file_name().into_string().unwrap());
            }
        }
        found
    }

    /// Waits until no device serves this file.
    fn wait_gone(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.devices().is_empty() {
            assert!(Instant::now() < deadline, "left over: {:?}", self.devices());
            thread::yield_now();
        }
    }
}

fn read_word(mount: &OwnedFd, name: &CStr) -> Result<String, Errno> {
    let file = openat(mount, name, OFlags::RDONLY, Mode::empty())?;
    Ok(std::io::read_to_string(File::from(file)).unwrap())
}

#[test]
fn sixty_four_at_once_share_one_device() {
    if !able() {
        return;
    }
    let image = Image::new("shared");
    let barrier = Barrier::new(64);
    let devices: Vec<PathBuf> = thread::scope(|scope| {
        let starts: Vec<_> = (0..64)
            .map(|_| {
                scope.spawn(|| {
                    let file = image.open();
                    barrier.wait();
                    let device = image.attach(&file).unwrap();
                    let mount = device.mount().unwrap();
                    assert_eq!(read_word(&mount, c"word").unwrap(), "shared");
                    barrier.wait();
                    device.path().to_owned()
                })
            })
            .collect();
        starts.into_iter().map(|s| s.join().unwrap()).collect()
    });
    assert!(devices.iter().all(|d| *d == devices[0]), "{devices:?}");
    image.wait_gone();
}

#[test]
fn mounts_survive_autoclear_races_and_never_show_another_image() {
    if !able() {
        return;
    }
    // Devices come and go all the time, and two images of the same size compete for the same numbers.
    let images = [Image::new("first!"), Image::new("second")];
    assert_eq!(images[0].data_size, images[1].data_size);
    let expected = ["first!", "second"];
    thread::scope(|scope| {
        for worker in 0..8 {
            let (images, expected) = (&images, &expected);
            scope.spawn(move || {
                for round in 0..60 {
                    let which = (worker + round) % 2;
                    let device = images[which].attach(&images[which].open()).unwrap();
                    let mount = device.mount().unwrap();
                    drop(device);
                    assert_eq!(read_word(&mount, c"word").unwrap(), expected[which]);
                }
            });
        }
    });
    images[0].wait_gone();
    images[1].wait_gone();
}

#[test]
fn a_mount_keeps_its_device_and_two_mounts_share_their_pages() {
    if !able() {
        return;
    }
    let image = Image::new("kept");
    let device = image.attach(&image.open()).unwrap();
    let (one, two) = (device.mount().unwrap(), device.mount().unwrap());
    let device_of = |mount: &OwnedFd| rustix::fs::fstat(mount).unwrap().st_dev;
    assert_eq!(device_of(&one), device_of(&two), "two superblocks");
    drop((device, two));
    assert_eq!(image.devices().len(), 1);
    let third = image.attach(&image.open()).unwrap();
    assert!(third.was_shared());
    drop((third, one));
    image.wait_gone();
}

#[test]
fn the_mount_cannot_be_written_and_ends_at_the_hash_tree() {
    if !able() {
        return;
    }
    let image = Image::new("sealed");
    let device = image.attach(&image.open()).unwrap();
    let mount = device.mount().unwrap();
    let flags = OFlags::WRONLY;
    let error = openat(&mount, c"word", flags, Mode::empty()).unwrap_err();
    assert_eq!(error, Errno::ROFS);
    let sys = Path::new("/sys/block").join(device.path().file_name().unwrap());
    let sectors: u64 = fs::read_to_string(sys.join("size"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert_eq!(sectors * 512, image.data_size);
    assert!(fs::metadata(&image.path).unwrap().size() > image.data_size);
    assert_eq!(fs::read_to_string(sys.join("ro")).unwrap().trim(), "1");
    drop((device, mount));
    image.wait_gone();
}

#[test]
fn what_is_no_image_is_refused() {
    if !able() {
        return;
    }
    let image = Image::new("x");
    let with = |file: &File, data_size| {
        let label = "test-image";
        let file = file.as_fd();
        let wanted = ImageFile {
            file,
            data_size,
            label,
        };
        LoopDevice::attach(wanted, image.folder.path())
    };
    let short = with(&image.open(), image.data_size + (1 << 20));
    assert!(
        matches!(short, Err(MountError::Truncated { .. })),
        "{short:?}"
    );
    let odd = with(&image.open(), image.data_size - 1);
    assert!(matches!(odd, Err(MountError::BadSize { .. })), "{odd:?}");
    let folder = with(&File::open("/").unwrap(), 512);
    assert!(matches!(folder, Err(MountError::NotAFile)), "{folder:?}");

    fs::write(&image.path, vec![7; 1 << 20]).unwrap();
    let device = with(&image.open(), 1 << 20).unwrap();
    let noise = device.mount();
    assert!(matches!(noise, Err(MountError::Kernel { .. })), "{noise:?}");
    drop(device);
    image.wait_gone();
}
