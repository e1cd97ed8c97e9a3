//! The node service as its clients see it: `berth-node` keeps mounts between jobs and serves images on demand.
//!
//! One connection is one request and one answer (JSON, [`Request`] and [`Answer`]), with descriptors beside them. Who
//! asks is known by the socket's peer credentials: mounts are given to root alone, who has verified the image's record
//! and the user's right to it. A connection over which a mount was given counts as the mount's use until it is closed;
//! nothing is lost when it is closed early, only the idle time begins.
//!
//! It listens at two sockets: users connect to the configured one, root to [`root_socket`] beside it, where no user can
//! stand in the way.
//!
//! Nobody needs the service: whoever finds it [absent](KeeperError::Absent) mounts by itself.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::packets::{Packet, Packets};

/// Both sides speak this version, or not with each other.
pub const VERSION: u32 = 1;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Request {
    /// A mount of an image, for root. Descriptor: the image's file, where the node has it.
    Mount(MountRequest),
    /// The same, attached to a folder that the request's user can enter, for root.
    Attach(MountRequest),
    /// A folder with an image's files, for those who may read it.
    Path {
        /// The image manifest's, `sha256:…`.
        digest: String,
        /// As `linux/amd64`.
        platform: String,
    },
    /// What is mounted; for root.
    Status,
    /// Counters in the Prometheus text format; for root.
    Metrics,
    /// Let go of every mount that is idle, and keep none from now on until the service starts anew; for root.
    Drain,
}

/// Which image, and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    /// The image manifest's, `sha256:…`: for people.
    pub digest: String,
    /// As `linux/amd64`: for people.
    pub platform: String,
    /// From the verified record, 64 hexadecimal digits: what the image is.
    pub verity_root: String,
    /// Bytes of the SquashFS part; the hash tree follows.
    pub hash_offset: u64,
    /// Bytes of the whole file.
    pub file_size: u64,
    /// By whom it is to be served.
    pub mode: Mode,
    /// For people: which job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// The user it is for.
    pub uid: u32,
    /// Where the image's bytes can be fetched, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<Source>,
}

/// A place to fetch an image's bytes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// `http://HOST:PORT/…`, or `SOCKET:/PATH` with the path of a Unix socket.
    pub at: String,
    /// What lets its bearer read there. Without one it is not asked until a later request brings one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant: Option<String>,
    /// Until when it does, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
}

/// By whom an image is to be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// By the kernel's driver if there is a file, or a copy of the node's own, else on demand.
    Auto,
    /// By the kernel's driver.
    Kernel,
    /// On demand, through FUSE, whatever is at hand.
    Lazy,
}

/// How an image came to be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// The kernel's SquashFS driver on the image's file.
    Kernel,
    /// The kernel's SquashFS driver on the node's whole and verified copy.
    Cache,
    /// Berth's own reader, on demand.
    Lazy,
}

/// A mount.
#[derive(Debug)]
pub struct Given {
    /// Detached, `ro,nosuid,nodev`, the caller's own.
    pub tree: OwnedFd,
    /// Who serves it.
    pub how: How,
    /// Whether it was there already.
    pub kept: bool,
    /// Keep this as long as the mount is used.
    pub lease: OwnedFd,
}

