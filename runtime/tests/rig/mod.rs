//! A site in a folder, and the plugin's side of the protocol: what `slurmstepd` and its tasks do.
#![allow(
    unsafe_code,
    reason = "tasks enter a namespace and change user between fork and exec, as the plugin's do"
)]
#![allow(dead_code, reason = "each suite uses a part of it")]

#[path = "../../../mount/tests/able/mod.rs"]
mod able;
pub mod service;

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub use able::able;
use berth_image::record::{Admission, Conversion, DataFile, RunConfig};
use berth_image::{Digest, ImageRef, Platform, PrivateKey, Record, RefEntry, layout};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// An ordinary user that every Debian has, with a home folder that exists.
pub const UID: u32 = 34;
pub const GID: u32 = 34;
pub const HOME: &str = "/var/backups";
/// What the example image is called.
pub const REFERENCE: &str = "docker://registry.example/demo/tools:1";

/// A site: configuration, key, store, and a folder for what a test makes.
pub struct Site {
    pub folder: tempfile::TempDir,
    pub key: PrivateKey,
    /// Lines after `[node]` in the configuration.
    pub node: String,
}

impl Site {
    pub fn new() -> Site {
        let folder = tempfile::Builder::new()
            .prefix("berth-rt-")
            .tempdir()
            .unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        let key = PrivateKey::generate().unwrap();
        let site = Site {
            folder,
            key,
            node: "[node.slurm]\nclient = false\n".into(),
        };
        fs::create_dir(site.store()).unwrap();
        fs::write(site.store().join(layout::FORMAT), "berth-store 1\n").unwrap();
        fs::write(site.path("site.pub"), site.key.public().to_pem().unwrap()).unwrap();
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn store(&self) -> PathBuf {
        self.path("store")
    }

    pub fn config(&self) -> PathBuf {
        let path = self.path("berth.toml");
        let root = self.folder.path().display();
        let node = &self.node;
        let text = format!(
            "[store]\npath = '{root}/store'\n[api]\nsocket = '{root}/no.sock'\n[node]\nkeys = ['{root}/site.pub']\n\
             run_dir = '{root}/run'\nwait_s = 60\n{node}"
        );
        // Who has read it sees by its times whether it is another.
        if fs::read_to_string(&path).ok().as_ref() != Some(&text) {
            fs::write(&path, text).unwrap();
        }
        path
    }

    /// Publishes `tree` as [`REFERENCE`].
    pub fn publish(&self, tree: &Tree) -> Record {
        self.publish_with(tree, |_| {}, &self.key)
    }

    /// The same, after `change` had its way with the record, signed by `key`.
    pub fn publish_with(
        &self,
        tree: &Tree,
        change: impl FnOnce(&mut Record),
        key: &PrivateKey,
    ) -> Record {
        let image = self.path("image.tmp");
        let made = Command::new("mksquashfs")
            .args([tree.path(), image.as_path()])
            .args(["-quiet", "-no-progress", "-noappend", "-processors", "1"])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let mut file = File::options().append(true).open(&image).unwrap();
        let squashfs_size = file.metadata().unwrap().len();
        let hash_offset = squashfs_size.next_multiple_of(4096);
        let size = hash_offset + 8192;
        file.write_all(&vec![0; (size - squashfs_size) as usize])
            .unwrap();
        let content = fs::read(&image).unwrap();
        let manifest = Digest::of(&content);
        let mut record = Record {
            manifest,
            platform: Platform::host(),
            config: Digest::of(b"config"),
            layers: vec![],
            file: DataFile {
                size,
                squashfs_size,
                hash_offset,
                verity_root: *Digest::of(&[content.as_slice(), b"root"].concat()).as_bytes(),
                verity_salt: [0; 32],
            },
            run: RunConfig {
                env: vec![
                    "PATH=/opt/tools:/usr/bin:/bin".into(),
                    "OF_IMAGE=yes".into(),
                ],
                working_dir: Some("/opt".into()),
                ..RunConfig::default()
            },
            conversion: Conversion {
                version: "0".into(),
                compression: "gzip".into(),
                level: 1,
                block_size: 131_072,
                ownership: "readable".into(),
                keep_setid: false,
                keep_xattrs: vec![],
                entries: 1,
                notes: vec![],
            },
            admission: Admission {
                rule: "test".into(),
                reasons: vec![],
            },
            serial: 1,
            signed_at: jiff::Timestamp::UNIX_EPOCH,
        };
        change(&mut record);
        let dir = self
            .store()
            .join(layout::image_dir(&manifest, &Platform::host()));
        fs::create_dir_all(&dir).unwrap();
        fs::rename(&image, dir.join(record.file.name())).unwrap();
        fs::write(dir.join(layout::RECORD), record.seal(key).unwrap()).unwrap();
        let reference = ImageRef::parse(REFERENCE, None).unwrap();
        let entry = RefEntry {
            reference: reference.clone(),
            top: manifest,
            manifests: [(Platform::host(), manifest)].into(),
            serial: 1,
            resolved_at: jiff::Timestamp::UNIX_EPOCH,
        };
        let path = self.store().join(layout::ref_entry(&reference));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, entry.seal(key).unwrap()).unwrap();
        record
    }

