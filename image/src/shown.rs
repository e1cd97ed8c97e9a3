//! Strangers' text in error lines: short, in one line, and nothing that a terminal obeys.

use std::fmt::Display;

/// Most characters shown of a text, escapes counted as what they are written with.
const MOST: usize = 240;

/// What of a string goes into an error line: its start, escaped as Rust's literals are.
pub fn clip(text: &str) -> String {
    let mut shown: String = text
        .chars()
        .take(120)
        .flat_map(char::escape_default)
        .collect();
    if text.chars().nth(120).is_some() || shown.len() > MOST {
        shown.truncate(MOST);
        shown.push('…');
    }
    shown
}

/// What a parser says of a text, which it may quote whole: how it begins, and where and what was expected at its end.
pub fn parse_error(error: &impl Display) -> String {
    let text = error.to_string();
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            ' '..='~' => shown.push(c),
            _ => shown.extend(c.escape_default()),
        }
    }
    match shown.len() > MOST {
        true => {
            let end = shown.len() - MOST / 2;
            format!("{}…{}", &shown[..MOST / 2], &shown[end..])
        }
        false => shown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_short_and_plain() {
        assert_eq!(clip("a\nb"), "a\\nb");
        assert_eq!(clip(&"é".repeat(300)).chars().count(), MOST + 1);
        assert_eq!(clip(&"x".repeat(121)).chars().count(), 121);
        let long = serde_json::to_string(&"é\u{7}\u{1b}[2J".repeat(1 << 16)).unwrap();
        let error = serde_json::from_str::<u8>(&long).unwrap_err();
        let shown = parse_error(&error);
        assert_eq!(shown.chars().count(), MOST + 1);
        assert!(!shown.contains(char::is_control));
        assert!(shown.starts_with("invalid type: string"), "{shown}");
        assert!(shown.contains(", expected u8 at line 1"), "{shown}");
        let short = serde_json::from_str::<u8>("\"a\"").unwrap_err();
        assert_eq!(parse_error(&short), short.to_string());
    }
}
