//! A proxy in front of a registry that counts, and misbehaves when told to.
//!
//! Each connection carries one request. A [`Fault`] applies to requests whose path contains its `path`, as often as
//! `times` says; the first that fits is taken.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use crate::http::Head;

/// What to do wrong.
#[derive(Debug, Clone)]
pub enum Wrong {
    /// Answer with this status and these headers, and do not ask the registry.
    Status(u16, Vec<(String, String)>),
    /// Close the connection after this many bytes of the body, which was announced whole.
    Truncate(u64),
    /// Flip the bits of the byte at this offset of the body.
    Corrupt(u64),
    /// Close the connection without an answer.
    Drop,
    /// After this many bytes of the body wait for [`Proxy::release`].
    Hold(u64),
}

/// What to do wrong, with which requests.
#[derive(Debug, Clone)]
pub struct Fault {
    pub method: Option<&'static str>,
    /// Part of the path.
    pub path: String,
    /// How often; then the proxy behaves.
    pub times: u32,
    pub wrong: Wrong,
}

impl Fault {
    /// A fault of every GET of a path that contains `path`.
    pub fn always(path: &str, wrong: Wrong) -> Self {
        Self::some(path, u32::MAX, wrong)
    }

    /// A fault of the next `times` GETs.
    pub fn some(path: &str, times: u32, wrong: Wrong) -> Self {
        Self {
            method: Some("GET"),
            path: path.to_owned(),
            times,
            wrong,
        }
    }

    /// Whatever the method.
    pub fn any_method(mut self) -> Self {
        self.method = None;
        self
    }
}

/// What was asked of one path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    pub gets: u64,
    pub heads: u64,
    /// Bytes of bodies that were passed on to clients.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<Fault>,
    counts: BTreeMap<String, Count>,
    held: usize,
    released: bool,
}

#[derive(Debug)]
struct Shared {
    upstream: Mutex<String>,
    state: Mutex<State>,
    changed: Condvar,
    refusing: AtomicBool,
    ended: AtomicBool,
}

/// A running proxy; it ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: String,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on a free port of the loopback; `upstream` is `HOST:PORT` of the registry.
    ///
    /// # Panics
    /// Where no port can be had.
    pub fn start(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address").to_string();
        let shared = Arc::new(Shared {
            upstream: Mutex::new(upstream.to_owned()),
            state: Mutex::default(),
            changed: Condvar::new(),
            refusing: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let for_accept = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if for_accept.ended.load(Ordering::Acquire) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                if for_accept.refusing.load(Ordering::Acquire) {
                    let _ = stream.shutdown(Shutdown::Both);
                    continue;
                }
                let shared = Arc::clone(&for_accept);
                thread::spawn(move || {
                    // A client that goes away is no concern of the test's.
                    let _ = shared.serve(stream);
                });
            }
        });
        Self { address, shared }
    }

    /// `HOST:PORT` for references.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Adds a fault, after those that are there.
    pub fn fault(&self, fault: Fault) {
        self.shared.lock().faults.push(fault);
    }

    /// No more faults.
    pub fn behave(&self) {
        self.shared.lock().faults.clear();
    }

    /// Whether every new connection is closed at once, as with a registry that is down.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refusing.store(refuse, Ordering::Release);
    }

    /// How many answers wait in [`Wrong::Hold`] now.
    pub fn held(&self) -> usize {
        self.shared.lock().held
    }

    /// Lets everything held go on, now and later.
    pub fn release(&self) {
        self.shared.lock().released = true;
        self.shared.changed.notify_all();
    }

    /// What was asked so far, by path.
    pub fn counts(&self) -> BTreeMap<String, Count> {
        self.shared.lock().counts.clone()
    }

    /// What was asked of blobs only: (digest, count).
    pub fn blobs(&self) -> Vec<(String, Count)> {
        let counts = self.counts();
        let blob = |path: &str| path.split_once("/blobs/").map(|(_, d)| d.to_owned());
        counts
            .iter()
            .filter_map(|(path, count)| Some((blob(path)?, *count)))
            .collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.release();
        self.shared.ended.store(true, Ordering::Release);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(&self.address);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with the lock")
    }

    fn serve(&self, client: TcpStream) -> io::Result<()> {
        client.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut reader = BufReader::new(client.try_clone()?);
        let Some(head) = Head::read(&mut reader)? else {
            return Ok(());
        };
        let mut words = head.first.split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let target = words.next().unwrap_or_default().to_owned();
        let path = target.split('?').next().unwrap_or_default().to_owned();
        let wrong = self.begin(&method, &path);
        match wrong {
            Some(Wrong::Drop) => client.shutdown(Shutdown::Both),
            Some(Wrong::Status(code, headers)) => answer_status(client, code, &headers),
            wrong => self.pass_on(client, &head, &method, &path, wrong),
        }
    }

    /// Counts the request and picks its fault.
    fn begin(&self, method: &str, path: &str) -> Option<Wrong> {
        let mut state = self.lock();
        let count = state.counts.entry(path.to_owned()).or_default();
        match method {
            "GET" => count.gets += 1,
            "HEAD" => count.heads += 1,
            _ => {}
        }
        let fault = state.faults.iter_mut().find(|fault| {
            fault.times > 0
                && path.contains(&fault.path)
                && fault.method.is_none_or(|wanted| wanted == method)
        })?;
        fault.times -= u32::from(fault.times != u32::MAX);
        Some(fault.wrong.clone())
    }

    fn pass_on(
        &self,
        mut client: TcpStream,
        head: &Head,
        method: &str,
        path: &str,
        wrong: Option<Wrong>,
    ) -> io::Result<()> {
        let upstream = self.upstream.lock().expect("never poisoned").clone();
        let mut server = TcpStream::connect(&upstream)?;
        server.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut text = format!("{}\r\n", head.first);
        for (name, value) in &head.headers {
            if name != "connection" && name != "host" {
                text += &format!("{name}: {value}\r\n");
            }
        }
        text += &format!("host: {upstream}\r\nconnection: close\r\n\r\n");
        server.write_all(text.as_bytes())?;

        let mut answer = BufReader::new(server);
        let Some(answer_head) = Head::read(&mut answer)? else {
            return client.shutdown(Shutdown::Both);
        };
        let mut text = format!("{}\r\n", answer_head.first);
        for (name, value) in &answer_head.headers {
            if name != "connection" {
                text += &format!("{name}: {value}\r\n");
            }
        }
        text += "connection: close\r\n\r\n";
        client.write_all(text.as_bytes())?;
        if method == "HEAD" {
            return Ok(());
        }
        let mut sent = 0_u64;
        let mut buffer = [0_u8; 32 << 10];
        loop {
            let wanted = match wrong {
                // Stops exactly at the offset where something is to happen.
                Some(Wrong::Truncate(at) | Wrong::Hold(at)) if sent < at => buffer
                    .len()
                    .min(usize::try_from(at - sent).unwrap_or(usize::MAX)),
                _ => buffer.len(),
            };
            match wrong {
                Some(Wrong::Truncate(at)) if sent >= at => {
                    return client.shutdown(Shutdown::Both);
                }
                Some(Wrong::Hold(at)) if sent == at => self.hold(),
                _ => {}
            }
            let read = answer.read(&mut buffer[..wanted])?;
            if read == 0 {
                return Ok(());
            }
            if let Some(Wrong::Corrupt(at)) = wrong
                && (sent..sent + read as u64).contains(&at)
            {
                buffer[usize::try_from(at - sent).unwrap_or(0)] ^= 0xff;
            }
            client.write_all(&buffer[..read])?;
            sent += read as u64;
            self.lock().counts.entry(path.to_owned()).or_default().bytes += read as u64;
        }
    }

    fn hold(&self) {
        let mut state = self.lock();
        state.held += 1;
        let limit = Duration::from_secs(120);
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, limit, |state| !state.released)
            .expect("never poisoned");
        state.held -= 1;
    }
}

