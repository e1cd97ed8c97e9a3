//! How much of the daemon its peers may take: connections at a time, in all and for one user or machine, bytes of a
//! request, silence on a connection, and slowness ([`super::pace`]). One request at a time on a connection: HTTP/1.
//! Where all connections are held, who has fewest gets one of who has most ([`super::shares`]).

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::pace::{Pace, WINDOW};
use super::shares::{Cut, Shares};

/// Largest request body, in bytes.
pub const MAX_BODY: usize = 1 << 20;
/// Connections at a time on one socket: four times the tasks of a large start.
const MAX_CONNECTIONS: usize = 8192;
/// That were taken from their peers, and are still to be closed: a moment's work each.
const MAX_CLOSING: usize = MAX_CONNECTIONS / 8;
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
    peers: Arc<Peers>,
}

/// Who is at the other end, as far as it is known when somebody connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Who {
    User(u32),
    /// Of whom the kernel does not say who it is.
    Nobody,
    Machine(IpAddr),
}

/// Which connections each peer holds. Root's are not counted: it is every node's and the site's own.
#[derive(Debug, Default)]
struct Peers {
    held: Mutex<Shares<Who>>,
    /// One was closed.
    closed: Notify,
}

/// Whether somebody who connects may stay.
enum Room {
    Place(Place),
    /// It holds enough already.
    Enough,
    /// All hold about as much as it does: when one is closed there is room.
    Later,
}

impl Peers {
    fn room(self: &Arc<Self>, who: Who, cut: &Cut) -> Room {
        let mut counted = None;
        if who != Who::User(0) {
            let mut held = self.lock();
            let has = held.of(&who);
            if has >= MAX_OF_PEER {
                return Room::Enough;
            }
            let full = held.all() - held.taken() >= MAX_CONNECTIONS;
            if full && (held.taken() >= MAX_CLOSING || !held.take_for(&who)) {
                return match has > MAX_CONNECTIONS / held.peers().max(1) {
                    true => Room::Enough,
                    false => Room::Later,
                };
            }
            counted = Some((who, held.add(&who, cut.clone())));
        }
        Room::Place(Place {
            peers: self.clone(),
            counted,
        })
    }

