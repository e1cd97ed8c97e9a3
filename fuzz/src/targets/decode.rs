//! Bytes as a compressed layer. Pieces do not matter, and what another decoder makes of a gzip or zstd stream is what
//! we make of it.

use std::io::Read as _;

use berth_convert::decode::Decoder;

use super::Target;
use super::build::gzip;

pub const TARGET: Target = Target {
    name: "decode",
    run,
    seeds,
};

/// More is not looked at.
const MOST: usize = 1 << 20;

fn decode(data: &[u8], buffer: usize, piece: usize) -> Result<Vec<u8>, String> {
    let mut decoder = Decoder::new(data, buffer);
    let mut out = Vec::new();
    let mut chunk = vec![0; piece];
    loop {
        let n = decoder.fill(&mut chunk).map_err(|e| e.to_string())?;
        assert!(decoder.bytes_in() <= data.len() as u64);
        out.extend_from_slice(&chunk[..n]);
        if n < piece || out.len() >= MOST {
            out.truncate(MOST);
            return Ok(out);
        }
    }
}

fn run(data: &[u8]) {
    let ours = decode(data, 1 << 16, 1 << 14);
    assert_eq!(ours.is_ok(), decode(data, 5, 300).is_ok(), "pieces");
    let Ok(ours) = ours else { return };
    let mut theirs = Vec::new();
    let read = if data.starts_with(&[0x1f, 0x8b]) {
        flate2::read::MultiGzDecoder::new(data)
            .take(MOST as u64)
            .read_to_end(&mut theirs)
    } else if data.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let mut decoder = zstd::stream::read::Decoder::new(data).expect("a decoder");
        decoder.window_log_max(27).expect("a window");
        decoder.take(MOST as u64).read_to_end(&mut theirs)
    } else {
        return;
    };
    // Checksums are not ours to look at, so that theirs may refuse what we take.
    if read.is_ok() {
        assert_eq!(ours, theirs);
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let text = b"a layer, a layer, a layer".repeat(20);
    let zipped = gzip(&text);
    let mut named = zipped.clone();
    named[3] = 0x08;
    named.splice(10..10, *b"name\0");
    let frame = zstd::encode_all(&text[..], 3).expect("memory");
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 1, 2][..], &frame].concat();
    vec![
        text,
        [&zipped[..], &zipped, &[0; 20]].concat(),
        named,
        [&frame[..], &frame].concat(),
        skippable,
    ]
}