/// What the service says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "lowercase")]
pub enum Answer {
    /// Descriptor: the mount.
    Mounted {
        /// Who serves it.
        how: How,
        /// Whether it was there already.
        kept: bool,
    },
    /// A folder with the image's files.
    At {
        /// Of the node's mount namespace.
        path: PathBuf,
    },
    /// To [`Request::Status`].
    Status(Status),
    /// Text for people or for a collector.
    Text {
        /// Of any length that fits a packet.
        text: String,
    },
    /// Done.
    Done,
    /// It was not done.
    Refused {
        /// Which exit code a program that gives up should end with.
        code: u8,
        /// One line.
        why: String,
        /// One line on what to do, where there is something.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

/// What the service holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The service's own version.
    pub version: String,
    /// No mounts are kept any more.
    pub draining: bool,
    /// The process that serves on demand, where one runs.
    #[serde(default)]
    pub server: Option<u32>,
    /// Each mount.
    pub mounts: Vec<MountStatus>,
    /// Whole images on this node.
    #[serde(default)]
    pub copies: Copies,
}

/// Images that are whole on this node, verified and owned by root ([`How::Cache`]).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copies {
    /// How many may be mounted.
    pub count: usize,
    /// Bytes of all of them, and of those that have to be verified again first.
    pub bytes: u64,
    /// Most bytes; 0 as long as there never was one.
    pub limit: u64,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MountStatus {
    /// The image manifest's, `sha256:…`.
    pub digest: String,
    /// As `linux/amd64`.
    pub platform: String,
    /// Who serves it.
    pub how: How,
    /// Steps and folders that use it.
    pub users: usize,
    /// Seconds without use; 0 while it is used.
    pub idle_s: u64,
    /// How often it was given out.
    pub given: u64,
    /// Bytes that its server brought to this node, ahead of readers or for them; none where the kernel serves a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetched: Option<u64>,
    /// Where it is attached, for those who asked.
    #[serde(default)]
    pub paths: Vec<PathBuf>,
}

/// Why there is no answer, or not the one asked for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeeperError {
    /// No service runs, or one of another version.
    #[error("no node service answers at {}: {why}", socket.display())]
    Absent {
        /// Where it was looked for.
        socket: PathBuf,
        /// What was found instead.
        why: String,
    },
    /// It did not answer in time.
    #[error("the node service did not answer in time")]
    Slow,
    /// It refused, or failed.
    #[error("{why}")]
    Refused {
        /// An exit code.
        code: u8,
        /// One line.
        why: String,
        /// One line.
        hint: Option<String>,
    },
}

/// A request on its way, with the version in front.
#[derive(Debug, Serialize, Deserialize)]
struct Versioned<T> {
    v: u32,
    #[serde(flatten)]
    body: T,
}

/// A mount of an image from the service at `socket`. `image` is the file, opened by someone who may read it.
///
/// # Errors
/// See [`KeeperError`]; on [`KeeperError::Absent`] and [`KeeperError::Slow`] mount without the service.
pub fn mount(
    socket: &Path,
    request: &MountRequest,
    image: Option<BorrowedFd<'_>>,
    deadline: Instant,
) -> Result<Given, KeeperError> {
    let asked = Request::Mount(request.clone());
    let (answer, mut descriptors, lease) = exchange(socket, &asked, image, deadline)?;
    match (answer, descriptors.pop()) {
        (Answer::Mounted { how, kept }, Some(tree)) => Ok(Given {
            tree,
            how,
            kept,
            lease: lease.into(),
        }),
        (other, _) => Err(unfit(socket, other)),
    }
}

/// Asks anything else.
///
/// # Errors
/// See [`KeeperError`].
pub fn ask(
    socket: &Path,
    request: &Request,
    image: Option<BorrowedFd<'_>>,
    deadline: Instant,
) -> Result<Answer, KeeperError> {
    match exchange(socket, request, image, deadline)? {
        (refused @ Answer::Refused { .. }, ..) => Err(unfit(socket, refused)),
        (answer, ..) => Ok(answer),
    }
}

/// Root's own way to the service at `socket`, beside it: `node.sock.root`.
pub fn root_socket(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".root");
    name.into()
}

/// Root goes by its own socket, unless it is root of a user namespace only.
fn connect(socket: &Path, deadline: Instant) -> io::Result<Packets> {
    if rustix::process::geteuid().is_root() {
        match Packets::connect(&root_socket(socket), deadline) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            other => return other,
        }
    }
    Packets::connect(socket, deadline)
}

