//! Hostile images and hostile users: what must not happen.

mod rig;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rig::{Answer, GID, Site, Step, Tree, UID, able, text};

/// Publishes the tree and starts a step that must be refused; the text.
fn refused(site: &Site, fields: &[(&str, &std::ffi::OsStr)]) -> String {
    let step = Step::start(site, fields);
    let (code, text) = step.ask(0, "/").refusal();
    assert!(code != 0 && text.starts_with("berth: "), "{code} {text}");
    assert!(text.lines().count() <= 2, "{text}");
    // A second task of the node ends too, without repeating it.
    assert_eq!(step.ask(1, "/").refusal(), (code, String::new()));
    step.end();
    site.wait_clean();
    text
}

#[test]
fn system_folders_that_are_links_or_files_are_refused() {
    if !able() {
        return;
    }
    type Hostile = (&'static str, fn(&Path));
    let images: [Hostile; 6] = [
        ("/tmp", |at| symlink("/", at).unwrap()),
        ("/proc", |at| symlink("/etc", at).unwrap()),
        ("/dev", |at| fs::write(at, "").unwrap()),
        ("/sys", |at| symlink("proc", at).unwrap()),
        ("/tmp", |at| symlink("/proc/self/root", at).unwrap()),
        ("/proc", |at| symlink("proc", at).unwrap()),
    ];
    for (name, make) in images {
        let site = Site::new();
        let tree = Tree::new();
        let at = tree.at(&name[1..]);
        fs::remove_dir(&at).unwrap();
        make(&at);
        site.publish(&tree);
        let text = refused(&site, &[]);
        assert!(text.contains(name), "{name}: {text}");
    }
}

#[test]
fn targets_climb_out_of_no_image() {
    if !able() {
        return;
    }
    let site = Site::new();
    let tree = Tree::new();
    symlink("..", tree.at("opt/up")).unwrap();
    symlink("loop", tree.at("opt/loop")).unwrap();
    symlink("/proc/self/root/etc", tree.at("opt/magic")).unwrap();
    site.publish(&tree);
    let data = site.users_folder("data");
    let d = data.display();
    for (target, word) in [
        ("/", "root"),
        ("/opt/up", "root"),
        ("/..", "root"),
        ("/opt/loop/x", "/opt/loop/x"),
        ("/opt/magic/x", "/opt/magic/x"),
        ("/proc/sys", "/proc"),
        ("/proc/self/root/etc", "/proc"),
        ("/sys/kernel", "/sys"),
        ("/etc/passwd/x", "/etc/passwd/x"),
        ("/etc/passwd", "a file"),
        ("/bin", "x"),
    ] {
        let mount = format!("{d}:{target}");
        if target == "/bin" {
            // A link in the image is followed inside it, so this covers the image's own folder: allowed, harmless.
            let step = Step::start(&site, &[("mount", mount.as_ref())]);
            assert!(matches!(step.ask(0, "/").answer(), Answer::Ready { .. }));
            continue;
        }
        let text = refused(&site, &[("mount", mount.as_ref())]);
        assert!(text.contains(word), "{target}: {text}");
    }
    assert!(
        fs::read_dir(&data).unwrap().next().is_none(),
        "something was made in the user's folder"
    );
}

#[test]
fn a_bind_of_a_magic_link_or_of_what_the_user_cannot_reach_opens_nothing() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let closed = site.path("closed");
    fs::create_dir(&closed).unwrap();
    fs::create_dir(closed.join("inside")).unwrap();
    fs::write(closed.join("inside/secret"), "secret").unwrap();
    fs::set_permissions(closed.join("inside"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let link = site.users_folder("mine").join("link");
    symlink(closed.join("inside"), &link).unwrap();
    let mut sources: Vec<String> = (0..64).map(|n| format!("/proc/self/fd/{n}")).collect();
    for name in ["root", "cwd", "exe", "task/1/root", "ns/mnt", "map_files"] {
        sources.push(format!("/proc/self/{name}"));
        sources.push(format!("/proc/1/{name}"));
        sources.push(format!("/proc/thread-self/{name}"));
    }
    sources.push(closed.join("inside").display().to_string());
    sources.push(link.display().to_string());
    sources.push("/root".into());
    sources.push("/no/such".into());
    for source in sources {
        let mount = format!("{source}:/srv/x");
        let step = Step::start(&site, &[("mount", mount.as_ref())]);
        match step.ask(0, "/").answer() {
            Answer::Refused { text, .. } => assert!(text.contains(&source), "{text}"),
            // Folders that anybody may look at, but not use.
            Answer::Ready { .. } => {
                let seen = step.run("ls /srv/x /srv/x/* 2>&1; cat /srv/x/secret 2>&1");
                let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
                assert!(
                    source == "/root" || source.ends_with("map_files"),
                    "{source}: {seen}"
                );
                assert!(
                    !seen.contains("inside") && seen.contains("denied"),
                    "{source}: {seen}"
                );
            }
            Answer::Nothing => panic!("{source}: no answer"),
        }
    }
}

#[test]
fn nothing_is_made_in_somebodys_real_folder() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let data = site.users_folder("data");
    let other = site.users_folder("other");
    let mounts = [
        format!("{}:/data", data.display()),
        format!("{}:/data/sub", other.display()),
    ];
    let fields: Vec<_> = mounts.iter().map(|m| ("mount", m.as_ref())).collect();
    let text = refused(&site, &fields);
    assert!(
        text.contains("/data/sub") && text.contains("nothing is made"),
        "{text}"
    );
    assert!(fs::read_dir(&data).unwrap().next().is_none());
    // Where it exists it is covered, in the container alone.
    fs::create_dir(data.join("sub")).unwrap();
    fs::write(other.join("o"), "").unwrap();
    let step = Step::start(&site, &fields);
    assert_eq!(
        rig::text(&step.run("ls /data /data/sub")),
        "/data:\nsub\n\n/data/sub:\no"
    );
    step.end();
    assert!(fs::read_dir(data.join("sub")).unwrap().next().is_none());
}

#[test]
fn a_link_in_the_users_folder_that_is_swapped_stays_inside() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let data = site.users_folder("data");
    // The user's folder holds a link to the node's /etc; a second bind names it as target.
    symlink("/etc", data.join("evil")).unwrap();
    let other = site.users_folder("other");
    fs::write(other.join("o"), "").unwrap();
    let mounts = [
        format!("{}:/data", data.display()),
        format!("{}:/data/evil", other.display()),
    ];
    let fields: Vec<_> = mounts.iter().map(|m| ("mount", m.as_ref())).collect();
    let step = Step::start(&site, &fields);
    assert_eq!(
        text(&step.run("ls /etc")),
        "o",
        "the container's own /etc is covered"
    );
    step.end();
    assert!(Path::new("/etc/os-release").exists());
}

