//! Bytes as what passes between Slurm's plugin and a step's helper: what the plugin reads of its environment, its
//! line in plugstack.conf and its helper, in slurmstepd and as root, and what the helper reads of the plugin and of
//! its own children. Both ends understand each other.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use berth_runtime::strangers;

use super::Target;
use crate::plugin::plan::{self, Asked, StepEnv};
use crate::plugin::settings::Settings;
use crate::plugin::wire::{Answer, Body, MAX_BODY, MAX_MESSAGE, Reader, Ready};

pub const TARGET: Target = Target {
    name: "step",
    run,
    seeds,
};

fn run(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    match kind % 6 {
        0 => heard(packets(data)),
        1 => {
            let _ = strangers::job(packets(data));
        }
        2 => {
            let (_, text) = strangers::child(data);
            assert!(text.chars().filter(|c| c.is_control()).count() <= 1);
        }
        3 => node(data),
        4 => client(data),
        _ => settings(data),
    }
}

/// Parts of any length, each behind its length in two bytes; the last one may be cut.
fn packets(mut data: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (len, rest) = data.split_first_chunk::<2>()?;
        let len = usize::from(u16::from_le_bytes(*len)).min(rest.len());
        let (packet, rest) = rest.split_at(len);
        data = rest;
        Some(packet)
    })
}

/// What the plugin takes of its helper's packets can be handed to Slurm and to the kernel.
fn heard<'a>(packets: impl Iterator<Item = &'a [u8]>) {
    let mut reader = Reader::default();
    for packet in packets {
        match reader.take(packet) {
            Err(_) => return,
            Ok(None) => {}
            Ok(Some(Answer::Progress(text))) => assert!(text.len() < packet.len()),
            Ok(Some(Answer::Error { code, .. })) => assert_ne!(code, 0),
            Ok(Some(Answer::Ready(ready))) => fit(&ready),
        }
    }
}

fn fit(ready: &Ready) {
    assert!(ready.cwd.starts_with(b"/") && !ready.cwd.contains(&0));
    let set = ready.env.iter().map(|(name, _)| name);
    for name in set.chain(&ready.unset) {
        assert!(!name.is_empty() && !name.starts_with(b"SLURM") && !name.contains(&0));
    }
    for (name, value) in &ready.env {
        assert!(!name.contains(&b'=') && !value.contains(&0));
    }
}

/// A step's environment: what the plugin decides reaches the helper as it was decided.
fn node(data: &[u8]) {
    let mut words = data.split(|byte| *byte == 0);
    let mut next = || words.next().filter(|w| *w != b"\x01").map(<[u8]>::to_vec);
    let env = StepEnv {
        container: next(),
        job_image: next(),
        job_mounts: next(),
        job_workdir: next(),
        job_writable: next(),
        step_mounts: next(),
        step_workdir: next(),
        step_writable: next(),
    };
    let (pins, cwd) = (next().unwrap_or_default(), next().unwrap_or_default());
    let variables: Vec<_> = words.collect();
    let Some(wish) = plan::node(&env) else {
        return;
    };
    assert!(!wish.reference.is_empty() && wish.reference != plan::NONE);
    let mut body = Body::default();
    body.field("config", b"/c")
        .number("uid", 7)
        .number("gid", 8)
        .field("groups", b"9,10")
        .number("jobid", 11)
        .field("reference", &wish.reference)
        .field("pins", &pins)
        .field("workdir", &wish.workdir)
        .field("writable", if wish.writable { b"1" } else { b"0" });
    for mount in &wish.mounts {
        assert!(!mount.is_empty() && !mount.contains(&b','));
        body.field("mount", mount);
    }
    let messages = body
        .messages(b'J')
        .expect("an input is shorter than a body may be");
    assert!(messages.iter().all(|message| message.len() <= MAX_MESSAGE));
    let told = strangers::job(messages.iter().map(Vec::as_slice)).expect("a job");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mounts = wish.mounts.iter().map(|mount| OsStr::from_bytes(mount));
    assert!(told.mounts.iter().map(|mount| &**mount).eq(mounts));
    assert_eq!((told.user.uid, told.user.gid, told.job), (7, 8, 11));
    assert_eq!(told.reference, text(&wish.reference));
    assert_eq!(told.pins, text(&pins));
    assert_eq!(told.workdir.unwrap_or_default().as_bytes(), wish.workdir);
    assert_eq!(told.writable, wish.writable);
    answered(&cwd, &variables);
}

