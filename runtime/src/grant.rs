//! Grants of the daemons: what lets this node's image server read an image in the user's place.
//!
//! Each of the site's daemons is asked, side by side, and each one's grant is good at that one alone. A start waits for
//! the first grant, and a moment for the others.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant, SystemTime};

use berth_client::api::{ErrorKind, GrantRequest};
use berth_client::{Client, ClientError};
use berth_config::Config;
use berth_image::{Digest, Platform};
use berth_mount::keeper;

use crate::wire::{Body, Fields};

/// How long a start may wait for a grant that it can do without.
pub(crate) const SPARE_TIME: Duration = Duration::from_millis(500);
/// And for one that it needs.
pub(crate) const NEEDED: Duration = Duration::from_secs(60);
/// How long after the first grant the others may come.
const GRACE: Duration = Duration::from_millis(250);
/// A grant outlives the end that Slurm foresaw for its job by a day: limits are raised, jobs suspended.
const SLACK_S: u64 = 24 * 3600;

/// A grant, whose it is, and until when it is good, in seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    /// Where its daemon is: [`Client::place`].
    of: String,
    text: String,
    until: u64,
}

impl Grant {
    /// Asks for one, as whoever this process is.
    fn ask(client: &Client, ask: &Ask) -> Result<Self, ClientError> {
        let now = now();
        let grant = client.grant(&GrantRequest {
            digest: ask.digest.to_string(),
            platform: Some(ask.platform.to_string()),
            node: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            seconds: Some(seconds(ask.end, now)),
        })?;
        Ok(Self {
            of: client.place().to_owned(),
            text: grant.grant,
            until: now.saturating_add(grant.seconds),
        })
    }

    /// Adds it to a message.
    pub(crate) fn to_body(&self, body: Body) -> Body {
        body.field("of", self.of.as_bytes())
            .field("grant", self.text.as_bytes())
            .field("until", self.until.to_string().as_bytes())
    }

    /// Those that a message has.
    pub(crate) fn from_fields(fields: Fields<'_>) -> Vec<Self> {
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        let ofs = fields.all("of").zip(fields.all("grant"));
        let all = ofs.zip(fields.all("until"));
        let grant = |((of, grant), until): ((&[u8], &[u8]), &[u8])| {
            Some(Self {
                of: text(of),
                text: text(grant),
                until: text(until).parse().ok()?,
            })
        };
        all.filter_map(grant).collect()
    }
}

/// What a grant is asked for.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) digest: Digest,
    pub(crate) platform: Platform,
    /// When the job ends, in seconds since 1970, as far as Slurm said so.
    pub(crate) end: Option<u64>,
}

impl Ask {
    /// Asks each daemon in a thread of its own, for who has something else to do meanwhile. None answers later than
    /// after `limit`.
    pub(crate) fn aside(self, config: &Config, limit: Duration) -> Aside {
        let (sender, answers) = channel();
        let mut asked = 0;
        let end = Instant::now() + limit;
        let each = match Client::each_from_config(config) {
            Ok(each) => each,
            Err(error) => {
                asked = 1;
                // Its other end is below.
                let _ = sender.send((0, Instant::now(), Err(error)));
                Vec::new()
            }
        };
        for (at, client) in each.into_iter().enumerate() {
            let (ask, sender) = (self.clone(), sender.clone());
            let started = std::thread::Builder::new().spawn(move || {
                let grant = Grant::ask(&client.within(limit), &ask);
                sender.send((at, Instant::now(), grant))
            });
            // Without a thread there is no answer.
            asked += usize::from(started.is_ok());
        }
        Aside {
            answers,
            asked,
            end,
        }
    }
}

type Answer = (usize, Instant, Result<Grant, ClientError>);

/// Grants that are on their way.
pub(crate) struct Aside {
    answers: Receiver<Answer>,
    asked: usize,
    end: Instant,
}

/// What came of asking, by the daemons' order.
#[derive(Debug, Default)]
pub(crate) struct Said {
    granted: BTreeMap<usize, Grant>,
    refused: BTreeMap<usize, ClientError>,
}

