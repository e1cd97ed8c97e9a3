//! Conversion as a site sees it: its policy and limits, a converter that is in an attacker's hands, a sealer that not
//! everybody may ask.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::thread;

use berth_tests::cluster::{unique, write_executable};
use berth_tests::image::{Layer, Pushed, noise};
use berth_tests::suite::{container, suite};
use berth_tests::{Cluster, Ended, Image, Options, wait_until};
use serde_json::Value;

fn pull(cluster: &Cluster, image: &Pushed) -> Ended {
    cluster.berth(&["pull", &format!("docker://{}", image.name)])
}

fn push(cluster: &Cluster, what: &str, layer: &Layer) -> Pushed {
    let name = format!("test/{what}-{}:1", unique());
    Image::shell(what)
        .layer(layer)
        .push(cluster.registry(), &name)
}

/// The signed record of an image, as `berth inspect` gives it.
fn record(cluster: &Cluster, image: &Pushed) -> Value {
    let ended = cluster.berth(&["inspect", "--json", &format!("docker://{}", image.name)]);
    let all: Value = serde_json::from_str(ended.ok()).unwrap();
    all["record"].clone()
}

#[track_caller]
fn nothing_published(cluster: &Cluster, image: &Pushed) {
    let hex = image.digest.trim_start_matches("sha256:");
    let (images, unfinished) = cluster.published();
    let found: Vec<_> = (images.iter())
        .filter(|path| path.to_string_lossy().contains(hex))
        .chain(&unfinished)
        .collect();
    assert!(found.is_empty(), "{found:?}");
}

/// A file that is its owner's alone, one that runs as its owner, and a folder that is closed.
fn private() -> Layer {
    Layer::new()
        .entry("closed/", b'5', 0o700, "", b"")
        .file("closed/secret", b"read me", 0o600)
        .file("bin/tool", b"#!/bin/sh\necho tool\n", 0o4755)
}

const LOOK: &str = "cat /closed/secret; stat -c %a:%u /bin/tool";

#[test]
fn by_default_users_read_everything_and_nothing_is_set_id() {
    let cluster = &suite().cluster;
    let image = push(cluster, "private", &private());
    pull(cluster, &image).ok();
    let words = [&container(&image.name), "sh", "-c", LOOK];
    assert_eq!(cluster.user("srun", &words).end().ok(), "read me755:0");
    let made = &record(cluster, &image)["conversion"];
    assert_eq!(made["ownership"], "readable");
    assert_eq!(made["keep_setid"], false);
    assert_eq!(made["keep_xattrs"], serde_json::json!(["user."]));
    let told = cluster.berth(&["inspect", &format!("docker://{}", image.name)]);
    assert!(told.ok().contains("ownership readable"), "{told}");
}

#[test]
fn a_site_keeps_modes_reads_back_and_sets_limits() {
    let options = Options::new(&["--nodes", "1"])
        .setting("convert.ownership=\"keep\"")
        .setting("convert.read_back=true")
        .setting("convert.keep_xattrs=[]")
        .setting("convert.limits.max_bytes=20000000")
        .setting("convert.limits.max_entries=500");
    let cluster = Cluster::own("test-policy", &options);
    let image = push(&cluster, "kept", &private());
    pull(&cluster, &image).ok();
    let words = [&container(&image.name), "sh", "-c", LOOK];
    let ended = cluster.user("srun", &words).end();
    assert!(ended.says("Permission denied"), "{ended}");
    let made = &record(&cluster, &image)["conversion"];
    assert_eq!(made["ownership"], "keep");
    assert_eq!(made["keep_xattrs"], serde_json::json!([]));
    let told = cluster.berth(&["inspect", &format!("docker://{}", image.name)]);
    assert!(told.ok().contains("ownership keep"), "{told}");

    let many = (0..600).fold(Layer::new(), |layer, i| {
        layer.file(&format!("f{i}"), b"", 0o644)
    });
    let large = Layer::new().file("large", &vec![0; 30_000_000], 0o644);
    for (layer, limit, entry) in [
        (many, "convert.limits.max_entries", "f"),
        (large, "convert.limits.max_bytes", "large"),
    ] {
        let image = push(&cluster, "limit", &layer);
        let ended = pull(&cluster, &image);
        ended.failed();
        assert!(ended.says(limit), "{ended}");
        assert!(
            ended.says("layer 2") && ended.says(&format!("`{entry}")),
            "{ended}"
        );
        nothing_published(&cluster, &image);
    }
}

