//! Images that must not run: each with one line, an exit code, and nothing left over.

mod rig;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use berth_image::{Digest, Platform, PrivateKey, layout};
use rig::{Answer, Site, Step, Tree, UID, able, text};

fn refusal(site: &Site, fields: &[(&str, &OsStr)]) -> (u8, String) {
    let step = Step::start(site, fields);
    let refusal = step.ask(0, "/").refusal();
    step.end();
    site.wait_clean();
    let text = &refusal.1;
    assert!(
        text.starts_with("berth: ") && text.lines().count() <= 2,
        "{text}"
    );
    assert!(!text.contains("os error"), "{text}");
    refusal
}

fn site() -> (Site, Tree) {
    (Site::new(), Tree::new())
}

#[test]
fn records_that_nobody_trusted_signed() {
    if !able() {
        return;
    }
    let (site, tree) = site();
    let stranger = PrivateKey::generate().unwrap();
    let record = site.publish_with(&tree, |_| {}, &stranger);
    let (code, text) = refusal(&site, &[]);
    assert!(code == 77 && text.contains("trusted"), "{text}");
    // The entry of the reference is good, the record is not.
    site.publish(&tree);
    let dir = site
        .store()
        .join(layout::image_dir(&record.manifest, &Platform::host()));
    fs::write(dir.join(layout::RECORD), record.seal(&stranger).unwrap()).unwrap();
    let pins = format!("{}={}", rig::REFERENCE, record.manifest);
    let (code, text) = refusal(&site, &[("pins", pins.as_ref())]);
    assert!(code == 77 && text.contains("trusted"), "{text}");
    fs::write(dir.join(layout::RECORD), "{").unwrap();
    assert_eq!(refusal(&site, &[("pins", pins.as_ref())]).0, 77);
    fs::write(dir.join(layout::RECORD), vec![b' '; 3 << 20]).unwrap();
    assert_eq!(refusal(&site, &[("pins", pins.as_ref())]).0, 77);
}

#[test]
fn records_of_another_image_or_platform() {
    if !able() {
        return;
    }
    let (site, tree) = site();
    let record = site.publish_with(&tree, |r| r.manifest = Digest::of(b"another"), &site.key);
    drop(record);
    let (code, text) = refusal(&site, &[]);
    assert!(code == 77 && text.contains("record of"), "{text}");
    let change = |r: &mut berth_image::Record| r.platform = "linux/s390x".parse().unwrap();
    site.publish_with(&tree, change, &site.key);
    let (code, text) = refusal(&site, &[]);
    assert!(code == 77 && text.contains("linux/s390x"), "{text}");
}

#[test]
fn data_files_that_are_not_what_the_record_says() {
    if !able() {
        return;
    }
    let (site, tree) = site();
    let record = site.publish(&tree);
    let data = site.data_file(&record);
    let good = fs::read(&data).unwrap();

    File::options()
        .write(true)
        .open(&data)
        .unwrap()
        .set_len(good.len() as u64 - 4096)
        .unwrap();
    let (code, text) = refusal(&site, &[]);
    assert!(
        code == 69 && text.contains("bytes, its record says"),
        "{text}"
    );

    fs::write(&data, vec![0; good.len()]).unwrap();
    let (code, text) = refusal(&site, &[]);
    assert!(code == 70 && text.contains("kernel refused"), "{text}");

    fs::write(&data, &good).unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o664)).unwrap();
    let (code, text) = refusal(&site, &[]);
    assert!(code == 77 && text.contains("written by others"), "{text}");

    fs::set_permissions(&data, fs::Permissions::from_mode(0o644)).unwrap();
    chown(&data, Some(UID), None).unwrap();
    assert_eq!(refusal(&site, &[]).0, 77);

    chown(&data, Some(0), None).unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o600)).unwrap();
    let (code, text) = refusal(&site, &[]);
    assert!(code == 77 && text.contains("permission denied"), "{text}");

    fs::remove_file(&data).unwrap();
    assert_eq!(refusal(&site, &[]).0, 69);
    let target = site.path("elsewhere");
    fs::write(&target, &good).unwrap();
    std::os::unix::fs::symlink(&target, &data).unwrap();
    assert_eq!(
        refusal(&site, &[]).0,
        69,
        "a link in the store is not followed"
    );
}

#[test]
fn names_that_are_none() {
    if !able() {
        return;
    }
    let (site, tree) = site();
    let record = site.publish(&tree);
    for wrong in [
        "/home/u/image.sqsh",
        "docker://",
        "UPPER/case",
        "noregistry",
        "oras://x.y/z",
        "a b",
        "\x1b[2J",
    ] {
        let (code, text) = refusal(&site, &[("reference", wrong.as_ref())]);
        assert_eq!(code, 2, "{wrong}: {text}");
        assert!(!text.contains('\x1b'), "{text:?}");
    }
    let unknown = "docker://registry.example/other:1";
    let (code, text) = refusal(&site, &[("reference", unknown.as_ref())]);
    assert!(code == 69 && text.contains("other:1"), "{text}");
    // What `berth path` prints, and the digest, mean the image.
    let path = site.data_file(&record);
    let digest = format!("registry.example/demo/tools@{}", record.manifest);
    for good in [path.as_os_str(), digest.as_ref()] {
        let step = Step::start(&site, &[("reference", good)]);
        assert_eq!(text_of(&step, "echo in $OF_IMAGE"), "in yes");
        step.end();
    }
    let step = Step::start(&site, &[]);
    assert_eq!(text_of(&step, "echo $OF_IMAGE"), "yes");
}

fn text_of(step: &Step, script: &str) -> String {
    text(&step.run(script))
}

