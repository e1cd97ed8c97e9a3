//! What goes to stdout (results) and stderr (everything said to a person), and how numbers look.

use std::io::{self, Write};

use serde::Serialize;

use crate::error::{Failure, OTHER};

/// Writes a line to stdout. A reader that went away (`| head`) ends the program without a word.
pub fn line(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let result = out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush());
    match result {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(Failure::silent(0)),
        Err(e) => Err(Failure::new(OTHER, format!("cannot write the output: {e}"))),
    }
}

/// Writes a value to stdout as JSON for machines.
pub fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::new(OTHER, format!("cannot write the output: {e}")))?;
    line(&text)
}

/// Writes a line to stderr. A closed stderr is nobody's concern.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes rows as columns; the last column is not padded.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let head: Vec<String> = head.iter().map(|h| (*h).to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let cells: Vec<String> = (row.iter().zip(&widths))
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        line(cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// Writes `name: value` lines with the values below each other.
pub fn facts(facts: &[(&str, String)]) -> Result<(), Failure> {
    let width = facts.iter().map(|(n, _)| n.len()).max().unwrap_or(0) + 1;
    for (name, value) in facts {
        line(&format!("{:<width$} {value}", format!("{name}:")))?;
    }
    Ok(())
}

/// The text without std's `(os error 2)`, which tells a person nothing.
pub fn plain(text: String) -> String {
    let Some((before, rest)) = text.split_once(" (os error ") else {
        return text;
    };
    match rest.split_once(')') {
        Some((number, after)) if number.bytes().all(|b| b.is_ascii_digit()) => {
            plain(format!("{before}{after}"))
        }
        _ => text,
    }
}

/// `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// `2026-01-31 12:00:00Z`, from RFC 3339; what is not a time stays as it is.
pub fn time(text: &str) -> String {
    match text.parse::<jiff::Timestamp>() {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        Err(_) => text.to_owned(),
    }
}

/// `sha256:` and the first twelve digits: what lists show and `inspect` and `rm` take.
pub fn short_digest(digest: &str) -> String {
    digest.chars().take("sha256:".len() + 12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_look_alike_everywhere() {
        assert_eq!(size(1536 << 20), "1.50 GiB");
        assert_eq!(time("2026-01-31T12:00:00.5Z"), "2026-01-31 12:00:00Z");
        assert_eq!(time("-"), "-");
        let text = "cannot read `x`: No such file (os error 2): and (os error x)";
        assert_eq!(
            plain(text.into()),
            "cannot read `x`: No such file: and (os error x)"
        );
        assert_eq!(
            short_digest("sha256:0123456789abcdef"),
            "sha256:0123456789ab"
        );
    }
}
