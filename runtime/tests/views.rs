//! What a container looks like to an ordinary user's task, on real mounts.

mod rig;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use rig::{Answer, HOME, Site, Step, Tree, UID, able, task, text};

#[test]
fn a_task_runs_in_the_image_as_the_user() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let step = Step::start(&site, &[]);
    let script =
        "cat /etc/os-release; id -u; pwd; echo $OF_IMAGE; ls /dev/null /proc/self/exe; id -un";
    let output = text(&step.run(script));
    let expected =
        format!("NAME=\"the image\"\n{UID}\n/opt\nyes\n/dev/null\n/proc/self/exe\nbackup");
    assert_eq!(output, expected);
    step.end();
    site.wait_clean();
}

#[test]
fn the_image_is_read_only_and_grants_no_privilege() {
    if !able() {
        return;
    }
    let site = Site::new();
    let tree = Tree::new();
    fs::set_permissions(tree.at("opt"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(tree.at("usr/bin/id"), fs::Permissions::from_mode(0o4755)).unwrap();
    site.publish(&tree);
    let step = Step::start(&site, &[]);
    let output = step.run("touch /opt/x");
    assert!(!output.status.success());
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("Read-only"),
        "{output:?}"
    );
    assert_eq!(text(&step.run("id -u")), UID.to_string());
    let mounts = text(&step.run("cat /proc/self/mountinfo"));
    let root = mounts
        .lines()
        .find(|l| l.split(' ').nth(4) == Some("/"))
        .unwrap();
    assert!(root.contains(" ro,nosuid,nodev"), "{root}");
    for line in mounts.lines() {
        assert!(line.split(' ').nth(5).unwrap().contains("nosuid"), "{line}");
    }
    step.end();
}

#[test]
fn missing_mount_points_appear_and_folders_keep_their_looks() {
    if !able() {
        return;
    }
    let site = Site::new();
    let tree = Tree::without_mount_points();
    fs::set_permissions(tree.at("var"), fs::Permissions::from_mode(0o751)).unwrap();
    site.publish(&tree);
    let data = site.users_folder("data");
    fs::write(data.join("here"), "x").unwrap();
    let mount = format!("{}:/var/deep/er/data", data.display());
    let step = Step::start(&site, &[("mount", mount.as_ref())]);
    let script =
        "cat /var/deep/er/data/here; echo; stat -c %a:%u /var; ls -d /proc /sys /dev /tmp; ls /";
    let output = text(&step.run(script));
    let expected = "x\n751:0\n/dev\n/proc\n/sys\n/tmp\nbin\ndev\netc\nlib\nlib64\nopt\nproc\nsys\ntmp\nusr\nvar";
    assert_eq!(output, expected);
    step.end();
}

#[test]
fn links_in_the_image_stay_in_the_image() {
    if !able() {
        return;
    }
    let site = Site::new();
    let tree = Tree::new();
    fs::create_dir_all(tree.at("real/deep")).unwrap();
    symlink("/real", tree.at("absolute")).unwrap();
    symlink("../../../../../real", tree.at("opt/climbing")).unwrap();
    symlink("/run/nowhere/file", tree.at("opt/dangling")).unwrap();
    site.publish(&tree);
    let data = site.users_folder("data");
    fs::write(data.join("f"), "x").unwrap();
    let d = data.display();
    let mounts = [
        format!("{d}:/absolute/new"),
        format!("{d}:/opt/climbing/deep"),
        format!("{d}/f:/opt/dangling"),
        format!("{d}:/lib/data"),
    ];
    let fields: Vec<_> = mounts.iter().map(|m| ("mount", m.as_ref())).collect();
    let step = Step::start(&site, &fields);
    let script = "ls /real/new /real/deep /usr/lib/data; cat /opt/dangling /run/nowhere/file";
    let output = text(&step.run(script));
    assert_eq!(
        output,
        "/real/deep:\nf\n\n/real/new:\nf\n\n/usr/lib/data:\nf\nxx"
    );
    assert!(
        !std::path::Path::new("/run/nowhere").exists() && !std::path::Path::new("/real").exists()
    );
    step.end();
}

#[test]
fn home_job_folder_script_and_tmp_are_there() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    // Away from /tmp, which is bound anyway.
    let spool = tempfile::Builder::new()
        .prefix("berth-rt-")
        .tempdir_in("/var")
        .unwrap();
    fs::set_permissions(spool.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let script = spool.path().join("slurm_script");
    fs::write(&script, "#!/bin/sh\necho script\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let work = spool.path().join("work");
    fs::create_dir(&work).unwrap();
    fs::write(work.join("input"), "relative\n").unwrap();
    let step = Step::start(&site, &[("script", script.as_ref())]);
    let commands = format!("cat input; {}; stat -c %i {HOME} /tmp", script.display());
    let output = text(&step.run_at(work.to_str().unwrap(), &commands));
    use std::os::unix::fs::MetadataExt;
    let inode = |p: &str| fs::metadata(p).unwrap().ino();
    let expected = format!("relative\nscript\n{}\n{}", inode(HOME), inode("/tmp"));
    assert_eq!(output, expected);
    step.end();
}

#[test]
fn the_working_directory_is_chosen_in_the_documented_order() {
    if !able() {
        return;
    }
    let site = Site::new();
    let tree = Tree::new();
    fs::write(tree.at("srv/file"), "").unwrap();
    fs::create_dir(tree.at("root-only")).unwrap();
    fs::set_permissions(tree.at("root-only"), fs::Permissions::from_mode(0o700)).unwrap();
    site.publish(&tree);
    let job = site.users_folder("job");
    let pwd = |fields: &[(&str, &std::ffi::OsStr)], cwd: &str| {
        let step = Step::start(&site, fields);
        let output = text(&step.run_at(cwd, "pwd"));
        step.end();
        output
    };
    let job = job.to_str().unwrap();
    assert_eq!(
        pwd(&[("workdir", "/srv/empty".as_ref())], job),
        "/srv/empty"
    );
    assert_eq!(pwd(&[], job), job);
    assert_eq!(pwd(&[], "/no/such/folder"), "/opt");
    for wrong in ["/root-only", "/srv/file", "/nowhere"] {
        let step = Step::start(&site, &[("workdir", wrong.as_ref())]);
        let (code, message) = step.ask(0, job).refusal();
        assert!(
            message.contains(wrong) && [2, 77].contains(&code),
            "{code} {message}"
        );
    }
}

#[test]
fn what_the_user_binds_wins_and_read_only_means_it() {
    if !able() {
        return;
    }
    let site = Site::new();
    site.publish(&Tree::new());
    let data = site.users_folder("data");
    fs::write(data.join("f"), "x").unwrap();
    fs::set_permissions(data.join("f"), fs::Permissions::from_mode(0o666)).unwrap();
    let d = data.display();
    let mounts = [
        format!("{d}:/srv/ro:ro"),
        format!("{d}:/srv/rw"),
        format!("{d}:/tmp"),
    ];
    let fields: Vec<_> = mounts.iter().map(|m| ("mount", m.as_ref())).collect();
    let step = Step::start(&site, &fields);
    let script =
        "ls /tmp; touch /srv/rw/new /srv/rw/f && ls /srv/ro; touch /srv/ro/other 2>&1 || true";
    let output = text(&step.run(script));
    assert!(
        output.starts_with("f\nf\nnew\n") && output.contains("Read-only"),
        "{output}"
    );
    assert!(!data.join("other").exists());
    step.end();
}

#[test]
fn site_binds_and_private_tmp_of_the_job_are_kept() {
    if !able() {
        return;
    }
    let mut site = Site::new();
    site.publish(&Tree::new());
    // Away from /tmp, which is another one in the job.
    let shared = tempfile::Builder::new()
        .prefix("berth-rt-")
        .tempdir_in("/var")
        .unwrap();
    let shared = shared.path();
    fs::set_permissions(shared, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(shared.join("s"), "").unwrap();
    site.node = format!(
        "[[node.binds]]\nsource = '{}'\ntarget = '/scratch'\nread_only = true\n\
         [[node.binds]]\nsource = '/no/such'\noptional = true\n[node.slurm]\nclient = false\n",
        shared.display()
    );
    let private =
        rig::Namespace::new("mount --make-rprivate /\nmount -t tmpfs none /tmp\nmkdir /tmp/job");
    let step = Step::start(&site, &[]);
    let answer = step.ask_from(&private.file(), 0, "/").answer();
    let Answer::Ready {
        namespace,
        cwd,
        env,
    } = answer
    else {
        panic!("{answer:?}");
    };
    let script = "ls -d /tmp/job; ls /scratch; touch /scratch/x 2>&1 || true";
    let output = task(&namespace, &cwd, &env)
        .args(["/bin/sh", "-c", script])
        .output()
        .unwrap();
    let output = text(&output);
    assert!(
        output.starts_with("/tmp/job\ns\n") && output.contains("Read-only"),
        "{output}"
    );
    // Another namespace in the same step has a view of its own.
    assert!(!step.run("ls -d /tmp/job").status.success());
    step.end();
}

#[test]
fn a_writable_container_writes_to_memory_alone() {
    if !able() {
        return;
    }
    let mut site = Site::new();
    let tree = Tree::new();
    fs::set_permissions(tree.at("srv/empty"), fs::Permissions::from_mode(0o777)).unwrap();
    let record = site.publish(&tree);
    let before = fs::read(site.data_file(&record)).unwrap();
    site.node = format!("writable_bytes = 4194304\n{}", site.node);
    let step = Step::start(&site, &[("writable", "1".as_ref())]);
    let output = text(&step.run("echo new > /srv/empty/f; cat /srv/empty/f"));
    assert_eq!(output, "new");
    // What root owns in the image is the user's here, on kernels that can show it so.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|n| n.parse().unwrap_or(0));
    let release: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    if release >= (6, 6) {
        let script =
            "touch /usr/bin/new /new && rm /usr/bin/true && stat -c %U:%G /usr /new /srv/empty";
        let owned = text(&step.run(script));
        assert_eq!(owned, "backup:backup\nbackup:backup\nbackup:backup");
        assert!(!step.run("cat /etc/shadow").status.success());
    }
    // Tasks of one step and node see one container.
    assert_eq!(text(&step.run("cat /srv/empty/f")), "new");
    let full = step.run("head -c 100000000 /dev/zero > /srv/empty/big");
    assert!(
        String::from_utf8_lossy(&full.stderr).contains("No space"),
        "{full:?}"
    );
    step.end();
    assert!(fs::read(site.data_file(&record)).unwrap() == before);
    let step = Step::start(&site, &[]);
    assert!(!step.run("cat /srv/empty/f").status.success());
    step.end();
    site.node = site.node.replace("4194304", "0");
    let step = Step::start(&site, &[("writable", "1".as_ref())]);
    assert_eq!(step.ask(0, "/").refusal().0, 2);
}