    /// A place for `who`, as soon as there is one; `None` when it holds enough already.
    async fn place(self: &Arc<Self>, who: Who, cut: &Cut) -> Option<Place> {
        loop {
            match self.room(who, cut) {
                Room::Place(place) => return Some(place),
                Room::Enough => return None,
                Room::Later => self.closed.notified().await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shares<Who>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A peer's connection, counted until it is dropped.
#[derive(Debug)]
struct Place {
    peers: Arc<Peers>,
    counted: Option<(Who, u64)>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some((who, number)) = &self.counted {
            self.peers.lock().remove(who, *number);
            self.peers.closed.notify_one();
        }
    }
}

impl<L> Limited<L> {
    pub fn new(listener: L) -> Self {
        Self {
            listener,
            peers: Arc::default(),
        }
    }
}

/// A connection that gives its place back when it is dropped.
#[derive(Debug)]
pub struct Held<S> {
    stream: S,
    silence: Pin<Box<Sleep>>,
    pace: Pace,
    /// Bytes of [`HTTP2`] seen at the start; `None` when it begins otherwise.
    http2: Option<usize>,
    cut: Cut,
    cut_off: Pin<Box<WaitForCancellationFutureOwned>>,
    _place: Place,
}

impl<S> Held<S> {
    fn new(stream: S, cut: Cut, place: Place) -> Self {
        Self {
            stream,
            silence: Box::pin(tokio::time::sleep(SILENCE)),
            pace: Pace::new(WINDOW),
            http2: Some(0),
            cut_off: Box::pin(cut.wait()),
            cut,
            _place: place,
        }
    }

    /// What ends this connection.
    pub fn cut(&self) -> Cut {
        self.cut.clone()
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

    /// Something moved, or nothing has for too long, or somebody else needs the place more.
    fn judge<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.cut.is_cut() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if polled.is_ready() {
            self.silence.as_mut().reset(Instant::now() + SILENCE);
            return polled;
        }
        if self.cut_off.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
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
        loop {
            let (stream, address) = Listener::accept(&mut self.listener).await;
            let uid = stream.peer_cred().ok().map(|c| c.uid());
            let cut = Cut::default();
            let who = uid.map_or(Who::Nobody, Who::User);
            match self.peers.place(who, &cut).await {
                Some(place) => return (Held::new(stream, cut, place), address),
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
        loop {
            let (stream, address) = Listener::accept(&mut self.listener).await;
            // Small answers go out at once; without it they are only slower.
            let _ = stream.set_nodelay(true);
            let cut = Cut::default();
            let who = Who::Machine(address.ip());
            match self.peers.place(who, &cut).await {
                Some(place) => return (Held::new(stream, cut, place), address),
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

    fn place(peers: &Arc<Peers>, who: Who) -> Option<Place> {
        match peers.room(who, &Cut::default()) {
            Room::Place(place) => Some(place),
            Room::Enough | Room::Later => None,
        }
    }

    fn held() -> (Held<UnixStream>, UnixStream) {
        let (mine, peers) = UnixStream::pair().unwrap();
        let place = place(&Arc::default(), Who::User(0)).unwrap();
        (Held::new(mine, Cut::default(), place), peers)
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
        let greedy = Who::User(1000);
        let mut held: Vec<_> = (0..MAX_OF_PEER)
            .map(|_| place(&peers, greedy).unwrap())
            .collect();
        assert!(place(&peers, greedy).is_none());
        assert!(place(&peers, Who::User(1001)).is_some());
        held.pop();
        assert!(place(&peers, greedy).is_some());
        held.extend((0..=MAX_OF_PEER).map(|_| place(&peers, Who::User(0)).unwrap()));
        drop(held);
        assert_eq!(peers.lock().all(), 0);
    }

    #[tokio::test]
    async fn peers_who_hold_all_connections_together_do_not_keep_another_out() {
        let peers = Arc::new(Peers::default());
        let mut held: Vec<_> = (0..MAX_CONNECTIONS)
            .map(|n| {
                let cut = Cut::default();
                let who = Who::User(1 + n as u32 % 4);
                match peers.room(who, &cut) {
                    Room::Place(place) => (cut, place),
                    Room::Enough | Room::Later => panic!("the {n}th of {who:?}"),
                }
            })
            .collect();
        assert!(matches!(
            peers.room(Who::User(1), &Cut::default()),
            Room::Enough
        ));
        let other = place(&peers, Who::User(9)).unwrap();
        let cut: Vec<_> = held.iter().filter(|(cut, _)| cut.is_cut()).collect();
        assert_eq!(cut.len(), 1, "one goes for one that comes");
        // What is still to be closed is bounded, and then somebody waits for that.
        let more = (0..).map_while(|_| place(&peers, Who::User(9)));
        let more: Vec<_> = more.take(MAX_CLOSING + 1).collect();
        assert_eq!(more.len(), MAX_CLOSING - 1);
        let mut later = Box::pin(async { peers.place(Who::User(10), &Cut::default()).await });
        let mut context = Context::from_waker(std::task::Waker::noop());
        assert!(later.as_mut().poll(&mut context).is_pending());
        held.retain(|(cut, _)| !cut.is_cut());
        assert!(matches!(
            later.as_mut().poll(&mut context),
            Poll::Ready(Some(_))
        ));
        drop((later, other, more, held));
        assert_eq!(peers.lock().all(), 0);
    }

    #[tokio::test]
    async fn a_connection_that_is_cut_ends_at_once_reading_or_writing() {
        let (mut held, _peer) = held();
        let cut = held.cut();
        let writing = async { held.write_all(&vec![7u8; 4 << 20]).await };
        let (written, ()) = tokio::join!(writing, async { cut.now() });
        assert_eq!(
            written.unwrap_err().kind(),
            io::ErrorKind::ConnectionAborted
        );
        let (mut held, _peer) = self::held();
        let cut = held.cut();
        let mut byte = [0];
        let (read, ()) = tokio::join!(held.read(&mut byte), async { cut.now() });
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }
}