#[test]
fn a_pin_decides_over_the_tag() {
    if !able() {
        return;
    }
    let (site, tree) = site();
    fs::write(tree.at("opt/version"), "old").unwrap();
    let old = site.publish(&tree);
    fs::write(tree.at("opt/version"), "new").unwrap();
    site.publish(&tree);
    let pins = format!("{}={}", rig::REFERENCE, old.manifest);
    let step = Step::start(&site, &[("pins", pins.as_ref())]);
    assert_eq!(text_of(&step, "cat /opt/version"), "old");
    let step = Step::start(&site, &[]);
    assert_eq!(text_of(&step, "cat /opt/version"), "new");
}

/// Where an image in the store is served on demand the daemon is asked for a grant, as a second source: no start waits for
/// one that says nothing. (What ends this one is that no node service runs here.)
#[test]
fn a_silent_daemon_holds_no_start_up_that_can_do_without_it() {
    if !able() {
        return;
    }
    let (mut site, tree) = site();
    site.node = format!(
        "mount = 'lazy'\n{}[node.service]\nsocket = '{}'\n",
        site.node,
        site.path("none.sock").display()
    );
    let record = site.publish(&tree);
    let silent = UnixListener::bind(site.path("no.sock")).unwrap();
    fs::set_permissions(site.path("no.sock"), fs::Permissions::from_mode(0o666)).unwrap();
    let pins = format!("{}={}", rig::REFERENCE, record.manifest);
    let begun = Instant::now();
    let (code, text) = refusal(&site, &[("pins", pins.as_ref())]);
    assert!(code == 69 && text.contains("no node service"), "{text}");
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "it was waited for"
    );
    silent.set_nonblocking(true).unwrap();
    silent.accept().expect("it was asked");
    let error = silent.accept().expect_err("and only once");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn configurations_and_keys_that_others_can_write() {
    if !able() {
        return;
    }
    let (site, tree) = site();
    site.publish(&tree);
    let key = site.path("site.pub");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o666)).unwrap();
    let (code, text) = refusal(&site, &[]);
    assert!(code == 78 && text.contains("site.pub"), "{text}");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    chown(&key, Some(UID), None).unwrap();
    assert_eq!(refusal(&site, &[]).0, 78);
    chown(&key, Some(0), None).unwrap();
    chown(site.folder.path(), Some(UID), None).unwrap();
    assert_eq!(refusal(&site, &[]).0, 78, "the folder above is the user's");
    chown(site.folder.path(), Some(0), None).unwrap();
    assert!(matches!(
        Step::start(&site, &[]).ask(0, "/").answer(),
        Answer::Ready { .. }
    ));
}

#[test]
fn bad_mounts_are_named() {
    if !able() {
        return;
    }
    let (mut site, tree) = site();
    site.publish(&tree);
    for wrong in ["relative", "/a:/b:rx", "/a:/b:ro:x", ":"] {
        let (code, text) = refusal(&site, &[("mount", wrong.as_ref())]);
        assert!(code == 2 && text.contains("--container-mounts"), "{text}");
    }
    let (code, text) = refusal(&site, &[("mount", "/no/such:/x".as_ref())]);
    assert!(code == 2 && text.contains("/no/such"), "{text}");
    site.node = format!("user_mounts = false\n{}", site.node);
    let (code, text) = refusal(&site, &[("mount", "/tmp".as_ref())]);
    assert!(code == 2 && text.contains("not allowed"), "{text}");
}

#[test]
fn a_data_file_that_is_not_the_stores_owners() {
    if !able() {
        return;
    }
    let somebody = 33;
    let (site, tree) = site();
    let record = site.publish(&tree);
    chown(site.data_file(&record), Some(somebody), None).unwrap();
    let (code, text) = refusal(&site, &[]);
    assert!(
        code == 77 && text.contains("does not belong to the store's owner"),
        "{text}"
    );
    let format = site.store().join(layout::FORMAT);
    chown(&format, Some(somebody), None).unwrap();
    let step = Step::start(&site, &[]);
    assert_eq!(text_of(&step, "echo $OF_IMAGE"), "yes");
    // Root may have put it back from a copy.
    chown(site.data_file(&record), Some(0), None).unwrap();
    let step = Step::start(&site, &[]);
    assert_eq!(text_of(&step, "echo $OF_IMAGE"), "yes");
}

#[test]
fn a_record_that_is_older_than_one_seen_before() {
    if !able() {
        return;
    }
    let (site, tree) = site();
    let old = site.publish(&tree);
    let path = site.data_file(&old).with_file_name(layout::RECORD);
    let mut new = old.clone();
    new.serial = 2;
    let envelopes = [&old, &new].map(|record| record.seal(&site.key).unwrap());
    fs::write(&path, &envelopes[1]).unwrap();
    assert_eq!(text_of(&Step::start(&site, &[]), "echo $OF_IMAGE"), "yes");
    fs::write(&path, &envelopes[0]).unwrap();
    let (code, text) = refusal(&site, &[]);
    assert!(
        code == 77 && text.contains("serial is 1") && text.contains("seen 2"),
        "{text}"
    );
    fs::remove_dir_all(site.path("run").join("serials")).unwrap();
    assert_eq!(text_of(&Step::start(&site, &[]), "echo $OF_IMAGE"), "yes");
}

#[test]
fn a_run_folder_that_others_can_replace() {
    if !able() {
        return;
    }
    let (site, tree) = site();
    site.publish(&tree);
    let between = site.path("between");
    fs::create_dir(&between).unwrap();
    symlink(between.join("run"), site.path("run")).unwrap();
    fs::create_dir(between.join("run")).unwrap();
    chown(&between, Some(UID), None).unwrap();
    let (code, text) = refusal(&site, &[]);
    assert!(code == 78 && text.contains("between"), "{text}");
}