/// Stands in the converter's place. `mode`, a file beside it, says what it does; most of it is done by the real one,
/// so that what comes out is nearly right.
const HOSTILE: &str = r#"#!/usr/bin/python3
import json, os, subprocess, sys
folder = os.path.dirname(os.path.abspath(sys.argv[0]))
mode = open(folder + "/mode").read()
job = json.load(sys.stdin)

def real():
    fds = [job["output_fd"], job["spill_fd"]] + [layer["fd"] for layer in job["layers"]]
    done = subprocess.run([folder + "/real"], input=json.dumps(job).encode(), pass_fds=fds, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])

def say(event):
    print(json.dumps(event), flush=True)

def drain():
    for layer in job["layers"]:
        while os.read(layer["fd"], 1 << 20):
            pass

def flip(at):
    byte = os.pread(job["output_fd"], 1, at)[0]
    os.pwrite(job["output_fd"], bytes([byte ^ 1]), at)

if mode == "set-id":
    job["options"]["policy"].update(keep_setid=True, ownership="keep")
    say(real())
elif mode == "other layers":
    drain()
    say({"done": {"squashfs_size": 0, "hash_offset": 0, "file_size": 0, "verity_root": "00" * 32, "diff_ids": [],
                  "entries": 0, "notes": []}})
elif mode == "garbage":
    drain()
    os.write(job["output_fd"], b"hsqs" + os.urandom(1 << 20))
    say({"done": {"squashfs_size": 4096, "hash_offset": 4096, "file_size": 1 << 20, "verity_root": "00" * 32,
                  "diff_ids": [layer["diff_id"] for layer in job["layers"]], "entries": 1, "notes": []}})
elif mode == "root":
    event = real()
    event["done"]["verity_root"] = "11" * 32
    say(event)
elif mode == "tree":
    event = real()
    flip(event["done"]["file_size"] - 4096)
    say(event)
elif mode == "metadata":
    event = real()
    # The inode table's first block.
    flip(int.from_bytes(os.pread(job["output_fd"], 8, 64), "little") + 10)
    say(event)
elif mode == "contents":
    event = real()
    flip(4096)
    say(event)
elif mode == "longer":
    event = real()
    os.pwrite(job["output_fd"], b"x" * 4096, event["done"]["file_size"])
    say(event)
elif mode == "silent":
    drain()
elif mode == "shouts":
    while True:
        say({"warning": "w" * 1000})
elif mode == "reports":
    while True:
        say({"progress": {"bytes_in": 1, "bytes_out": 1, "entries": 1}})
elif mode == "one long line":
    while True:
        sys.stdout.write("x" * 65536)
elif mode == "nonsense":
    print("this is no JSON", flush=True)
elif mode == "count":
    with open(folder + "/count", "a") as count:
        count.write("x")
    # Until somebody opens the other end.
    open(folder + "/go").read()
    say(real())
else:
    say(real())
"#;

/// A cluster whose converter is [`HOSTILE`]; and the folder it lies in.
fn with_hostile_converter(name: &str, settings: &[&str]) -> (Cluster, PathBuf) {
    let folder = PathBuf::from(format!("/var/tmp/berth-test-converter-{}", unique()));
    fs::create_dir(&folder).unwrap();
    write_executable(&folder.join("berth-convert"), HOSTILE);
    let path = folder.join("berth-convert");
    let converter = format!("seal.converter=\"{}\"", path.display());
    let options = (settings.iter()).fold(
        Options::new(&["--nodes", "1"]).setting(&converter),
        |options, setting| options.setting(setting),
    );
    let cluster = Cluster::own(name, &options);
    fs::copy(
        cluster.folder().join("bin/berth-convert"),
        folder.join("real"),
    )
    .unwrap();
    (cluster, folder)
}

