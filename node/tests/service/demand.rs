//! Images on demand: one server for all, which may die at any moment.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use berth_mount::fuse::READ_AHEAD_KIB;
use berth_mount::keeper::{self, Answer, Given, How, MountRequest, Request};
use rustix::fs::{Dir, Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Node, eventually, soon};
use crate::ranges::Ranges;

/// Names and contents of a folder.
pub type Tree = BTreeMap<String, Vec<u8>>;

/// Files of some sizes, which do not compress away.
pub fn tree(seed: u64, files: usize) -> Tree {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut word = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let file = |at: usize| {
        let len = [5, 4000, 70_000, 300_000][at % 4];
        let bytes = std::iter::repeat_with(&mut word).flat_map(u64::to_le_bytes);
        (format!("file-{at:05}"), bytes.take(len).collect())
    };
    (0..files).map(file).collect()
}

pub fn write(tree: &Tree, folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    for (name, bytes) in tree {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}

fn folder(tree: &OwnedFd) -> OwnedFd {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(tree, ".", flags, Mode::empty()).unwrap()
}

fn names(dir: &mut Dir) -> impl Iterator<Item = String> {
    dir.map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned())
        .filter(|name| !name.starts_with('.'))
}

fn contents(mount: &OwnedFd, name: &str) -> Vec<u8> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(mount, name, flags, Mode::empty()).unwrap();
    let mut bytes = Vec::new();
    File::from(file).read_to_end(&mut bytes).unwrap();
    bytes
}

pub fn all(mount: &OwnedFd) -> Tree {
    let mut dir = Dir::new(folder(mount)).unwrap();
    names(&mut dir)
        .map(|name| (name.clone(), contents(mount, &name)))
        .collect()
}

/// A service and images of `trees`, on demand; `None` where that is not possible.
fn serving(trees: &[Tree]) -> Option<(Node, Vec<(MountRequest, Given)>)> {
    serving_with("keep_images = 100", trees)
}

fn serving_with(settings: &str, trees: &[Tree]) -> Option<(Node, Vec<(MountRequest, Given)>)> {
    let node = Node::start(settings)?;
    let mut given = Vec::new();
    for (at, tree) in trees.iter().enumerate() {
        let folder = node.dir.path().join(format!("tree-{at}"));
        write(tree, &folder);
        let image = node.image_of(&format!("image-{at}"), &folder);
        let request = node.sealed(&image)?;
        let mount = node.demand(&image, &request);
        given.push((request, mount));
    }
    Some((node, given))
}

pub fn server(node: &Node) -> Option<Pid> {
    Pid::from_raw(i32::try_from(node.status().server?).unwrap())
}

/// The next server, which is not `last`.
fn next_server(node: &Node, last: Option<Pid>) -> Pid {
    let mut found = None;
    eventually("another server", || {
        found = server(node).filter(|pid| Some(*pid) != last);
        found.is_some()
    });
    found.unwrap()
}

/// Has the kernel forget what it has of all mounts.
pub fn forget() {
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// Ended, waited for by its parent or not.
fn dead(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .map_or(true, |status| status.contains("State:\tZ"))
}

/// Images whose decoded tables are mapped: from files without a name, or from memory where the filesystem has no such.
fn kept_tables(pid: Pid) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let of_tables =
        |line: &&str| line.contains("/cache/chunks/#") || line.contains("memfd:berth-tables");
    maps.lines().filter(of_tables).count()
}

fn threads(pid: Pid) -> u64 {
    field(pid, "Threads:")
}

