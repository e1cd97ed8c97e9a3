//! The messages between the plugin and `berth-runtime step`: one tag byte, then `key=value` fields separated by NUL.
//!
//! | tag | from → to | body | descriptors |
//! |---|---|---|---|
//! | `S` | plugin → standby, once, before all else | 16 hexadecimal digits, steps of a kind have the same; not fields | the plugin's mount namespace, its log |
//! | `J` | plugin → helper, once | the step: config, uid, gid, groups, reference, … | – |
//! | `T` | task → helper | task, procid, cwd | the helper's end of the task's own pair, the task's mount namespace |
//! | `P` | helper → task | a line of progress, not fields | – |
//! | `E` | helper → task | code, text | – |
//! | `R` | helper → task | cwd, env…, unset… | the namespace to enter |
//!
//! A message is at most [`MAX_MESSAGE`] bytes. A longer body is cut anywhere into parts: the lower-case tag says that
//! more follows, the upper-case one is the last part. A peer that sends more than [`MAX_BODY`] in all is refused.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// Bytes of one message, tag included.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Bytes of all parts of one body.
pub const MAX_BODY: usize = 1024 * 1024;

/// Collects the fields of one message.
#[derive(Debug, Default)]
pub struct Body(Vec<u8>);

impl Body {
    /// Adds `key=value`. A value from a C string has no NUL; one that has is cut there, so that it cannot add fields.
    pub fn field(&mut self, key: &str, value: &[u8]) -> &mut Self {
        if !self.0.is_empty() {
            self.0.push(0);
        }
        self.0.extend_from_slice(key.as_bytes());
        self.0.push(b'=');
        self.0.extend(value.iter().take_while(|byte| **byte != 0));
        self
    }

    pub fn number(&mut self, key: &str, value: u32) -> &mut Self {
        self.field(key, value.to_string().as_bytes())
    }

    /// A number of what it holds so far. Others may have the same: for finding, not for telling apart.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    /// The messages to send, in order; `None` when the body is too long.
    pub fn messages(&self, tag: u8) -> Option<Vec<Vec<u8>>> {
        if self.0.len() > MAX_BODY {
            return None;
        }
        let mut parts: Vec<&[u8]> = self.0.chunks(MAX_MESSAGE - 1).collect();
        let last = parts.pop().unwrap_or_default();
        let mut messages: Vec<Vec<u8>> = parts
            .iter()
            .map(|part| [&[tag.to_ascii_lowercase()], *part].concat())
            .collect();
        messages.push([&[tag.to_ascii_uppercase()], last].concat());
        Some(messages)
    }
}

/// Something the helper said.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Progress(Vec<u8>),
    Error { code: u8, text: Vec<u8> },
    Ready(Ready),
}

/// How to go on once the namespace is there.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ready {
    pub cwd: Vec<u8>,
    /// `NAME=VALUE`.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    pub unset: Vec<Vec<u8>>,
}

/// Puts the parts of answers together.
#[derive(Debug, Default)]
pub struct Reader {
    body: Vec<u8>,
}

/// What the helper sent is not this protocol.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

impl Reader {
    /// Takes one message; `None` while parts are missing.
    pub fn take(&mut self, message: &[u8]) -> Result<Option<Answer>, Malformed> {
        let (tag, part) = message.split_first().ok_or(Malformed)?;
        if *tag == b'P' {
            return Ok(Some(Answer::Progress(part.to_vec())));
        }
        if self.body.len().saturating_add(part.len()) > MAX_BODY {
            return Err(Malformed);
        }
        self.body.extend_from_slice(part);
        match tag {
            b'r' | b'e' => Ok(None),
            b'R' => ready(&std::mem::take(&mut self.body)).map(|ready| Some(Answer::Ready(ready))),
            b'E' => Ok(Some(error(&std::mem::take(&mut self.body)))),
            _ => Err(Malformed),
        }
    }
}

fn fields(body: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    body.split(|byte| *byte == 0).filter_map(split_pair)
}

fn split_pair(field: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = field.iter().position(|byte| *byte == b'=')?;
    let (key, rest) = field.split_at(at);
    rest.split_first().map(|(_, value)| (key, value))
}

fn error(body: &[u8]) -> Answer {
    let mut code = 0;
    let mut text = Vec::new();
    for (key, value) in fields(body) {
        match key {
            b"code" => {
                code = std::str::from_utf8(value)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(0)
            }
            b"text" => text = value.to_vec(),
            _ => {}
        }
    }
    // An error is never a success.
    Answer::Error {
        code: if code == 0 { 70 } else { code },
        text,
    }
}

