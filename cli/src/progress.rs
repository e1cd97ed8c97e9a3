//! How pulls are shown while they go on: bars on a terminal, a line for each change in a log, nothing for machines.
//! All of it goes to stderr.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use berth_client::api::{Pull, PullState};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::context::Context;
use crate::output::{note, size};

/// In a log, a long transfer is mentioned again after so long.
const AGAIN: Duration = Duration::from_secs(30);

/// Where pulls are shown. Clones show in the same place.
#[derive(Debug, Clone)]
pub enum Display {
    Silent,
    Lines,
    Bars(MultiProgress),
}

/// One pull on display.
#[derive(Debug)]
pub struct Track {
    label: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Silent,
    Lines(Mutex<Said>),
    Bar(ProgressBar),
}

#[derive(Debug)]
struct Said {
    state: Option<PullState>,
    since: Instant,
    started: Instant,
}

impl Display {
    pub fn new(context: &Context) -> Self {
        if context.quiet || context.json {
            Self::Silent
        } else if std::io::stderr().is_terminal() {
            Self::Bars(MultiProgress::with_draw_target(ProgressDrawTarget::stderr()))
        } else {
            Self::Lines
        }
    }

    pub fn track(&self, label: &str) -> Track {
        let kind = match self {
            Self::Silent => Kind::Silent,
            Self::Lines => Kind::Lines(Mutex::new(Said {
                state: None,
                since: Instant::now(),
                started: Instant::now(),
            })),
            Self::Bars(all) => {
                let bar = all.add(ProgressBar::new(0));
                bar.set_style(style());
                bar.set_prefix(label.to_owned());
                bar.enable_steady_tick(Duration::from_millis(120));
                Kind::Bar(bar)
            }
        };
        Track {
            label: label.to_owned(),
            kind,
        }
    }

    /// Takes the bars off the terminal.
    pub fn clear(&self) {
        if let Self::Bars(all) = self {
            let _ = all.clear();
        }
    }

    /// Writes a line between the bars.
    pub fn say(&self, text: &str) {
        match self {
            Self::Silent => {}
            Self::Lines => note(text),
            Self::Bars(all) => all.suspend(|| note(text)),
        }
    }
}

impl Track {
    /// Shows how the pull stands.
    pub fn update(&self, pull: &Pull) {
        match &self.kind {
            Kind::Silent => {}
            Kind::Bar(bar) => {
                bar.set_length(pull.bytes_total);
                bar.set_position(position(pull));
                bar.set_message(word(pull.state));
            }
            Kind::Lines(said) => {
                let Ok(mut said) = said.lock() else { return };
                let again = !pull.state.is_final() && said.since.elapsed() > AGAIN;
                if said.state == Some(pull.state) && !again {
                    return;
                }
                // What was there already needs no word.
                let at_once = said.state.is_none() && pull.state == PullState::Ready;
                said.state = Some(pull.state);
                if at_once {
                    return;
                }
                said.since = Instant::now();
                note(&format!(
                    "{}: {}",
                    self.label,
                    sentence(pull, said.started.elapsed())
                ));
            }
        }
    }
}

impl Drop for Track {
    fn drop(&mut self) {
        if let Kind::Bar(bar) = &self.kind {
            bar.finish_and_clear();
        }
    }
}

/// What the bar counts: layers that arrive, then layers that go into the image.
fn position(pull: &Pull) -> u64 {
    match pull.state {
        PullState::Resolving => 0,
        PullState::Fetching => pull.bytes_fetched,
        PullState::Converting => pull.bytes_converted,
        PullState::Publishing | PullState::Ready | PullState::Failed => pull.bytes_total,
    }
}

pub fn word(state: PullState) -> &'static str {
    match state {
        PullState::Resolving => "resolving",
        PullState::Fetching => "fetching",
        PullState::Converting => "converting",
        PullState::Publishing => "publishing",
        PullState::Ready => "ready",
        PullState::Failed => "failed",
    }
}

fn sentence(pull: &Pull, elapsed: Duration) -> String {
    let word = word(pull.state);
    match pull.state {
        PullState::Fetching | PullState::Converting if pull.bytes_total > 0 => format!(
            "{word}, {} of {}",
            size(position(pull)),
            size(pull.bytes_total)
        ),
        PullState::Ready => format!("{word} after {} s", elapsed.as_secs()),
        _ => word.to_owned(),
    }
}

fn style() -> ProgressStyle {
    // The template is a constant and good; should it not be, the default bar serves as well.
    ProgressStyle::with_template(
        "{spinner} {prefix}  {msg:<10} [{bar:24}] {binary_bytes}/{binary_total_bytes}  {elapsed}",
    )
    .map(|style| style.progress_chars("=> "))
    .unwrap_or_else(|_| ProgressStyle::default_bar())
}
