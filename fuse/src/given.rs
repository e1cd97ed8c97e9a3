//! `berth-fuse hold`: serves an image to whoever has the other end of a socket, who makes the mount.
//!
//! A runtime that mounts in a user namespace must open `/dev/fuse` there, and must have no server among its own
//! processes' children. So it starts this first, with the image and one end of a `SOCK_SEQPACKET` pair:
//!
//! 1. from here one packet: `k` when the image can be served, `e` and a line of text when it cannot;
//! 2. to here one packet with the descriptor of a connection, which is served until its mount is gone.
//!
//! When the other end is closed before that, this ends. The other end is free to end after it.
//!
//! With `--confined` this process is the server too, and closes the cage of [`crate::confined`] around itself first.

use std::io::{IoSlice, IoSliceMut};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use berth_fuse::holder::Held;
use berth_fuse::slots;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg,
    sendmsg,
};

use crate::lazy::Lazy;
use crate::{Failure, Serving, check, check_apart, confined, inherited, keep, serve_image};

/// Answers on `channel`, waits for the connection, and serves it.
pub fn run(
    serving: Serving,
    lazy: &Lazy,
    channel: RawFd,
    image: Option<RawFd>,
    confined: bool,
) -> Result<(), Failure> {
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let channel = inherited(channel)?;
    let image = image.map(inherited).transpose()?;
    let slots = slots::create()?;
    let checked = match confined {
        true => {
            confined::enter()?;
            let copy = image.as_ref().map(OwnedFd::try_clone).transpose()?;
            check(serving, lazy, copy)
        }
        false => check_apart(serving, lazy, image.as_ref()),
    };
    let said = match checked {
        Ok(()) => "k".to_owned(),
        Err(error) => format!("e{}", crate::told(error.as_ref())),
    };
    say(&channel, said.as_bytes())?;
    let Some(device) = connection(&channel)? else {
        return Ok(());
    };
    drop(channel);
    if confined {
        let source = lazy.open(image, serving.deadline())?;
        return serve_image(serving, lazy, source, device, slots);
    }
    let held = Held {
        device,
        slots,
        image,
    };
    keep(serving, lazy, held)
}

fn say(channel: &OwnedFd, bytes: &[u8]) -> Result<(), Errno> {
    let parts = [IoSlice::new(bytes)];
    let mut nothing = SendAncillaryBuffer::default();
    sendmsg(channel, &parts, &mut nothing, SendFlags::NOSIGNAL).map(drop)
}

/// The descriptor that comes; `None` when the other end is closed instead.
fn connection(channel: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    let mut byte = [0u8; 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    loop {
        let parts = &mut [IoSliceMut::new(&mut byte)];
        match recvmsg(channel, parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            Err(errno) => return Err(errno),
            Ok(_) => break,
        }
    }
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

/// Goes on without the terminal and the pipes that this program was started with.
#[allow(
    unsafe_code,
    reason = "standard descriptors have numbers, and no owners"
)]
pub fn leave_terminal() -> Result<(), Failure> {
    // A process that leads its group stays in its session.
    let _ = rustix::process::setsid();
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let nothing = rustix::fs::open("/dev/null", flags, Mode::empty())?;
    for number in 0..3 {
        // SAFETY: nobody owns a standard descriptor, and this does not close it.
        let mut standard = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
        rustix::io::dup2(&nothing, &mut standard)?;
    }
    rustix::process::chdir("/")?;
    Ok(())
}
