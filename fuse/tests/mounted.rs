//! The whole program, mounted.

#[path = "../../squashfs/tests/common/mod.rs"]
mod common;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use berth_fuse::chunks::{FileSource, Source, Sources};
use berth_squashfs::read::{CacheSizes, Reader};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

struct Mount {
    folder: PathBuf,
    holder: Child,
    image: PathBuf,
    dir: tempfile::TempDir,
}

impl Mount {
    /// Makes an image of a tree and mounts it with the arguments that `arguments` gives for it; `None` where that is
    /// not possible, which CI does not accept.
    fn new(arguments: impl FnOnce(&Path) -> Vec<OsString>) -> Option<Self> {
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
            .args(arguments(&image))
            .arg(&folder)
            .env("BERTH_LOG", "info")
            .stdout(Stdio::piped())
            .stderr(File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let mount = Self {
            folder,
            holder,
            image,
            dir,
        };
        assert_eq!(line, "mounted\n", "{}", mount.log());
        Some(mount)
    }

    fn of_file() -> Option<Self> {
        Self::new(|image| vec![image.into()])
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
    }
}

impl Drop for Mount {
    /// A failed test leaves no mount and no process either.
    fn drop(&mut self) {
        if let Ok(None) = self.holder.try_wait() {
            let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
            let _ = self.holder.wait();
        }
    }
}

/// Read calls that a process made so far.
fn reads_of(pid: rustix::process::Pid) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let reads = io.lines().find_map(|line| line.strip_prefix("syscr: "));
    reads.and_then(|reads| reads.parse().ok()).unwrap_or(0)
}

#[test]
fn the_mount_shows_what_the_image_holds() {
    let Some(mount) = Mount::of_file() else {
        return;
    };
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
    let Some(mount) = Mount::of_file() else {
        return;
    };
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
        let bound = Instant::now() + Duration::from_secs(600);
        let mut last = None;
        while killed < 50 && Instant::now() < bound {
            let server = mount.server();
            if let Some(pid) = server.filter(|_| server != last) {
                // Let it take some requests first: its start makes fewer reads.
                let pause = Instant::now() + Duration::from_millis(500);
                while reads_of(pid) < 300 && Instant::now() < pause {
                    std::thread::yield_now();
                }
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
                killed += 1;
                last = server;
            }
        }
        // And the last one serves: on a busy machine no round may have ended yet.
        let seen = rounds.load(Ordering::SeqCst);
        while rounds.load(Ordering::SeqCst) < seen + 3 && Instant::now() < bound {
            std::thread::sleep(Duration::from_millis(5));
        }
        done.store(true, Ordering::SeqCst);
        assert_eq!(killed, 50);
        assert!(rounds.load(Ordering::SeqCst) >= seen + 3);
    });
    let log = mount.log();
    assert!(
        log.contains("took over"),
        "no server died over a request: {log}"
    );
    mount.unmount();
}

/// The image is only behind a source that goes away; its tree is made by veritysetup.
#[test]
fn a_lazy_mount_lives_on_its_cache_when_source_and_server_are_gone() {
    if !common::have("veritysetup") {
        return;
    }
    let lazy = |image: &Path| {
        let size = std::fs::metadata(image).unwrap().len();
        let output = Command::new("veritysetup")
            .args(["format", &format!("--hash-offset={size}")])
            .args([image, image])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        let root = said
            .lines()
            .find_map(|line| line.strip_prefix("Root hash:"))
            .unwrap()
            .trim();
        let cache = image.with_extension("cache");
        std::fs::create_dir(&cache).unwrap();
        [
            format!("--verity-root={root}"),
            format!("--hash-offset={size}"),
            format!("--from={}", image.display()),
            format!("--cache={}", cache.display()),
            "-".to_owned(),
        ]
        .map(OsString::from)
        .to_vec()
    };
    let Some(mount) = Mount::new(lazy) else {
        return;
    };
    let expected = mount.expected();
    assert!(common::of_folder(&mount.folder) == expected);
    std::fs::rename(&mount.image, mount.dir.path().join("away")).unwrap();
    let first = mount.server().unwrap();
    rustix::process::kill_process(first, rustix::process::Signal::KILL).unwrap();
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    assert!(common::of_folder(&mount.folder) == expected);
    assert_ne!(mount.server(), Some(first));
    mount.unmount();
}

