//! Layers that nobody means well with: each ends in bounded time and memory, with an error that names it.

use crate::build::{Tar, block, checksum, gzip, head, record};
use crate::image::{convert_blobs, convert_tars, options};
use berth_convert::job::{Done, Failure, FailureKind, Limits};
use berth_image::Digest;

#[track_caller]
fn refused(layer: Vec<u8>) -> Failure {
    let base = Tar::new().file("base", b"b").end();
    let failure = convert_tars(&[base, layer], &options())
        .map(|(_, done)| done)
        .unwrap_err();
    assert!(
        !failure.message.contains('\n') && failure.message.len() < 300,
        "{failure}"
    );
    failure
}

#[track_caller]
fn corrupt(layer: Vec<u8>, entry: Option<&str>, why: &str) {
    let failure = refused(layer);
    assert_eq!(failure.kind, FailureKind::CorruptLayer, "{failure}");
    assert_eq!(
        (failure.layer, failure.entry.as_deref()),
        (Some(1), entry),
        "{failure}"
    );
    assert!(failure.message.contains(why), "{failure}");
}

fn done(layers: &[Vec<u8>]) -> Done {
    convert_tars(layers, &options())
        .unwrap_or_else(|e| panic!("{e}"))
        .1
}

#[test]
fn names_that_lead_out() {
    for name in ["../x", "a/../../x", "/..", "a/.."] {
        corrupt(Tar::new().file(name, b"x").end(), Some(name), "`..`");
    }
    corrupt(
        Tar::new().hardlink("x", "../base").end(),
        Some("x"),
        "link target contains `..`",
    );
    // Absolute names are names in the image.
    assert_eq!(
        done(&[Tar::new().file("/etc/passwd", b"x").end()]).entries,
        2
    );
}

#[test]
fn symlinks_lead_nowhere_else() {
    let out = Tar::new()
        .symlink("out", "../../../etc")
        .file("out/x", b"x")
        .end();
    assert_eq!(done(&[out]).entries, 3);
    let ring = Tar::new()
        .symlink("a", "b")
        .symlink("b", "a")
        .file("a/x", b"x")
        .end();
    corrupt(ring, Some("a/x"), "more than 40 symlinks");
    let target = "a".repeat(5000);
    corrupt(
        Tar::new().symlink("l", &target).end(),
        Some("l"),
        "1 to 4095 bytes",
    );
    corrupt(
        Tar::new().symlink("l", "").end(),
        Some("l"),
        "1 to 4095 bytes",
    );
}

#[test]
fn hard_links_to_what_is_no_file() {
    corrupt(
        Tar::new().hardlink("x", "missing").end(),
        Some("x"),
        "does not exist",
    );
    corrupt(
        Tar::new().dir("d").hardlink("x", "d").end(),
        Some("x"),
        "is a folder",
    );
    corrupt(
        Tar::new().hardlink("x", ".").end(),
        Some("x"),
        "is a folder",
    );
    // Onto itself: nothing happens.
    assert_eq!(
        done(&[Tar::new().file("a", b"1").hardlink("a", "a").end()]).entries,
        1
    );
}

#[test]
fn odd_whiteouts() {
    for name in [".wh.", ".wh..", ".wh...", "d/.wh."] {
        corrupt(Tar::new().file(name, b"").end(), Some(name), "whiteout");
    }
    corrupt(
        Tar::new().file(".wh.d/x", b"").end(),
        Some(".wh.d/x"),
        ".wh.",
    );
    // AUFS's own files are skipped; the root cannot be hidden.
    let aufs = Tar::new()
        .dir(".wh..wh.plnk")
        .file(".wh..wh.plnk/1.2", b"x")
        .file(".wh..wh.aufs", b"")
        .end();
    assert_eq!(done(&[aufs]).entries, 0);
    let root = Tar::new().file(".wh..wh..opq", b"").file("x", b"").end();
    assert_eq!(done(&[Tar::new().file("y", b"").end(), root]).entries, 1);
}

#[test]
fn deep_and_long_names() {
    let deep = |n: usize| Tar::new().file("d/".repeat(n) + "f", b"x").end();
    corrupt(
        deep(4096),
        Some(&("d/".repeat(100) + "…")),
        "longer than 4095 bytes",
    );
    assert_eq!(done(&[deep(2047)]).entries, 2048);
    let long = "n".repeat(256);
    corrupt(
        Tar::new().file(&long, b"").end(),
        Some(&("n".repeat(200) + "…")),
        "longer than 255",
    );
    // Deeper through a symlink than any name can say.
    let under = Tar::new()
        .dir("d/".repeat(2000))
        .symlink("s", &"d/".repeat(2000))
        .file(String::from("s/") + &"e/".repeat(100) + "f", b"x")
        .end();
    let failure = refused(under);
    assert!(failure.message.contains("nested deeper"), "{failure}");
}

