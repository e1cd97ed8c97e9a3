//! What a step reads of others, for `fuzz/`, which gives it any bytes.

use std::ffi::OsString;
use std::path::Path;

use berth_config::Config;

use crate::mounts;
use crate::refusal::Refusal;
use crate::user::{Account, User};
use crate::wanted::Wanted;
use crate::wire::{Assembler, Body, Job};

/// What a step was told, as far as the plugin's own words come through unchanged.
#[derive(Debug, PartialEq, Eq)]
pub struct Told {
    pub user: User,
    pub job: u32,
    pub reference: String,
    pub pins: String,
    pub mounts: Vec<OsString>,
    pub workdir: Option<OsString>,
    pub writable: bool,
}

/// Packets as those of the plugin that describe the job.
pub fn job<'a>(packets: impl Iterator<Item = &'a [u8]>) -> Result<Told, String> {
    let mut assembler = Assembler::default();
    let mut body = None;
    for packet in packets {
        body = (assembler.push(b'J', packet)).map_err(|e| e.to_string())?;
        if body.is_some() {
            break;
        }
    }
    let job = Job::parse(&body.ok_or("no end")?).map_err(|e| e.to_string())?;
    // What is made of it next.
    let _ = Wanted::new(&job.reference, &job.pins, &Config::default());
    let _ = mounts::of_user(&job.mounts, true);
    Ok(Told {
        user: job.user,
        job: job.job,
        reference: job.reference,
        pins: job.pins,
        mounts: job.mounts,
        workdir: job.workdir.map(OsString::from),
        writable: job.writable,
    })
}

/// A body as one of the children's: what the account database says, and a refusal, whose text is for terminals.
pub fn child(body: &[u8]) -> (Account, String) {
    (Account::read(body), Refusal::from_body(body).text())
}

/// What a task is answered, as packets.
pub fn answer(cwd: &Path, variables: &[&[u8]]) -> Vec<Vec<u8>> {
    let body = Body::default().path("cwd", cwd);
    let body = (variables.iter()).fold(body, |body, variable| body.field("env", variable));
    let packets = std::cell::RefCell::new(Vec::new());
    let kept = body.parts(b'R', &[], |packet, _| {
        packets.borrow_mut().push(packet.to_vec());
        Ok(())
    });
    kept.map(|()| packets.into_inner()).unwrap_or_default()
}
