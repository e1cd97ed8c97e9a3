//! What the plugin and this program say to each other: a tag byte, then `key=value` fields separated by NUL.
//!
//! A body longer than a packet is cut anywhere; all parts but the last carry the tag in lower case. Lengths come from
//! the socket, never from the text. Everything in a job is what a user may have chosen, but for its identity.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::channel::{Channel, PACKET};
use crate::user::User;

/// Longest message, all parts together, in bytes.
const LONGEST: usize = 1 << 20;

/// Why a message makes no sense. That is a fault of the plugin's, or of versions that do not belong together.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum WireError {
    #[error("a message of kind {0:?} where none belongs")]
    Unexpected(char),
    #[error("a message longer than 1 MiB")]
    Long,
    #[error("the field `{0}` is missing")]
    Missing(&'static str),
    #[error("the field `{0}` is malformed")]
    Malformed(&'static str),
}

/// Puts cut messages together.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    body: Vec<u8>,
}

impl Assembler {
    /// The whole body when `packet` is the last part of a message with `tag` (upper case).
    pub(crate) fn push(&mut self, tag: u8, packet: &[u8]) -> Result<Option<Vec<u8>>, WireError> {
        let (first, rest) = packet.split_first().ok_or(WireError::Unexpected(' '))?;
        if first.to_ascii_uppercase() != tag {
            return Err(WireError::Unexpected(char::from(*first)));
        }
        if self.body.len() + rest.len() > LONGEST {
            return Err(WireError::Long);
        }
        self.body.extend_from_slice(rest);
        Ok((*first == tag).then(|| std::mem::take(&mut self.body)))
    }
}

/// The fields of a body.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    /// Every value of `key`, in order.
    pub(crate) fn all(self, key: &'static str) -> impl Iterator<Item = &'a [u8]> {
        self.0.split(|b| *b == 0).filter_map(move |field| {
            let value = field.strip_prefix(key.as_bytes())?;
            value.strip_prefix(b"=")
        })
    }

    /// The first value of `key` that is not empty.
    pub(crate) fn get(self, key: &'static str) -> Option<&'a [u8]> {
        self.all(key).find(|v| !v.is_empty())
    }

    pub(crate) fn path(self, key: &'static str) -> Option<PathBuf> {
        self.get(key).map(|v| PathBuf::from(OsStr::from_bytes(v)))
    }

    pub(crate) fn number<N: std::str::FromStr>(self, key: &'static str) -> Result<N, WireError> {
        let text = self.get(key).ok_or(WireError::Missing(key))?;
        parse(text).ok_or(WireError::Malformed(key))
    }
}

fn parse<N: std::str::FromStr>(text: &[u8]) -> Option<N> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A step of a job that wants a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) config: PathBuf,
    /// Slurm's own file, where slurmd says which.
    pub(crate) slurm_conf: Option<PathBuf>,
    pub(crate) user: User,
    pub(crate) job: u32,
    pub(crate) cluster: Option<String>,
    /// When it ends, in seconds since 1970, where Slurm says so (since 23.02): the user's to change, as all variables.
    pub(crate) end: Option<u64>,
    /// As the user typed it.
    pub(crate) reference: String,
    /// `REFERENCE=DIGEST,…`, from the submission.
    pub(crate) pins: String,
    pub(crate) mounts: Vec<OsString>,
    pub(crate) workdir: Option<PathBuf>,
    pub(crate) writable: bool,
    /// The user's folder, as the job's environment has it: a guess, the user's to make.
    pub(crate) home: Option<PathBuf>,
    /// Where the tasks will be, as the job's environment has it: a guess, the user's to make.
    pub(crate) cwd: Option<PathBuf>,
    pub(crate) script: Option<PathBuf>,
    /// The first word of the step's command: a hint.
    pub(crate) command: Option<PathBuf>,
    pub(crate) prologs: Vec<PathBuf>,
}

impl Job {
    /// Whether the other step is to be served as this one was: the same user, image, mounts and places, maybe in another
    /// job.
    pub(crate) fn is_like(&self, other: &Job) -> bool {
        let kind = |job: &Job| Job {
            job: 0,
            end: None,
            command: None,
            ..job.clone()
        };
        kind(self) == kind(other)
    }

    pub(crate) fn parse(body: &[u8]) -> Result<Job, WireError> {
        let fields = Fields(body);
        let text = |key| {
            fields
                .get(key)
                .map(|v| String::from_utf8_lossy(v).into_owned())
        };
        let mut groups = Vec::new();
        for group in fields
            .get("groups")
            .unwrap_or_default()
            .split(|b| *b == b',')
        {
            if !group.is_empty() {
                groups.push(parse(group).ok_or(WireError::Malformed("groups"))?);
            }
        }
        Ok(Job {
            config: fields.path("config").ok_or(WireError::Missing("config"))?,
            slurm_conf: fields.path("slurm_conf"),
            user: User {
                uid: fields.number("uid")?,
                gid: fields.number("gid")?,
                groups,
            },
            job: fields.number("jobid")?,
            cluster: text("cluster"),
            end: fields.number("end").ok(),
            reference: text("reference").ok_or(WireError::Missing("reference"))?,
            pins: text("pins").unwrap_or_default(),
            mounts: fields
                .all("mount")
                .filter(|m| !m.is_empty())
                .map(|m| OsString::from_vec(m.to_vec()))
                .collect(),
            workdir: fields.path("workdir"),
            writable: fields.get("writable") == Some(b"1"),
            home: fields.path("home").filter(|home| home.is_absolute()),
            cwd: fields.path("cwd"),
            script: fields.path("script"),
            command: fields.path("command"),
            prologs: fields
                .all("prolog")
                .filter(|p| !p.is_empty())
                .map(|p| PathBuf::from(OsStr::from_bytes(p)))
                .collect(),
        })
    }
}

