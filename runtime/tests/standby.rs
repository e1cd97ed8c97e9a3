//! The helper that waits for steps: what it forks is what the plugin would have started.

mod rig;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};

use berth_image::PrivateKey;
use rig::service::Service;
use rig::{Answer, REFERENCE, Site, Standby, Step, Tree, UID, able, wait_for};
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};

const SHOW: &str = "cat /etc/os-release";
const SHOWN: &str = "NAME=\"the image\"\n";

fn shown(step: &Step) -> String {
    String::from_utf8(step.run(SHOW).stdout).unwrap()
}

fn own_namespace() -> File {
    File::open("/proc/self/ns/mnt").unwrap()
}

/// The helper of the only step.
fn helper_of(standby: &Standby) -> u32 {
    let id = standby.process.id();
    let mut helper = None;
    wait_for("a helper", || {
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        helper = children
            .split_whitespace()
            .next()
            .map(|c| c.parse().unwrap());
        helper.is_some()
    });
    helper.unwrap()
}

#[test]
fn steps_are_served_side_by_side_with_the_configuration_of_now() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let standby = Standby::start(&site);
    let first = Step::by(&standby, &site, &own_namespace());
    let second = Step::by(&standby, &site, &own_namespace());
    assert_eq!(
        (shown(&first), shown(&second)),
        (SHOWN.into(), SHOWN.into())
    );
    // The site has another key from now on.
    let other = PrivateKey::generate().unwrap().public().to_pem().unwrap();
    fs::write(site.path("site.pub"), other).unwrap();
    let third = Step::by(&standby, &site, &own_namespace());
    let (code, text) = third.ask(0, "/").refusal();
    assert_eq!(code, 77, "{text}");
    // And then one that makes no sense: said, not ignored.
    fs::write(site.path("site.pub"), "no key").unwrap();
    let fourth = Step::by(&standby, &site, &own_namespace());
    let (code, text) = fourth.ask(0, "/").refusal();
    assert_eq!(code, 78, "{text}");
    assert!(text.contains("site.pub"), "{text}");
    drop((first, second, third, fourth));
    site.wait_clean();
}

#[test]
fn a_step_is_served_in_the_plugins_mount_namespace_by_a_process_on_its_own() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let standby = Standby::start(&site);
    let elsewhere = Elsewhere::new();
    let namespace = elsewhere.namespace();
    let step = Step::by(&standby, &site, &namespace);
    assert_eq!(shown(&step), SHOWN);
    let helper = helper_of(&standby);
    let facts = fs::metadata(format!("/proc/{helper}/ns/mnt")).unwrap();
    assert_eq!(facts.ino(), namespace.metadata().unwrap().ino());
    let open: Vec<_> = fs::read_dir(format!("/proc/{helper}/fd"))
        .unwrap()
        .map(|entry| fs::read_link(entry.unwrap().path()).unwrap())
        .collect();
    for number in 0..3 {
        let link = fs::read_link(format!("/proc/{helper}/fd/{number}")).unwrap();
        assert_eq!(link.to_str(), Some("/dev/null"), "{open:?}");
    }
    // Nothing of it is for the programs that it starts.
    for entry in fs::read_dir(format!("/proc/{helper}/fdinfo")).unwrap() {
        let entry = entry.unwrap();
        let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let Ok(facts) = fs::read_to_string(entry.path()) else {
            continue;
        };
        let flags = facts.lines().find_map(|l| l.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        let closed = flags & OFlags::CLOEXEC.bits() != 0;
        assert_eq!(closed, number > 2, "{number} of {open:?}");
    }
    let status = fs::read_to_string(format!("/proc/{helper}/status")).unwrap();
    assert!(status.contains("SigBlk:\t0000000000000000"), "{status}");
    drop(step);
    wait_for("the helper to be gone", || {
        !fs::exists(format!("/proc/{helper}")).unwrap()
    });
    site.wait_clean();
}

