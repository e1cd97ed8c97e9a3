//! A site's daemons as one: each is asked in turn until one answers.
//!
//! What one says is final, errors of the API too. Another one is asked where a request cannot have been heard, and,
//! where asking twice does no harm, after a connection that broke. All tries share the call's limit; connecting to one
//! takes little of it where there are others. The one that answered last is asked first from then on, in all of this process.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ureq::http::header::CONTENT_TYPE;

use crate::error::ClientError;
use crate::way::{Answer, Ask, Limits, Silence, Way};

/// How long connecting may take where there is another one to ask: long enough for a packet that was lost.
const CONNECT: Duration = Duration::from_millis(1500);

/// Who is asked first, by all places that are asked.
static FIRST: Mutex<Option<HashMap<String, usize>>> = Mutex::new(None);

fn first() -> MutexGuard<'static, Option<HashMap<String, usize>>> {
    FIRST.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
pub(crate) struct Ways {
    /// At least one, in the site's order.
    all: Vec<Way>,
    /// Their places, to know these daemons again.
    name: String,
}

impl Ways {
    /// `None` without any.
    pub(crate) fn new(all: Vec<Way>) -> Option<Self> {
        let places: Vec<&str> = all.iter().map(Way::place).collect();
        let name = places.join("\n");
        (!all.is_empty()).then_some(Self { all, name })
    }

    pub(crate) fn one(way: Way) -> Self {
        Self {
            name: way.place().to_owned(),
            all: vec![way],
        }
    }

    /// Who is asked first.
    pub(crate) fn first(&self) -> &Way {
        &self.all[self.start()]
    }

    fn start(&self) -> usize {
        let first = first();
        let known = first.as_ref().and_then(|all| all.get(&self.name)).copied();
        known.unwrap_or_default().min(self.all.len() - 1)
    }

    fn remember(&self, at: usize) {
        let mut first = first();
        let all = first.get_or_insert_default();
        // Only where it says something: there is one list in an ordinary process.
        match at {
            0 => drop(all.remove(&self.name)),
            at => drop(all.insert(self.name.clone(), at)),
        }
    }

    /// Asks until one answers, within `limit`.
    pub(crate) fn ask(
        &self,
        ask: &Ask<'_>,
        limit: Option<Duration>,
    ) -> Result<Answer<'_>, ClientError> {
        let end = limit.map(|limit| Instant::now() + limit);
        let start = self.start();
        let mut silent = Vec::new();
        // The one from last time, then the others in the site's order.
        let others = (0..self.all.len()).filter(|at| *at != start);
        for (tried, at) in std::iter::once(start).chain(others).enumerate() {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if tried > 0 && left.is_some_and(|left| left.is_zero()) {
                break;
            }
            let to_ask = self.all.len() - tried;
            let share = left.map(|left| left / u32::try_from(to_ask).unwrap_or(u32::MAX));
            let connect = share.map_or(CONNECT, |share| share.min(CONNECT));
            let limits = Limits {
                whole: left,
                connect: (to_ask > 1).then_some(connect),
            };
            match self.all[at].ask(ask, limits) {
                Ok(answer) if to_ask > 1 && ask.may_repeat() && is_of_proxy(&answer) => {
                    let why = format!("HTTP {}", answer.response.status());
                    let place = answer.way.place().to_owned();
                    silent.push(ClientError::Unreachable { place, why });
                }
                Ok(answer) => {
                    if at != start {
                        self.remember(at);
                    }
                    return Ok(answer);
                }
                Err(Silence { error, unheard }) => {
                    let go_on = error.is_unavailable() && (unheard || ask.may_repeat());
                    silent.push(error);
                    if !go_on {
                        break;
                    }
                }
            }
        }
        if self.all.len() > 1 {
            // One that was connected to and said nothing had all the time: the next call begins elsewhere.
            self.remember((start + 1) % self.all.len());
        }
        Err(ClientError::of_all(silent, self.first().place()))
    }
}

/// A proxy's word that the daemon behind it does not answer. The daemon's own errors are JSON.
fn is_of_proxy(answer: &Answer<'_>) -> bool {
    let headers = answer.response.headers();
    let json = |value: &str| value.starts_with("application/json");
    let kind = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
    matches!(answer.response.status().as_u16(), 502..=504) && !kind.is_some_and(json)
}

#[cfg(test)]
mod tests;