    pub fn data_file(&self, record: &Record) -> PathBuf {
        let dir = layout::image_dir(&record.manifest, &record.platform);
        self.store().join(dir).join(record.file.name())
    }

    /// A folder of the user's.
    pub fn users_folder(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(UID), Some(GID)).unwrap();
        path
    }

    /// Loop devices that serve a file of this site's.
    pub fn loops(&self) -> Vec<String> {
        let folder = self.folder.path().to_str().unwrap().to_owned();
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
            if backing.is_ok_and(|b| b.starts_with(&folder)) {
                found.push(entry.file_name().into_string().unwrap());
            }
        }
        found
    }

    /// Waits until no loop device of this site's is left.
    pub fn wait_clean(&self) {
        wait_for("loop devices to go", || self.loops().is_empty());
    }
}

/// A small image: a shell and a few tools of this machine's, with the usual links.
pub struct Tree(tempfile::TempDir);

const TOOLS: [&str; 14] = [
    "dash", "cat", "ls", "id", "stat", "touch", "readlink", "mkdir", "env", "pwd", "sleep", "true",
    "head", "rm",
];

impl Tree {
    pub fn new() -> Tree {
        let tree = Tree::without_mount_points();
        for name in [
            "proc",
            "sys",
            "dev",
            "tmp",
            "home",
            "root",
            "run",
            "srv/empty",
        ] {
            fs::create_dir_all(tree.at(name)).unwrap();
        }
        tree
    }