#[test]
fn running_steps_outlive_the_one_that_forked_them() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    for signal in [Signal::TERM, Signal::KILL] {
        let mut standby = Standby::start(&site);
        let step = Step::by(&standby, &site, &own_namespace());
        assert_eq!(shown(&step), SHOWN);
        let id = Pid::from_raw(standby.process.id().cast_signed()).unwrap();
        kill_process(id, signal).unwrap();
        let ended = standby.process.wait().unwrap();
        assert_eq!(ended.success(), signal == Signal::TERM, "{ended}");
        // The plugin starts a helper by itself then.
        assert!(standby.connect().is_err());
        assert_eq!(shown(&step), SHOWN);
        assert!(matches!(step.ask(1, "/").answer(), Answer::Ready { .. }));
    }
    // What the killed one left is in nobody's way.
    let standby = Standby::start(&site);
    wait_for("the next one to listen", || standby.connect().is_ok());
    site.wait_clean();
}

#[test]
fn a_step_that_waits_when_it_is_told_to_stop_is_served() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let mut standby = Standby::start(&site);
    let id = Pid::from_raw(standby.process.id().cast_signed()).unwrap();
    kill_process(id, Signal::STOP).unwrap();
    let waiting: Vec<_> = (0..3)
        .map(|_| Step::by(&standby, &site, &own_namespace()))
        .collect();
    for signal in [Signal::TERM, Signal::CONT] {
        kill_process(id, signal).unwrap();
    }
    let ended = standby.process.wait().unwrap();
    assert!(ended.success(), "{ended}");
    for step in &waiting {
        assert_eq!(shown(step), SHOWN);
    }
    drop(waiting);
    site.wait_clean();
}

/// Processes that the standby forked, and that live.
fn helpers_of(standby: &Standby) -> Vec<u32> {
    let id = standby.process.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let numbers = children.split_whitespace().map(|c| c.parse().unwrap());
    numbers.collect()
}

/// Where a helper that stays is the only one, and the next step of its number is given to it.
struct Staying {
    site: Site,
    service: Service,
    standby: Standby,
    pins: OsString,
    helper: u32,
}

const KIND: u64 = 7;

impl Staying {
    fn new() -> Staying {
        let mut site = Site::new();
        let service = Service::start(&mut site);
        let record = site.publish(&Tree::new());
        let pins = OsString::from(format!("{REFERENCE}={}", record.manifest));
        let standby = Standby::start(&site);
        let mut staying = Staying {
            site,
            service,
            standby,
            pins,
            helper: 0,
        };
        staying.has_one();
        staying
    }

    fn step(&self, user: u32, fields: &[(&str, &OsStr)]) -> Step {
        let pins: (&str, &OsStr) = ("pins", &self.pins);
        Step::of_kind(
            &self.standby,
            &self.site,
            KIND,
            user,
            &[&[pins], fields].concat(),
        )
    }

    /// Runs plain steps until one is served by the helper that served the one before: mounts that other tests make on this
    /// machine let it leave.
    fn has_one(&mut self) {
        let mut before = Vec::new();
        wait_for("a helper that stays", || {
            let step = self.step(UID, &[]);
            assert_eq!(shown(&step), SHOWN);
            let now = helpers_of(&self.standby);
            let stays = now == before && now.len() == 1;
            before = now;
            drop(step);
            stays
        });
        self.helper = before[0];
    }

    /// What a step of the same number shows; none where it was not served by who stayed.
    fn shows(&self, user: u32, fields: &[(&str, &OsStr)], script: &str) -> Option<String> {
        let step = self.step(user, fields);
        let said = String::from_utf8(step.run(script).stdout).unwrap();
        (helpers_of(&self.standby) == [self.helper]).then_some(said)
    }
}

