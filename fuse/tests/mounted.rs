//! The whole program, mounted.

#[path = "../../squashfs/tests/common/mod.rs"]
mod common;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use berth_squashfs::read::{CacheSizes, Reader};

struct Mount {
    folder: PathBuf,
    holder: Child,
    image: PathBuf,
    dir: tempfile::TempDir,
}

impl Mount {
    /// Mounts an image of a tree; `None` where that is not possible, which CI does not accept.
    fn new() -> Option<Self> {
        let can = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
        if !can {
            assert!(
                std::env::var_os("CI").is_none(),
                "CI mounts through /dev/fuse as root"
            );
            eprintln!("left out: mounting needs root and /dev/fuse");
            return None;
        }
        if !common::have("mksquashfs") {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
        common::make_tree(&tree);
        let mut args = vec![tree.as_os_str(), image.as_os_str()];
        let options = ["-noappend", "-quiet", "-no-progress", "-comp", "zstd"];
        args.extend(options.map(OsStr::new));
        common::run("mksquashfs", &args);
        let folder = dir.path().join("mount");
        std::fs::create_dir(&folder).unwrap();
        let mut holder = Command::new(env!("CARGO_BIN_EXE_berth-fuse"))
            .arg("mount")
            .args([&image, &folder])
            .env("BERTH_LOG", "info")
            .stdout(Stdio::piped())
            .stderr(File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "mounted\n");
        Some(Self {
            folder,
            holder,
            image,
            dir,
        })
    }

    fn expected(&self) -> common::Tree {
        let file = File::open(&self.image).unwrap();
        common::of_image(&Reader::open(file, CacheSizes::default()).unwrap())
    }

    /// The server that now runs, if one does.
    fn server(&self) -> Option<rustix::process::Pid> {
        let children = format!("/proc/{0}/task/{0}/children", self.holder.id());
        let pid = std::fs::read_to_string(children).ok()?;
        rustix::process::Pid::from_raw(pid.split_whitespace().next()?.parse().ok()?)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn unmount(mut self) {
        common::run("umount", &[self.folder.as_os_str()]);
        assert!(
            self.holder.wait().unwrap().success(),
            "the holder ends with the mount"
        );
        drop(self.dir);
    }
}

#[test]
fn the_mount_shows_what_the_image_holds() {
    let Some(mount) = Mount::new() else { return };
    let shown = common::of_folder(&mount.folder);
    let expected = mount.expected();
    assert_eq!(shown.len(), expected.len());
    for (path, seen) in &expected {
        assert_eq!(&shown[path], seen, "{}", String::from_utf8_lossy(path));
    }
    let error = std::fs::write(mount.folder.join("new"), b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert!(!mount.folder.join("missing").exists());
    mount.unmount();
}

#[test]
fn readers_outlive_fifty_servers() {
    let Some(mount) = Mount::new() else { return };
    let expected = mount.expected();
    let (done, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    // Without this, the second round would come from the kernel's caches.
                    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
                    assert!(common::of_folder(&mount.folder) == expected);
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let mut killed = 0;
        let bound = Instant::now() + Duration::from_secs(120);
        let mut last = None;
        while killed < 50 && Instant::now() < bound {
            let server = mount.server();
            if let Some(pid) = server.filter(|_| server != last) {
                // Let it take some requests first.
                let taken = rounds.load(Ordering::SeqCst);
                let pause = Instant::now() + Duration::from_millis(20);
                while Instant::now() < pause && rounds.load(Ordering::SeqCst) == taken {
                    std::thread::yield_now();
                }
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
                killed += 1;
                last = server;
            }
        }
        done.store(true, Ordering::SeqCst);
        assert_eq!(killed, 50);
    });
    assert!(rounds.load(Ordering::SeqCst) >= 3);
    let log = mount.log();
    assert!(
        log.contains("took over"),
        "no server died over a request: {log}"
    );
    mount.unmount();
}
