//! Numbers in headers.

use super::TarError;

/// An octal field, or a base-256 one (GNU, star) when its first bit is set. Spaces and NULs around octal digits are
/// padding; a field of padding alone is 0.
pub(super) fn field(bytes: &[u8], what: &'static str) -> Result<i64, TarError> {
    match bytes.first() {
        Some(first) if first & 0x80 != 0 => base256(bytes).ok_or(TarError::Number(what)),
        _ => octal(bytes).ok_or(TarError::Number(what)),
    }
}

fn octal(bytes: &[u8]) -> Option<i64> {
    let padding = |b: &u8| *b == b' ' || *b == 0;
    let start = bytes
        .iter()
        .position(|b| !padding(b))
        .unwrap_or(bytes.len());
    let digits = &bytes[start..];
    let end = digits.iter().position(padding).unwrap_or(digits.len());
    digits[..end].iter().try_fold(0i64, |value, b| match b {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(b - b'0')),
        _ => None,
    })
}

/// Big-endian two's complement; the first byte gives seven bits, the highest of them the sign.
fn base256(bytes: &[u8]) -> Option<i64> {
    let first = bytes[0] & 0x7f;
    let negative = first & 0x40 != 0;
    let mut value = i128::from(if negative { first | 0x80 } else { first } as i8);
    for &b in &bytes[1..] {
        value = value << 8 | i128::from(b);
        if value > i128::from(i64::MAX) || value < i128::from(i64::MIN) {
            return None;
        }
    }
    i64::try_from(value).ok()
}

/// A decimal number that is not negative.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, b| match b {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(b - b'0')),
        _ => None,
    })
}

/// A pax time, `[-]seconds[.fraction]`, as the whole second at or before it.
pub(super) fn time(text: &[u8]) -> Option<i64> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let point = text.iter().position(|b| *b == b'.').unwrap_or(text.len());
    let whole = i64::try_from(decimal(&text[..point])?).ok()?;
    let fraction = text.get(point + 1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let later = fraction.iter().any(|b| *b != b'0');
    Some(match negative {
        true => (-whole).checked_sub(i64::from(later))?,
        false => whole,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_are_read_with_any_padding() {
        for (bytes, value) in [
            (&b"0000644\0"[..], 0o644),
            (b"   644 \0", 0o644),
            (b"644\0\0\0\0\0", 0o644),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"77777777777 ", 0o77_777_777_777),
        ] {
            assert_eq!(field(bytes, "x").unwrap(), value);
        }
        assert!(field(b"0000648\0", "x").is_err());
        assert!(field(b"-000644\0", "x").is_err());
    }

    #[test]
    fn base_256_holds_large_and_negative_numbers() {
        assert_eq!(field(b"\x80\0\0\0\0\0\x01\0", "x").unwrap(), 256);
        assert_eq!(field(b"\xff\xff\xff\xff\xff\xff\xff\xfe", "x").unwrap(), -2);
        assert_eq!(
            field(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", "x").unwrap(),
            i64::MAX
        );
        assert!(field(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", "x").is_err());
        assert!(field(b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "x").is_err());
    }

    #[test]
    fn times_round_down() {
        for (text, value) in [
            ("1.9", Some(1)),
            ("-1.5", Some(-2)),
            ("-1.0", Some(-1)),
            ("-0.1", Some(-1)),
            ("5.", Some(5)),
            ("", None),
            ("1e3", None),
            ("1.x", None),
        ] {
            assert_eq!(time(text.as_bytes()), value, "{text}");
        }
    }
}
