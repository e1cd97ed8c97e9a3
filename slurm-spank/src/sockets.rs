//! Unix SEQPACKET sockets with descriptors, and waiting with a deadline. All descriptors made here are CLOEXEC.
#![allow(unsafe_code, reason = "sendmsg, recvmsg and poll with libc only")]

use crate::ffi::errno;
use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Most descriptors in one message that this side sends or takes.
const MAX_FDS: usize = 2;
/// Room for one SCM_RIGHTS header and `MAX_FDS` descriptors, aligned as cmsghdr needs it.
type Control = [u64; 4];

/// An errno.
pub type Error = c_int;

/// A connected pair.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Error> {
    let mut ends: [RawFd; 2] = [-1; 2];
    // SAFETY: room for two descriptors.
    let code = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
            0,
            ends.as_mut_ptr(),
        )
    };
    if code != 0 {
        return Err(errno());
    }
    let [one, other] = ends;
    // SAFETY: two fresh descriptors that nobody else owns.
    Ok(unsafe { (OwnedFd::from_raw_fd(one), OwnedFd::from_raw_fd(other)) })
}

/// Connects to a process of root's that listens at `path`; waits for nothing. EPERM when it is another's.
pub fn connect_to_root(path: &[u8]) -> Result<OwnedFd, Error> {
    let address = address_of(path)?;
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is involved.
    let socket = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if socket < 0 {
        return Err(errno());
    }
    // SAFETY: fresh and ours.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let length = std::mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: a whole address and its length.
    if unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
        return Err(errno());
    }
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut length = std::mem::size_of_val(&peer) as libc::socklen_t;
    // SAFETY: room for the credentials, and its length.
    let told = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    };
    match told {
        0 if peer.uid == 0 => Ok(socket),
        0 => Err(libc::EPERM),
        _ => Err(errno()),
    }
}