#[test]
fn cut_streams() {
    let whole = Tar::new().file("a", &[7; 3000]).file("b", &[8; 3000]).end();
    corrupt(
        whole[..700].to_vec(),
        Some("a"),
        "ends in the middle of a file's contents",
    );
    corrupt(
        whole[..3684].to_vec(),
        None,
        "ends in the middle of a header (after entry `a`)",
    );
    let zipped = gzip(&whole);
    let cut = (zipped[..zipped.len() - 9].to_vec(), Digest::of(&whole));
    let failure = convert_blobs(&[cut], &options()).unwrap_err();
    assert_eq!(
        (failure.kind, failure.layer),
        (FailureKind::CorruptLayer, Some(0)),
        "{failure}"
    );
    let mut flipped = zipped.clone();
    flipped[60] ^= 0x10;
    let failure = convert_blobs(&[(flipped, Digest::of(&whole))], &options()).unwrap_err();
    assert!(
        matches!(
            failure.kind,
            FailureKind::CorruptLayer | FailureKind::DigestMismatch
        ),
        "{failure}"
    );
    let failure = convert_blobs(&[(zipped, Digest::of(b"other"))], &options()).unwrap_err();
    assert_eq!(failure.kind, FailureKind::DigestMismatch);
}

#[test]
fn headers_that_lie() {
    let mut wrong = block(b'0', b"x", b"", [0o644, 0, 0, 0, 0]);
    wrong[0] = b'y';
    corrupt(wrong.to_vec(), None, "checksum");
    // A size of 8 EiB, of which nothing follows.
    let mut huge = block(b'0', b"x", b"", [0o644, 0, 0, 0, 0]);
    huge[124..136].copy_from_slice(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff");
    checksum(&mut huge);
    let failure = refused(huge.to_vec());
    assert_eq!(failure.kind, FailureKind::Limit, "{failure}");
    let mut negative = block(b'0', b"x", b"", [0o644, 0, 0, 0, 0]);
    negative[124..136].fill(0xff);
    checksum(&mut negative);
    corrupt(negative.to_vec(), None, "size");
    // A pax header of 1 GiB.
    let pax = block(b'x', b"pax", b"", [0o644, 0, 0, 1 << 30, 0]);
    corrupt(pax.to_vec(), None, "extended header of 1073741824 bytes");
    let mut chain = Tar::new();
    for _ in 0..100 {
        let text = record(b"comment", b"x");
        chain.raw(
            &block(b'x', b"pax", b"", [0o644, 0, 0, text.len() as u64, 0]),
            &text,
        );
    }
    corrupt(chain.end(), None, "too many extended headers");
    corrupt(Tar::new().add(head(b'V', "volume")).end(), None, "type `V`");
}

#[test]
fn sparse_files_that_lie() {
    let sparse = |map: &str, real: &str, stored: &[u8]| {
        let mut tar = Tar::new();
        let h = head(b'0', "s")
            .pax("GNU.sparse.map", map)
            .pax("GNU.sparse.size", real);
        tar.push(h, stored);
        tar.end()
    };
    assert_eq!(
        done(&[sparse("0,1,1000000,2", "2000000", b"abc")]).entries,
        1
    );
    for (map, real, why) in [
        ("0,3", "2", "behind its end"),
        ("5,1,0,2", "9", "overlap"),
        ("0,2", "9", "not as long"),
        ("0", "9", "pairs"),
        ("18446744073709551615,3", "9", "behind its end"),
    ] {
        corrupt(sparse(map, real, b"abc"), None, why);
    }
    let failure = refused(sparse("0,3", "9000000000000000000", b"abc"));
    assert_eq!(failure.kind, FailureKind::Limit, "{failure}");
}

#[test]
fn bombs_and_floods() {
    let mut few = options();
    few.limits = Limits {
        max_bytes: 1 << 20,
        max_entries: 100,
        max_ratio: 200,
    };
    let limit = |layer: Vec<u8>, why: &str| {
        let failure = convert_tars(&[layer], &few)
            .map(|(_, done)| done)
            .unwrap_err();
        assert_eq!(failure.kind, FailureKind::Limit, "{failure}");
        assert!(failure.message.contains(why), "{failure}");
    };
    limit(
        Tar::new().file("zeros", &vec![0; 2 << 20]).end(),
        "max_bytes",
    );
    let many = (0..200).fold(Tar::new(), |tar, i| tar.file(format!("f{i}"), b""));
    limit(many.end(), "max_entries");
    limit(
        Tar::new().file("d/".repeat(500) + "f", b"").end(),
        "max_entries",
    );
    let comment = head(b'0', "x").pax("comment", vec![b'c'; 700_000]);
    limit(
        Tar::new().add(comment.clone()).add(comment).end(),
        "max_bytes",
    );
    limit(
        Tar::new().file(".wh..wh.x", &vec![0; 2 << 20]).end(),
        "max_bytes",
    );
    let trailing = |length| [Tar::new().end(), vec![b't'; length]].concat();
    limit(trailing(2 << 20), "max_bytes");
    let failure = convert_tars(&[trailing(600_000), trailing(600_000)], &few)
        .map(|(_, done)| done)
        .unwrap_err();
    assert_eq!(failure.kind, FailureKind::Limit, "{failure}");
    assert!(convert_tars(&[trailing(600_000)], &few).is_ok());
    let whole = Tar::new().file("zeros", &vec![0; 70 << 20]).end();
    let bomb = (zstd::encode_all(&whole[..], 3).unwrap(), Digest::of(&whole));
    let failure = convert_blobs(&[bomb], &options())
        .map(|(_, done)| done)
        .unwrap_err();
    assert_eq!(failure.kind, FailureKind::Limit, "{failure}");
    assert!(failure.message.contains("max_ratio"), "{failure}");

    let flood = (0..5000).fold(head(b'0', "x"), |h, i| h.xattr(&format!("user.{i}"), b"v"));
    corrupt(Tar::new().add(flood).end(), None, "too many xattrs");
    let wide = head(b'0', "x").xattr("user.x", vec![b'v'; 70_000]);
    corrupt(Tar::new().add(wide).end(), Some("x"), "xattr");
}

#[test]
fn global_headers_hold_for_all_entries_but_do_not_pile_up() {
    let global = |tar: Tar, i: usize, size: usize| {
        let value = vec![b'v'; size];
        let records = crate::build::record(format!("SCHILY.xattr.user.g{i}").as_bytes(), &value);
        let numbers = [0, 0, 0, records.len() as u64, 0];
        let mut out = tar;
        (out.0).extend_from_slice(&crate::build::block(b'g', b"g", b"", numbers));
        out.0.extend_from_slice(&records);
        out.0.resize(out.0.len().next_multiple_of(512), 0);
        out
    };
    // The same name again and again is one xattr.
    let same = (0..40).fold(Tar::new(), |tar, _| global(tar, 0, 60_000).file("x", b""));
    let own = head(b'0', "own").xattr("user.g0", b"mine");
    let local = head(b'0', "x").xattr("user.g0", vec![b'v'; 60_000]);
    assert_eq!(
        done(&[same.add(own.clone()).end()]).verity_root,
        done(&[Tar::new().add(local).add(own).end()]).verity_root,
    );
    let many = (0..40).fold(Tar::new(), |tar, i| global(tar, i, 60_000).file("x", b""));
    corrupt(many.end(), None, "global extended headers");
}

#[test]
fn the_last_of_several_wins_and_devices_are_noted() {
    let twice = Tar::new()
        .file("x", b"first")
        .dir("x")
        .file("x/y", b"")
        .file("x", b"last")
        .add(head(b'3', "dev/null"))
        .add(head(b'4', "dev/sda"))
        .hardlink("dev/zero", "dev/null")
        .end();
    let done = done(&[twice]);
    assert_eq!(done.entries, 2);
    assert_eq!(
        done.notes,
        [
            "left out device nodes: 2, the first `dev/null` in layer 0",
            "left out hard links to device nodes: 1, the first `dev/zero` in layer 0",
        ]
    );
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let noise: Vec<u8> = (0..600_000u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let base = Tar::new()
        .dir("d")
        .file("d/noise", &noise)
        .file("d/zeros", &vec![0; 400_000])
        .file("hidden", &noise[..1000])
        .hardlink("kept", "hidden")
        .end();
    let upper = Tar::new()
        .file("hidden", b"not any more")
        .add(head(b'0', "x").xattr("user.k", b"v"))
        .end();
    let layers = [base, upper];
    let roots: Vec<String> = [1, 2, 7]
        .map(|threads| {
            let mut options = options();
            options.threads = threads;
            options.memory = 32 << 20 << (threads / 4);
            convert_tars(&layers, &options).unwrap().1.verity_root
        })
        .into();
    // Changes only when the writer, a compressor or this layer stack does: then every site's images differ from
    // those made before, which the changelog has to say.
    assert_eq!(roots, [PINNED; 3]);
}

const PINNED: &str = "d6524c77d08de42e29857f28d7acaa389672ea8c31599cf5ca28031e4aa6b3eb";
