//! `berth mount` and `berth umount`: an image as a folder, for whoever asks.
//!
//! `berth-fuse mount` serves it in the background until it is unmounted. Root mounts by itself, others by `fusermount3`.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use berth_image::Platform;
use nix::unistd::geteuid;
use serde_json::json;

use crate::command::image_file::{self, Bytes};
use crate::context::Context;
use crate::error::{Failure, OTHER, UNAVAILABLE, USAGE};
use crate::{output, programs};

/// What mounts for those who may not.
const HELPER: &str = "fusermount3";

pub fn mount(
    context: &Context,
    image: &str,
    folder: &Path,
    platform: Option<Platform>,
) -> Result<(), Failure> {
    let image = image_file::open_image(context, image, platform)?;
    let folder = folder.canonicalize().map_err(|e| {
        Failure::new(
            USAGE,
            format!("cannot mount on `{}`: {e}", folder.display()),
        )
        .hint("make the folder first")
    })?;
    if !geteuid().is_root() && !programs::on_path(HELPER) {
        return Err(without_helper());
    }
    let program = programs::find("berth-fuse")?;
    let mut server = Command::new(&program);
    server.args(["mount", "--background"]);
    match image.bytes {
        Bytes::File { path, .. } => {
            server.arg(std::path::absolute(&path).unwrap_or(path));
        }
        Bytes::Daemon { options, grant } => {
            server.args(options).arg("-").env("BERTH_GRANT", grant);
        }
    }
    let mut server = server
        .arg(&folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .current_dir("/")
        .spawn()
        .map_err(|e| Failure::new(OTHER, format!("cannot run `{}`: {e}", program.display())))?;
    let mut line = String::new();
    if let Some(said) = server.stdout.take() {
        let _ = BufReader::new(said).read_line(&mut line);
    }
    if line.trim_end() != "mounted" {
        return Err(why_not(server));
    }
    let shown = folder.display().to_string();
    match context.json {
        true => output::json(&json!({
            "folder": shown,
            "image": image.name,
            "digest": image.record.map(|record| record.manifest),
            "server": server.id(),
        })),
        false => {
            context.say(&format!("`berth umount {shown}` lets go of it"));
            output::line(&shown)
        }
    }
}

/// What the server said before it ended.
fn why_not(mut server: std::process::Child) -> Failure {
    let mut said = String::new();
    if let Some(mut stderr) = server.stderr.take() {
        let _ = stderr.read_to_string(&mut said);
    }
    let _ = server.wait();
    let last = said.lines().rev().find(|l| !l.trim().is_empty());
    let last = last.unwrap_or("berth: the server ended without a word");
    let failure = Failure::new(OTHER, last.strip_prefix("berth: ").unwrap_or(last));
    match last.contains("/dev/fuse") || last.contains("mount") {
        true => failure.hint("`berth doctor` tells whether this machine can mount through FUSE"),
        false => failure,
    }
}

fn without_helper() -> Failure {
    Failure::new(
        UNAVAILABLE,
        format!("ordinary users mount by `{HELPER}`, which is not installed here"),
    )
    .hint("`berth exec` needs none; the admin can install the package fuse3")
}

pub fn umount(folder: &Path) -> Result<(), Failure> {
    // Not canonicalize: a mount whose server is gone cannot be looked at.
    let folder = absolute(folder)?;
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !is_ours(&table, &folder) {
        return Err(Failure::new(
            USAGE,
            format!("nothing of berth's is mounted on `{}`", folder.display()),
        )
        .hint("findmnt -t fuse.berth lists what is"));
    }
    let mut command = match geteuid().is_root() {
        true => Command::new("umount"),
        false if !programs::on_path(HELPER) => return Err(without_helper()),
        false => {
            let mut helper = Command::new(HELPER);
            helper.arg("-u");
            helper
        }
    };
    let done = command.arg("--").arg(&folder).output();
    let done = done.map_err(|e| Failure::new(OTHER, format!("cannot unmount: {e}")))?;
    match done.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
            Err(Failure::new(OTHER, said)
                .hint("it is in use as long as a process has a file of it open, or is in it"))
        }
    }
}

/// Without links in its parents, and without a look at the folder itself.
fn absolute(folder: &Path) -> Result<PathBuf, Failure> {
    let wrong = |e: std::io::Error| Failure::new(USAGE, format!("`{}`: {e}", folder.display()));
    let folder = std::path::absolute(folder).map_err(wrong)?;
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else {
        return Ok(folder);
    };
    Ok(parent.canonicalize().map_err(wrong)?.join(name))
}

/// Whether the topmost mount on `folder` is one of `berth-fuse`'s.
fn is_ours(table: &str, folder: &Path) -> bool {
    let mut of_folder = table.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let point = unescape(mount.split(' ').nth(4)?);
        (Path::new(&point) == folder).then(|| filesystem.split(' ').next())?
    });
    of_folder.next_back() == Some("fuse.berth")
}

/// mountinfo's `\040` as a space, and so on.
fn unescape(text: &str) -> String {
    let mut out = text.to_owned();
    for (code, plain) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        out = out.replace(code, plain);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_mounts_are_unmounted() {
        let table = "29 1 0:25 / / rw - ext4 /dev/sda rw\n\
                     40 29 0:41 / /home/u/my\\040image ro,nosuid - fuse.berth berth ro\n\
                     41 29 0:42 / /mnt ro - fuse.berth berth ro\n\
                     42 41 0:43 / /mnt rw - tmpfs tmpfs rw\n";
        assert!(is_ours(table, Path::new("/home/u/my image")));
        assert!(!is_ours(table, Path::new("/")));
        assert!(!is_ours(table, Path::new("/home")));
        // Something else lies over it.
        assert!(!is_ours(table, Path::new("/mnt")));
    }
}
