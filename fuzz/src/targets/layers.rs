//! Bytes as layers, through a whole conversion: it ends with an error that says one line, or with an image that the
//! check before signing lets through, and both are the same however many layers are read at a time. Layers are divided
//! by a marker; each has the diff_id that its bytes have.

use berth_convert::job::{FailureKind, Options};
use berth_image::Digest;

use super::Target;
use super::build::{Tar, gzip, head};
use crate::image::{assert_sound, convert_blobs, options};

pub const TARGET: Target = Target {
    name: "layers",
    run,
    seeds,
};

const MARKER: &[u8] = b"<<layer>>";
const MOST_LAYERS: usize = 4;

fn split(data: &[u8]) -> Vec<Vec<u8>> {
    let mut layers = vec![Vec::new()];
    let mut at = 0;
    while at < data.len() {
        if data[at..].starts_with(MARKER) && layers.len() < MOST_LAYERS {
            layers.push(Vec::new());
            at += MARKER.len();
        } else {
            layers.last_mut().expect("one at least").push(data[at]);
            at += 1;
        }
    }
    layers
}

fn run(data: &[u8]) {
    // Compressed layers are the decoder's target; here every byte reaches the tar reader.
    let blobs: Vec<_> = (split(data).into_iter())
        .map(|layer| {
            let digest = Digest::of(&layer);
            (layer, digest)
        })
        .collect();
    let result = convert_blobs(&blobs, &options());
    if blobs.len() > 1 {
        let many = Options {
            threads: 6,
            ..options()
        };
        let same = convert_blobs(&blobs, &many);
        assert!(
            result == same,
            "with one task {result:?}, with three {same:?}"
        );
    }
    match result {
        Ok((image, done)) => {
            let found = assert_sound(&image, &done);
            assert_eq!(found.entries, done.entries);
        }
        Err(failure) => {
            assert!(
                failure.message.len() < 500 && !failure.message.contains('\n'),
                "{failure:?}"
            );
            assert!(
                failure
                    .entry
                    .is_none_or(|e| e.len() < 1000 && !e.contains('\n'))
            );
            let odd = matches!(failure.kind, FailureKind::Internal | FailureKind::DiskFull);
            // Compressed bytes have another diff_id than they were given here.
            assert!(!odd, "{}", failure.message);
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let base = Tar::new()
        .dir("d")
        .file("d/a", &[7; 5000])
        .file("d/b", b"b")
        .hardlink("h", "d/a")
        .symlink("s", "d");
    let upper = Tar::new()
        .file("d/.wh.a", b"")
        .file("s/new", b"n")
        .hardlink("h2", "d/b");
    let opaque = Tar::new()
        .file("d/.wh..wh..opq", b"")
        .file("d", b"a file now");
    let xattrs = (0..5).fold(Tar::new(), |tar, i| {
        tar.add(
            head(b'0', format!("x{i}"))
                .xattr(&format!("user.{i}"), "v")
                .owner(i, i),
        )
    });
    let join = |layers: &[Tar]| {
        let parts: Vec<_> = layers.iter().map(|l| l.clone().end()).collect();
        parts.join(MARKER)
    };
    vec![
        join(&[base.clone(), upper.clone()]),
        join(&[base.clone(), upper, opaque]),
        join(&[xattrs]),
        gzip(&base.end()),
    ]
}