impl Aside {
    /// What was said until all did, or some time after the first grant, or after the limit.
    pub(crate) fn gather(self) -> Said {
        let mut said = Said::default();
        let mut end = self.end;
        while said.granted.len() + said.refused.len() < self.asked {
            let left = end.saturating_duration_since(Instant::now());
            match self.answers.recv_timeout(left) {
                Ok((at, when, Ok(grant))) => {
                    said.granted.insert(at, grant);
                    end = end.min(when + GRACE);
                }
                Ok((at, _, Err(error))) => {
                    said.refused.insert(at, error);
                }
                Err(_) => break,
            }
        }
        said
    }
}

impl Said {
    /// Whether none granted, and one that was there said no: it does not have the image, or not yet.
    pub(crate) fn is_refused(&self) -> bool {
        let mut refused = self.refused.values();
        self.granted.is_empty() && refused.any(|error| matches!(error, ClientError::Api(_)))
    }

    pub(crate) fn grants(self) -> Vec<Grant> {
        self.granted.into_values().collect()
    }

    /// At least one, or why there is none: a daemon's word against it says more than that one has not the image, and
    /// that more than silence.
    pub(crate) fn some(self) -> Result<Vec<Grant>, ClientError> {
        if !self.granted.is_empty() {
            return Ok(self.grants());
        }
        let weight = |error: &ClientError| match error {
            ClientError::Api(body) if body.kind == ErrorKind::NotFound => 1,
            ClientError::Api(_) => 0,
            _ => 2,
        };
        let mut refused: Vec<ClientError> = self.refused.into_values().collect();
        refused.sort_by_key(weight);
        let answers = refused.first().is_some_and(|error| weight(error) < 2);
        match refused.len() {
            2.. if !answers => Err(ClientError::NoneAnswers(refused)),
            0 => Err(ClientError::Timeout {
                place: "api.url".into(),
            }),
            _ => Err(refused.remove(0)),
        }
    }
}

/// Where the node's server finds the image's bytes with the daemons, in the site's order. One without a grant is asked
/// for nothing until it is given one, with another job's.
pub(crate) fn sources(
    config: &Config,
    digest: &Digest,
    platform: &Platform,
    grants: &[Grant],
) -> Vec<keeper::Source> {
    let there = Client::each_from_config(config).unwrap_or_default();
    let is_there = |place: &str| there.iter().any(|client| client.place() == place);
    let every = Client::every_from_config(config).into_iter();
    every
        .filter_map(|client| {
            let grant = grants.iter().find(|grant| grant.of == client.place());
            (grant.is_some() || is_there(client.place())).then(|| keeper::Source {
                at: client.data_source(digest, platform),
                grant: grant.map(|grant| grant.text.clone()),
                until: grant.map(|grant| grant.until),
            })
        })
        .collect()
}

/// Where a program of this process's user finds an image, and what it shows there for a day: each daemon that grants.
///
/// # Errors
/// When none does.
pub fn granted(
    config: &Config,
    digest: &Digest,
    platform: &Platform,
) -> Result<Vec<(String, String)>, ClientError> {
    let ask = Ask {
        digest: *digest,
        platform: platform.clone(),
        end: Some(now() + 1),
    };
    let grants = ask.aside(config, NEEDED).gather().some()?;
    let sources = sources(config, digest, platform, &grants).into_iter();
    Ok(sources.filter_map(|s| Some((s.at, s.grant?))).collect())
}

