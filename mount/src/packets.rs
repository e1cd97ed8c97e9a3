//! Packets with descriptors over a Unix socket that keeps their bounds (`SOCK_SEQPACKET`): how the node service, its
//! clients and its server speak.
//!
//! A packet is read whole or refused. Every wait has a deadline.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, recvmsg, sendmsg, socket_with, socketpair,
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

    /// Connects to who listens at `path`.
    ///
    /// # Errors
    /// The system's; `WouldBlock` when too many others wait there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self(socket))
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
        let mut bytes = vec![0; PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
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
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        poll_once(&self.0, what, Some(&timeout))
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