    /// The same, without `/proc`, `/sys`, `/dev`, `/tmp`, `/home`.
    pub fn without_mount_points() -> Tree {
        let tree = Tree(tempfile::tempdir().unwrap());
        for name in ["usr/bin", "usr/lib", "usr/lib64", "etc", "opt/tools", "var"] {
            fs::create_dir_all(tree.at(name)).unwrap();
        }
        for name in ["bin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), tree.at(name)).unwrap();
        }
        for tool in TOOLS {
            let from = Path::new("/usr/bin").join(tool);
            fs::copy(&from, tree.at("usr/bin").join(tool)).unwrap();
            let ldd = Command::new("ldd").arg(&from).output().unwrap();
            for word in String::from_utf8(ldd.stdout).unwrap().split_whitespace() {
                if word.starts_with('/') && word != from.to_str().unwrap() {
                    let to = tree.0.path().join(word.trim_start_matches('/'));
                    fs::create_dir_all(to.parent().unwrap()).unwrap();
                    if !to.exists() {
                        fs::copy(word, &to).unwrap();
                    }
                }
            }
        }
        symlink("dash", tree.at("usr/bin/sh")).unwrap();
        fs::write(tree.at("etc/os-release"), "NAME=\"the image\"\n").unwrap();
        fs::write(tree.at("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        fs::write(tree.at("etc/group"), "root:x:0:\n").unwrap();
        fs::set_permissions(tree.path(), Permissions::from_mode(0o755)).unwrap();
        tree
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// A running helper of a step, and the plugin's end of its socket.
pub struct Step {
    /// `berth-runtime step`, where it was started for this step alone.
    pub helper: Option<Child>,
    parent: Option<OwnedFd>,
}

/// A running `berth-runtime standby`.
pub struct Standby {
    pub process: Child,
    socket: PathBuf,
}

impl Standby {
    /// Starts it and waits until it takes steps.
    pub fn start(site: &Site) -> Standby {
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth-runtime"));
        command
            .args(["standby", "--config"])
            .arg(site.config())
            .env_clear();
        let process = command.stdin(Stdio::null()).spawn().unwrap();
        let name = concat!("step-", env!("CARGO_PKG_VERSION"), ".sock");
        let socket = site.path("run").join(name);
        wait_for("the standby to listen", || socket.exists());
        Standby { process, socket }
    }

    /// As the plugin connects; without an answer where nobody listens.
    pub fn connect(&self) -> rustix::io::Result<OwnedFd> {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let address = rustix::net::SocketAddrUnix::new(&self.socket)?;
        rustix::net::connect(&socket, &address)?;
        Ok(socket)
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a task was told.
#[derive(Debug)]
pub enum Answer {
    Ready {
        namespace: OwnedFd,
        cwd: PathBuf,
        env: Vec<String>,
    },
    Refused {
        code: u8,
        text: String,
    },
    /// The helper went away without an answer.
    Nothing,
}

/// A task's end of its own socket.
pub struct Waiting(OwnedFd);

/// What the plugin says of a step; `fields` are added to the usual ones.
fn job_message(site: &Site, uid: u32, gid: u32, fields: &[(&str, &OsStr)]) -> Vec<u8> {
    let mut job = vec![
        ("config", site.config().into_os_string()),
        ("uid", uid.to_string().into()),
        ("gid", gid.to_string().into()),
        ("groups", gid.to_string().into()),
        ("jobid", "7".into()),
        ("stepid", "0".into()),
        ("nodename", "n1".into()),
    ];
    if !fields.iter().any(|(k, _)| *k == "reference") {
        job.push(("reference", REFERENCE.into()));
    }
    let fields = fields.iter().map(|(k, v)| (*k, v.to_os_string()));
    let mut body = vec![b'J'];
    for (key, value) in job.into_iter().chain(fields) {
        body.extend([key.as_bytes(), b"=", value.as_bytes(), b"\0"].concat());
    }
    body
}

impl Step {
    /// Starts the helper and sends it the job; `fields` are added to the usual ones.
    pub fn start(site: &Site, fields: &[(&str, &OsStr)]) -> Step {
        Step::start_as(site, UID, GID, fields)
    }

    pub fn start_as(site: &Site, uid: u32, gid: u32, fields: &[(&str, &OsStr)]) -> Step {
        let (ours, theirs) = pair();
        let fd = theirs.as_raw_fd();
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth-runtime"));
        command.arg("step").env_clear().env("PATH", "/usr/bin:/bin");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: only dup2, which may be called between fork and exec.
        unsafe {
            command.pre_exec(move || match libc::dup2(fd, 3) {
                3 if fd != 3 => Ok(()),
                3 if libc::fcntl(3, libc::F_SETFD, 0) == 0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let helper = command.spawn().unwrap();
        send(&ours, &job_message(site, uid, gid, fields), &[]);
        Step {
            helper: Some(helper),
            parent: Some(ours),
        }
    }

    /// Has the one that is on standby serve the step, with tasks in `namespace`.
    pub fn by(standby: &Standby, site: &Site, namespace: &File) -> Step {
        let ours = standby.connect().unwrap();
        send(&ours, b"S", &[namespace.as_fd()]);
        send(&ours, &job_message(site, UID, GID, &[]), &[]);
        Step {
            helper: None,
            parent: Some(ours),
        }
    }

    /// The same for a step of this kind, by its number, for a user who is also the only one of their group.
    pub fn of_kind(
        standby: &Standby,
        site: &Site,
        kind: u64,
        user: u32,
        fields: &[(&str, &OsStr)],
    ) -> Step {
        let ours = standby.connect().unwrap();
        let namespace = File::open("/proc/self/ns/mnt").unwrap();
        send(
            &ours,
            format!("S{kind:016x}").as_bytes(),
            &[namespace.as_fd()],
        );
        send(&ours, &job_message(site, user, user, fields), &[]);
        Step {
            helper: None,
            parent: Some(ours),
        }
    }

    /// A task asks, from this process's mount namespace.
    pub fn ask(&self, task: u32, cwd: &str) -> Waiting {
        self.ask_from(&File::open("/proc/self/ns/mnt").unwrap(), task, cwd)
    }

    pub fn ask_from(&self, namespace: &File, task: u32, cwd: &str) -> Waiting {
        let (ours, theirs) = pair();
        let body = format!("Ttask={task}\0procid={task}\0cwd={cwd}");
        let parent = self.parent.as_ref().unwrap();
        send(
            parent,
            body.as_bytes(),
            &[theirs.as_fd(), namespace.as_fd()],
        );
        Waiting(ours)
    }

    /// Runs a shell script in a task of its own.
    pub fn run(&self, script: &str) -> Output {
        self.run_at("/", script)
    }

    pub fn run_at(&self, cwd: &str, script: &str) -> Output {
        match self.ask(0, cwd).answer() {
            Answer::Ready {
                namespace,
                cwd,
                env,
            } => task(&namespace, &cwd, &env)
                .args(["/bin/sh", "-c", script])
                .output()
                .unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Closes the plugin's end and waits for the helper's.
    pub fn end(mut self) {
        self.parent = None;
        let mut helper = self.helper.take().unwrap();
        let mut ended = None;
        wait_for("the helper to end", || {
            ended = helper.try_wait().unwrap();
            ended.is_some()
        });
        assert!(ended.unwrap().success(), "{ended:?}");
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(helper) = &mut self.helper {
            let _ = helper.kill();
            let _ = helper.wait();
        }
    }
}

impl Waiting {
    pub fn answer(self) -> Answer {
        let mut whole = Vec::new();
        loop {
            let timeout = Timespec {
                tv_sec: 90,
                tv_nsec: 0,
            };
            let ready = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)).unwrap();
            assert_eq!(ready, 1, "no answer");
            let Some((bytes, fds)) = receive(&self.0) else {
                return Answer::Nothing;
            };
            match bytes[0] {
                b'P' => continue,
                b'r' | b'e' => whole.extend_from_slice(&bytes[1..]),
                tag => {
                    whole.extend_from_slice(&bytes[1..]);
                    return Answer::read(tag, &whole, fds);
                }
            }
        }
    }

    /// The refusal, which must be one.
    pub fn refusal(self) -> (u8, String) {
        match self.answer() {
            Answer::Refused { code, text } => (code, text),
            other => panic!("{other:?}"),
        }
    }
}

impl Answer {
    fn read(tag: u8, body: &[u8], fds: Vec<OwnedFd>) -> Answer {
        let text = String::from_utf8_lossy(body);
        let all = |key: &str| {
            let fields = text.split('\0').filter_map(|f| f.split_once('='));
            fields
                .filter(|(k, _)| *k == key)
                .map(|(_, v)| v.to_owned())
                .collect::<Vec<_>>()
        };
        match tag {
            b'R' => Answer::Ready {
                namespace: fds.into_iter().next().unwrap(),
                cwd: all("cwd").remove(0).into(),
                env: all("env"),
            },
            b'E' => Answer::Refused {
                code: all("code")[0].parse().unwrap(),
                text: all("text").remove(0),
            },
            other => panic!("tag {}", char::from(other)),
        }
    }
}

/// `env -i VARIABLES…` in the namespace, as the user, without privileges; add the command as arguments.
pub fn task(namespace: &OwnedFd, cwd: &Path, env: &[String]) -> Command {
    let namespace = namespace.try_clone().unwrap();
    let cwd = cwd.as_os_str().as_bytes().to_vec();
    let mut command = Command::new("/usr/bin/env");
    command.arg("-i").args(env).env_clear();
    // SAFETY: system calls alone, in the order of the plugin's.
    unsafe {
        command.pre_exec(move || {
            let ok = |result: i32| match result {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            };
            ok(libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS))?;
            let group = GID;
            ok(libc::setgroups(1, &raw const group))?;
            ok(libc::setresgid(GID, GID, GID))?;
            ok(libc::setresuid(UID, UID, UID))?;
            ok(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            let mut path = [0u8; 4096];
            path[..cwd.len()].copy_from_slice(&cwd);
            ok(libc::chdir(path.as_ptr().cast()))
        });
    }
    command
}

/// What a command wrote, and that it succeeded.
pub fn text(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {error}", output.status);
    String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned()
}

/// Waits for something that has no event of its own, with a bound.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn send(to: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(
        to,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .unwrap();
}

fn receive(from: &OwnedFd) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; 1 << 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(
        from,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        flags,
    )
    .ok()?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            fds.extend(more);
        }
    }
    bytes.truncate(got.bytes);
    (got.bytes > 0).then_some((bytes, fds))
}

/// A mount namespace made by running `script` in a new one; it lives as long as the value.
pub struct Namespace(Child);

impl Namespace {
    pub fn new(script: &str) -> Namespace {
        let mut child = Command::new("unshare")
            .args([
                "-m",
                "/bin/sh",
                "-ec",
                &format!("{script}\necho ready\nexec sleep 600"),
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0u8; 6];
        use std::io::Read;
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut line)
            .unwrap();
        Namespace(child)
    }

    pub fn file(&self) -> File {
        File::open(format!("/proc/{}/ns/mnt", self.0.id())).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
