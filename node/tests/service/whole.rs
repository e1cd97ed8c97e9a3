//! Images of which the server has fetched all: root's own copies, mounted by the kernel.

use std::cell::OnceCell;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use berth_mount::keeper::{self, Given, How, Mode, MountRequest, Request};
use rustix::fs::StatVfsMountFlags;
use rustix::process::{Signal, kill_process};

use crate::demand::{Tree, all, forget, tree, write};
use crate::harness::{Node, eventually, figure, soon};

/// All of an image comes soon after its first byte, and nobody waits for its trace.
const FILL: &str = "fill_bytes_per_s = 10000000000\nrecord_s = 0";

struct Image {
    tree: Tree,
    file: PathBuf,
    request: MountRequest,
}

impl Image {
    fn new(node: &Node, name: &str, tree: Tree) -> Option<Self> {
        let folder = node.dir.path().join(format!("{name}.tree"));
        write(&tree, &folder);
        let file = node.image_of(name, &folder);
        let request = node.sealed(&file)?;
        Some(Self {
            tree,
            file,
            request,
        })
    }

    /// As for the first job: on demand, fetched from the file.
    fn first(&self, node: &Node) -> Given {
        let given = node.demand(&self.file, &self.request);
        assert_eq!(given.how, How::Lazy);
        assert!(all(&given.tree) == self.tree);
        given
    }

    /// As for the next job on a node without the store.
    fn next(&self, node: &Node) -> Given {
        let request = MountRequest {
            mode: Mode::Auto,
            ..self.request.clone()
        };
        keeper::mount(&node.socket(), &request, None, soon()).unwrap()
    }

    /// The file of the server's cache.
    fn chunks(&self, node: &Node, ending: &str) -> PathBuf {
        let name = format!("{}.{ending}", self.request.verity_root);
        node.dir.path().join("cache/chunks").join(name)
    }

    /// Whether the server's map says that all of it is there.
    fn is_whole(&self, node: &Node) -> bool {
        let map = std::fs::read(self.chunks(node, "map")).unwrap_or_default();
        map.len() > 64 && map[64..].iter().all(|byte| *byte == 1)
    }
}