fn ready(body: &[u8]) -> Result<Ready, Malformed> {
    let mut ready = Ready::default();
    for (key, value) in fields(body) {
        match key {
            b"cwd" => ready.cwd = value.to_vec(),
            b"unset" => ready.unset.push(value.to_vec()),
            b"env" => {
                let (name, value) = split_pair(value).ok_or(Malformed)?;
                ready.env.push((name.to_vec(), value.to_vec()));
            }
            _ => {}
        }
    }
    // The names are the image's: nothing may pass for Slurm's own.
    let allowed = |name: &[u8]| !name.is_empty() && !name.starts_with(b"SLURM");
    if !ready.cwd.starts_with(b"/")
        || !ready.env.iter().all(|(name, _)| allowed(name))
        || !ready.unset.iter().all(|name| allowed(name))
    {
        return Err(Malformed);
    }
    Ok(ready)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_separated_by_nul() {
        let mut body = Body::default();
        body.field("a", b"1")
            .number("uid", 7)
            .field("mount", b"/x:/y\0evil=1");
        assert_eq!(
            body.messages(b'J').unwrap(),
            vec![b"Ja=1\0uid=7\0mount=/x:/y".to_vec()]
        );
    }

    #[test]
    fn long_bodies_are_cut_and_put_together() {
        let mut body = Body::default();
        body.field("cwd", b"/w");
        for index in 0..3000 {
            body.field("env", format!("NAME{index}={}", "v".repeat(60)).as_bytes());
        }
        let messages = body.messages(b'R').unwrap();
        assert!(messages.len() > 2);
        assert!(messages.iter().all(|message| message.len() <= MAX_MESSAGE));
        let mut reader = Reader::default();
        let mut answers: Vec<Answer> = messages
            .iter()
            .filter_map(|message| reader.take(message).unwrap())
            .collect();
        let Some(Answer::Ready(ready)) = answers.pop() else {
            panic!("no answer")
        };
        assert_eq!(ready.env.len(), 3000);
        assert!(answers.is_empty());
    }

    #[test]
    fn bodies_are_bounded() {
        let mut body = Body::default();
        body.field("mount", &vec![b'x'; MAX_BODY]);
        assert_eq!(body.messages(b'J'), None);
        let mut reader = Reader::default();
        let part = [b"r".as_slice(), &vec![b'x'; MAX_MESSAGE - 1]].concat();
        let refused = (0..MAX_BODY / MAX_MESSAGE + 2).any(|_| reader.take(&part).is_err());
        assert!(refused);
    }

    #[test]
    fn answers_are_read() {
        let mut reader = Reader::default();
        assert_eq!(
            reader.take(b"Ppulling 3 %"),
            Ok(Some(Answer::Progress(b"pulling 3 %".to_vec())))
        );
        assert_eq!(
            reader.take(b"Ecode=69\0text=berth: no"),
            Ok(Some(Answer::Error {
                code: 69,
                text: b"berth: no".to_vec()
            }))
        );
        assert_eq!(
            reader.take(b"Rcwd=/\0env=PATH=/bin:/x=y\0env=EMPTY=\0unset=LD_PRELOAD"),
            Ok(Some(Answer::Ready(Ready {
                cwd: b"/".to_vec(),
                env: vec![
                    (b"PATH".to_vec(), b"/bin:/x=y".to_vec()),
                    (b"EMPTY".to_vec(), Vec::new())
                ],
                unset: vec![b"LD_PRELOAD".to_vec()],
            })))
        );
    }

    #[test]
    fn nonsense_is_refused_and_an_error_is_never_a_success() {
        for message in [
            "",
            "X",
            "R",
            "Rcwd=relative",
            "Rcwd=/\0env=novalue",
            "Rcwd=/\0env=SLURM_JOB_ID=1",
            "Rcwd=/\0env==x",
        ] {
            assert_eq!(
                Reader::default().take(message.as_bytes()),
                Err(Malformed),
                "{message:?}"
            );
        }
        for message in ["E", "Ecode=0", "Ecode=999", "Ecode=x"] {
            let answer = Reader::default().take(message.as_bytes());
            assert_eq!(
                answer,
                Ok(Some(Answer::Error {
                    code: 70,
                    text: Vec::new()
                })),
                "{message:?}"
            );
        }
    }
}
