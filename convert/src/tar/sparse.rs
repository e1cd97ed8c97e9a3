//! Sparse files: where the stored bytes belong. GNU's old format and pax 0.0, 0.1, 1.0.

use super::TarError;
use super::number::field;

/// Most segments of one file: 16 MiB of map.
pub const MAX_SEGMENTS: usize = 1 << 20;

/// A run of stored bytes at its place in the file; what lies between runs is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Refuses maps whose segments overlap, go backwards, reach past the file, or need other than `stored` bytes.
pub(super) fn check(map: &[Segment], real_size: u64, stored: u64) -> Result<(), TarError> {
    let (mut end, mut sum) = (0u64, 0u64);
    for segment in map {
        if segment.offset < end {
            return Err(TarError::Sparse("its parts overlap"));
        }
        end = segment
            .offset
            .checked_add(segment.length)
            .filter(|end| *end <= real_size)
            .ok_or(TarError::Sparse("a part lies behind its end"))?;
        sum += segment.length;
    }
    if sum != stored {
        return Err(TarError::Sparse(
            "its parts are not as long as what is stored",
        ));
    }
    Ok(())
}

/// Adds the segments of an old GNU header (`count` slots of 24 bytes); a slot that begins with NUL ends the map.
pub(super) fn old_slots(map: &mut Vec<Segment>, slots: &[u8]) -> Result<(), TarError> {
    for slot in slots.chunks_exact(24) {
        if slot[0] == 0 {
            break;
        }
        let value = |bytes| {
            let n = field(bytes, "sparse map").ok();
            n.and_then(|n| u64::try_from(n).ok())
                .ok_or(TarError::Number("sparse map"))
        };
        let (offset, length) = (value(&slot[..12])?, value(&slot[12..])?);
        if map.len() == MAX_SEGMENTS {
            return Err(TarError::Sparse("its map is too long"));
        }
        map.push(Segment { offset, length });
    }
    Ok(())
}