/// The body of an answer, field by field.
#[derive(Debug, Default)]
pub(crate) struct Body(Vec<u8>);

impl Body {
    /// A body that came in, to be passed on.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Body {
        Body(bytes.to_vec())
    }

    pub(crate) fn field(mut self, key: &str, value: &[u8]) -> Body {
        if !self.0.is_empty() {
            self.0.push(0);
        }
        self.0.extend_from_slice(key.as_bytes());
        self.0.push(b'=');
        self.0.extend(value.iter().filter(|b| **b != 0));
        self
    }

    pub(crate) fn path(self, key: &str, value: &Path) -> Body {
        self.field(key, value.as_os_str().as_bytes())
    }

    /// Sends the body under `tag` (upper case), cut if need be; the descriptors travel with the last part. Does not
    /// wait: a peer that reads nothing loses the message.
    pub(crate) fn send(&self, to: &Channel, tag: u8, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.parts(tag, fds, |packet, fds| to.send(packet, fds))
    }

    /// The same to a peer that is sure to read.
    pub(crate) fn send_wait(
        &self,
        to: &Channel,
        tag: u8,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.parts(tag, fds, |packet, fds| to.send_wait(packet, fds))
    }

    pub(crate) fn parts(
        &self,
        tag: u8,
        fds: &[BorrowedFd<'_>],
        send: impl Fn(&[u8], &[BorrowedFd<'_>]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut parts = self.0.chunks(PACKET - 1).peekable();
        loop {
            let part = parts.next().unwrap_or_default();
            let last = parts.peek().is_none();
            let mut packet = Vec::with_capacity(part.len() + 1);
            packet.push(if last { tag } else { tag.to_ascii_lowercase() });
            packet.extend_from_slice(part);
            send(&packet, if last { fds } else { &[] })?;
            if last {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &[u8] = b"config=/c\0uid=1000\0gid=100\0groups=4,5\0jobid=7\0end=4102444800\0reference=a/b:1\0mount=/x\0mount=/y:/z\0\
        workdir=\0writable=1\0script=\0prolog=/p";

    #[test]
    fn a_job_reads_as_it_was_sent() {
        let job = Job::parse(JOB).unwrap();
        assert_eq!(
            (job.user.uid, job.user.groups, job.job),
            (1000, vec![4, 5], 7)
        );
        assert_eq!(job.end, Some(4_102_444_800));
        assert_eq!(job.mounts, ["/x", "/y:/z"]);
        assert_eq!((job.workdir, job.script), (None, None));
        assert!(job.writable);
    }

    #[test]
    fn steps_are_alike_whatever_their_job_and_command_and_by_nothing_else() {
        let job = Job::parse(JOB).unwrap();
        let other = |from: &str, to: &str| {
            let text = std::str::from_utf8(JOB).unwrap().replace(from, to);
            assert_ne!(text.as_bytes(), JOB);
            Job::parse(text.as_bytes()).unwrap()
        };
        for (from, to) in [
            ("jobid=7", "jobid=8"),
            ("end=4", "end=5"),
            ("prolog=/p", "prolog=/p\0command=x"),
        ] {
            assert!(job.is_like(&other(from, to)), "{to}");
        }
        for (from, to) in [
            ("uid=1000", "uid=1001"),
            ("gid=100", "gid=101"),
            ("groups=4,5", "groups=4"),
            ("config=/c", "config=/d"),
            ("reference=a/b:1", "reference=a/b:2"),
            ("reference=a/b:1", "reference=a/b:1\0pins=a/b:1=sha256:0"),
            ("mount=/x", "mount=/z"),
            ("workdir=", "workdir=/w"),
            ("writable=1", "writable=0"),
            ("script=", "script=/s"),
            ("prolog=/p", "prolog=/q"),
            ("prolog=/p", "prolog=/p\0cwd=/w"),
            ("prolog=/p", "prolog=/p\0home=/w"),
            ("prolog=/p", "prolog=/p\0slurm_conf=/w"),
            ("prolog=/p", "prolog=/p\0cluster=w"),
        ] {
            assert!(!job.is_like(&other(from, to)), "{to}");
        }
    }

    #[test]
    fn nonsense_is_refused_without_a_panic() {
        assert_eq!(Job::parse(b""), Err(WireError::Missing("config")));
        let bad = b"config=/c\0uid=-1\0gid=0\0jobid=1\0reference=a";
        assert_eq!(Job::parse(bad), Err(WireError::Malformed("uid")));
        let mut assembler = Assembler::default();
        assert_eq!(assembler.push(b'J', b""), Err(WireError::Unexpected(' ')));
        assert_eq!(assembler.push(b'J', b"Tx"), Err(WireError::Unexpected('T')));
        let part = [b"j".as_slice(), &vec![b'x'; 600 << 10]].concat();
        assert_eq!(assembler.push(b'J', &part), Ok(None));
        assert_eq!(assembler.push(b'J', &part), Err(WireError::Long));
    }

    #[test]
    fn a_long_body_is_cut_and_put_together() {
        let (one, two) = Channel::pair().unwrap();
        let value = vec![b'v'; PACKET + 100];
        Body::default()
            .field("env", &value)
            .send(&one, b'R', &[])
            .unwrap();
        let mut assembler = Assembler::default();
        let first = two.receive().unwrap().unwrap().bytes;
        assert_eq!(assembler.push(b'R', &first).unwrap(), None);
        let second = two.receive().unwrap().unwrap().bytes;
        let body = assembler.push(b'R', &second).unwrap().unwrap();
        assert_eq!(Fields(&body).get("env"), Some(value.as_slice()));
    }
}
