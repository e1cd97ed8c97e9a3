//! Layers that run ahead of those above them: the image, or the error, is the one that turns would have given.

use std::io::{PipeWriter, Write as _};

use berth_convert::job::{Done, Failure, Options};
use berth_convert::{Layer, convert};
use berth_image::Digest;

use crate::build::{Tar, head};
use crate::image::options;

/// One layer after another, on one thread; then all lower layers wholly before the first byte of the top one comes.
fn both_ways(layers: &[Vec<u8>], options: &Options) -> Result<Done, Failure> {
    let turns = run(layers, options, 1, Feed::TopFirst);
    let ahead = run(layers, options, 8, Feed::TopLast);
    assert_eq!(ahead, turns);
    turns
}

#[derive(Clone, Copy)]
enum Feed {
    TopFirst,
    TopLast,
    AllAtOnce,
}

fn run(layers: &[Vec<u8>], options: &Options, threads: usize, feed: Feed) -> Result<Done, Failure> {
    let (inputs, pens): (Vec<_>, Vec<_>) = layers
        .iter()
        .map(|layer| {
            let (input, pen) = std::io::pipe().unwrap();
            let input = Layer {
                input: std::os::fd::OwnedFd::from(input).into(),
                diff_id: Digest::of(layer),
            };
            (input, pen)
        })
        .unzip();
    std::thread::scope(|scope| {
        let mut rest: Vec<_> = pens.into_iter().zip(layers).collect();
        // A converter that has failed closes its end.
        let write = |(mut pen, layer): (PipeWriter, &Vec<u8>)| drop(pen.write_all(layer));
        match feed {
            Feed::AllAtOnce => rest.into_iter().for_each(|one| {
                scope.spawn(move || write(one));
            }),
            Feed::TopFirst | Feed::TopLast => {
                if let Feed::TopFirst = feed {
                    rest.reverse();
                }
                scope.spawn(move || rest.into_iter().for_each(write));
            }
        }
        let options = Options {
            threads,
            ..options.clone()
        };
        convert(
            inputs,
            tempfile::tempfile().unwrap(),
            tempfile::tempfile().unwrap(),
            &options,
            &mut |_| {},
        )
    })
}

fn noise(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    })
    .take(len)
    .collect()
}

#[test]
fn what_upper_layers_hide_and_bring_back() {
    let (large, small) = (noise(1, 700_000), noise(2, 3000));
    let mut base = Tar::new().dir("d").dir("opaque").dir("gone");
    for i in 0..300u32 {
        base = base
            .file(format!("d/{i}"), &noise(i, 1000 + i as usize))
            .file(format!("opaque/{i}"), &noise(i, 2000))
            .file(
                format!("gone/{i}"),
                &noise(i + 1000, 150_000 * (i % 2) as usize + 20),
            );
    }
    let base = base
        .file("large", &large)
        .file("small", &small)
        .hardlink("large-kept", "large")
        .hardlink("small-kept", "small")
        .file("zeros", &vec![0; 400_000])
        .hardlink("zeros-kept", "zeros")
        .file("twice", &large)
        .end();
    let middle = Tar::new()
        .file("d/.wh.7", &noise(9, 5000))
        .file(".wh..wh.aufs", &noise(10, 5000))
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/new", &small)
        .file("large", b"not any more")
        .file("d/8", &large)
        .end();
    let top = Tar::new()
        .file("small", b"nor this")
        .file("zeros", b"nor that")
        .file("gone", b"a file now")
        .add(head(b'0', "x").xattr("user.k", b"v"))
        .end();
    let done = both_ways(&[base, middle, top], &options()).unwrap();
    assert_eq!(done.entries, 299 + 12);
}

#[test]
fn the_topmost_error_is_told() {
    let good = Tar::new().file("f", &noise(1, 100_000)).end();
    let cut = |name: &str| {
        let mut layer = Tar::new()
            .file("before", b"x")
            .file(name, &noise(2, 50_000))
            .end();
        layer.truncate(20_000);
        layer
    };
    let told = |layers: &[Vec<u8>]| {
        let failure = both_ways(layers, &options()).unwrap_err();
        (failure.layer, failure.entry)
    };
    assert_eq!(
        told(&[cut("base"), good.clone()]),
        (Some(0), Some("base".into()))
    );
    assert_eq!(
        told(&[cut("base"), cut("top"), good.clone()]),
        (Some(1), Some("top".into()))
    );
    // Skipped by every engine, and still the layer's end.
    assert_eq!(told(&[cut(".wh..wh.x"), good.clone()]).0, Some(0));
    let bad = Tar::new().file("../escape", b"x").end();
    assert_eq!(told(&[cut("base"), bad, good]).0, Some(1));
}

#[test]
fn limits_count_all_layers_together() {
    let layer = |name: &str| Tar::new().file(name, &noise(3, 300_000)).end();
    let layers = [layer("a"), layer("b"), layer("c")];
    let mut options = options();
    options.limits.max_bytes = 2_000_000;
    both_ways(&layers, &options).unwrap();
    options.limits.max_bytes = 1_000_000;
    let failure = both_ways(&layers, &options).unwrap_err();
    assert_eq!(failure.layer, Some(0));
    options.limits.max_bytes = 2_000_000;
    options.limits.max_entries = 2;
    assert_eq!(both_ways(&layers, &options).unwrap_err().layer, Some(0));
}

#[test]
fn more_entries_than_may_wait() {
    let many = |layer: u32| {
        let mut tar = Tar::new();
        for i in 0..30_000u32 {
            tar = tar.file(format!("{}/{i}", i % 50), &layer.to_le_bytes());
        }
        tar.end()
    };
    let layers = [many(0), many(1), many(2)];
    let turns = run(&layers, &options(), 1, Feed::TopFirst).unwrap();
    assert_eq!(turns.entries, 30_050);
    // They wait for their turns instead.
    let ahead = run(&layers, &options(), 8, Feed::AllAtOnce).unwrap();
    assert_eq!(ahead, turns);
}
