//! The keeper as its clients see it.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use berth_mount::keeper::{
    self, Answer, Given, How, KeeperError, Mode, MountRequest, Request, Status,
};
use rustix::fs::{Mode as Bits, OFlags, StatVfsMountFlags};

const BOUND: Duration = Duration::from_secs(30);

/// A service of one test's own.
struct Node {
    dir: tempfile::TempDir,
    child: Child,
}

impl Node {
    /// `None` where mounting is not possible, which CI does not accept.
    fn start(settings: &str) -> Option<Self> {
        let can = rustix::process::geteuid().is_root()
            && Path::new("/dev/loop-control").exists()
            && Command::new("mksquashfs").arg("-version").output().is_ok();
        if !can {
            assert!(std::env::var_os("CI").is_none(), "CI mounts as root");
            eprintln!("left out: needs root, loop devices and mksquashfs");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(
            dir.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let at = dir.path().display();
        let config = format!(
            "[node]\nrun_dir = '{at}/run'\n[node.service]\nsocket = '{at}/run/node.sock'\nuser = '64304'\ncache_dir = '{at}/cache'\n{settings}\n"
        );
        std::fs::write(dir.path().join("berth.toml"), config).unwrap();
        let child = Self::spawn(dir.path());
        let node = Self { dir, child };
        node.wait_ready();
        Some(node)
    }

    fn spawn(dir: &Path) -> Child {
        Command::new(env!("CARGO_BIN_EXE_berth-node"))
            .env("BERTH_LOG", "warn")
            .arg("--config")
            .arg(dir.join("berth.toml"))
            .spawn()
            .unwrap()
    }

    fn wait_ready(&self) {
        eventually("the service answers", || {
            keeper::ask(&self.socket(), &Request::Status, None, soon()).is_ok()
        });
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/node.sock")
    }

    /// An image with one file that says `text`.
    fn image(&self, name: &str, text: &str) -> PathBuf {
        let tree = self.dir.path().join(format!("{name}.tree"));
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("file"), text).unwrap();
        let image = self.dir.path().join(name);
        let made = Command::new("mksquashfs")
            .args([&tree, &image])
            .args(["-noappend", "-quiet", "-no-progress"])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        image
    }

    fn mount(&self, image: &Path) -> Result<Given, KeeperError> {
        let file = File::open(image).unwrap();
        keeper::mount(&self.socket(), &request(image), Some(file.as_fd()), soon())
    }

    fn status(&self) -> Status {
        match keeper::ask(&self.socket(), &Request::Status, None, soon()).unwrap() {
            Answer::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

fn request(image: &Path) -> MountRequest {
    let size = std::fs::metadata(image).unwrap().size();
    MountRequest {
        digest: format!("sha256:{}", "1".repeat(64)),
        platform: "linux/amd64".into(),
        verity_root: "ab".repeat(32),
        hash_offset: size,
        file_size: size,
        mode: Mode::Kernel,
        job: Some("7".into()),
        uid: 1000,
        sources: Vec::new(),
    }
}

fn soon() -> Instant {
    Instant::now() + BOUND
}

fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = soon();
    while !check() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::yield_now();
    }
}

/// What the file in a mount says.
fn says(tree: &OwnedFd) -> String {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(tree, "file", flags, Bits::empty()).unwrap();
    let mut text = String::new();
    File::from(file).read_to_string(&mut text).unwrap();
    text
}

fn as_somebody(node: &Node, message: &str) -> Output {
    let script = "import socket, sys\n\
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
        s.connect(sys.argv[1]); s.send(sys.argv[2].encode())\n\
        print(s.recv(65536).decode())";
    Command::new("python3")
        .args(["-c", script])
        .arg(node.socket())
        .arg(message)
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap()
}

#[test]
fn the_second_gets_the_mount_of_the_first() {
    let Some(node) = Node::start("") else { return };
    let image = node.image("a", "hello");
    let first = node.mount(&image).unwrap();
    assert!(!first.kept);
    assert_eq!(
        (first.how, says(&first.tree).as_str()),
        (How::Kernel, "hello")
    );
    let flags = rustix::fs::fstatvfs(&first.tree).unwrap().f_flag;
    let wanted = StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
    assert!(flags.contains(wanted), "{flags:?}");
    let second = node.mount(&image).unwrap();
    assert!(second.kept);
    let device = |tree| rustix::fs::fstat(tree).unwrap().st_dev;
    assert_eq!(device(&first.tree), device(&second.tree));
    assert_eq!(node.status().mounts[0].users, 2);
    drop((first, second));
    eventually("the leases end", || node.status().mounts[0].users == 0);
    // Nobody uses it, and it is there.
    assert!(node.mount(&image).unwrap().kept);
}

#[test]
fn sixty_four_at_once_get_one_mount() {
    let Some(node) = Node::start("") else { return };
    let image = node.image("a", "hello");
    let made = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..64)
            .map(|_| scope.spawn(|| node.mount(&image).unwrap()))
            .collect();
        let given: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert!(given.iter().all(|g| says(&g.tree) == "hello"));
        given.iter().filter(|g| !g.kept).count()
    });
    assert_eq!(made, 1);
}

