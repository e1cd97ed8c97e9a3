//! The keeper as its clients see it.

use berth_mount::keeper::{self, Answer, How, KeeperError, Request};
use rustix::fs::StatVfsMountFlags;

use crate::harness::{Node, as_somebody, eventually, request, says, soon};

#[test]
fn the_second_gets_the_mount_of_the_first() {
    let Some(node) = Node::start("") else { return };
    let image = node.image("a", "hello");
    let first = node.mount(&image).unwrap();
    assert!(!first.kept);
    assert_eq!(
        (first.how, says(&first.tree).as_str()),
        (How::Kernel, "hello")
    );
    let flags = rustix::fs::fstatvfs(&first.tree).unwrap().f_flag;
    let wanted = StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
    assert!(flags.contains(wanted), "{flags:?}");
    let second = node.mount(&image).unwrap();
    assert!(second.kept);
    let device = |tree| rustix::fs::fstat(tree).unwrap().st_dev;
    assert_eq!(device(&first.tree), device(&second.tree));
    assert_eq!(node.status().mounts[0].users, 2);
    drop((first, second));
    eventually("the leases end", || node.status().mounts[0].users == 0);
    // Nobody uses it, and it is there.
    assert!(node.mount(&image).unwrap().kept);
}

#[test]
fn sixty_four_at_once_get_one_mount() {
    let Some(node) = Node::start("") else { return };
    let image = node.image("a", "hello");
    let made = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..64)
            .map(|_| scope.spawn(|| node.mount(&image).unwrap()))
            .collect();
        let given: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert!(given.iter().all(|g| says(&g.tree) == "hello"));
        given.iter().filter(|g| !g.kept).count()
    });
    assert_eq!(made, 1);
}

#[test]
fn nothing_stays_beyond_its_time_or_number() {
    let Some(node) = Node::start("keep_images = 1") else {
        return;
    };
    let (one, two) = (node.image("a", "one"), node.image("b", "two"));
    drop(node.mount(&one).unwrap());
    eventually("the lease ends", || node.status().mounts[0].users == 0);
    let held = node.mount(&two).unwrap();
    eventually("the first is let go of", || node.status().mounts.len() == 1);
    assert_eq!(says(&held.tree), "two");
    assert!(!node.mount(&one).unwrap().kept);

    let Some(node) = Node::start("keep_s = 0") else {
        return;
    };
    let image = node.image("a", "one");
    let given = node.mount(&image).unwrap();
    assert!(node.mount(&image).unwrap().kept, "while it is used");
    drop(given);
    eventually("it is let go of", || node.status().mounts.is_empty());
}

#[test]
fn a_drained_service_lets_go_and_what_was_given_stays() {
    let Some(node) = Node::start("") else { return };
    let image = node.image("a", "hello");
    let used = node.mount(&image).unwrap();
    drop(node.mount(&node.image("b", "idle")).unwrap());
    eventually("the lease ends", || {
        node.status().mounts.iter().any(|mount| mount.users == 0)
    });
    let answer = keeper::ask(&node.socket(), &Request::Drain, None, soon()).unwrap();
    let Answer::Status(status) = answer else {
        panic!("{answer:?}")
    };
    assert!(status.draining);
    assert_eq!(status.mounts.len(), 1);
    assert_eq!(says(&used.tree), "hello");
    drop(used);
    eventually("the last goes", || node.status().mounts.is_empty());
}

#[test]
fn what_was_given_outlives_a_killed_service_and_the_next_one_serves_on() {
    let Some(mut node) = Node::start("") else {
        return;
    };
    let image = node.image("a", "hello");
    let given = node.mount(&image).unwrap();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    assert_eq!(says(&given.tree), "hello");
    let absent = node.mount(&image).unwrap_err();
    assert!(matches!(absent, KeeperError::Absent { .. }), "{absent}");
    node.child = Node::spawn(node.dir.path());
    node.wait_ready();
    assert!(!node.mount(&image).unwrap().kept);
}

#[test]
fn users_get_no_mounts_and_one_service_has_a_folder() {
    let Some(node) = Node::start("") else { return };
    let image = node.image("a", "hello");
    drop(node.mount(&image).unwrap());
    let wanted = keeper::encode(&Request::Mount(request(&image))).unwrap();
    let drain = keeper::encode(&Request::Drain).unwrap();
    for message in [wanted, drain] {
        let output = as_somebody(&node.socket(), std::str::from_utf8(&message).unwrap());
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(answer.contains(r#""code":77"#), "{output:?}");
    }
    assert!(!node.status().draining);
    // Root's own socket is not theirs, and all that root needs.
    let roots = keeper::root_socket(&node.socket());
    let output = as_somebody(&roots, "{}");
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(why.contains("Permission denied"), "{output:?}");
    std::fs::remove_file(node.socket()).unwrap();
    drop(node.mount(&image).unwrap());
    let second = Node::spawn(node.dir.path()).wait().unwrap();
    assert_eq!(second.code(), Some(69));
    // Neither a file that users can write nor one of another length is mounted.
    std::fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let error = node.mount(&image).unwrap_err();
    assert!(
        matches!(error, KeeperError::Refused { code: 77, .. }),
        "{error}"
    );
}