fn address_of(path: &[u8]) -> Result<libc::sockaddr_un, Error> {
    // SAFETY: an all-zero address is a valid one.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // The last byte stays zero.
    if path.len() >= address.sun_path.len() || path.contains(&0) {
        return Err(libc::ENAMETOOLONG);
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    Ok(address)
}

/// Opens a path for reading, CLOEXEC.
pub fn open(path: &std::ffi::CStr, flags: c_int) -> Result<OwnedFd, Error> {
    // SAFETY: a C string; no mode is needed without O_CREAT.
    let descriptor = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
    if descriptor < 0 {
        return Err(errno());
    }
    // SAFETY: fresh and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Sends one message, at most until `deadline`.
pub fn send(
    socket: BorrowedFd<'_>,
    message: &[u8],
    fds: &[RawFd],
    deadline: Instant,
) -> Result<(), Error> {
    loop {
        match try_send(socket, message, fds) {
            Err(libc::EAGAIN) => wait(socket, libc::POLLOUT, deadline)?,
            Err(libc::EINTR) => {}
            other => return other,
        }
    }
}

/// Sends one message or fails at once with EAGAIN: what a hook of the parent may do.
pub fn try_send(socket: BorrowedFd<'_>, message: &[u8], fds: &[RawFd]) -> Result<(), Error> {
    if fds.len() > MAX_FDS {
        return Err(libc::EINVAL);
    }
    let mut control: Control = [0; 4];
    let mut part = libc::iovec {
        iov_base: message.as_ptr().cast_mut().cast::<c_void>(),
        iov_len: message.len(),
    };
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = std::mem::size_of_val(fds);
        header.msg_control = control.as_mut_ptr().cast::<c_void>();
        // SAFETY: CMSG_* only compute; the buffer holds a header and MAX_FDS descriptors, which was checked.
        unsafe {
            header.msg_controllen = libc::CMSG_SPACE(bytes as u32) as _;
            let rights = libc::CMSG_FIRSTHDR(&raw const header);
            (*rights).cmsg_level = libc::SOL_SOCKET;
            (*rights).cmsg_type = libc::SCM_RIGHTS;
            (*rights).cmsg_len = libc::CMSG_LEN(bytes as u32) as _;
            std::ptr::copy_nonoverlapping(
                fds.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(rights),
                bytes,
            );
        }
    }
    // SAFETY: the header points to the message and the control buffer, both alive.
    let sent = unsafe {
        libc::sendmsg(
            socket.as_raw_fd(),
            &raw const header,
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        )
    };
    if sent < 0 { Err(errno()) } else { Ok(()) }
}

/// One message that came in.
#[derive(Debug)]
pub struct Received {
    /// Empty at the end of the stream.
    pub message: Vec<u8>,
    pub fd: Option<OwnedFd>,
}

/// Waits for a message until `deadline` (ETIMEDOUT).
pub fn receive(socket: BorrowedFd<'_>, deadline: Instant) -> Result<Received, Error> {
    loop {
        match try_receive(socket, 0) {
            Err(libc::EAGAIN) => wait(socket, libc::POLLIN, deadline)?,
            Err(libc::EINTR) => {}
            other => return other,
        }
    }
}

/// Looks at the first waiting message and leaves it there for others who hold the same socket.
pub fn peek(socket: BorrowedFd<'_>) -> Option<Vec<u8>> {
    // A peer that ended with messages unread leaves one error before its own messages, for one reader to take.
    for _ in 0..4 {
        match try_receive(socket, libc::MSG_PEEK) {
            Ok(received) => return Some(received.message).filter(|message| !message.is_empty()),
            Err(libc::ECONNRESET | libc::EPIPE | libc::EINTR) => {}
            Err(_) => return None,
        }
    }
    None
}

fn try_receive(socket: BorrowedFd<'_>, flags: c_int) -> Result<Received, Error> {
    let mut control: Control = [0; 4];
    // Room for the longest message would cost each task a page fault for each of its pages.
    let mut message = vec![0u8; next_length(socket)?.min(crate::wire::MAX_MESSAGE)];
    let mut part = libc::iovec {
        iov_base: message.as_mut_ptr().cast::<c_void>(),
        iov_len: message.len(),
    };
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast::<c_void>();
    header.msg_controllen = std::mem::size_of::<Control>() as _;
    // SAFETY: the header points to two live buffers of the stated sizes.
    let count = unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut header,
            flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
        )
    };
    let count = usize::try_from(count).map_err(|_| errno())?;
    let mut fds = rights(&header);
    if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(libc::EMSGSIZE);
    }
    message.truncate(count);
    Ok(Received {
        message,
        fd: fds.pop(),
    })
}

/// How long the first waiting message is; 0 at the end of the stream.
fn next_length(socket: BorrowedFd<'_>) -> Result<usize, Error> {
    let flags = libc::MSG_PEEK | libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: nothing is written to a buffer of no bytes.
    let length = unsafe { libc::recv(socket.as_raw_fd(), std::ptr::null_mut(), 0, flags) };
    usize::try_from(length).map_err(|_| errno())
}