#[test]
fn nothing_stays_beyond_its_time_or_number() {
    let Some(node) = Node::start("keep_images = 1") else {
        return;
    };
    let (one, two) = (node.image("a", "one"), node.image("b", "two"));
    drop(node.mount(&one).unwrap());
    eventually("the lease ends", || node.status().mounts[0].users == 0);
    let held = node.mount(&two).unwrap();
    eventually("the first is let go of", || node.status().mounts.len() == 1);
    assert_eq!(says(&held.tree), "two");
    assert!(!node.mount(&one).unwrap().kept);

    let Some(node) = Node::start("keep_s = 0") else {
        return;
    };
    let image = node.image("a", "one");
    let given = node.mount(&image).unwrap();
    assert!(node.mount(&image).unwrap().kept, "while it is used");
    drop(given);
    eventually("it is let go of", || node.status().mounts.is_empty());
}

#[test]
fn a_drained_service_lets_go_and_what_was_given_stays() {
    let Some(node) = Node::start("") else { return };
    let image = node.image("a", "hello");
    let used = node.mount(&image).unwrap();
    drop(node.mount(&node.image("b", "idle")).unwrap());
    eventually("the lease ends", || {
        node.status().mounts.iter().any(|mount| mount.users == 0)
    });
    let answer = keeper::ask(&node.socket(), &Request::Drain, None, soon()).unwrap();
    let Answer::Status(status) = answer else {
        panic!("{answer:?}")
    };
    assert!(status.draining);
    assert_eq!(status.mounts.len(), 1);
    assert_eq!(says(&used.tree), "hello");
    drop(used);
    eventually("the last goes", || node.status().mounts.is_empty());
}

#[test]
fn what_was_given_outlives_a_killed_service_and_the_next_one_serves_on() {
    let Some(mut node) = Node::start("") else {
        return;
    };
    let image = node.image("a", "hello");
    let given = node.mount(&image).unwrap();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    assert_eq!(says(&given.tree), "hello");
    let absent = node.mount(&image).unwrap_err();
    assert!(matches!(absent, KeeperError::Absent { .. }), "{absent}");
    node.child = Node::spawn(node.dir.path());
    node.wait_ready();
    assert!(!node.mount(&image).unwrap().kept);
}

#[test]
fn users_get_no_mounts_and_one_service_has_a_folder() {
    let Some(node) = Node::start("") else { return };
    let image = node.image("a", "hello");
    drop(node.mount(&image).unwrap());
    let wanted = keeper::encode(&Request::Mount(request(&image))).unwrap();
    let drain = keeper::encode(&Request::Drain).unwrap();
    for message in [wanted, drain] {
        let output = as_somebody(&node, std::str::from_utf8(&message).unwrap());
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(answer.contains(r#""code":77"#), "{output:?}");
    }
    assert!(!node.status().draining);
    let second = Node::spawn(node.dir.path()).wait().unwrap();
    assert_eq!(second.code(), Some(69));
    // Neither a file that users can write nor one of another length is mounted.
    std::fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let error = node.mount(&image).unwrap_err();
    assert!(
        matches!(error, KeeperError::Refused { code: 77, .. }),
        "{error}"
    );
}
