//! What a keeper leaves for the next one: descriptors that the service manager holds while no keeper runs (systemd's
//! `FileDescriptorStoreMax=`, sd_notify(3)). So an upgrade, or a killed keeper, loses no mount.
//!
//! Each thing lies there from its making to its end, under a name that says what it is:
//! - `den`: the namespace of kept mounts; `server`: the process that serves;
//! - `kept-N`: a memory file that describes the kept mount N;
//! - `served-N`: the same of an image that is served; `device-N`, `memory-N`, `image-N`: its descriptors.
//!
//! Without a service manager nothing is left, and nothing is lost either: the server goes on for those who read.

use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSlice, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sendmsg_addr, socket_with,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The way to the service manager, where there is one.
#[derive(Debug)]
pub(crate) struct Shelf(Option<(OwnedFd, SocketAddrUnix)>);

/// What was found there at the start.
#[derive(Debug, Default)]
pub(crate) struct Left(HashMap<String, OwnedFd>);

impl Shelf {
    /// As the environment names it; children do not inherit that.
    pub(crate) fn new() -> Self {
        let path = std::env::var_os("NOTIFY_SOCKET").map(PathBuf::from);
        let Some(path) = path else { return Self(None) };
        let address = match path.to_str().and_then(|text| text.strip_prefix('@')) {
            Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes()),
            None => SocketAddrUnix::new(&path),
        };
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
        Self(socket.ok().zip(address.ok()))
    }

    /// Requests are answered from now on.
    pub(crate) fn ready(&self) {
        self.send("READY=1", None);
    }

    /// Puts a descriptor there.
    pub(crate) fn put(&self, name: &str, descriptor: impl AsFd) {
        let text = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        self.send(&text, Some(descriptor.as_fd()));
    }

    /// Puts there what describes something.
    pub(crate) fn describe(&self, name: &str, what: &impl Serialize) {
        if self.0.is_none() {
            return;
        }
        let written = || -> std::io::Result<OwnedFd> {
            let file = memfd_create("berth-node", MemfdFlags::CLOEXEC)?;
            let mut file = File::from(file);
            file.write_all(&serde_json::to_vec(what)?)?;
            Ok(file.into())
        };
        match written() {
            Ok(file) => self.put(name, file),
            Err(error) => tracing::error!(%error, name, "cannot be left for the next keeper"),
        }
    }

    /// Takes it away again.
    pub(crate) fn remove(&self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
    }

    fn send(&self, text: &str, descriptor: Option<BorrowedFd<'_>>) {
        let Some((socket, address)) = &self.0 else {
            return;
        };
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptor.as_slice().is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptor.as_slice()));
        }
        let parts = [IoSlice::new(text.as_bytes())];
        let flags = SendFlags::NOSIGNAL;
        if let Err(error) = sendmsg_addr(socket, address, &parts, &mut control, flags) {
            tracing::error!(%error, "the service manager does not listen");
        }
    }
}

impl Left {
    /// What the service manager passed on (sd_listen_fds(3)).
    pub(crate) fn take() -> Self {
        let number = |name| -> Option<u32> { std::env::var(name).ok()?.parse().ok() };
        if number("LISTEN_PID") != Some(std::process::id()) {
            return Self::default();
        }
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let count = number("LISTEN_FDS").unwrap_or(0);
        let numbered = (3..).take(count as usize).zip(names.split(':'));
        let taken = numbered.filter_map(|(number, name)| {
            let descriptor = inherited(number)?;
            Some((name.to_owned(), descriptor))
        });
        Self(taken.collect())
    }

    /// Whether there is one of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// One of them.
    pub(crate) fn get(&mut self, name: &str) -> Option<OwnedFd> {
        self.0.remove(name)
    }

    /// Everything that was described under `PREFIX-N`, by number.
    pub(crate) fn described<T: DeserializeOwned>(&mut self, prefix: &str) -> Vec<(u64, T)> {
        let number = |name: &str| name.strip_prefix(prefix)?.strip_prefix('-')?.parse().ok();
        let numbers: Vec<u64> = self.0.keys().filter_map(|name| number(name)).collect();
        let described = numbers.into_iter().filter_map(|number| {
            let mut file = File::from(self.get(&format!("{prefix}-{number}"))?);
            let mut text = String::new();
            file.rewind().ok()?;
            file.read_to_string(&mut text).ok()?;
            Some((number, serde_json::from_str(&text).ok()?))
        });
        described.collect()
    }
}

#[allow(
    unsafe_code,
    reason = "a number in the environment is all that names it"
)]
fn inherited(number: i32) -> Option<OwnedFd> {
    // SAFETY: only looked at, to see whether there is such a descriptor.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).ok()?;
    // SAFETY: it is open, the service manager made it for this process, and this is asked for once, at the start.
    Some(unsafe { std::os::fd::FromRawFd::from_raw_fd(number) })
}