/// Every descriptor in the control data, owned: those nobody asked for are closed.
fn rights(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel filled header and control buffer; CMSG_* walk inside msg_controllen.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while !control.is_null() {
            if (*control).cmsg_level == libc::SOL_SOCKET && (*control).cmsg_type == libc::SCM_RIGHTS
            {
                let bytes =
                    ((*control).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                for index in 0..bytes / std::mem::size_of::<RawFd>() {
                    let fd = libc::CMSG_DATA(control)
                        .cast::<RawFd>()
                        .add(index)
                        .read_unaligned();
                    fds.push(OwnedFd::from_raw_fd(fd));
                }
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    fds
}

/// Waits until the descriptor is ready or hung up, or `deadline` is over.
pub fn wait(socket: BorrowedFd<'_>, events: i16, deadline: Instant) -> Result<(), Error> {
    wait_any(
        &mut [libc::pollfd {
            fd: socket.as_raw_fd(),
            events,
            revents: 0,
        }],
        deadline,
    )
}

/// The same for several; `revents` tells which.
pub fn wait_any(polled: &mut [libc::pollfd], deadline: Instant) -> Result<(), Error> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the last millisecond is not a busy loop.
        let milliseconds = left.saturating_add(Duration::from_micros(999)).as_millis();
        let limit = c_int::try_from(milliseconds).unwrap_or(c_int::MAX);
        // SAFETY: the slice's own pointer and length.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, limit) };
        match ready {
            0 => return Err(libc::ETIMEDOUT),
            1.. => return Ok(()),
            _ if errno() == libc::EINTR => {}
            _ => return Err(errno()),
        }
    }
}

/// One that listens there and accepts nobody.
#[cfg(test)]
pub fn listener(path: &str) -> OwnedFd {
    let address = address_of(path.as_bytes()).unwrap();
    let length = std::mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: a whole address and its length; the descriptor is fresh and ours.
    unsafe {
        let socket = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0);
        assert!(socket >= 0);
        let socket = OwnedFd::from_raw_fd(socket);
        let bound = libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length);
        assert_eq!((bound, libc::listen(socket.as_raw_fd(), 4)), (0, 0));
        socket
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_descriptor_crosses() {
        let (one, other) = pair().unwrap();
        let null = open(c"/dev/null", libc::O_RDONLY).unwrap();
        send(one.as_fd(), b"Rcwd=/", &[null.as_raw_fd()], soon()).unwrap();
        let received = receive(other.as_fd(), soon()).unwrap();
        assert_eq!(received.message, b"Rcwd=/");
        let fd = received.fd.unwrap();
        // SAFETY: asks for the flags of a live descriptor.
        assert_eq!(
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) },
            libc::FD_CLOEXEC
        );
    }

    #[test]
    fn the_end_is_an_empty_message_and_silence_times_out() {
        let (one, other) = pair().unwrap();
        let now = Instant::now();
        assert_eq!(
            receive(other.as_fd(), now).map(|received| received.message),
            Err(libc::ETIMEDOUT)
        );
        drop(one);
        assert_eq!(receive(other.as_fd(), soon()).unwrap().message, b"");
    }

    #[test]
    fn peek_leaves_the_message() {
        let (one, other) = pair().unwrap();
        assert_eq!(peek(other.as_fd()), None);
        send(one.as_fd(), b"Ecode=70", &[], soon()).unwrap();
        // Left unread by the peer: what makes the kernel report an error first.
        send(other.as_fd(), b"Ttask=0", &[], soon()).unwrap();
        drop(one);
        assert_eq!(peek(other.as_fd()).unwrap(), b"Ecode=70");
        assert_eq!(peek(other.as_fd()).unwrap(), b"Ecode=70");
    }

    #[test]
    fn what_is_too_long_is_told_and_what_follows_is_heard() {
        let (one, other) = pair().unwrap();
        let null = open(c"/dev/null", libc::O_RDONLY).unwrap();
        let long = vec![b'R'; crate::wire::MAX_MESSAGE + 1];
        for message in [&long[..], &long[1..], b"Pnext"] {
            send(one.as_fd(), message, &[null.as_raw_fd()], soon()).unwrap();
        }
        let taken = || receive(other.as_fd(), soon()).map(|received| received.message.len());
        assert_eq!(taken(), Err(libc::EMSGSIZE));
        assert_eq!(taken(), Ok(crate::wire::MAX_MESSAGE));
        assert_eq!(taken(), Ok(5));
    }

    #[test]
    fn a_full_listener_is_told_at_once_and_no_path_is_too_long_for_an_answer() {
        let path = std::env::temp_dir().join(format!("berth-full-{}", std::process::id()));
        let path = path.to_str().unwrap();
        let listener = listener(path);
        let waiting: Vec<_> = (0..100).map(|_| connect_to_root(path.as_bytes())).collect();
        assert_eq!(waiting.last().unwrap().as_ref().err(), Some(&libc::EAGAIN));
        drop(listener);
        std::fs::remove_file(path).unwrap();
        let long = "/".repeat(200);
        let refused = connect_to_root(long.as_bytes()).err();
        assert_eq!(refused, Some(libc::ENAMETOOLONG));
    }

    #[test]
    fn a_full_socket_is_told_at_once() {
        let (one, _other) = pair().unwrap();
        let message = vec![b'j'; crate::wire::MAX_MESSAGE];
        let full = (0..10_000).find_map(|_| try_send(one.as_fd(), &message, &[]).err());
        assert_eq!(full, Some(libc::EAGAIN));
    }
}
