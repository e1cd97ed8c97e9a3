//! Kill anything at any moment: nothing stays.

mod rig;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use rig::{Answer, Site, Step, Tree, able, task, wait_for};

#[test]
fn a_killed_helper_leaves_the_running_task_and_nothing_after_it() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let mut step = Step::start(&site, &[]);
    let Answer::Ready {
        namespace,
        cwd,
        env,
    } = step.ask(0, "/").answer()
    else {
        panic!("no view");
    };
    let mut running = task(&namespace, &cwd, &env)
        .args(["/bin/sh", "-c", "echo started; exec sleep 600"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(namespace);
    let mut line = [0u8; 8];
    std::io::Read::read_exact(running.stdout.as_mut().unwrap(), &mut line).unwrap();
    let helper = step.helper.as_mut().unwrap();
    helper.kill().unwrap();
    helper.wait().unwrap();
    assert!(running.try_wait().unwrap().is_none());
    assert_eq!(site.loops().len(), 1, "the task's mount keeps its device");
    running.kill().unwrap();
    running.wait().unwrap();
    site.wait_clean();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    // Others on this machine may have mounts of Berth's.
    let ours = site.folder.path().to_str().unwrap();
    assert!(!mounts.contains(ours), "{mounts}");
}

#[test]
fn a_step_that_ends_before_its_image_is_found_ends_at_once() {
    if !able() {
        return;
    }
    // No image and no daemon that answers: the socket is there and silent.
    let site = Site::new();
    let socket = site.path("no.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let step = Step::start(&site, &[]);
    let waiting = step.ask(0, "/");
    let mut daemon = None;
    wait_for("the daemon to be asked", || {
        daemon = listener.accept().ok();
        daemon.is_some()
    });
    let pid = step.helper.as_ref().unwrap().id();
    let children = format!("/proc/{pid}/task/{pid}/children");
    let child = fs::read_to_string(children).unwrap();
    step.end();
    assert!(matches!(waiting.answer(), Answer::Nothing));
    for pid in child.split_whitespace() {
        wait_for("the child to end", || {
            !Path::new("/proc").join(pid).exists()
        });
    }
    drop(daemon);
}

#[test]
fn sixty_four_tasks_share_one_view_and_one_device() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let step = Step::start(&site, &[]);
    let asked: Vec<_> = (0..64).map(|n| step.ask(n, "/")).collect();
    let mut namespaces = Vec::new();
    for waiting in asked {
        match waiting.answer() {
            Answer::Ready { namespace, .. } => namespaces.push(namespace),
            other => panic!("{other:?}"),
        }
    }
    let inode = |fd| rustix::fs::fstat(fd).unwrap().st_ino;
    let first = inode(&namespaces[0]);
    assert!(namespaces.iter().all(|n| inode(n) == first));
    assert_eq!(site.loops().len(), 1);
    // Another step of another job shares the device.
    let other = Step::start(&site, &[]);
    other.run("true");
    assert_eq!(site.loops().len(), 1);
    step.end();
    other.end();
    drop(namespaces);
    site.wait_clean();
}
