//! How much of the daemon its peers may take: connections at a time, in all and for one user or machine, bytes of a
//! request, silence on a connection, and slowness ([`super::pace`]). One request at a time on a connection: HTTP/1.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

use super::pace::{Pace, WINDOW};

/// Largest request body, in bytes.
pub const MAX_BODY: usize = 1 << 20;
/// Connections at a time on one socket: four times the tasks of a large start.
const MAX_CONNECTIONS: usize = 8192;
/// Of these, what one user on the Unix socket, or one machine on TCP, may hold. More are closed at once.
const MAX_OF_PEER: usize = MAX_CONNECTIONS / 4;
/// A connection on which nothing moves for so long is closed: twice the longest poll. Events send keep-alives.
const SILENCE: Duration = Duration::from_secs(120);
/// How HTTP/2 begins (RFC 9113, section 3.4). There a peer holds many responses at once and takes nothing of them.
const HTTP2: &[u8] = b"PRI * HTTP/2.0";

/// A listener that takes a bounded number of connections; others wait in the kernel's queue.
#[derive(Debug)]
pub struct Limited<L> {
    listener: L,
    slots: Arc<Semaphore>,
    peers: Arc<Peers>,
}

/// Who is at the other end, as far as it is known when somebody connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Who {
    User(u32),
    Machine(IpAddr),
}

/// How many connections each peer holds. Root's are not counted: it is every node's and the site's own.
#[derive(Debug, Default)]
struct Peers {
    held: Mutex<HashMap<Who, usize>>,
}

impl Peers {
    /// A place for one more connection of `who`, if it may have one.
    fn place(self: &Arc<Self>, who: Option<Who>) -> Option<Place> {
        let who = who.filter(|who| *who != Who::User(0));
        if let Some(who) = who {
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            let count = held.entry(who).or_default();
            if *count >= MAX_OF_PEER {
                return None;
            }
            *count += 1;
        }
        Some(Place {
            peers: self.clone(),
            who,
        })
    }
}

/// A peer's connection, counted until it is dropped.
#[derive(Debug)]
struct Place {
    peers: Arc<Peers>,
    who: Option<Who>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = (self.peers.held.lock()).unwrap_or_else(PoisonError::into_inner);
        if let Some(who) = self.who
            && let Some(count) = held.get_mut(&who)
        {
            *count -= 1;
            if *count == 0 {
                held.remove(&who);
            }
        }
    }
}

impl<L> Limited<L> {
    pub fn new(listener: L) -> Self {
        Self {
            listener,
            slots: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            peers: Arc::default(),
        }
    }
}

/// A connection that gives its slot back when it is dropped.
#[derive(Debug)]
pub struct Held<S> {
    stream: S,
    silence: Pin<Box<Sleep>>,
    pace: Pace,
    /// Bytes of [`HTTP2`] seen at the start; `None` when it begins otherwise.
    http2: Option<usize>,
    _slot: Option<OwnedSemaphorePermit>,
    _place: Place,
}

impl<S> Held<S> {
    fn new(stream: S, slot: Option<OwnedSemaphorePermit>, place: Place) -> Self {
        Self {
            stream,
            silence: Box::pin(tokio::time::sleep(SILENCE)),
            pace: Pace::new(WINDOW),
            http2: Some(0),
            _slot: slot,
            _place: place,
        }
    }

    /// Whether what was read at first is the beginning of HTTP/2.
    fn is_http2(&mut self, read: &[u8]) -> bool {
        for byte in read {
            match self.http2 {
                Some(at) if HTTP2[at] == *byte => self.http2 = Some(at + 1),
                Some(_) => self.http2 = None,
                None => return false,
            }
            if self.http2 == Some(HTTP2.len()) {
                return true;
            }
        }
        false
    }