fn copies(node: &Node) -> Vec<PathBuf> {
    let folder = node.dir.path().join("cache/whole");
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn a_copy_is_there(node: &Node) {
    eventually("a copy", || node.status().copies.count == 1);
}

/// The next job gets the copy, once that has been verified.
fn next_from_the_copy(node: &Node, image: &Image) -> Given {
    let mut given = None;
    eventually("the copy is mounted", || {
        let next = image.next(node);
        given = (next.how == How::Cache).then_some(next);
        given.is_some()
    });
    let given = given.unwrap();
    assert!(all(&given.tree) == image.tree);
    given
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn facts(path: &Path) -> (u32, u32) {
    let facts = std::fs::metadata(path).unwrap();
    (facts.uid(), facts.mode() & 0o7777)
}

fn kill(node: &mut Node) {
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    // Its server ends with the last reader; the next one has no cache before that.
    let lock = node.dir.path().join("cache/chunks/lock");
    eventually("the server lets go of the cache", || {
        let how = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        File::open(&lock).is_ok_and(|lock| rustix::fs::flock(lock, how).is_ok())
    });
}

fn start(node: &mut Node) {
    node.child = Node::spawn(node.dir.path());
    node.wait_ready();
}

fn restart(node: &mut Node) {
    kill(node);
    start(node);
}

#[test]
fn the_next_job_gets_a_whole_image_from_the_kernel() {
    let Some(node) = Node::start(FILL) else {
        return;
    };
    let Some(image) = Image::new(&node, "image", tree(1, 40)) else {
        return;
    };
    let first = image.first(&node);
    a_copy_is_there(&node);
    let next = image.next(&node);
    assert_eq!((next.how, next.kept), (How::Cache, false));
    let kind = rustix::fs::fstatfs(&next.tree).unwrap().f_type;
    assert_eq!(kind, 0x7371_7368, "the kernel's squashfs");
    let flags = rustix::fs::fstatvfs(&next.tree).unwrap().f_flag;
    let wanted = StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
    assert!(flags.contains(wanted), "{flags:?}");
    forget();
    assert!(all(&next.tree) == image.tree);
    assert!(image.next(&node).kept);
    // Who read on demand goes on, and the mount goes with the last of them.
    assert!(all(&first.tree) == image.tree);
    drop(first);
    eventually("only the copy is mounted", || {
        let mounts = node.status().mounts;
        mounts.len() == 1 && mounts[0].how == How::Cache
    });
    // Who wants it on demand whatever is there gets it so.
    assert_eq!(image.first(&node).how, How::Lazy);
    // Only root can get at the copy, only the server at its own files.
    let cache = node.dir.path().join("cache");
    assert_eq!(facts(&cache), (0, 0o755));
    assert_eq!(facts(&cache.join("whole")), (0, 0o700));
    assert_eq!(facts(&cache.join("chunks")), (64304, 0o700));
    let [copy] = copies(&node).try_into().unwrap();
    assert_eq!(facts(&copy), (0, 0o400));
    assert_eq!(
        std::fs::read(&copy).unwrap(),
        std::fs::read(&image.file).unwrap()
    );
    let status = node.status().copies;
    assert_eq!(status.bytes, image.request.file_size);
    assert_eq!(figure(&node, "berth_node_copies"), 1);
    assert_eq!(figure(&node, "berth_node_copies_made_total"), 1);
    assert_eq!(figure(&node, "berth_node_copies_failed_total"), 0);
    let both = figure(&node, "berth_node_cache_limit_bytes") + status.bytes;
    assert!(both.abs_diff(2 * status.limit) <= 1, "one limit for both");
}

#[test]
fn what_the_servers_user_writes_never_reaches_the_kernel() {
    let lazy = "mount = 'lazy'";
    let Some(mut node) = Node::start_at(lazy, FILL, |_| ()) else {
        return;
    };
    let Some(image) = Image::new(&node, "image", tree(2, 40)) else {
        return;
    };
    let given = image.first(&node);
    eventually("all of it is here", || image.is_whole(&node));
    // A site that says so keeps the kernel's driver away from images, whatever is asked for.
    assert_eq!(image.next(&node).how, How::Lazy);
    assert_eq!(node.status().copies.count, 0);
    assert!(!node.dir.path().join("cache/whole").exists());
    drop(given);
    kill(&mut node);
    let config = node.dir.path().join("berth.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace(lazy, "")).unwrap();

    // Its server says that it is whole, and a block of it is another one.
    let chunks = image.chunks(&node, "data");
    flip(&chunks, 200_000);
    start(&mut node);
    // Nobody reads before root does: a reader would find the block, and have it brought again.
    let given = node.demand(&image.file, &image.request);
    eventually("no copy is made", || {
        figure(&node, "berth_node_copies_failed_total") == 1
    });
    assert_eq!(image.next(&node).how, How::Lazy);
    assert_eq!(copies(&node), [] as [PathBuf; 0]);
    assert!(all(&given.tree) == image.tree);
    drop(given);

    // Now it is as it was sealed, and root looks again.
    eventually("the block was brought again", || image.is_whole(&node));
    restart(&mut node);
    let given = image.first(&node);
    a_copy_is_there(&node);
    let next = image.next(&node);
    assert_eq!(next.how, How::Cache);
    // Through a descriptor that it could have kept.
    let file = File::options().write(true).open(&chunks).unwrap();
    file.write_all_at(&vec![0xaa; image.request.file_size as usize], 0)
        .unwrap();
    file.sync_all().unwrap();
    forget();
    assert!(all(&next.tree) == image.tree);
    drop((given, next));
}

/// Unmounted at the end, however that comes.
#[derive(Default)]
struct SmallDisk(OnceCell<PathBuf>);

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Some(folder) = self.0.get() {
            let _ = rustix::mount::unmount(folder, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

#[test]
fn without_room_it_goes_on_on_demand() {
    // The cache has room for the image, half of it has not.
    let Some(node) = Node::start(&format!("cache_bytes = 5000000\n{FILL}")) else {
        return;
    };
    let Some(image) = Image::new(&node, "image", tree(3, 40)) else {
        return;
    };
    assert!(image.request.file_size > 2_500_000 && image.request.file_size < 5_000_000);
    let given = image.first(&node);
    let failed = || figure(&node, "berth_node_copies_failed_total");
    eventually("it is too large", || failed() == 1);
    assert_eq!(image.next(&node).how, How::Lazy);
    assert_eq!(copies(&node), [] as [PathBuf; 0]);
    drop(given);

    // A disk that is full.
    let disk = SmallDisk::default();
    let small = |dir: &Path| {
        let cache = dir.join("cache");
        std::fs::create_dir(&cache).unwrap();
        let none = rustix::mount::MountFlags::empty();
        rustix::mount::mount("berth", &cache, "tmpfs", none, c"size=6m,mode=755").unwrap();
        disk.0.set(cache).unwrap();
    };
    let settings = format!("cache_bytes = 100000000\n{FILL}");
    let Some(node) = Node::start_at("", &settings, small) else {
        return;
    };
    let Some(image) = Image::new(&node, "image", tree(3, 40)) else {
        return;
    };
    let given = image.first(&node);
    let failed = || figure(&node, "berth_node_copies_failed_total");
    eventually("the disk is full", || failed() == 1);
    assert_eq!(copies(&node), [] as [PathBuf; 0]);
    let next = image.next(&node);
    assert_eq!(next.how, How::Lazy);
    forget();
    assert!(all(&next.tree) == image.tree && all(&given.tree) == image.tree);
    drop((given, next, disk));
}

#[test]
fn the_next_keeper_verifies_what_it_finds() {
    let Some(mut node) = Node::start(FILL) else {
        return;
    };
    let Some(image) = Image::new(&node, "image", tree(4, 40)) else {
        return;
    };
    drop(image.first(&node));
    a_copy_is_there(&node);
    restart(&mut node);
    // The server's own files are not needed for it.
    std::fs::remove_file(&image.file).unwrap();
    drop(next_from_the_copy(&node, &image));

    // A bad disk, or a power cut before all was written.
    kill(&mut node);
    let [copy] = copies(&node).try_into().unwrap();
    flip(&copy, 100_000);
    let other = copy.with_file_name(format!("{}-8192", "0".repeat(64)));
    std::fs::write(&other, "too short").unwrap();
    let strange = copy.with_file_name("lost+found");
    std::fs::create_dir(&strange).unwrap();
    start(&mut node);
    eventually("both are thrown away", || {
        copies(&node) == [strange.clone()]
    });
    assert_eq!(figure(&node, "berth_node_copies_failed_total"), 2);
    assert_eq!(node.status().copies.bytes, 0);

    // A site that wants everything on demand has no use for any.
    kill(&mut node);
    std::fs::write(&other, "too short").unwrap();
    let config = node.dir.path().join("berth.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let lazy = text.replace("[node.service]", "mount = 'lazy'\n[node.service]");
    std::fs::write(&config, lazy).unwrap();
    start(&mut node);
    assert_eq!(copies(&node), [strange]);
}

#[test]
fn what_is_mounted_stays_and_the_longest_unused_goes() {
    // Two copies have room, and nothing is kept mounted.
    let settings = format!("cache_bytes = 16000000\nkeep_s = 0\n{FILL}");
    let Some(mut node) = Node::start(&settings) else {
        return;
    };
    let images = (5..8).map(|seed| Image::new(&node, &format!("image-{seed}"), tree(seed, 40)));
    let Some(images) = images.collect::<Option<Vec<_>>>() else {
        return;
    };
    let [one, two, three] = &images[..] else {
        panic!("three images")
    };
    drop(one.first(&node));
    drop(next_from_the_copy(&node, one));
    drop(two.first(&node));
    drop(next_from_the_copy(&node, two));
    let held = one.next(&node);
    assert_eq!(held.how, How::Cache);
    // The other is not mounted, though it was made later.
    drop(three.first(&node));
    let held_too = next_from_the_copy(&node, three);
    assert_eq!(copies(&node).len(), 2);
    assert_eq!(image_how(two, &node), How::Lazy);
    // Both are mounted: there is no room, whatever keeper looks.
    restart(&mut node);
    let again = two.first(&node);
    eventually("no room", || {
        figure(&node, "berth_node_copies_failed_total") >= 1
    });
    forget();
    assert!(all(&held.tree) == one.tree && all(&held_too.tree) == three.tree);
    drop((held, held_too, again));
    eventually("unmounted", || node.status().mounts.is_empty());
    drop(two.first(&node));
    drop(next_from_the_copy(&node, two));
    assert_eq!(copies(&node).len(), 2);
}

fn image_how(image: &Image, node: &Node) -> How {
    let given = node.demand(&image.file, &image.request);
    drop(given);
    image.next(node).how
}

#[test]
fn killed_while_copying_it_leaves_nothing() {
    let Some(mut node) = Node::start(FILL) else {
        return;
    };
    let mut words = tree(9, 40);
    let block = words["file-00003"].clone();
    let mut big = Vec::new();
    for round in 0..400u32 {
        big.extend_from_slice(&round.to_le_bytes());
        big.extend(block.iter().map(|byte| byte ^ round as u8));
    }
    words.insert("big".into(), big);
    let Some(image) = Image::new(&node, "image", words) else {
        return;
    };
    let given = node.demand(&image.file, &image.request);
    let pid = node.child.id();
    // A file without a name.
    let copying = || {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let mut open = open
            .flatten()
            .filter_map(|fd| std::fs::read_link(fd.path()).ok());
        open.any(|file| file.to_string_lossy().contains("/cache/whole/#"))
    };
    eventually("it is copied", copying);
    drop(given);
    kill(&mut node);
    assert_eq!(copies(&node), [] as [PathBuf; 0]);
    start(&mut node);
    drop(image.first(&node));
    drop(next_from_the_copy(&node, &image));
}

/// Under a service manager that holds what a keeper leaves: see `manager.py`.
#[test]
fn a_mounted_copy_outlives_its_keeper() {
    let Some(mut node) = Node::start(FILL) else {
        return;
    };
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    let mut keeper = node.under_a_manager();
    let first = keeper();
    let Some(image) = Image::new(&node, "image", tree(10, 40)) else {
        return;
    };
    drop(image.first(&node));
    drop(next_from_the_copy(&node, &image));
    kill_process(first, Signal::KILL).unwrap();
    assert_ne!(keeper(), first);
    let again = image.next(&node);
    assert_eq!((again.how, again.kept), (How::Cache, true));
    assert!(all(&again.tree) == image.tree);
    drop(again);
    eventually("it is unused", || {
        node.status().mounts.iter().all(|mount| mount.users == 0)
    });
    keeper::ask(&node.socket(), &Request::Drain, None, soon()).unwrap();
    eventually("nothing is mounted", || node.status().mounts.is_empty());
}
