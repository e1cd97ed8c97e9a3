//! Who is at the other end of a connection, as the kernel has it from the time of connecting.
#![allow(unsafe_code, reason = "SO_PEERGROUPS has no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc;

/// A local process that asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// Most groups that Linux lets a process have.
const MOST: usize = 65536;

/// The peer's numbers.
pub(crate) fn of(socket: impl AsFd) -> io::Result<Peer> {
    let credentials = rustix::net::sockopt::socket_peercred(&socket)?;
    let mut groups = vec![0u32; 64];
    let socket = socket.as_fd().as_raw_fd();
    loop {
        let mut len = (groups.len() * size_of::<u32>()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes to the vector's own, and how many it wrote or needs to `len`.
        let got = unsafe {
            libc::getsockopt(
                socket,
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let count = len as usize / size_of::<u32>();
        if got == 0 {
            groups.truncate(count);
            break;
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > MOST {
            return Err(error);
        }
        groups.resize(count, 0);
    }
    Ok(Peer {
        uid: credentials.uid.as_raw(),
        gid: credentials.gid.as_raw(),
        groups,
    })
}
