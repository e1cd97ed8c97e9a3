//! What works on the store itself: path and inspect without a daemon, store init, keys.

mod common;

use std::os::unix::fs::PermissionsExt;

use berth_image::{PrivateKey, Store, layout};
use common::{Site, error, exists, http, pull};

const IMAGE: &str = "a.b/c:1";

#[test]
fn a_path_is_found_with_the_daemon_down() {
    let site = Site::new();
    let record = site.publish(IMAGE);
    let path = site.data_file(&record).display().to_string();
    let said = site.berth(&["path", "docker://a.b/c:1"]);
    assert_eq!((said.code, said.out), (Some(0), format!("{path}\n")));
    assert!(
        said.err
            .contains("taking the store's image as of 2026-01-01 00:00:00Z"),
        "{}",
        said.err
    );

    // The path, the digest and its first digits stand for the image as well.
    let digest = record.manifest.to_string();
    for name in [path.as_str(), &digest, &digest[..19]] {
        let said = site.berth(&["path", name]);
        assert_eq!(
            (said.code, said.out, said.err.as_str()),
            (Some(0), format!("{path}\n"), ""),
            "{name}"
        );
    }
    let said = site.berth(&["path", "--json", &digest]);
    let value: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(
        (&value["path"], &value["digest"]),
        (&path.into(), &digest.into())
    );

    let said = site.berth(&["path", "a.b/other:1"]);
    assert_eq!(said.code, Some(69), "{said:?}");
    let said = site.berth(&["path", "sha256:00000000"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    let said = site.berth(&["path", IMAGE, "--platform", "linux/s390x"]);
    assert_eq!(said.code, Some(69), "{said:?}");
}

#[test]
fn a_path_is_pulled_with_the_daemon_up() {
    let site = Site::new();
    let record = site.publish(IMAGE);
    let path = site.data_file(&record).display().to_string();
    site.daemon(move |line, _| match line {
        "POST /v1/pulls" => http(200, &pull("p", IMAGE, "ready", Some(&record))),
        other => panic!("{other}"),
    });
    let said = site.berth(&["path", IMAGE]);
    assert_eq!((said.code, said.out), (Some(0), format!("{path}\n")));
}

#[test]
fn what_the_daemon_refuses_is_not_taken_from_the_store() {
    let site = Site::new();
    site.publish(IMAGE);
    site.daemon(|_, _| error(403, "denied", "the site does not allow a.b", "ask for it"));
    let said = site.berth(&["path", IMAGE]);
    assert_eq!((said.code, said.out.as_str()), (Some(77), ""));
    assert_eq!(
        said.err,
        "berth: the site does not allow a.b\nhint: ask for it\n"
    );
}

#[test]
fn a_record_that_no_trusted_key_signed_is_not_believed() {
    let site = Site::new();
    let record = site.publish(IMAGE);
    let store = Store::open(&site.path("store"), None, None).unwrap();
    let forged = record.seal(&PrivateKey::generate().unwrap()).unwrap();
    let place = layout::record(&record.manifest, &record.platform);
    store.publish_bytes(&place, &forged).unwrap();
    for command in ["path", "inspect"] {
        let said = site.berth(&[command, IMAGE]);
        assert_eq!((said.code, said.out.as_str()), (Some(1), ""), "{said:?}");
        assert!(
            said.err.contains("is not believed: signed by key"),
            "{said:?}"
        );
    }
    // A list leaves it out.
    let said = site.berth(&["images", "--json"]);
    assert_eq!(said.out, "[]\n");
}

#[test]
fn a_list_of_the_store_has_the_references_of_its_signed_entries() {
    let site = Site::new();
    let record = site.publish(IMAGE);
    let said = site.berth(&["images", "--json"]);
    let images: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(images[0]["digest"], record.manifest.to_string());
    let name = IMAGE.trim_start_matches("docker://");
    assert_eq!(images[0]["references"], serde_json::json!([name]));
}

#[test]
fn a_cut_off_file_is_not_handed_out() {
    let site = Site::new();
    let record = site.publish(IMAGE);
    std::fs::write(site.data_file(&record), "short").unwrap();
    let said = site.berth(&["path", IMAGE]);
    assert_eq!((said.code, said.out.as_str()), (Some(1), ""));
    assert!(
        said.err.contains("has 5 bytes, its record says 12288"),
        "{said:?}"
    );
}

#[test]
fn an_unmounted_store_is_told_as_such() {
    let site = Site::new();
    site.publish(IMAGE);
    std::fs::remove_file(site.path("store/FORMAT")).unwrap();
    let said = site.berth(&["path", IMAGE]);
    assert_eq!(said.code, Some(69), "{said:?}");
    assert!(said.err.contains("is the filesystem mounted?"), "{said:?}");
    assert!(said.err.contains("hint: mount it"), "{said:?}");
}

#[test]
fn inspect_shows_what_is_signed_and_hides_control_characters() {
    let site = Site::new();
    let record = site.publish(IMAGE);
    let said = site.berth(&["inspect", IMAGE]);
    assert_eq!(said.code, Some(0), "{said:?}");
    let key = site.key.public().id().to_string();
    for text in [
        record.manifest.to_string(),
        key,
        "PATH=/bin".into(),
        "EVIL=\\u{1b}[31m".into(),
        "left out device".into(),
    ] {
        assert!(said.out.contains(&text), "{text} in {}", said.out);
    }
    assert!(!said.out.contains('\x1b'));
    let said = site.berth(&["inspect", "--json", IMAGE]);
    let value: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(value["record"]["manifest"], record.manifest.to_string());

    let said = site.berth(&["inspect", "a.b/other:1"]);
    assert_eq!(said.code, Some(1));
    assert!(
        said.err.ends_with("hint: berth pull a.b/other:1\n"),
        "{said:?}"
    );
}

#[test]
fn init_makes_store_and_keys_once() {
    let site = Site::new();
    std::fs::remove_dir_all(site.path("store")).unwrap();
    std::fs::remove_file(site.path("site.pub")).unwrap();
    let said = site.berth(&["store", "init"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.out.contains("made: uuid"), "{said:?}");
    let mode = std::fs::metadata(site.path("site.key"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let before = std::fs::read(site.path("site.key")).unwrap();

    let said = site.berth(&["store", "init"]);
    assert!(
        said.code == Some(0) && said.out.contains("was there: uuid"),
        "{said:?}"
    );
    assert_eq!(std::fs::read(site.path("site.key")).unwrap(), before);

    // The public half can be had again; a pair that does not match is refused.
    std::fs::remove_file(site.path("site.pub")).unwrap();
    assert_eq!(site.berth(&["key", "generate"]).code, Some(0));
    assert!(exists(&site.path("site.pub")));
    let other = PrivateKey::generate().unwrap().public().to_pem().unwrap();
    std::fs::write(site.path("site.pub"), other).unwrap();
    let said = site.berth(&["key", "generate"]);
    assert_eq!(said.code, Some(78), "{said:?}");
    // A public key alone is somebody's: no new pair.
    std::fs::remove_file(site.path("site.key")).unwrap();
    let said = site.berth(&["key", "generate"]);
    assert_eq!(said.code, Some(78), "{said:?}");
    assert!(!exists(&site.path("site.key")));
}

#[test]
fn init_touches_no_folder_that_is_something_else() {
    let site = Site::new();
    std::fs::remove_file(site.path("store/FORMAT")).unwrap();
    let said = site.berth(&["store", "init"]);
    assert_eq!(said.code, Some(69), "{said:?}");
    std::fs::write(
        site.path("store/FORMAT"),
        "berth-store 1\nuuid: 0\nowner: another\n",
    )
    .unwrap();
    let said = site.berth(&["store", "init"]);
    assert_eq!(said.code, Some(78), "{said:?}");
    assert!(
        said.err.contains("belongs to `another`, not to `berthd`"),
        "{said:?}"
    );
}