#[test]
fn a_task_cannot_get_at_the_node_s_root() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    fs::write(site.path("marker"), "").unwrap();
    let step = Step::start(&site, &[]);
    let script = "ls /.. /proc/self/root; cd /proc/self/root/..; ls; cat /proc/self/status; cat /proc/self/mountinfo";
    let output = text(&step.run(script));
    assert!(
        !output.contains("lost+found") && !output.contains("boot"),
        "{output}"
    );
    assert!(output.contains("NoNewPrivs:\t1"));
    let roots: Vec<_> = output
        .lines()
        .filter(|l| l.split(' ').nth(4) == Some("/"))
        .collect();
    assert_eq!(roots.len(), 1, "{roots:?}");
    assert!(roots[0].contains("overlay"));
    // The helper, its children and its loop device are out of reach.
    let pid = step.helper.as_ref().unwrap().id();
    let device = site.loops().remove(0);
    for path in [
        format!("/proc/{pid}/root/"),
        format!("/proc/{pid}/fd/3"),
        format!("/dev/{device}"),
    ] {
        let output = step.run(&format!("cat {path}"));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains("denied"), "{path}: {error}");
    }
    step.end();
}

#[test]
fn account_files_cannot_be_broken_by_the_image() {
    if !able() {
        return;
    }
    let site = Site::new();
    let tree = Tree::new();
    // The image gives the user's name and number to others, and its files are links.
    fs::remove_file(tree.at("etc/passwd")).unwrap();
    fs::write(
        tree.at("opt/passwd"),
        format!("evil:x:{UID}:0::/:/bin/sh\nbackup:x:0:0::/:/bin/sh\n"),
    )
    .unwrap();
    symlink("/opt/passwd", tree.at("etc/passwd")).unwrap();
    symlink("/proc/1/environ", tree.at("etc/hosts")).unwrap();
    fs::remove_file(tree.at("etc/group")).unwrap();
    fs::create_dir(tree.at("etc/group")).unwrap();
    site.publish(&tree);
    let step = Step::start(&site, &[]);
    match step.ask(0, "/").answer() {
        Answer::Ready { .. } => {
            let output = text(
                &step
                    .run("id -un; id -u backup; cat /etc/passwd | head -n 1; head -c 0 /etc/hosts"),
            );
            assert!(
                output.starts_with(&format!("backup\n{UID}\nbackup:x:{UID}:{GID}:")),
                "{output}"
            );
        }
        other => panic!("{other:?}"),
    }
    step.end();
}

#[test]
fn no_way_of_names_leads_a_bind_over_proc_or_sys() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let (data, other) = (site.users_folder("data"), site.users_folder("other"));
    symlink("/proc", data.join("p")).unwrap();
    symlink("/sys/kernel", data.join("s")).unwrap();
    for target in ["/data/p/sys", "/data/s"] {
        let mounts = [
            format!("{}:/data", data.display()),
            format!("{}:{target}", other.display()),
        ];
        let fields: Vec<_> = mounts.iter().map(|m| ("mount", m.as_ref())).collect();
        let step = Step::start(&site, &fields);
        let (_, text) = step.ask(0, "/").refusal();
        assert!(text.contains("not allowed in /proc and /sys"), "{text}");
        step.end();
    }
}