#[test]
fn what_a_hostile_converter_makes_is_not_signed() {
    let (cluster, folder) = with_hostile_converter("test-hostile", &["convert.read_back=true"]);
    let layer = private().file("big", &noise(3, 300_000), 0o644);
    for (mode, says) in [
        ("set-id", "a set-id file"),
        ("other layers", "its layers are not the configuration's"),
        ("garbage", "must not be signed"),
        ("root", "not as the converter described it"),
        ("tree", "its hash tree"),
        ("metadata", "must not be signed"),
        ("contents", "must not be signed"),
        ("longer", "its size is"),
        ("silent", "the converter failed"),
        ("shouts", "the converter failed"),
        ("reports", "the converter failed"),
        ("one long line", "the converter failed"),
        ("nonsense", "the converter failed"),
    ] {
        fs::write(folder.join("mode"), mode).unwrap();
        // An image of its own: a failure is remembered for a while.
        let image = push(
            &cluster,
            "hostile",
            &layer.clone().file("mode", mode.as_bytes(), 0o644),
        );
        let ended = pull(&cluster, &image);
        assert!(ended.code != 0 && ended.says(says), "{mode}: {ended}");
        nothing_published(&cluster, &image);
    }
    // What stood in the way was the check, and not the script.
    fs::write(folder.join("mode"), "honest").unwrap();
    let image = push(&cluster, "honest", &layer);
    pull(&cluster, &image).ok();
    let ended = cluster
        .user("srun", &[&container(&image.name), "cat", "/closed/secret"])
        .end();
    assert_eq!(ended.ok(), "read me");
    drop(cluster);
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn two_that_ask_at_the_same_time_get_one_conversion() {
    let (cluster, folder) = with_hostile_converter("test-once", &[]);
    fs::write(folder.join("mode"), "count").unwrap();
    let count = folder.join("count");
    fs::write(&count, "").unwrap();
    fs::set_permissions(&count, fs::Permissions::from_mode(0o666)).unwrap();
    let go = folder.join("go");
    cluster
        .root("mkfifo", &["-m", "666", go.to_str().unwrap()])
        .end()
        .ok();
    let image = push(&cluster, "once", &Layer::new().file("x", b"x", 0o644));
    let other = image.tag(cluster.registry(), "again");
    thread::scope(|scope| {
        let pulls = [&image, &other].map(|image| scope.spawn(|| pull(&cluster, image)));
        wait_until("both pulls run, and a conversion", 60, || {
            let pulls = cluster.berth(&["pulls", "--json"]);
            let both = pulls.says(&image.name) && pulls.says(&other.name);
            (both && !fs::read(&count).unwrap().is_empty()).then_some(())
        });
        fs::write(&go, "").unwrap();
        for pull in pulls {
            pull.join().unwrap().ok();
        }
    });
    assert_eq!(fs::read_to_string(count).unwrap(), "x");
    drop(cluster);
    fs::remove_dir_all(folder).unwrap();
}

/// What anybody could type: a request of the sealer's own protocol, by the daemon's rules.
const ASK: &str = r#"
import json, socket, struct, sys
seal = socket.socket(socket.AF_UNIX)
seal.connect(sys.argv[1])
body = json.dumps({"remove": {"manifest": sys.argv[2], "platform": "linux/amd64"}}).encode()
try:
    seal.sendall(struct.pack("<I", len(body)) + body)
except BrokenPipeError:
    pass  # It answers and hangs up without listening.
length, = struct.unpack("<I", seal.recv(4))
print(seal.recv(length).decode())
"#;

#[test]
fn only_the_daemon_may_ask_the_sealer() {
    let cluster = &suite().cluster;
    // An image of its own: it is taken out of the store behind the daemon's back.
    let content = berth_tests::cluster::unique();
    let layer = Layer::new().file("x", content.as_bytes(), 0o644);
    let image = push(cluster, "sealed", &layer);
    pull(cluster, &image).ok();
    let socket = cluster.folder().join("run/sealer/seal.sock");
    let words = ["-c", ASK, socket.to_str().unwrap(), &image.digest];
    let refused = cluster.user("python3", &words).end();
    assert!(
        refused.says("denied") && refused.says("may not ask the sealer"),
        "{refused}"
    );
    assert_eq!(record(cluster, &image)["manifest"], image.digest.as_str());
    // The same words from one who may: the refusal was for who asked.
    let taken = cluster.root("python3", &words).end();
    assert!(taken.ok().contains("\"existed\":true"), "{taken}");
}