/// The helper's answer: what the plugin takes of it is what was said, or nothing.
fn answered(cwd: &[u8], variables: &[&[u8]]) {
    let mut reader = Reader::default();
    let mut taken = None;
    let answer = strangers::answer(Path::new(OsStr::from_bytes(cwd)), variables);
    for packet in &answer {
        assert!(packet.len() <= MAX_MESSAGE && taken.is_none());
        match reader.take(packet) {
            Ok(answer) => taken = answer,
            Err(_) => return,
        }
    }
    let Some(Answer::Ready(ready)) = taken else {
        panic!("an answer without an end");
    };
    fit(&ready);
    assert_eq!(ready.cwd, cwd);
    let pairs = ready
        .env
        .iter()
        .map(|(name, value)| [&name[..], value].join(&b'='));
    assert!(pairs.eq(variables.iter().map(|variable| variable.to_vec())));
}

/// A command line of sbatch's or srun's.
fn client(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else {
        return;
    };
    let mut words = data.split(|byte| *byte == 0);
    let mut next = |bit: u8| {
        words
            .next()
            .filter(|_| flags & bit != 0)
            .map(<[u8]>::to_vec)
    };
    let asked = Asked {
        container: next(1),
        image: next(2),
        job_image: next(4),
        workdir: next(8),
        mounts: plan::split_mounts(next(16)),
        writable: flags & 32 != 0,
        new_job: flags & 64 != 0,
        starts_step: flags & 128 != 0,
        cwd: next(64),
    };
    if let Ok(plan) = plan::client(&asked)
        && let Some(reference) = &plan.ask
    {
        assert!(plan.contained);
        let pins = plan::add_pin(&next(16).unwrap_or_default(), reference, b"sha256:1");
        let again = plan::add_pin(&pins, reference, b"sha256:2");
        assert!(again.len() <= pins.len() && again.ends_with(b"=sha256:2"));
    }
}

fn settings(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let arguments: Vec<String> = text.split_whitespace().map(String::from).collect();
    let settings = Settings::parse(&arguments);
    assert!(settings.runtime.starts_with('/') && settings.config.starts_with('/'));
    assert!(!settings.wait.is_zero() && settings.unknown.len() <= arguments.len());
}

fn seeds() -> Vec<Vec<u8>> {
    let part = |bytes: &[u8]| [&(bytes.len() as u16).to_le_bytes(), bytes].concat();
    let job = b"config=/c\0uid=1000\0gid=100\0groups=4,5\0jobid=7\0reference=a/b:1\0pins=a/b:1=sha256:00\0mount=/x\0\
        mount=/y:/z:ro\0workdir=/w\0writable=1\0script=/s\0prolog=/p\0home=/h\0cwd=/w\0command=x";
    let long = [&b"r"[..], &[b'x'; 60_000]].concat();
    assert!(long.len() < MAX_BODY);
    vec![
        [&[0][..], &part(b"Ppulling 3 %"), &part(b"Ecode=69\0text=berth: no")].concat(),
        [&[0][..], &part(b"rcwd=/w\0env=PATH=/b"), &part(b"Rin\0env=E=\0unset=LD_PRELOAD")].concat(),
        [&[0][..], &part(&long)].concat(),
        [&[1][..], &part(&[b"J", &job[..]].concat())].concat(),
        [&[1][..], &part(b"jconfig=/c\0ui"), &part(b"Jd=1")].concat(),
        b"\x02name=u\0home=/h\0group=7:g\0other=1:2:slurm\0code=77\0line=no\0hint=ask".to_vec(),
        b"\x03docker://a/b:1\0docker://a/b:1\0/x:/y,/z\0/w\x001\0/z,/a:/b:ro\0/v\x001\0a=sha256:1\0/w\0PATH=/bin\0E="
            .to_vec(),
        b"\x03/home/u/x.sqsh".to_vec(),
        b"\x04\xffdocker://a/b:1\0docker://a/b:1\0x\0/w\0/x:/y,/z\0a=1,docker://a/b:1=sha256:0".to_vec(),
        b"\x05runtime=/r config=/c wait=5 image_option=0 log=/l wait=never colour=red".to_vec(),
    ]
}
