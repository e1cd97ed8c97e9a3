//! A daemon of few words: a file's ranges by HTTP, for who shows the right grant.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

pub struct Ranges {
    pub url: String,
    sent: Arc<AtomicUsize>,
    gone: Arc<AtomicBool>,
}

impl Ranges {
    /// Serves until the test's process ends.
    pub fn serve(file: Vec<u8>, grant: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/data", listener.local_addr().unwrap());
        let (file, sent) = (Arc::new(file), Arc::new(AtomicUsize::new(0)));
        let (counter, grant) = (Arc::clone(&sent), format!("Berth-Grant {grant}"));
        let gone = Arc::new(AtomicBool::new(false));
        let is_gone = Arc::clone(&gone);
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (file, sent, grant) = (Arc::clone(&file), Arc::clone(&counter), grant.clone());
                let gone = Arc::clone(&is_gone);
                // Who goes away in the middle is none of ours.
                std::thread::spawn(move || answer(&connection, &file, &grant, (&sent, &gone)));
            }
        });
        Self { url, sent, gone }
    }

    /// From now on nobody gets an answer.
    pub fn go(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }

    /// Bytes so far.
    pub fn sent(&self) -> usize {
        self.sent.load(Ordering::SeqCst)
    }
}

fn answer(
    mut connection: &TcpStream,
    file: &[u8],
    grant: &str,
    (sent, gone): (&AtomicUsize, &AtomicBool),
) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection.try_clone()?).lines();
    loop {
        let (mut range, mut granted, mut begun) = (None, false, false);
        for line in lines.by_ref() {
            let line = line?;
            if line.is_empty() {
                break;
            }
            begun = true;
            let Some((name, value)) = line.split_once(": ") else {
                continue;
            };
            match name.to_ascii_lowercase().as_str() {
                "range" => {
                    range = value
                        .strip_prefix("bytes=")
                        .and_then(|r| r.split_once('-'))
                        .map(|(from, to)| {
                            (from.parse::<usize>().unwrap(), to.parse::<usize>().unwrap())
                        })
                }
                "authorization" => granted = value == grant,
                _ => {}
            }
        }
        match (begun && !gone.load(Ordering::SeqCst), range) {
            (false, _) => return Ok(()),
            (true, Some((from, to))) if granted && to < file.len() => {
                let (part, all) = (&file[from..=to], file.len());
                let head = format!(
                    "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{to}/{all}\r\n\r\n",
                    part.len()
                );
                sent.fetch_add(part.len(), Ordering::SeqCst);
                connection.write_all(head.as_bytes())?;
                connection.write_all(part)?;
            }
            (true, _) => {
                connection.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")?;
            }
        }
    }
}
