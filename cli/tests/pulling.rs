//! pull, prefetch, pulls, rm, images and status against a daemon of a few lines.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Site, error, events, http, pull, said};

const IMAGE: &str = "a.b/c:1";

/// A daemon that has everything at once.
fn ready(line: &str, body: &str) -> String {
    assert_eq!(line, "POST /v1/pulls");
    let reference: serde_json::Value = serde_json::from_str(body).unwrap();
    http(
        200,
        &pull("p", reference["reference"].as_str().unwrap(), "ready", None),
    )
}

#[test]
fn a_pull_is_followed_and_its_result_alone_goes_to_stdout() {
    let site = Site::new();
    let record = site.publish(IMAGE);
    let digest = record.manifest.to_string();
    let seen = site.daemon(move |line, _| match line {
        "POST /v1/pulls" => http(202, &pull("p1", IMAGE, "resolving", None)),
        "GET /v1/pulls/p1/events" => events(&[
            pull("p1", IMAGE, "fetching", Some(&record)),
            pull("p1", IMAGE, "fetching", Some(&record)),
            pull("p1", IMAGE, "ready", Some(&record)),
        ]),
        other => panic!("{other}"),
    });
    let done = site.berth(&["pull", "docker://a.b/c:1", "--platform", "linux/arm64"]);
    assert_eq!(done.code, Some(0), "{done:?}");
    assert_eq!(done.out, format!("{digest} {IMAGE}\n"));
    assert_eq!(
        done.err,
        "a.b/c:1: resolving\na.b/c:1: fetching, 512 B of 1.00 KiB\na.b/c:1: ready after 0 s\n"
    );
    assert_eq!(
        seen.all()[0],
        r#"POST /v1/pulls {"reference":"docker://a.b/c:1","platform":"linux/arm64","fresh":true}"#
    );

    let quiet = site.berth(&["--quiet", "pull", IMAGE]);
    assert_eq!(
        (quiet.out, quiet.err),
        (format!("{digest} {IMAGE}\n"), String::new())
    );
    let json = site.berth(&["--json", "pull", IMAGE]);
    let value: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(
        (&value[0]["state"], &value[0]["digest"]),
        (&"ready".into(), &digest.into())
    );
    assert_eq!(json.err, "");
}

#[test]
fn a_stream_that_breaks_and_a_daemon_that_forgot_are_no_failure() {
    let site = Site::new();
    let asked = AtomicUsize::new(0);
    site.daemon(move |line, _| match line {
        "POST /v1/pulls" => {
            let n = asked.fetch_add(1, Ordering::SeqCst);
            http(202, &pull(&format!("p{n}"), IMAGE, "fetching", None))
        }
        // Cut off in the middle of an event.
        "GET /v1/pulls/p0/events" => events(&[pull("p0", IMAGE, "fetching", None)]) + "data: {",
        "GET /v1/pulls/p0?wait=20" => error(404, "not-found", "no such pull", "x"),
        "GET /v1/pulls/p1/events" => error(500, "internal", "no events today", "x"),
        "GET /v1/pulls/p1?wait=20" => http(200, &pull("p1", IMAGE, "ready", None)),
        other => panic!("{other}"),
    });
    let done = site.berth(&["pull", IMAGE]);
    assert_eq!(done.code, Some(0), "{done:?}");
}

#[test]
fn a_registrys_refusal_is_printed_with_its_hint_and_code() {
    let site = Site::new();
    site.daemon(|line, _| match line {
        "POST /v1/pulls" => http(202, &pull("p", IMAGE, "resolving", None)),
        _ => {
            let mut failed: serde_json::Value =
                serde_json::from_str(&pull("p", IMAGE, "failed", None)).unwrap();
            failed["error"] = serde_json::json!({
                "kind": "unauthorized", "message": "a.b refuses anonymous access to c", "hint": "set [registry.\"a.b\"] credentials",
            });
            events(&[failed.to_string()])
        }
    });
    let done = site.berth(&["--quiet", "pull", IMAGE]);
    assert_eq!((done.code, done.out.as_str()), (Some(77), ""));
    assert_eq!(
        done.err,
        "berth: a.b refuses anonymous access to c\nhint: set [registry.\"a.b\"] credentials\n"
    );
}

#[test]
fn prefetch_tries_all_and_sums_up() {
    let site = Site::new();
    let seen = site.daemon(|line, body| match body.contains("bad") {
        true => error(404, "unknown-image", "a.b has no bad:1", "check the name"),
        false => ready(line, body),
    });
    std::fs::write(
        site.path("list"),
        "# ours\na.b/x:1\n\na.b/bad:1 # gone\nNOT//A/REF\na.b/y:1\n",
    )
    .unwrap();
    let done = site.berth(&["prefetch", "--file", "list", "a.b/z:1"]);
    assert_eq!(seen.all().len(), 4);
    // The order is the list's, whichever came first; failures of two kinds end with 1.
    assert_eq!(done.out, "- a.b/z:1\n- a.b/x:1\n- a.b/y:1\n");
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.err.contains("3 ready, 2 failed\n"), "{done:?}");
    assert!(
        done.err
            .contains("berth: a.b/bad:1: a.b has no bad:1\nhint: check the name\n"),
        "{done:?}"
    );
    assert!(
        done.err.contains("berth: `NOT//A/REF` names no registry"),
        "{done:?}"
    );

    let mut child = site
        .command(&["--json", "prefetch", "--file", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"a.b/x:1\na.b/bad:1\n")
        .unwrap();
    let done = said(child.wait_with_output().unwrap());
    let value: serde_json::Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(value[1]["error"]["message"], "a.b has no bad:1");
    assert_eq!(
        (done.code, value[0]["state"].as_str()),
        (Some(1), Some("ready"))
    );
}

