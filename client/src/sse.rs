//! Server-sent events (HTML standard, section 9.2), as far as the daemon uses them: the data of each event.

use std::io::{self, BufRead};

/// Longest line and longest event taken, in bytes.
const MAX_EVENT: usize = 1 << 20;

/// The `data` of the next event; `None` at the end of the stream. Comments (keep-alives) and other fields are skipped.
pub(crate) fn next_data(stream: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut data: Option<String> = None;
    loop {
        let Some(line) = next_line(stream)? else {
            // An event that the end cut off is none.
            return Ok(None);
        };
        if line.is_empty() {
            if data.is_some() {
                return Ok(data);
            }
            continue;
        }
        let Some(value) = line.strip_prefix("data:") else {
            continue;
        };
        let value = value.strip_prefix(' ').unwrap_or(value);
        let all = data.get_or_insert_default();
        if !all.is_empty() {
            all.push('\n');
        }
        all.push_str(value);
        if all.len() > MAX_EVENT {
            return Err(too_long());
        }
    }
}

fn next_line(stream: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let mut limited = io::Read::take(&mut *stream, MAX_EVENT as u64);
    if limited.read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.pop_if(|b| *b == b'\n').is_none() {
        return match line.len() {
            MAX_EVENT.. => Err(too_long()),
            _ => Ok(None),
        };
    }
    line.pop_if(|b| *b == b'\r');
    String::from_utf8(line)
        .map(Some)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "an event that is not UTF-8"))
}

fn too_long() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("an event of more than {MAX_EVENT} bytes"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_end_with_an_empty_line_and_comments_are_none() {
        let mut text = &b": keep-alive\n\nevent: progress\ndata: {\"a\":1}\n\ndata:x\r\ndata: y\r\n\r\ndata: cut"[..];
        assert_eq!(next_data(&mut text).unwrap().as_deref(), Some("{\"a\":1}"));
        assert_eq!(next_data(&mut text).unwrap().as_deref(), Some("x\ny"));
        assert_eq!(next_data(&mut text).unwrap(), None);
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut endless = io::BufReader::new(io::repeat(b'x'));
        assert!(next_data(&mut endless).is_err());
    }
}
