//! `berth pulls`.

use berth_client::api::{Pull, PullState};

use crate::command::follow;
use crate::context::Context;
use crate::error::Failure;
use crate::progress::{self, Display};
use crate::{interrupt, output};

pub fn pulls(context: &Context, watch: bool) -> Result<(), Failure> {
    if watch {
        follow_all(context)?;
    }
    let pulls = context.client()?.pulls()?;
    if context.json {
        return output::json(&pulls);
    }
    let rows: Vec<Vec<String>> = (pulls.iter())
        .map(|pull| {
            vec![
                pull.id.clone(),
                progress::word(pull.state).to_owned(),
                fraction(pull),
                output::time(&pull.started_at),
                pull.reference.clone(),
                pull.error
                    .as_ref()
                    .map(|e| e.message.clone())
                    .unwrap_or_default(),
            ]
        })
        .collect();
    output::table(&["ID", "STATE", "DONE", "STARTED", "REFERENCE", ""], &rows)
}

/// Shows what is in flight until nothing of it is.
fn follow_all(context: &Context) -> Result<(), Failure> {
    let display = Display::new(context);
    let cleaned = display.clone();
    interrupt::watch(move || cleaned.clear())?;
    let client = context.client()?;
    let flying: Vec<Pull> = client
        .pulls()?
        .into_iter()
        .filter(|p| !p.state.is_final())
        .collect();
    std::thread::scope(|scope| {
        for pull in flying {
            let track = display.track(&pull.reference);
            let client = &client;
            // How it ended stands in the list that is printed afterwards.
            scope.spawn(move || follow::follow(client, pull, None, &track));
        }
    });
    display.clear();
    Ok(())
}

/// How far a pull is: its stage's share of the layers' bytes.
fn fraction(pull: &Pull) -> String {
    let done = match pull.state {
        PullState::Converting | PullState::Publishing => pull.bytes_converted,
        _ => pull.bytes_fetched,
    };
    match (pull.state, pull.bytes_total) {
        (PullState::Ready, _) => "100%".into(),
        (_, 0) => "-".into(),
        (_, total) => format!("{}%", (u128::from(done) * 100 / u128::from(total)).min(100)),
    }
}