fn exchange(
    socket: &Path,
    request: &Request,
    image: Option<BorrowedFd<'_>>,
    deadline: Instant,
) -> Result<(Answer, Vec<OwnedFd>, Packets), KeeperError> {
    let absent = |why: String| KeeperError::Absent {
        socket: socket.to_owned(),
        why,
    };
    let of_io = |error: io::Error| match error.kind() {
        io::ErrorKind::TimedOut => KeeperError::Slow,
        _ => absent(plain(&error)),
    };
    let packets = connect(socket, deadline).map_err(of_io)?;
    let bytes = encode(request).map_err(of_io)?;
    let descriptors = image.as_slice();
    packets.send(&bytes, descriptors, deadline).map_err(of_io)?;
    let packet = packets.receive(Some(deadline)).map_err(of_io)?;
    let Packet { bytes, descriptors } = packet.ok_or_else(|| absent("it hung up".into()))?;
    let answer = decode(&bytes).map_err(|why| absent(why.to_owned()))?;
    Ok((answer, descriptors, packets))
}

/// The system's words without its number.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_lowercase(),
        None => text,
    }
}

/// An answer that is not the one asked for.
fn unfit(socket: &Path, answer: Answer) -> KeeperError {
    match answer {
        Answer::Refused { code, why, hint } => KeeperError::Refused { code, why, hint },
        _ => KeeperError::Absent {
            socket: socket.to_owned(),
            why: "it speaks another language".into(),
        },
    }
}

/// A request or answer as a packet's bytes.
///
/// # Errors
/// When it does not fit one.
pub fn encode<T: Serialize>(body: &T) -> io::Result<Vec<u8>> {
    let bytes = serde_json::to_vec(&Versioned { v: VERSION, body })?;
    match bytes.len() <= crate::packets::PACKET {
        true => Ok(bytes),
        false => Err(io::Error::other("a message that is too long")),
    }
}

/// The other end of [`encode`].
///
/// # Errors
/// What is wrong with the bytes, in words.
pub fn decode<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, &'static str> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    match serde_json::from_slice(bytes) {
        Ok(Version { v: VERSION }) => {}
        Ok(_) => return Err("it is of another version"),
        Err(_) => return Err("it speaks another language"),
    }
    match serde_json::from_slice(bytes) {
        Ok(Versioned { body, .. }) => Ok(body),
        Err(_) => Err("a message that makes no sense"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn request() -> MountRequest {
        MountRequest {
            digest: "sha256:00".into(),
            platform: "linux/amd64".into(),
            verity_root: "ab".repeat(32),
            hash_offset: 4096,
            file_size: 8192,
            mode: Mode::Kernel,
            job: Some("7".into()),
            uid: 1000,
            sources: Vec::new(),
        }
    }

    #[test]
    fn messages_come_back_as_they_were() {
        for request in [
            Request::Mount(request()),
            Request::Status,
            Request::Path {
                digest: "sha256:00".into(),
                platform: "linux/amd64".into(),
            },
        ] {
            assert_eq!(decode(&encode(&request).unwrap()), Ok(request));
        }
        let answer = Answer::Status(Status::default());
        assert_eq!(decode(&encode(&answer).unwrap()), Ok(answer));
    }

    #[test]
    fn another_version_and_foul_bytes_are_told_apart_from_an_answer() {
        let of = |text: &str| decode::<Request>(text.as_bytes()).unwrap_err();
        assert_eq!(of(r#"{"v":2,"do":"status"}"#), "it is of another version");
        assert_eq!(
            of(r#"{"v":1,"do":"explode"}"#),
            "a message that makes no sense"
        );
        assert_eq!(of("\0"), "it speaks another language");
    }

    #[test]
    fn without_a_service_the_caller_is_told_to_mount_alone() {
        let dir = tempfile::tempdir().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let error = mount(&dir.path().join("no"), &request(), None, deadline).unwrap_err();
        assert!(matches!(error, KeeperError::Absent { .. }), "{error}");
    }
}
