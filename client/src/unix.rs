//! HTTP over a Unix socket, as a connector of ureq.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout as Direction, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};
use ureq::{Error, Timeout};

/// Connects every request to one socket, whatever its URI says.
#[derive(Debug)]
pub struct UnixConnector(pub PathBuf);

/// Looks nothing up: [`UnixConnector`] needs no address.
#[derive(Debug)]
pub struct NoResolver;

#[derive(Debug)]
pub struct UnixTransport {
    stream: UnixStream,
    buffers: LazyBuffers,
}

impl Resolver for NoResolver {
    fn resolve(
        &self,
        _: &Uri,
        _: &ureq::config::Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let mut addresses = self.empty();
        addresses.push(([0, 0, 0, 0], 0).into());
        Ok(addresses)
    }
}

impl Connector for UnixConnector {
    type Out = UnixTransport;

    fn connect(
        &self,
        details: &ConnectionDetails,
        _: Option<()>,
    ) -> Result<Option<UnixTransport>, Error> {
        let limit = details.timeout.not_zero().map(|t| *t);
        let stream = match connect_within(&self.0, limit) {
            Ok(stream) => stream,
            // What connect(2) says when the server's backlog stays full for the whole limit.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(Error::Timeout(Timeout::Connect));
            }
            Err(e) => return Err(e.into()),
        };
        let config = details.config;
        Ok(Some(UnixTransport {
            stream,
            buffers: LazyBuffers::new(config.input_buffer_size(), config.output_buffer_size()),
        }))
    }
}

/// Connecting to a Unix socket waits while the server's backlog is full, as long as a write may wait (unix(7)).
fn connect_within(path: &Path, limit: Option<Duration>) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&socket, Direction::Send, limit)?;
    connect(&socket, &address)?;
    Ok(socket.into())
}

impl Transport for UnixTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let timeout = timeout.for_write();
        let limit = remaining(&timeout)?;
        self.stream.set_write_timeout(limit)?;
        let output = &self.buffers.output()[..amount];
        self.stream
            .write_all(output)
            .map_err(|e| timed_out(e, &timeout))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let timeout = timeout.for_read();
        let limit = remaining(&timeout)?;
        let end = limit.map(|l| Instant::now() + l);
        let mut left = limit;
        let amount = loop {
            self.stream.set_read_timeout(left)?;
            match self.stream.read(self.buffers.input_append_buf()) {
                // A signal ends a read that has a timeout even with SA_RESTART: go on with what is left of it.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    left = end.map(|end| end.saturating_duration_since(Instant::now()));
                    if left.is_some_and(|l| l.is_zero()) {
                        return Err(Error::Timeout(timeout.reason));
                    }
                }
                result => break result.map_err(|e| timed_out(e, &timeout))?,
            }
        };
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    /// Each call has a connection of its own, none is kept for later.
    fn is_open(&mut self) -> bool {
        false
    }
}

/// What is left of the limit: `None` without one, an error when nothing is.
fn remaining(timeout: &NextTimeout) -> Result<Option<Duration>, Error> {
    if timeout.after.is_zero() {
        return Err(Error::Timeout(timeout.reason));
    }
    Ok(timeout.not_zero().map(|t| *t))
}

fn timed_out(error: io::Error, timeout: &NextTimeout) -> Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Timeout(timeout.reason),
        _ => error.into(),
    }
}
