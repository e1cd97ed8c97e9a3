//! Packets with descriptors between two processes (`SOCK_SEQPACKET`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, sendmsg, socketpair,
};

/// Largest packet, in bytes.
pub(crate) const PACKET: usize = 64 << 10;
/// Most descriptors in one packet; more are closed by the kernel.
const DESCRIPTORS: usize = 4;

/// One end of a packet socket.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

/// What one packet brought.
#[derive(Debug)]
pub(crate) struct Packet {
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl Channel {
    /// Two connected ends.
    pub(crate) fn pair() -> io::Result<(Channel, Channel)> {
        let (one, two) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Channel::from_fd(one), Channel::from_fd(two)))
    }

    pub(crate) fn from_fd(socket: OwnedFd) -> Channel {
        Channel { socket }
    }

    /// Sends one packet, whole, without waiting for room.
    pub(crate) fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(bytes, descriptors, SendFlags::DONTWAIT)
    }

    /// Sends one packet, whole, and waits until there is room.
    pub(crate) fn send_wait(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_with(bytes, descriptors, SendFlags::empty())
    }

    fn send_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], flags: SendFlags) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one packet"));
        }
        let flags = flags | SendFlags::NOSIGNAL;
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The next packet; `None` when the other end is closed. A packet that was cut is an error.
    pub(crate) fn receive(&self) -> io::Result<Option<Packet>> {
        // Room for the longest packet would cost each of a step's processes a page fault for each of its pages.
        let Some(length) = self.next_length()? else {
            return Ok(None);
        };
        let mut bytes = vec![0; length];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let parts = &mut [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                other => break other?,
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
        if length > PACKET || got.flags.intersects(rustix::net::ReturnFlags::TRUNC) {
            return Err(io::Error::other("a packet longer than agreed"));
        }
        bytes.truncate(got.bytes);
        Ok(Some(Packet { bytes, descriptors }))
    }

    /// Waits for a packet, and leaves it there: its length, or a bit more than may be. `None` at the end.
    fn next_length(&self) -> io::Result<Option<usize>> {
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
        loop {
            match recv(&self.socket, &mut [0u8; 0], flags) {
                Ok((_, length)) => return Ok(Some(length.min(PACKET + 1))),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Like [`Channel::receive`], and an error of kind `TimedOut` when nothing came before `deadline`.
    pub(crate) fn receive_until(&self, deadline: Instant) -> io::Result<Option<Packet>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(
                &mut [PollFd::new(&self.socket, PollFlags::IN)],
                Some(&timeout),
            ) {
                Ok(0) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return self.receive(),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