fn field(pid: Pid, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[test]
fn an_image_on_demand_is_right_and_nobody_looks_into_its_server() {
    let trees = [tree(1, 40)];
    let Some((node, given)) = serving(&trees) else {
        return;
    };
    let (request, mount) = &given[0];
    assert_eq!((mount.how, mount.kept), (How::Lazy, false));
    assert!(all(&mount.tree) == trees[0]);
    // Without a file: only who was verified as having a right to it asks for a kept one.
    let again = keeper::mount(&node.socket(), request, None, soon()).unwrap();
    assert!(again.kept);
    let pid = server(&node).unwrap();
    assert_eq!(field(pid, "Uid:"), 64304);
    for file in ["environ", "maps", "mem", "fd/0"] {
        let read = Command::new("head")
            .args(["-c1", &format!("/proc/{pid}/{file}")])
            .uid(64304)
            .gid(64304)
            .output()
            .unwrap();
        assert!(!read.status.success(), "{file}");
    }
    let answer = keeper::ask(&node.socket(), &Request::Metrics, None, soon()).unwrap();
    let Answer::Text { text } = answer else {
        panic!("{answer:?}")
    };
    let has = |line: &str| text.lines().any(|l| l.starts_with(line));
    assert!(has("berth_node_chunk_misses_total "), "{text}");
    assert!(
        has("berth_node_fetched_bytes_total{source=\"file\"} "),
        "{text}"
    );
    assert!(
        has("berth_node_request_seconds_count{kind=\"read\"} "),
        "{text}"
    );
    assert!(has("berth_node_takeovers_total 0"), "{text}");
}

#[test]
fn the_kernel_reads_further_ahead_on_a_mount_on_demand() {
    let Some((_node, given)) = serving(&[tree(2, 4)]) else {
        return;
    };
    let mount = &given[0].1.tree;
    // Read from: INIT was answered, which could have taken it back.
    contents(mount, "file-00003");
    let minor = rustix::fs::minor(rustix::fs::fstat(mount).unwrap().st_dev);
    let file = format!("/sys/class/bdi/0:{minor}/read_ahead_kb");
    let ahead = std::fs::read_to_string(&file).unwrap();
    if std::fs::write(&file, &ahead).is_err() {
        assert!(std::env::var_os("CI").is_none(), "CI can write to /sys");
        eprintln!("left out: needs a /sys that can be written to");
        return;
    }
    assert_eq!(ahead.trim(), READ_AHEAD_KIB.to_string());
}

#[test]
fn a_store_that_fails_under_its_readers_is_survived_with_another_source() {
    let tree = tree(4, 60);
    let Some((node, given)) = serving(&[]) else {
        return;
    };
    assert!(given.is_empty());
    let folder = node.dir.path().join("tree");
    write(&tree, &folder);
    let image = node.image_of("image", &folder);
    let Some(mut request) = node.sealed(&image) else {
        return;
    };
    let daemon = Ranges::serve(std::fs::read(&image).unwrap(), "long");
    let source = |grant: &str, until| keeper::Source {
        at: daemon.url.clone(),
        grant: Some(grant.into()),
        until: Some(until),
    };
    // Of three jobs that share the mount, the second has the grant that lasts.
    let mut mounts = Vec::new();
    for (grant, until) in [("short", 10), ("long", 30), ("shorter", 20)] {
        request.sources = vec![source(grant, until)];
        mounts.push(node.demand(&image, &request));
    }
    let mount = &mounts[0].tree;
    assert!(contents(mount, "file-00000") == tree["file-00000"]);
    assert_eq!(daemon.sent(), 0, "the file was there");
    File::options()
        .write(true)
        .open(&image)
        .and_then(|file| file.set_len(0))
        .unwrap();
    assert!(contents(mount, "file-00003") == tree["file-00003"]);
    let sent = daemon.sent();
    assert!(sent > 0);
    // A server that was not there when the grants came reads on with the same one.
    let pid = server(&node).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    next_server(&node, Some(pid));
    assert!(all(mount) == tree);
    assert!(daemon.sent() > sent);
}

/// The node has no file of the image. The first of two daemons did not grant anything to the first job.
#[test]
fn daemons_take_over_from_each_other_each_with_its_own_grants() {
    let tree = tree(6, 120);
    let Some((node, _)) = serving(&[]) else {
        return;
    };
    let folder = node.dir.path().join("tree");
    write(&tree, &folder);
    let image = node.image_of("image", &folder);
    let Some(mut request) = node.sealed(&image) else {
        return;
    };
    let file = std::fs::read(&image).unwrap();
    std::fs::remove_file(&image).unwrap();
    let daemons = ["of-a", "of-b"].map(|grant| Ranges::serve(file.clone(), grant));
    let sources = |grants: [Option<&str>; 2]| {
        let both = daemons.iter().zip(grants);
        let source = |(daemon, grant): (&Ranges, Option<&str>)| keeper::Source {
            at: daemon.url.clone(),
            grant: grant.map(str::to_owned),
            until: grant.map(|_| 30),
        };
        both.map(source).collect()
    };
    request.sources = sources([None, Some("of-b")]);
    let first = keeper::mount(&node.socket(), &request, None, soon()).unwrap();
    assert_eq!(first.how, How::Lazy);
    assert!(contents(&first.tree, "file-00003") == tree["file-00003"]);
    assert_eq!(daemons[0].sent(), 0);
    assert!(daemons[1].sent() > 0);
    // A later job of the same mount has a grant of it; then the other one goes.
    request.sources = sources([Some("of-a"), None]);
    let second = keeper::mount(&node.socket(), &request, None, soon()).unwrap();
    assert!(second.kept);
    daemons[1].go();
    let last = tree.keys().nth(103).unwrap();
    assert!(contents(&first.tree, last) == tree[last]);
    assert!(daemons[0].sent() > 0);
    // The next server has all of that from the keeper.
    let pid = server(&node).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    next_server(&node, Some(pid));
    assert!(all(&first.tree) == tree);
}

#[test]
fn readers_of_many_mounts_outlive_fifty_servers() {
    let trees: Vec<Tree> = (0..4).map(|seed| tree(seed, 24)).collect();
    let Some((node, given)) = serving(&trees) else {
        return;
    };
    let (done, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for (tree, (_, given)) in trees.iter().zip(&given) {
            let (done, rounds) = (&done, &rounds);
            scope.spawn(move || {
                while !done.load(Ordering::SeqCst) {
                    forget();
                    assert!(all(&given.tree) == *tree);
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let mut last = None;
        for killed in 0..50 {
            let pid = next_server(&node, last);
            // Some die at their start, some in the middle of work.
            if killed % 5 == 0 {
                let seen = rounds.load(Ordering::SeqCst);
                eventually("readers go on", || rounds.load(Ordering::SeqCst) > seen);
            }
            kill_process(pid, Signal::KILL).unwrap();
            last = Some(pid);
        }
        // And the last one serves.
        let seen = rounds.load(Ordering::SeqCst);
        eventually("readers go on", || {
            rounds.load(Ordering::SeqCst) >= seen + 8
        });
        done.store(true, Ordering::SeqCst);
    });
    let (_, mount) = &given[0];
    let again = keeper::mount(&node.socket(), &given[0].0, None, soon()).unwrap();
    assert!(again.kept && mount.how == How::Lazy);
}

#[test]
fn an_image_served_as_one_file_outlives_its_servers_too() {
    let trees = [tree(5, 60)];
    let Some((node, given)) = serving_with("mode = 'block'", &trees) else {
        return;
    };
    let mount = &given[0].1.tree;
    assert!(all(mount) == trees[0]);
    let kind = rustix::fs::fstatfs(mount).unwrap().f_type;
    assert_eq!(kind, 0x7371_7368, "the kernel's squashfs");
    let mut last = None;
    for _ in 0..5 {
        let pid = next_server(&node, last);
        forget();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| all(mount) == trees[0]);
            kill_process(pid, Signal::KILL).unwrap();
            assert!(reader.join().unwrap());
        });
        last = Some(pid);
    }
    drop(given);
    eventually("it is unused", || node.status().mounts[0].users == 0);
    keeper::ask(&node.socket(), &Request::Drain, None, soon()).unwrap();
    let pid = next_server(&node, last);
    eventually("nothing is served", || threads(pid) <= 2);
}

#[test]
fn a_listing_goes_on_where_the_server_died() {
    let many: Tree = (0..5000)
        .map(|at| (format!("{at:04}-{}", "n".repeat(60)), Vec::new()))
        .collect();
    let Some((node, given)) = serving(std::slice::from_ref(&many)) else {
        return;
    };
    forget();
    let mut dir = Dir::new(folder(&given[0].1.tree)).unwrap();
    let mut seen: Vec<String> = names(&mut dir).take(50).collect();
    let pid = server(&node).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    seen.extend(names(&mut dir));
    assert!(seen.iter().eq(many.keys()), "{} of 5000", seen.len());
    assert_ne!(next_server(&node, Some(pid)), pid);
}

#[test]
fn readers_outlive_the_keeper_and_its_server_ends_with_the_last_of_them() {
    let trees = [tree(7, 40)];
    let Some((mut node, mut given)) = serving(&trees) else {
        return;
    };
    let pid = server(&node).unwrap();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    forget();
    let (_, mount) = given.pop().unwrap();
    assert!(all(&mount.tree) == trees[0]);
    // The next keeper serves anew.
    node.child = Node::spawn(node.dir.path());
    node.wait_ready();
    drop(mount);
    eventually("the old server ends", || dead(pid));
}

/// What `scripts/packaging/berth-unkillable` is for: a server that answers nothing, and a job that waits for it.
#[test]
fn slurms_program_for_unkillable_steps_frees_who_waits_for_a_stopped_server() {
    let trees = [tree(9, 8)];
    let Some((node, given)) = serving(&trees) else {
        return;
    };
    let mount = &given[0].1.tree;
    let folder = node.dir.path().join("mount");
    std::fs::create_dir(&folder).unwrap();
    let flags = rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mount, c"", rustix::fs::CWD, &folder, flags).unwrap();
    let minor = rustix::fs::minor(rustix::fs::fstat(mount).unwrap().st_dev);
    let server = server(&node).unwrap();
    kill_process(server, Signal::STOP).unwrap();
    forget();
    let mut job = Command::new("cat")
        .arg(folder.join("file-00003"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // As /proc looks where slurmstepd made the job's cgroup.
    let proc = node.dir.path().join("proc");
    let facts = proc.join(job.id().to_string());
    std::fs::create_dir_all(&facts).unwrap();
    // A container's namespace holds its image's mount alone; this one holds those of other tests and users too.
    let all = std::fs::read_to_string(format!("/proc/{}/mountinfo", job.id())).unwrap();
    let own = format!(" 0:{minor} ");
    let own: Vec<&str> = all.lines().filter(|line| line.contains(&own)).collect();
    std::fs::write(facts.join("mountinfo"), own.join("\n")).unwrap();
    let in_namespace = |pid: &str, name: &str| {
        let folder = proc.join(pid).join("ns");
        std::fs::create_dir_all(&folder).unwrap();
        let _ = std::fs::remove_file(folder.join("mnt"));
        std::os::unix::fs::symlink(name, folder.join("mnt")).unwrap();
    };
    in_namespace("1", "mnt:[1]");
    in_namespace(&job.id().to_string(), "mnt:[2]");
    let in_cgroup = |path: &str| {
        let line = format!("0::{path}/job_4242424242/step_0/user/task_0\n");
        std::fs::write(facts.join("cgroup"), line).unwrap();
    };
    let control = node.dir.path().join("control");
    std::fs::create_dir(&control).unwrap();
    let none = rustix::mount::MountFlags::empty();
    rustix::mount::mount("berth", &control, "fusectl", none, None).unwrap();
    let waiting = control.join(format!("{minor}/waiting"));
    let waits = || std::fs::read_to_string(&waiting).is_ok_and(|count| count.trim() != "0");
    eventually("the job waits", waits);
    let script =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/packaging/berth-unkillable");
    let run = || {
        let run = Command::new(&script)
            .env("SLURM_JOB_ID", "4242424242")
            .env("BERTH_PROC", &proc)
            .env("BERTH_CONNECTIONS", &control)
            .status()
            .unwrap();
        assert!(run.success());
    };
    // A cgroup of a user's own, with a job's number.
    in_cgroup("/user.slice/user-1000.slice/user@1000.service/slurmstepd.scope");
    run();
    assert!(waits());
    in_cgroup("/system.slice/slurmstepd.scope");
    // A job's process outside of its container sees the mounts of everybody.
    in_namespace(&job.id().to_string(), "mnt:[1]");
    run();
    assert!(waits());
    in_namespace(&job.id().to_string(), "mnt:[2]");
    run();
    assert!(!job.wait().unwrap().success());
    kill_process(server, Signal::KILL).unwrap();
    for mount in [&folder, &control] {
        rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

/// Under a service manager that holds what a keeper leaves: see `manager.py`.
#[test]
fn a_killed_keepers_successor_takes_over_every_mount() {
    let trees = [tree(3, 40)];
    let Some((mut node, given)) = serving(&[]) else {
        return;
    };
    assert!(given.is_empty());
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    let mut keeper = node.under_a_manager();
    let first = keeper();
    let folder = node.dir.path().join("tree");
    write(&trees[0], &folder);
    let image = node.image_of("image", &folder);
    let Some(request) = node.sealed(&image) else {
        return;
    };
    let lazy = node.demand(&image, &request);
    let by_kernel = node.mount(&image).unwrap();
    let last = server(&node).unwrap();
    forget();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| all(&lazy.tree) == trees[0]);
        kill_process(first, Signal::KILL).unwrap();
        let second = keeper();
        assert_ne!(first, second);
        // The old server was replaced, at once: it would answer beside the new one.
        assert_ne!(next_server(&node, Some(last)), last);
        assert!(dead(last));
        assert!(reader.join().unwrap());
    });
    // What was kept is kept.
    let status = node.status();
    assert_eq!(status.mounts.len(), 2, "{status:?}");
    let again = keeper::mount(&node.socket(), &request, None, soon()).unwrap();
    assert!(again.kept && all(&again.tree) == trees[0]);
    assert!(node.mount(&image).unwrap().kept);
    drop((lazy, by_kernel, again));
    eventually("all are unused", || {
        node.status().mounts.iter().all(|mount| mount.users == 0)
    });
    keeper::ask(&node.socket(), &Request::Drain, None, soon()).unwrap();
    let pid = server(&node).unwrap();
    eventually("nothing is served", || {
        node.status().mounts.is_empty() && threads(pid) <= 2
    });
    // And nothing comes back.
    let now = node.status();
    assert!(now.mounts.is_empty());
    kill_process(pid, Signal::KILL).unwrap();
}

#[test]
fn sixty_four_mounts_stay_within_their_memory() {
    let trees: Vec<Tree> = (0..64).map(|seed| tree(seed, 12)).collect();
    // Without a recording the tables are decoded at once, into files that the kernel may take from memory.
    let settings = "keep_images = 100\nrecord_s = 0";
    let Some((node, given)) = serving_with(settings, &trees) else {
        return;
    };
    let pid = server(&node).unwrap();
    eventually("all tables are decoded", || kept_tables(pid) == 64);
    let (done, most) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|worker| {
                let (given, trees) = (&given, &trees);
                scope.spawn(move || {
                    for at in (worker..64).step_by(8) {
                        assert!(all(&given[at].1.tree) == trees[at]);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let now = field(pid, "RssAnon:") as usize;
                most.fetch_max(now, Ordering::SeqCst);
                std::thread::yield_now();
            }
        });
        for thread in threads {
            thread.join().unwrap();
        }
        done.store(true, Ordering::SeqCst);
    });
    let kib = most.load(Ordering::SeqCst);
    eprintln!("anonymous memory: {} MiB", kib >> 10);
    assert!(kib > 0 && kib < (64 + 8 * 64) << 10, "{kib} KiB");
    assert_eq!(server(&node), Some(pid));
    drop(given);
    eventually("all are unused", || {
        node.status().mounts.iter().all(|mount| mount.users == 0)
    });
    keeper::ask(&node.socket(), &Request::Drain, None, soon()).unwrap();
    eventually("all are gone", || node.status().mounts.is_empty());
}
