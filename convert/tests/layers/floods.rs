//! Much of something: the program's time and memory stay bounded while a layer goes on and on. Each layer here is made
//! while it is read, so that this test's own memory does not grow either.

use std::io::{self, Read as _, Write};

use berth_convert::job::{Event, Failure, FailureKind, Limits, Options};

use crate::build::{Tar, head};
use crate::image::options;
use crate::program::{Layer, Ran, fed, finish, plain, start};

/// Bytes that a converter needs whatever it is given, with [`small`]'s options; debug builds included.
const BASE: u64 = 256 << 20;
/// Bytes an entry: the bar of issue 4.
const ENTRY: u64 = 400;

fn small(limits: Limits) -> Options {
    Options {
        limits,
        memory: 32 << 20,
        ..options()
    }
}

fn limits(max_entries: u64) -> Limits {
    Limits {
        max_bytes: 4 << 30,
        max_entries,
        max_ratio: 1000,
    }
}

#[track_caller]
fn failed(ran: &Ran) -> &Failure {
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
    match &ran.last {
        Event::Error(failure) => failure,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn limited(ran: &Ran, why: &str, entries: u64) {
    let failure = failed(ran);
    assert_eq!(failure.kind, FailureKind::Limit, "{failure}");
    assert_eq!(failure.layer, Some(0), "{failure}");
    assert!(failure.message.contains(why), "{failure}");
    let bound = BASE + ENTRY * entries;
    assert!(
        ran.peak < bound,
        "{} MiB of {}",
        ran.peak >> 20,
        bound >> 20
    );
}

/// A layer without end, one piece after the other.
fn endless(mut piece: impl FnMut(u64) -> Vec<u8> + Send + 'static) -> Layer {
    fed(move |out| (0..).try_for_each(|i| out.write_all(&piece(i))))
}

fn entry(tar: Tar) -> Vec<u8> {
    tar.0
}

#[test]
fn entries_without_end() {
    // One block an entry, in folders of 1000.
    let layer = endless(|i| entry(Tar::new().file(format!("d{}/f{i}", i / 1000), b"")));
    let ran = finish(start(vec![layer], &small(limits(1_000_000))));
    limited(&ran, "max_entries", 1_000_000);
    assert!(
        failed(&ran)
            .entry
            .as_deref()
            .is_some_and(|e| e.starts_with("d1000/")),
        "{ran:?}"
    );
}

#[test]
fn whiteouts_without_end() {
    let layer = endless(|i| entry(Tar::new().file(format!(".wh.f{i}"), b"")));
    let ran = finish(start(vec![layer], &small(limits(100_000))));
    limited(&ran, "max_entries", 2 * 100_000);
}

#[test]
fn deep_folders_without_end() {
    // Each entry has a path of its own, 2000 deep: the names that are implied count.
    let layer = endless(|i| entry(Tar::new().file(format!("{i}/") + &"d/".repeat(2000), b"")));
    let ran = finish(start(vec![layer], &small(limits(100_000))));
    limited(&ran, "max_entries", 2 * 100_000);
}

#[test]
fn xattrs_without_end() {
    // Each value is new: nothing is shared.
    let layer = endless(|i| {
        let value = [i.to_le_bytes().to_vec(), vec![b'v'; 60_000]].concat();
        entry(Tar::new().add(head(b'0', format!("f{i}")).xattr("user.x", value)))
    });
    let ran = finish(start(vec![layer], &small(limits(1_000_000))));
    limited(&ran, "xattr", 0);
}

#[test]
fn symlink_targets_without_end() {
    let layer = endless(|i| {
        let target = format!("{i}{}", "t".repeat(4000));
        entry(Tar::new().symlink(&format!("l{i}"), &target))
    });
    let ran = finish(start(vec![layer], &small(limits(1_000_000))));
    limited(&ran, "symlink targets", 0);
}

/// A ladder of links, each rung twice through the one below: 2^40 steps for who follows them all.
#[test]
fn links_that_lead_through_links() {
    let mut tar = Tar::new().dir("0");
    for i in 1..39 {
        tar = tar.symlink(&i.to_string(), &format!("{0}/../{0}/../{0}", i - 1));
    }
    for i in 0..20_000 {
        tar = tar.file(format!("38/f{i}"), b"");
    }
    let ran = finish(start(vec![plain(tar.end())], &small(limits(100_000))));
    let failure = failed(&ran);
    assert_eq!(failure.kind, FailureKind::CorruptLayer, "{failure}");
    assert_eq!(failure.entry.as_deref(), Some("38/f0"), "{failure}");
}

fn gzip_of_zeros(out: &mut dyn Write) -> io::Result<()> {
    let mut gzip = flate2::write::GzEncoder::new(out, flate2::Compression::best());
    let zeros = [0; 1 << 16];
    loop {
        gzip.write_all(&zeros)?;
    }
}

#[test]
fn bombs_end_by_their_ratio() {
    let ran = finish(start(vec![fed(gzip_of_zeros)], &small(limits(1000))));
    // Zeros end an archive; what follows is read to its end for the diff_id.
    limited(&ran, "max_ratio", 0);
    let frames = fed(|out| {
        let frame = zstd::encode_all(io::repeat(0).take(64 << 20), 3)?;
        loop {
            out.write_all(&frame)?;
        }
    });
    limited(
        &finish(start(vec![frames], &small(limits(1000)))),
        "max_ratio",
        0,
    );
}

#[test]
fn a_window_larger_than_memory_is_refused() {
    // A frame header that asks for a window of 2 GiB (RFC 8878, 3.1.1.1.2: exponent 21, mantissa 0).
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0, 0, 0];
    let ran = finish(start(vec![plain(frame.to_vec())], &small(limits(1000))));
    let failure = failed(&ran);
    assert_eq!(failure.kind, FailureKind::CorruptLayer, "{failure}");
    assert!(ran.peak < BASE, "{}", ran.peak >> 20);
}

#[test]
fn gzip_members_and_headers_without_end() {
    // Empty members: nothing comes out, and still it ends, because the pipe does.
    let member = crate::build::gzip(b"");
    let many = fed(move |out| out.write_all(&member.repeat(200_000)));
    let ran = finish(start(vec![many], &small(limits(1000))));
    // An empty archive, and the diff_id that `start` gives it.
    assert!(matches!(ran.last, Event::Done(_)), "{ran:?}");
    let mut named = b"\x1f\x8b\x08\x08\0\0\0\0\0\x03".to_vec();
    named.resize(32 << 20, b'n');
    let ran = finish(start(vec![plain(named)], &small(limits(1000))));
    let failure = failed(&ran);
    assert_eq!(failure.kind, FailureKind::CorruptLayer, "{failure}");
    assert!(ran.peak < BASE, "{}", ran.peak >> 20);
}
