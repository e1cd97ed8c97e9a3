//! Bytes as one compressed block: what a decoder takes fits the room it was given, comes out the same twice, and has
//! nothing behind its end; what we compress comes back.

use berth_squashfs::compress::{Compression, Compressor, Decompressor};

use super::Target;

pub const TARGET: Target = Target {
    name: "blocks",
    run,
    seeds,
};

const KINDS: [Compression; 5] = [
    Compression::Zstd,
    Compression::Gzip,
    Compression::Lz4,
    Compression::Xz,
    Compression::Lzo,
];

fn decompress(kind: Compression, block: &[u8], room: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; room];
    let mut decoder = Decompressor::new(kind).expect("it can be read");
    let length = decoder.decompress(block, &mut out).ok()?;
    assert!(length <= room);
    out.truncate(length);
    Some(out)
}

fn run(data: &[u8]) {
    let [kind, room, block @ ..] = data else {
        return;
    };
    let kind = KINDS[usize::from(*kind) % KINDS.len()];
    // Metadata's, the default's, the largest, and less than most blocks need.
    let room = [8192, 131_072, 1 << 20, 100][usize::from(*room) % 4];
    if let Some(found) = decompress(kind, block, room) {
        assert_eq!(decompress(kind, block, room).as_ref(), Some(&found));
        // A raw LZ4 block ends where it ends: what follows is a part of it.
        if kind != Compression::Lz4 {
            let longer = [block, &[0]].concat();
            assert_eq!(decompress(kind, &longer, room), None, "{kind} with a tail");
        }
    }
    let Ok(mut compressor) = Compressor::new(kind, 1) else {
        return;
    };
    let mut small = Vec::new();
    if let Ok(true) = compressor.compress(block, &mut small) {
        let again = decompress(kind, &small, block.len());
        assert_eq!(again.as_deref(), Some(block));
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let text = b"a block of an image, a block of an image ".repeat(9);
    let mut seeds = Vec::new();
    for (i, kind) in (0u8..).zip(KINDS) {
        seeds.push([&[i, 0], &text[..]].concat());
        if let Ok(mut compressor) = Compressor::new(kind, 1) {
            let mut small = Vec::new();
            if let Ok(true) = compressor.compress(&text, &mut small) {
                seeds.push([&[i, 0], &small[..]].concat());
            }
        }
    }
    seeds
}
