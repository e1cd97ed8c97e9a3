//! `berth node`: what this node's service keeps mounted, and having it let go.

use std::time::{Duration, Instant};

use berth_mount::keeper::{self, Answer, How, KeeperError, Request, Status};

use crate::context::Context;
use crate::error::{Failure, OTHER, UNAVAILABLE};
use crate::output;

/// How long the service may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The service's answer.
pub fn ask(context: &Context, request: &Request, patience: Duration) -> Result<Answer, Failure> {
    let socket = &context.config.node.service.socket;
    keeper::ask(socket, request, None, Instant::now() + patience).map_err(|error| match error {
        KeeperError::Refused { code, why, hint } => Failure {
            hint,
            ..Failure::new(code, why)
        },
        error => Failure::new(UNAVAILABLE, error.to_string()).hint(
            "`systemctl status berth-node` tells; container jobs start without it, only slower",
        ),
    })
}

pub fn status(context: &Context, metrics: bool) -> Result<(), Failure> {
    if metrics {
        return match ask(context, &Request::Metrics, PATIENCE)? {
            Answer::Text { text } => output::line(text.trim_end()),
            _ => Err(misunderstood()),
        };
    }
    let status = the_status(ask(context, &Request::Status, PATIENCE)?)?;
    if context.json {
        return output::json(&status);
    }
    show(&status)
}

/// Exits with 1 while something is still used.
pub fn drain(context: &Context) -> Result<(), Failure> {
    let status = the_status(ask(context, &Request::Drain, PATIENCE)?)?;
    if context.json {
        output::json(&status)?;
    }
    match status.mounts.len() {
        0 => Ok(()),
        count => Err(
            Failure::new(OTHER, format!("{count} mounts are still used"))
                .hint("they go with their jobs; `berth node status` lists them"),
        ),
    }
}

fn the_status(answer: Answer) -> Result<Status, Failure> {
    match answer {
        Answer::Status(status) => Ok(status),
        _ => Err(misunderstood()),
    }
}

fn misunderstood() -> Failure {
    Failure::new(UNAVAILABLE, "the node service speaks another language")
        .hint("berth and berth-node must be of one release")
}

fn show(status: &Status) -> Result<(), Failure> {
    let rows: Vec<Vec<String>> = (status.mounts.iter())
        .map(|mount| {
            vec![
                output::short_digest(&mount.digest),
                mount.platform.clone(),
                how(mount.how).to_owned(),
                mount.users.to_string(),
                match mount.users {
                    0 => format!("{} s", mount.idle_s),
                    _ => "-".to_owned(),
                },
                mount.given.to_string(),
                mount.fetched.map_or_else(|| "-".to_owned(), output::size),
                match mount.paths.as_slice() {
                    [] => "-".to_owned(),
                    paths => {
                        let shown = paths.iter().map(|path| path.display().to_string());
                        shown.collect::<Vec<_>>().join(" ")
                    }
                },
            ]
        })
        .collect();
    output::table(
        &[
            "DIGEST", "PLATFORM", "BY", "USERS", "IDLE", "GIVEN", "FETCHED", "AT",
        ],
        &rows,
    )?;
    let copies = status.copies;
    if copies.count > 0 {
        output::line(&format!(
            "whole images on this node: {}, {} of at most {}",
            copies.count,
            output::size(copies.bytes),
            output::size(copies.limit),
        ))?;
    }
    match status.draining {
        true => output::line("drained: nothing is kept until the service is restarted"),
        false => Ok(()),
    }
}

fn how(how: How) -> &'static str {
    match how {
        How::Kernel => "kernel",
        How::Cache => "kernel, node's copy",
        How::Lazy => "on demand",
    }
}
