//! `berth pull` and `berth prefetch`.

use std::io::Read;
use std::path::Path;

use berth_client::api::{Pull, PullRequest};
use berth_image::Platform;
use serde::Serialize;

use crate::command::follow;
use crate::context::Context;
use crate::error::{Failure, OTHER, UNAVAILABLE, USAGE};
use crate::progress::Display;
use crate::{interrupt, output};

/// Largest list read, in bytes.
const MAX_LIST: u64 = 16 << 20;

/// What came of one reference, for machines.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    reference: &'a str,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<OutcomeError<'a>>,
}

#[derive(Debug, Serialize)]
struct OutcomeError<'a> {
    exit_code: u8,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
}

pub fn pull(
    context: &Context,
    references: &[String],
    platform: Option<Platform>,
) -> Result<(), Failure> {
    // A pull of a few: a typing error in one stops all, before anything is asked.
    for reference in references {
        context.reference(reference)?;
    }
    let (results, _) = run(context, references, platform)?;
    finish(context, references, &results)
}

pub fn prefetch(
    context: &Context,
    mut references: Vec<String>,
    file: Option<&Path>,
    platform: Option<Platform>,
) -> Result<(), Failure> {
    if let Some(file) = file {
        references.extend(read_list(file)?);
    }
    let (results, display) = run(context, &references, platform)?;
    let failed = results.iter().filter(|r| r.is_err()).count();
    display.say(&match failed {
        0 => format!("{} ready", results.len()),
        _ => format!("{} ready, {failed} failed", results.len() - failed),
    });
    finish(context, &references, &results)
}

/// Asks for all and waits for all. What is no reference fails here, without a question to the daemon.
fn run(
    context: &Context,
    references: &[String],
    platform: Option<Platform>,
) -> Result<(Vec<Result<Pull, Failure>>, Display), Failure> {
    let display = Display::new(context);
    let cleaned = display.clone();
    interrupt::watch(move || cleaned.clear())?;
    let client = context.client()?;

    let checked: Vec<_> = references.iter().map(|r| context.reference(r)).collect();
    let platform = platform.map(|p| p.to_string());
    let requests: Vec<PullRequest> = (references.iter().zip(&checked))
        .filter(|(_, checked)| checked.is_ok())
        .map(|(reference, _)| PullRequest {
            reference: reference.clone(),
            platform: platform.clone(),
            fresh: true,
        })
        .collect();
    let mut answers = follow::all(&client, &requests, &display).into_iter();
    let results = (checked.into_iter())
        .map(|checked| match checked {
            Ok(_) => answers
                .next()
                .unwrap_or_else(|| Err(Failure::silent(OTHER))),
            Err(failure) => Err(failure),
        })
        .collect();
    Ok((results, display))
}

/// Prints what came of each, and ends with the code of the failures.
fn finish(
    context: &Context,
    references: &[String],
    results: &[Result<Pull, Failure>],
) -> Result<(), Failure> {
    let both = || references.iter().zip(results);
    if context.json {
        output::json(
            &both()
                .map(|(r, result)| outcome(r, result))
                .collect::<Vec<_>>(),
        )?;
    } else {
        for (_, result) in both() {
            if let Ok(pull) = result {
                output::line(&format!("{} {}", digest(pull), pull.reference))?;
            }
        }
    }
    let failures: Vec<(&String, &Failure)> = both()
        .filter_map(|(r, result)| Some((r, result.as_ref().err()?)))
        .collect();
    let Some((_, first)) = failures.first() else {
        return Ok(());
    };
    let code = match failures.iter().all(|(_, f)| f.code == first.code) {
        true => first.code,
        false => OTHER,
    };
    if code == UNAVAILABLE && failures.len() == results.len() && results.len() > 1 {
        let same = failures.iter().all(|(_, f)| f.message == first.message);
        // Nobody answers: said once, not once a reference.
        if same {
            return Err((*first).clone());
        }
    }
    for (reference, failure) in failures {
        named(reference, failure, references.len()).report();
    }
    Err(Failure::silent(code))
}

/// With several references, each failure says whose it is.
fn named(reference: &str, failure: &Failure, of: usize) -> Failure {
    let mut failure = failure.clone();
    let bare = reference.strip_prefix("docker://").unwrap_or(reference);
    if of > 1 && !failure.message.contains(bare) {
        failure.message = format!("{reference}: {}", failure.message);
    }
    failure
}

fn outcome<'a>(reference: &'a str, result: &'a Result<Pull, Failure>) -> Outcome<'a> {
    match result {
        Ok(pull) => Outcome {
            reference,
            state: "ready",
            digest: pull.digest.as_deref(),
            path: pull.path.as_deref(),
            error: None,
        },
        Err(failure) => Outcome {
            reference,
            state: "failed",
            digest: None,
            path: None,
            error: Some(OutcomeError {
                exit_code: failure.code,
                message: &failure.message,
                hint: failure.hint.as_deref(),
            }),
        },
    }
}

fn digest(pull: &Pull) -> &str {
    pull.digest.as_deref().unwrap_or("-")
}

fn read_list(file: &Path) -> Result<Vec<String>, Failure> {
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin()
            .lock()
            .take(MAX_LIST)
            .read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|f| f.take(MAX_LIST).read_to_string(&mut text))
    };
    read.map_err(|e| {
        Failure::new(
            USAGE,
            format!("cannot read the list `{}`: {e}", file.display()),
        )
    })?;
    Ok(parse_list(&text))
}

/// One reference a line; what follows a `#` that starts a word is a comment.
fn parse_list(text: &str) -> Vec<String> {
    (text.lines())
        .map(|line| line.split_whitespace().take_while(|w| !w.starts_with('#')))
        .map(|words| words.collect::<Vec<_>>().join(" "))
        .filter(|line| !line.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_comments_and_empty_lines() {
        let text = "# all\n\n a.b/c:1  # the first\r\nd.e/f@sha256:0\n   #x\n";
        assert_eq!(parse_list(text), ["a.b/c:1", "d.e/f@sha256:0"]);
    }
}