#[test]
fn workers_go_to_the_cpu_of_a_reader_that_is_bound_and_come_back() {
    let Some(mount) = Mount::of_file() else {
        return;
    };
    let all = sched_getaffinity(None).unwrap();
    if all.count() < 2 {
        assert!(std::env::var_os("CI").is_none(), "CI has two CPUs");
        eprintln!("left out: there is one CPU");
        return;
    }
    let workers = || -> Vec<CpuSet> {
        let server = mount.server().unwrap().as_raw_pid();
        let tasks = std::fs::read_dir(format!("/proc/{server}/task"))
            .unwrap()
            .map(Result::unwrap);
        let workers = tasks.filter(|task| {
            let name = std::fs::read_to_string(task.path().join("comm"));
            name.is_ok_and(|name| name.starts_with("fuse-"))
        });
        workers
            .map(|task| {
                let tid = task.file_name().to_string_lossy().parse().unwrap();
                sched_getaffinity(rustix::process::Pid::from_raw(tid)).unwrap()
            })
            .collect()
    };
    // Requests that read no bytes, until all workers have had some: now and then there is a new one.
    let asked_until_on = |path: &Path, place: &CpuSet| {
        let bound = Instant::now() + Duration::from_secs(20);
        loop {
            let file = File::open(path).unwrap();
            (0..64).for_each(|_| assert!(!file.is_terminal()));
            let workers = workers();
            if !workers.is_empty() && workers.iter().all(|cpus| cpus == place) {
                break;
            }
            assert!(Instant::now() < bound, "{workers:?}, not {place:?}");
        }
    };
    let path = mount.folder.join("noise");
    asked_until_on(&path, &all);
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).take(2) {
        let mut one = CpuSet::new();
        one.set(cpu);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sched_setaffinity(None, &one).unwrap();
                asked_until_on(&path, &one);
            });
        });
    }
    asked_until_on(&path, &all);
    mount.unmount();
}

#[test]
fn block_mode_carries_the_kernels_own_driver_and_outlives_its_server() {
    let Some(mount) = Mount::new(|image| vec!["--mode=block".into(), image.into()]) else {
        return;
    };
    let bytes = mount.folder.join("image");
    assert!(std::fs::read(&bytes).unwrap() == std::fs::read(&mount.image).unwrap());
    let top = mount.dir.path().join("top");
    std::fs::create_dir(&top).unwrap();
    let options = ["-t", "squashfs", "-o", "ro,loop"].map(OsStr::new);
    let places = [bytes.as_os_str(), top.as_os_str()];
    common::run("mount", &[&options[..], &places].concat());
    let server = mount.server().unwrap();
    rustix::process::kill_process(server, rustix::process::Signal::KILL).unwrap();
    let shown = std::panic::catch_unwind(|| common::of_folder(&top));
    common::run("umount", &[top.as_os_str()]);
    // The loop device closes its file a moment after its last user has gone.
    let bound = Instant::now() + Duration::from_secs(20);
    while loop_is_on(&bytes) && Instant::now() < bound {
        std::thread::yield_now();
    }
    assert!(shown.unwrap() == mount.expected());
    mount.unmount();
}

/// A process that is stopped until this is dropped: after a failure too, or whoever closes a file of its mount would hang.
struct Stopped(rustix::process::Pid);

impl Stopped {
    fn new(pid: rustix::process::Pid) -> Self {
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let stopped = Self(pid);
        // Each thread stops when it is on its way out of the kernel next: until then it may answer.
        let bound = Instant::now() + Duration::from_secs(20);
        while !stopped.is_so() {
            assert!(Instant::now() < bound, "it goes on");
            std::thread::yield_now();
        }
        stopped
    }

    fn is_so(&self) -> bool {
        let tasks = format!("/proc/{}/task", self.0.as_raw_pid());
        std::fs::read_dir(tasks).unwrap().all(|task| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::CONT);
    }
}

/// A store that hangs under its readers: the image lies in a mount whose server is stopped.
#[test]
fn a_filesystem_that_hangs_lets_the_next_source_answer_and_is_asked_again_when_it_is_back() {
    let Some(mount) = Mount::new(|image| vec!["--mode=block".into(), image.into()]) else {
        return;
    };
    let file = |path: &Path| -> Box<dyn Source> {
        let file = File::open(path).unwrap();
        Box::new(FileSource::new(file, path.to_string_lossy()))
    };
    let store = file(&mount.folder.join("image"));
    let size = std::fs::metadata(&mount.image).unwrap().len().min(1 << 18);
    let bytes = std::fs::read(&mount.image).unwrap();
    let sources = Sources::new(vec![store, file(&mount.image)], Duration::from_secs(6));
    let fetch = || {
        let mut got = Vec::new();
        let until = Instant::now() + sources.patience();
        let fetched = sources.fetch(0..size, 1 << 16, until, &mut |_, part| {
            got.extend_from_slice(part);
            true
        });
        fetched.unwrap();
        assert!(got == bytes[..size as usize]);
        sources.fetched()[0].1
    };
    let stopped = Stopped::new(mount.server().unwrap());
    assert_eq!(fetch(), 0);
    // Nobody waits for it a second time, however long ago the first was: another fetch would leave another thread there.
    for _ in 0..100 {
        assert_eq!(fetch(), 0);
    }
    let bound = Instant::now() + Duration::from_secs(20);
    while fetching() != 1 {
        assert!(Instant::now() < bound, "it was waited for");
        std::thread::yield_now();
    }
    drop(stopped);
    let bound = Instant::now() + Duration::from_secs(30);
    while fetch() == 0 {
        assert!(Instant::now() < bound, "it is not asked again");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(sources);
    mount.unmount();
}

/// Threads of this process that read a source's file; those of fetches that have ended go a moment later.
fn fetching() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.trim_end() == "file").count()
}

fn loop_is_on(file: &Path) -> bool {
    std::fs::read_dir("/sys/block")
        .unwrap()
        .filter_map(|device| {
            std::fs::read_to_string(device.ok()?.path().join("loop/backing_file")).ok()
        })
        .any(|backing| Path::new(backing.trim_end()) == file)
}