fn answer_status(mut client: TcpStream, code: u16, headers: &[(String, String)]) -> io::Result<()> {
    let mut text = format!("HTTP/1.1 {code} Told So\r\nconnection: close\r\ncontent-length: 0\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    client.write_all((text + "\r\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::request;

    /// A server that answers every GET with 1,000 bytes.
    fn upstream() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                if let Ok(Some(_)) = Head::read(&mut reader) {
                    let mut stream = stream;
                    let body = [7_u8; 1000];
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n");
                    let _ = stream.write_all(&body);
                }
            }
        });
        address
    }

    #[test]
    fn counts_what_passes_and_does_wrong_as_told() {
        let proxy = Proxy::start(&upstream());
        let get = |path: &str| request(proxy.address(), "GET", path, &[], b"");
        assert_eq!(get("/v2/a/blobs/x").unwrap().body, [7; 1000]);
        proxy.fault(Fault::some("/blobs/x", 1, Wrong::Corrupt(500)));
        proxy.fault(Fault::some("/blobs/x", 1, Wrong::Truncate(10)));
        proxy.fault(Fault::some("/blobs/x", 1, Wrong::Status(429, vec![])));
        let corrupt = get("/v2/a/blobs/x").unwrap().body;
        assert_eq!((corrupt[499], corrupt[500]), (7, 0xf8));
        assert_eq!(get("/v2/a/blobs/x").unwrap().body.len(), 10);
        assert_eq!(get("/v2/a/blobs/x").unwrap().head.status(), 429);
        assert_eq!(get("/v2/a/blobs/x").unwrap().body, [7; 1000]);
        let count = Count {
            gets: 5,
            heads: 0,
            bytes: 3010,
        };
        // The client may have its bytes before they are counted.
        crate::wait_until("all is counted", 10, || {
            (proxy.blobs() == [("x".to_owned(), count)]).then_some(())
        });
    }

    #[test]
    fn holds_until_released() {
        let proxy = Proxy::start(&upstream());
        proxy.fault(Fault::always("/held", Wrong::Hold(100)));
        let address = proxy.address().to_owned();
        let reader = thread::spawn(move || request(&address, "GET", "/held", &[], b""));
        crate::wait_until("the answer is held", 10, || {
            (proxy.held() == 1).then_some(())
        });
        assert_eq!(proxy.counts()["/held"].bytes, 100);
        proxy.release();
        assert_eq!(reader.join().unwrap().unwrap().body.len(), 1000);
    }
}
