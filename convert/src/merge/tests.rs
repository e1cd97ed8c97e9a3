//! What the tests through whole layers cannot reach without millions of headers.

use super::*;
use crate::entries::{Header, XattrId};

/// A base layer with the symlink `s`, and a layer above that whites out `s/x` so many times.
fn whiteouts_behind(target: &[u8], count: u32) -> Entries {
    let mut entries = Entries::new(2);
    let header = |path, what| Header {
        path,
        what,
        mode: 0o777,
        uid: 0,
        gid: 0,
        mtime: 0,
        xattrs: XattrId::default(),
    };
    let link = entries.paths.intern(b"s").unwrap();
    let behind = entries.paths.intern(b"s/x").unwrap();
    let what = entries.add_target(target).unwrap();
    entries.headers.push(header(link, what));
    for _ in 0..count {
        entries.headers.push(header(behind, What::Whiteout));
    }
    entries.layers = vec![0..1, 1..count + 1];
    entries
}

#[test]
fn names_of_a_target_count_even_if_the_way_ends_before_them() {
    let target = [&b"missing"[..], &b"/.".repeat(2000)].concat();
    // One name down to the symlink, 2001 of its target, of which one is looked up.
    let cost = 2002;
    let run = |count, steps| merge_within(&mut whiteouts_behind(&target, count), steps);
    assert!(run(3, 3 * cost).is_ok());
    let misfit = run(3, 3 * cost - 1).unwrap_err();
    assert_eq!((misfit.header, misfit.error), (3, MergeError::Work));
}
