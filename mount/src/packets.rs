//! Packets with descriptors over a Unix socket that keeps their bounds (`SOCK_SEQPACKET`): how the node service, its
//! clients and its server speak.
//!
//! A packet is read whole or refused. Every wait has a deadline. Descriptors of whoever is not trusted are never taken
//! ([`Packets::receive_bytes`]): closing one may wait for ever for its filesystem, which could be the sender's own.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, recvmsg, sendmsg, socket_with, socketpair, sockopt,
};

/// Largest packet, in bytes.
pub const PACKET: usize = 64 << 10;
/// Most descriptors in one packet; more are closed by the kernel.
pub const DESCRIPTORS: usize = 4;

/// One end of a packet socket.
#[derive(Debug)]
pub struct Packets(OwnedFd);

/// What one packet brought.
#[derive(Debug)]
pub struct Packet {
    /// At least one byte.
    pub bytes: Vec<u8>,
    /// Closed when others exec.
    pub descriptors: Vec<OwnedFd>,
}

impl Packets {
    /// Speaks over a socket that is there.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Two connected ends.
    ///
    /// # Errors
    /// The system's.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, two) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(one), Self(two)))
    }

    /// Connects to who listens at `path`; while too many others wait there, waits with them until `deadline`.
    ///
    /// # Errors
    /// The system's; `TimedOut`.
    pub fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        // Blocking, for the kernel's own queue of who waits; nothing else here is.
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let address = SocketAddrUnix::new(path)?;
        loop {
            let left = time_left(deadline)?;
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(left))?;
            match connect(&socket, &address) {
                Ok(()) => return Ok(Self(socket)),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Sends one packet, whole, and waits for room until `deadline`.
    ///
    /// # Errors
    /// The system's; `TimedOut`.
    pub fn send(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::other("too many descriptors for one packet"));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The next packet, waited for until `deadline`, or without end; `None` when the other end is closed.
    ///
    /// # Errors
    /// The system's; `TimedOut`; a packet longer than agreed.
    pub fn receive(&self, deadline: Option<Instant>) -> io::Result<Option<Packet>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        self.receive_into(RecvAncillaryBuffer::new(&mut space), deadline)
    }

    /// The same from whoever need not be trusted: descriptors never become this process's.
    ///
    /// # Errors
    /// Those of [`receive`](Self::receive); a packet with descriptors.
    pub fn receive_bytes(&self, deadline: Option<Instant>) -> io::Result<Option<Vec<u8>>> {
        let packet = self.receive_into(RecvAncillaryBuffer::default(), deadline)?;
        Ok(packet.map(|packet| packet.bytes))
    }

    fn receive_into(
        &self,
        mut control: RecvAncillaryBuffer<'_>,
        deadline: Option<Instant>,
    ) -> io::Result<Option<Packet>> {
        let mut bytes = vec![0; PACKET];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = loop {
            let parts = &mut [IoSliceMut::new(&mut bytes)];
            match (recvmsg(&self.0, parts, &mut control, flags), deadline) {
                (Err(Errno::INTR), _) => {}
                (Err(Errno::AGAIN), Some(deadline)) => self.wait(PollFlags::IN, deadline)?,
                (Err(Errno::AGAIN), None) => poll_once(&self.0, PollFlags::IN, None)?,
                (Err(Errno::CONNRESET), _) => return Ok(None),
                (other, _) => break other?,
            }
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                descriptors.extend(fds);
            }
        }
        // A packet of no bytes and the end of the stream look alike; nobody here sends empty packets.
        if got.bytes == 0 {
            return Ok(None);
        }
        if got
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::other("a packet longer than agreed"));
        }
        bytes.truncate(got.bytes);
        Ok(Some(Packet { bytes, descriptors }))
    }

    fn wait(&self, what: PollFlags, deadline: Instant) -> io::Result<()> {
        let timeout = Timespec::try_from(time_left(deadline)?).map_err(io::Error::other)?;
        poll_once(&self.0, what, Some(&timeout))
    }
}

fn time_left(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

fn poll_once(socket: &OwnedFd, what: PollFlags, timeout: Option<&Timespec>) -> io::Result<()> {
    match poll(&mut [PollFd::new(socket, what)], timeout) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Packets> for OwnedFd {
    fn from(packets: Packets) -> OwnedFd {
        packets.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{bind, listen};

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn descriptors_of_who_is_not_trusted_stay_with_the_kernel() {
        let (ours, theirs) = Packets::pair().unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        theirs.send(b"x", &[write.as_fd()], soon()).unwrap();
        drop(write);
        ours.receive_bytes(Some(soon())).unwrap_err();
        // Nobody has the writing end: the end of the file.
        assert_eq!(rustix::io::read(&read, &mut [0]), Ok(0));
        theirs.send(b"y", &[], soon()).unwrap();
        let got = ours.receive_bytes(Some(soon())).unwrap();
        assert_eq!(got.as_deref(), Some(&b"y"[..]));
    }

    #[test]
    fn a_full_queue_is_waited_at_until_the_deadline_or_a_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let flags = SocketFlags::CLOEXEC;
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 0).unwrap();
        let first = Packets::connect(&path, soon()).unwrap();
        let late = Packets::connect(&path, Instant::now() + Duration::from_millis(20));
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| Packets::connect(&path, soon()));
            rustix::net::accept(&listener).unwrap();
            waits.join().unwrap().unwrap();
        });
        drop(first);
    }
}