    /// Something moved, or nothing has for too long.
    fn judge<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.silence.as_mut().reset(Instant::now() + SILENCE);
            return polled;
        }
        match self.silence.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Held<UnixStream> {
    /// The uid at the other end when it connected.
    pub fn peer_uid(&self) -> Option<u32> {
        self.stream.peer_cred().ok().map(|c| c.uid())
    }
}

impl Listener for Limited<UnixListener> {
    type Io = Held<UnixStream>;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let slot = self.slots.clone().acquire_owned().await.ok();
        loop {
            let (stream, address) = Listener::accept(&mut self.listener).await;
            let uid = stream.peer_cred().ok().map(|c| c.uid());
            match self.peers.place(uid.map(Who::User)) {
                Some(place) => return (Held::new(stream, slot, place), address),
                None => tracing::warn!(uid, "too many connections of one user, one was closed"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

impl Listener for Limited<TcpListener> {
    type Io = Held<TcpStream>;
    type Addr = std::net::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let slot = self.slots.clone().acquire_owned().await.ok();
        loop {
            let (stream, address) = Listener::accept(&mut self.listener).await;
            // Small answers go out at once; without it they are only slower.
            let _ = stream.set_nodelay(true);
            match self.peers.place(Some(Who::Machine(address.ip()))) {
                Some(place) => return (Held::new(stream, slot, place), address),
                None => {
                    tracing::warn!(peer = %address.ip(), "too many connections of one machine, one was closed");
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Held<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if self.is_http2(&buffer.filled()[before..]) {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        self.judge(context, polled)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Held<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        let polled = self.pace.judge(context, polled);
        self.judge(context, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::testbed::SOON;

    fn held() -> (Held<UnixStream>, UnixStream) {
        let (mine, peers) = UnixStream::pair().unwrap();
        let place = Arc::new(Peers::default()).place(None).unwrap();
        (Held::new(mine, None, place), peers)
    }

    #[tokio::test]
    async fn who_takes_nothing_is_left_by_the_clock_and_who_takes_all_is_not() {
        let (mut held, mut peer) = held();
        held.pace = Pace::new(Duration::from_millis(50));
        let much = vec![7u8; 4 << 20];
        let sent = tokio::time::timeout(SOON, held.write_all(&much)).await;
        let error = sent.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let (mut held, mut other) = self::held();
        let read = async {
            let mut all = vec![0u8; much.len()];
            other.read_exact(&mut all).await.map(|_| all)
        };
        let (sent, read) = tokio::join!(held.write_all(&much), read);
        sent.unwrap();
        assert_eq!(read.unwrap(), much);
        drop(held);
        assert_eq!(other.read(&mut [0]).await.unwrap(), 0);
        assert_ne!(peer.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn only_http_1_is_spoken() {
        for (parts, fine) in [
            (&["GET / HTTP/1.1\r\n"][..], true),
            (&["P", "RI / HTTP/1.1\r\n", "PRI * HTTP/2.0"], true),
            (&["PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], false),
            (&["PRI", " * HTTP/2", ".0"], false),
        ] {
            let (mut held, mut peer) = held();
            let mut read = Ok(0);
            for part in parts {
                peer.write_all(part.as_bytes()).await.unwrap();
                read = held.read(&mut [0; 100]).await;
            }
            assert_eq!(read.is_ok(), fine, "{parts:?}");
        }
    }

    #[test]
    fn one_peer_gets_a_share_and_gives_it_back() {
        let peers = Arc::new(Peers::default());
        let greedy = Some(Who::User(1000));
        let mut held: Vec<_> = (0..MAX_OF_PEER)
            .map(|_| peers.place(greedy).unwrap())
            .collect();
        assert!(peers.place(greedy).is_none());
        assert!(peers.place(Some(Who::User(1001))).is_some());
        held.pop();
        assert!(peers.place(greedy).is_some());
        held.extend((0..=MAX_OF_PEER).map(|_| peers.place(Some(Who::User(0))).unwrap()));
        drop(held);
        assert!(peers.held.lock().unwrap().is_empty());
    }
}
