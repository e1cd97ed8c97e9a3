//! Bytes as a trace of an image: what is taken names chunks that the image has, each once and not too many, and is
//! written as it was read.

use berth_image::digest::hex;
use berth_image::trace::{CHUNK, Trace, most_chunks};

use super::Target;

pub const TARGET: Target = Target {
    name: "trace",
    run,
    seeds,
};

const ROOT: [u8; 32] = [7; 32];

fn run(data: &[u8]) {
    // The image's size first, up to 64 TiB.
    let Some((size, text)) = data.split_first_chunk::<4>() else {
        return;
    };
    let hash_offset = u64::from(u32::from_le_bytes(*size)) * (CHUNK / 4);
    let Ok(trace) = Trace::from_json(&ROOT, hash_offset, text) else {
        return;
    };
    let chunks = hash_offset.div_ceil(CHUNK);
    let mut runs = trace.runs().to_vec();
    runs.sort_by_key(|run| run.start);
    let mut before = 0;
    for run in &runs {
        assert!(run.start >= before && run.start < run.end && u64::from(run.end) <= chunks);
        before = run.end;
    }
    assert!(trace.bytes() <= most_chunks(hash_offset) * CHUNK);
    let again = Trace::from_json(&ROOT, hash_offset, trace.to_json().as_bytes());
    assert_eq!(again.expect("what was written can be read"), trace);
}

fn seeds() -> Vec<Vec<u8>> {
    let root = hex(&ROOT);
    [
        "[]",
        "[[7,1],[0,2]]",
        "[[0,2500]]",
        "[[4294967295,4294967295]]",
    ]
    .map(|runs| {
        let text =
            format!(r#"{{"format":1,"verity_root":"{root}","chunk_bytes":{CHUNK},"runs":{runs}}}"#);
        [&40_000u32.to_le_bytes(), text.as_bytes()].concat()
    })
    .into()
}