#[test]
fn who_stays_serves_its_kind_and_begins_anew_for_whatever_has_the_same_number() {
    if !able() {
        return;
    }
    let mut all = Staying::new();
    assert!(all.service.given() >= 2, "the service is told of each step");
    let folder = all.site.users_folder("mine");
    fs::write(folder.join("mine"), "").unwrap();
    let mount = OsString::from(format!("{}:/mnt", folder.display()));
    let mount: &[(&str, &OsStr)] = &[("mount", &mount)];
    const OTHER: u32 = 33;
    let places: &[(&str, &OsStr)] = &[("workdir", OsStr::new("/usr"))];
    let cases = [
        (UID, mount, "ls /mnt", "mine", ":34:"),
        (OTHER, &[], "cat /etc/passwd; ls /mnt", ":33:33:", ":34:34:"),
        (UID, places, "pwd; ls /mnt", "/usr", "mine"),
        (UID, &[], "cat /etc/passwd; ls /mnt; pwd", ":34:34:", "mine"),
    ];
    for (user, fields, script, shown, hidden) in cases {
        let mut said = None;
        wait_for("one that stayed gets it", || {
            said = all.shows(user, fields, script);
            if said.is_none() {
                all.has_one();
            }
            said.is_some()
        });
        let said = said.unwrap();
        assert!(said.contains(shown) && !said.contains(hidden), "{said}");
        all.has_one();
    }
    // It leaves when the service says that it drains.
    let Staying {
        site,
        standby,
        service,
        ..
    } = all;
    service.hurry();
    wait_for("who waits to leave", || helpers_of(&standby).is_empty());
    drop(standby);
    drop(service);
    site.wait_clean();
}

#[test]
fn who_stays_leaves_with_a_mount_with_another_configuration_and_with_the_one_who_knows() {
    if !able() {
        return;
    }
    let mut all = Staying::new();
    // A mount that comes to the node, and goes.
    let folder = all.site.path("mounted");
    fs::create_dir(&folder).unwrap();
    let on = |program: &str| {
        let mut command = Command::new(program);
        if program == "mount" {
            command.args(["-t", "tmpfs", "berth-test"]);
        }
        assert!(command.arg(&folder).status().unwrap().success());
    };
    on("mount");
    wait_for("who waits to leave", || helpers_of(&all.standby).is_empty());
    on("umount");

    // A step is running while the keys change: its helper does not stay.
    all.has_one();
    let running = all.step(UID, &[]);
    assert_eq!(shown(&running), SHOWN);
    let other = PrivateKey::generate().unwrap().public().to_pem().unwrap();
    let was = fs::read(all.site.path("site.pub")).unwrap();
    fs::write(all.site.path("site.pub"), other).unwrap();
    let (code, text) = all.step(UID, &[]).ask(0, "/").refusal();
    assert_eq!(code, 77, "{text}");
    drop(running);
    wait_for("nobody to stay", || helpers_of(&all.standby).is_empty());
    fs::write(all.site.path("site.pub"), was).unwrap();

    // Writing is nobody else's to see.
    let write = all.step(UID, &[("writable", OsStr::new("1"))]);
    assert_eq!(shown(&write), SHOWN);
    drop(write);
    wait_for("nobody to stay", || helpers_of(&all.standby).is_empty());

    // Which bits a tag means is found out for each step that nobody pinned it for.
    let unpinned = Step::of_kind(&all.standby, &all.site, KIND, UID, &[]);
    assert_eq!(shown(&unpinned), SHOWN);
    drop(unpinned);
    wait_for("nobody to stay", || helpers_of(&all.standby).is_empty());

    // The one who knows is gone.
    all.has_one();
    let helper = all.helper;
    drop(all.standby);
    wait_for("the helper to be gone", || {
        !fs::exists(format!("/proc/{helper}")).unwrap()
    });
    drop(all.service);
    all.site.wait_clean();
}

/// A process in a mount namespace of its own.
struct Elsewhere(Child);

impl Elsewhere {
    fn new() -> Elsewhere {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sleep", "600"]);
        let elsewhere = Elsewhere(command.stdin(Stdio::null()).spawn().unwrap());
        let own = own_namespace().metadata().unwrap().ino();
        wait_for("another namespace", || {
            elsewhere.namespace().metadata().unwrap().ino() != own
        });
        elsewhere
    }

    fn namespace(&self) -> File {
        File::open(format!("/proc/{}/ns/mnt", self.0.id())).unwrap()
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
