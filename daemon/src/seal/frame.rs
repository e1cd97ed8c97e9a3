//! Length-prefixed JSON and descriptors on a stream socket, for both ends. Knows nothing of what is said.

use std::io;

use serde::Serialize;

use super::protocol::MAX_FRAME;

/// `value` as a frame.
pub(super) fn encode<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut out = vec![0; 4];
    serde_json::to_writer(&mut out, value)?;
    let length = out.len() - 4;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a frame of {length} bytes, at most {MAX_FRAME} are allowed"),
        ));
    }
    out[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(out)
}

/// The length that a frame's first four bytes announce, if it is allowed.
pub(super) fn length(prefix: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(prefix) as usize;
    if length == 0 || length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes, expected 1 to {MAX_FRAME}"),
        ));
    }
    Ok(length)
}