#[test]
fn without_a_daemon_it_is_said_once_with_69() {
    let site = Site::new();
    let done = site.berth(&["prefetch", "a.b/x:1", "a.b/y:1"]);
    assert_eq!(done.code, Some(69), "{done:?}");
    assert!(
        done.err.starts_with("berth: no daemon: there is no socket"),
        "{done:?}"
    );
    assert_eq!(done.err.matches("berth: ").count(), 1, "{done:?}");
    // A socket that nobody listens on any more.
    drop(std::os::unix::net::UnixListener::bind(site.path("s")).unwrap());
    let done = site.berth(&["prefetch", "a.b/x:1", "a.b/y:1"]);
    assert_eq!(done.code, Some(69), "{done:?}");
    assert_eq!(
        done.err.matches("connection refused").count(),
        1,
        "{done:?}"
    );
}

#[test]
fn ctrl_c_ends_it_and_says_that_the_daemon_goes_on() {
    let site = Site::new();
    let (send, hold) = std::sync::mpsc::channel::<()>();
    let hold = std::sync::Mutex::new(hold);
    site.daemon(move |line, _| match line {
        "POST /v1/pulls" => http(202, &pull("p", IMAGE, "fetching", None)),
        // No answer until the test ends.
        _ => {
            let _ = hold.lock().unwrap().recv();
            String::new()
        }
    });
    let mut child = site
        .command(&["pull", IMAGE])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut first = String::new();
    err.read_line(&mut first).unwrap();
    assert!(first.starts_with("a.b/c:1: fetching"), "{first}");
    let killed = Command::new("/bin/kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    let mut rest = String::new();
    err.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(
        rest.starts_with("berth: interrupted; the daemon goes on with the pull\nhint: "),
        "{rest}"
    );
    drop(send);
}

#[test]
fn lists_are_tables_for_people_and_json_for_machines() {
    let site = Site::new();
    let record = site.publish(IMAGE);
    let digest = record.manifest.to_string();
    let image = serde_json::json!([{
        "digest": digest, "platform": "linux/amd64", "references": [IMAGE], "size": 3u64 << 30,
        "created_at": "2026-01-01T00:00:00Z", "path": "/p",
    }]);
    let known = digest.clone();
    let seen = site.daemon(move |line, _| match line {
        "GET /v1/images" => http(200, &image.to_string()),
        "GET /v1/pulls" => http(200, &format!("[{}]", pull("p", IMAGE, "fetching", None))),
        line if line.starts_with("DELETE") => match line.ends_with(&known) {
            true => http(200, "{}"),
            false => error(404, "not-found", "no such image", "x"),
        },
        other => panic!("{other}"),
    });
    let said = site.berth(&["images"]);
    let short = &digest[..19];
    assert_eq!(
        said.out,
        format!(
            "DIGEST               PLATFORM     SIZE      CREATED               REFERENCES\n{short}  linux/amd64  3.00 GiB  2026-01-01 00:00:00Z  a.b/c:1\n"
        )
    );
    let said = site.berth(&["images", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(value[0]["digest"], digest.as_str());
    let said = site.berth(&["pulls"]);
    assert!(said.out.contains("fetching  50%"), "{said:?}");

    let said = site.berth(&["rm", "a.b/unknown:1", IMAGE]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(
        !seen.all().iter().any(|r| r.starts_with("DELETE")),
        "a mistyped name removes nothing"
    );
    let said = site.berth(&["rm", IMAGE, short]);
    assert_eq!(
        (said.code, said.out),
        (Some(0), format!("removed {digest}\n"))
    );
}

#[test]
fn status_shows_the_daemons_figures() {
    let site = Site::new();
    site.daemon(|_, _| {
        http(
            200,
            r#"{"version":"0.1.0","started_at":"2026-01-01T00:00:00Z","store":"/s","store_uuid":"u","images":2,
            "image_bytes":1048576,"pulls_in_flight":1,"spool_bytes":0,"upstream_bytes":5,"conversions":2,"sealer":"ok"}"#,
        )
    });
    let said = site.berth(&["status"]);
    assert!(said.out.contains("images:    2, 1.00 MiB\n"), "{said:?}");
    assert_eq!(site.berth(&["status", "--json"]).code, Some(0));
}
