//! A service of a test's own, images for it, and what a test asks of both.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use berth_mount::keeper::{self, Answer, Given, KeeperError, Mode, MountRequest, Request, Status};
use rustix::fs::{Mode as Bits, OFlags};
use rustix::process::Pid;

/// Copies are made at the lowest priority: on a machine that is busy with other tests that takes its time.
const BOUND: Duration = Duration::from_secs(120);

/// A service of one test's own.
pub struct Node {
    pub dir: tempfile::TempDir,
    pub child: Child,
}

impl Node {
    /// `None` where mounting is not possible, which CI does not accept.
    pub fn start(settings: &str) -> Option<Self> {
        Self::start_at("", settings, |_| ())
    }

    /// The same where the site says more of its nodes; `before` gets the folder before anything is started.
    pub fn start_at(site: &str, settings: &str, before: impl FnOnce(&Path)) -> Option<Self> {
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
            "[node]\nrun_dir = '{at}/run'\n{site}\n[node.service]\nsocket = '{at}/run/node.sock'\nuser = '64304'\ncache_dir = '{at}/cache'\n{settings}\n"
        );
        std::fs::write(dir.path().join("berth.toml"), config).unwrap();
        before(dir.path());
        let child = Self::spawn(dir.path());
        let node = Self { dir, child };
        node.wait_ready();
        Some(node)
    }

    pub fn spawn(dir: &Path) -> Child {
        Command::new(programs().join("berth-node"))
            .env("BERTH_LOG", "warn")
            .arg("--config")
            .arg(dir.join("berth.toml"))
            .spawn()
            .unwrap()
    }

    /// Starts it anew as the child of a service manager, which takes this test's place as its parent; gives each
    /// keeper's process when it is ready.
    pub fn under_a_manager(&mut self) -> impl FnMut() -> Pid + use<> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/service/manager.py");
        self.child = Command::new("python3")
            .arg(script)
            .arg(self.dir.path().join("notify"))
            .arg(programs().join("berth-node"))
            .arg("--config")
            .arg(self.dir.path().join("berth.toml"))
            .env("BERTH_LOG", "warn")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(self.child.stdout.take().unwrap()).lines();
        move || {
            let line = said.next().unwrap().unwrap();
            let pid = line.strip_prefix("ready ").unwrap().parse().unwrap();
            Pid::from_raw(pid).unwrap()
        }
    }

    pub fn wait_ready(&self) {
        eventually("the service answers", || {
            keeper::ask(&self.socket(), &Request::Status, None, soon()).is_ok()
        });
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("run/node.sock")
    }

    /// An image with one file that says `text`.
    pub fn image(&self, name: &str, text: &str) -> PathBuf {
        let tree = self.dir.path().join(format!("{name}.tree"));
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("file"), text).unwrap();
        self.image_of(name, &tree)
    }

    pub fn mount(&self, image: &Path) -> Result<Given, KeeperError> {
        let file = File::open(image).unwrap();
        keeper::mount(&self.socket(), &request(image), Some(file.as_fd()), soon())
    }

    /// The same as an image with a hash tree, and its request on demand; `None` where veritysetup is missing.
    pub fn sealed(&self, image: &Path) -> Option<MountRequest> {
        let mut request = request(image);
        request.mode = Mode::Lazy;
        let size = request.file_size.next_multiple_of(4096);
        File::options()
            .write(true)
            .open(image)
            .unwrap()
            .set_len(size)
            .unwrap();
        let made = Command::new("veritysetup")
            .args(["format", &format!("--hash-offset={size}")])
            .args([image, image])
            .output();
        let Ok(made) = made else {
            assert!(std::env::var_os("CI").is_none(), "CI has veritysetup");
            eprintln!("left out: needs veritysetup");
            return None;
        };
        assert!(made.status.success(), "{made:?}");
        let said = String::from_utf8(made.stdout).unwrap();
        let mut lines = said.lines();
        let root = lines.find_map(|l| l.strip_prefix("Root hash:")).unwrap();
        request.verity_root = root.trim().to_owned();
        request.hash_offset = size;
        request.file_size = std::fs::metadata(image).unwrap().size();
        Some(request)
    }

    /// An image on demand, fetched from its file.
    pub fn demand(&self, image: &Path, request: &MountRequest) -> Given {
        let file = File::open(image).unwrap();
        keeper::mount(&self.socket(), request, Some(file.as_fd()), soon()).unwrap()
    }

    /// An image of a tree that is there.
    pub fn image_of(&self, name: &str, tree: &Path) -> PathBuf {
        let image = self.dir.path().join(name);
        let made = Command::new("mksquashfs")
            .args([tree, &image])
            .args(["-noappend", "-quiet", "-no-progress", "-comp", "zstd"])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        image
    }

    pub fn status(&self) -> Status {
        match keeper::ask(&self.socket(), &Request::Status, None, soon()).unwrap() {
            Answer::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }
}

/// One of the service's figures.
pub fn figure(node: &Node, name: &str) -> u64 {
    let answer = keeper::ask(&node.socket(), &Request::Metrics, None, soon()).unwrap();
    let Answer::Text { text } = answer else {
        panic!("{answer:?}")
    };
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no {name} in {text}"))
        .parse()
        .unwrap()
}

impl Drop for Node {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

/// The programs, where the server's user may run them: a clone may lie where others cannot go.
fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = PROGRAMS.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open).unwrap();
        let node = Path::new(env!("CARGO_BIN_EXE_berth-node"));
        let fuse = node.with_file_name("berth-fuse");
        assert!(fuse.exists(), "cargo build -p berth-fuse");
        for program in [node, &fuse] {
            std::fs::copy(program, folder.path().join(program.file_name().unwrap())).unwrap();
        }
        folder
    });
    folder.path()
}

pub fn request(image: &Path) -> MountRequest {
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

pub fn soon() -> Instant {
    Instant::now() + BOUND
}

pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let end = soon();
    while !check() {
        assert!(Instant::now() < end, "not in time: {what}");
        // Between two looks, so that what is waited for gets the processor.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What the file in a mount says.
pub fn says(tree: &OwnedFd) -> String {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(tree, "file", flags, Bits::empty()).unwrap();
    let mut text = String::new();
    File::from(file).read_to_string(&mut text).unwrap();
    text
}

pub fn as_somebody(socket: &Path, message: &str) -> Output {
    let script = "import socket, sys\n\
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
        s.connect(sys.argv[1]); s.send(sys.argv[2].encode())\n\
        print(s.recv(65536).decode())";
    Command::new("python3")
        .args(["-c", script])
        .arg(socket)
        .arg(message)
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap()
}