/// How long a grant is to be good: a day beyond the job's end; as long as the site gives them where that is not known.
fn seconds(end: Option<u64>, now: u64) -> u64 {
    match end {
        Some(end) if end > now => (end - now).saturating_add(SLACK_S),
        _ => u64::MAX,
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use berth_client::api::ErrorBody;

    use super::*;

    fn grant(of: &str) -> Grant {
        Grant {
            of: of.into(),
            text: format!("grant of {of}"),
            until: 7,
        }
    }

    fn no(kind: ErrorKind) -> ClientError {
        ClientError::Api(ErrorBody {
            kind,
            message: format!("{kind:?}"),
            hint: None,
        })
    }

    fn silent(place: &str) -> ClientError {
        ClientError::Timeout {
            place: place.into(),
        }
    }

    /// Three daemons, of whom these said something.
    fn aside(said: Vec<(usize, Result<Grant, ClientError>)>) -> Aside {
        let (sender, answers) = channel();
        for (at, what) in said {
            sender.send((at, Instant::now(), what)).unwrap();
        }
        // Who says nothing is not gone.
        std::mem::forget(sender);
        Aside {
            answers,
            asked: 3,
            end: Instant::now() + Duration::from_secs(60),
        }
    }

    #[test]
    fn one_grant_is_enough_and_the_slow_are_not_waited_for() {
        let began = Instant::now();
        let said = aside(vec![(2, Ok(grant("c"))), (0, Ok(grant("a")))]).gather();
        assert!(began.elapsed() < Duration::from_secs(30));
        assert_eq!(said.grants(), [grant("a"), grant("c")]);
        let all = vec![
            (1, Ok(grant("b"))),
            (2, Err(silent("c"))),
            (0, Err(no(ErrorKind::NotFound))),
        ];
        let said = aside(all).gather();
        assert!(!said.is_refused());
        assert_eq!(said.some().unwrap(), [grant("b")]);
    }

    #[test]
    fn without_a_grant_what_says_most_is_told() {
        let all = |errors: [ClientError; 3]| {
            let errors = errors.into_iter().enumerate();
            aside(errors.map(|(at, error)| (at, Err(error))).collect()).gather()
        };
        let missing = || no(ErrorKind::NotFound);
        let said = all([silent("a"), missing(), no(ErrorKind::Denied)]);
        assert!(said.is_refused());
        assert_eq!(said.some().unwrap_err().to_string(), "Denied");
        let said = all([silent("a"), silent("b"), missing()]);
        assert_eq!(said.some().unwrap_err().to_string(), "NotFound");
        let said = all([silent("a"), silent("b"), silent("c")]);
        assert!(!said.is_refused());
        let text = said.some().unwrap_err().to_string();
        assert!(text.starts_with("no daemon answers: "), "{text}");
    }

    #[test]
    fn each_grant_goes_with_its_own_daemon_in_the_sites_order() {
        let mut config = Config::default();
        config.api.socket = "/nonexistent/s".into();
        config.api.url = vec!["http://a:1".into(), "http://b:1/".into()].into();
        let (digest, platform) = (Digest::of(b"image"), Platform::host());
        // What it says comes over the wire as it was, and a place that the site does not name is none.
        let sent = [
            grant("http://evil:1"),
            grant("http://b:1/"),
            grant("http://a:1"),
        ];
        let body = sent
            .iter()
            .fold(Body::default(), |body, grant| grant.to_body(body));
        let packet = RefCell::new(Vec::new());
        body.parts(b'F', &[], |part, _| {
            packet.borrow_mut().extend_from_slice(part);
            Ok(())
        })
        .unwrap();
        let packet = packet.borrow();
        let grants = Grant::from_fields(Fields(&packet[1..]));
        assert_eq!(grants, sent);
        let found = sources(&config, &digest, &platform, &grants);
        let found: Vec<_> = found
            .iter()
            .map(|s| (s.at.as_str(), s.grant.as_deref()))
            .collect();
        let path = format!("/v1/images/{digest}/data?platform={platform}");
        let (a, b) = (format!("http://a:1{path}"), format!("http://b:1{path}"));
        assert_eq!(
            found,
            [
                (a.as_str(), Some("grant of http://a:1")),
                (b.as_str(), Some("grant of http://b:1/"))
            ]
        );
        // One that has not granted may do so for a later job.
        let found = sources(&config, &digest, &platform, &grants[..2]);
        assert_eq!((&found[0].at, &found[0].grant), (&a, &None));
        // And the socket that only the user does not see, or only root, is as good.
        let grants = [grant("/nonexistent/s")];
        let found = sources(&config, &digest, &platform, &grants);
        assert_eq!(found[0].at, format!("/nonexistent/s:{path}"));
    }

    #[test]
    fn a_grant_ends_a_day_after_its_job_and_with_the_sites_limit_where_that_is_not_known() {
        assert_eq!(seconds(Some(5000), 2000), 3000 + SLACK_S);
        for end in [None, Some(0), Some(2000)] {
            assert_eq!(seconds(end, 2000), u64::MAX);
        }
        assert_eq!(seconds(Some(u64::MAX), 0), u64::MAX);
    }
}
