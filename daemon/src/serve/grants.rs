//! Grants: what lets a node's image server, which is nobody's process, read one image in a user's place.
//!
//! A user's process asks for one (peer credentials or munge say who it is) and hands it on; who shows it may read that
//! image, for that platform, until it expires, and nothing else. It says who was meant, never more than that user may:
//! the user's right to the image is looked at again whenever a grant is used. A grant for an image that not everybody
//! may read is good only from the address that it was asked from.
//!
//! Form: `base64url(JSON) "." base64url(HMAC-SHA256)`; only this daemon reads it. The key is drawn when the daemon
//! first starts and lies in its state folder; removing it takes back every grant.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use axum::extract::State;
use axum::{Extension, Json};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use berth_client::api::{ErrorAnswer, ErrorKind, Grant, GrantRequest};
use berth_image::{Digest, Platform};
use jiff::Timestamp;
use ring::hmac;
use serde::{Deserialize, Serialize};

use super::auth::Place;
use super::error::ApiError;
use super::{Answer, App, Body, Caller, platform, readers};

/// How long a grant is good where nothing else is asked for: a day.
const USUAL_S: u64 = 24 * 3600;
/// Longest grant looked at, in bytes.
const MAX_GRANT: usize = 2048;
/// Longest name of a node.
const MAX_NODE: usize = 255;

/// What a grant says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    pub digest: Digest,
    pub platform: Platform,
    pub uid: u32,
    /// For people and logs.
    pub node: String,
    /// Where it is good; everywhere without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Place>,
    /// Seconds since 1970.
    pub until: i64,
}

/// Signs and checks grants.
pub struct Grants(hmac::Key);

impl std::fmt::Debug for Grants {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grants")
    }
}

impl Grants {
    /// With the key in a state folder, which is drawn when there is none.
    pub fn open(state_dir: &Path) -> std::io::Result<Self> {
        let path = state_dir.join("grant.key");
        let mut key = Vec::new();
        match OpenOptions::new().read(true).open(&path) {
            Ok(file) => drop(file.take(64).read_to_end(&mut key)?),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                key.resize(32, 0);
                rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
                let new = state_dir.join("grant.key.new");
                let _ = std::fs::remove_file(&new);
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&new)?;
                file.write_all(&key)?;
                file.sync_all()?;
                std::fs::rename(&new, &path)?;
            }
            Err(e) => return Err(e),
        }
        if key.len() != 32 {
            let why = format!("`{}` does not hold 32 bytes", path.display());
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &key)))
    }

    fn sign(&self, granted: &Granted) -> String {
        // Words and numbers always have a JSON form.
        let payload = serde_json::to_vec(granted).unwrap_or_default();
        let tag = hmac::sign(&self.0, &payload);
        let (payload, tag) = (
            URL_SAFE_NO_PAD.encode(payload),
            URL_SAFE_NO_PAD.encode(tag.as_ref()),
        );
        format!("{payload}.{tag}")
    }

    /// What a grant that this daemon gave says, if it is good now and there.
    pub fn check(&self, grant: &str, at: Place, now: Timestamp) -> Result<Granted, &'static str> {
        const WRONG: &str = "it is not one of this daemon's";
        if grant.len() > MAX_GRANT {
            return Err(WRONG);
        }
        let (payload, tag) = grant.split_once('.').ok_or(WRONG)?;
        let payload = URL_SAFE_NO_PAD.decode(payload).map_err(|_| WRONG)?;
        let tag = URL_SAFE_NO_PAD.decode(tag).map_err(|_| WRONG)?;
        hmac::verify(&self.0, &payload, &tag).map_err(|_| WRONG)?;
        let granted: Granted = serde_json::from_slice(&payload).map_err(|_| WRONG)?;
        if granted.until <= now.as_second() {
            return Err("it has expired");
        }
        if granted.at.is_some_and(|place| place != at) {
            return Err("it was given to another machine");
        }
        Ok(granted)
    }
}

/// A grant to read an image's file, for the caller, to be handed to a node's image server.
#[utoipa::path(
    post,
    path = "/v1/grants",
    tag = "images",
    request_body = GrantRequest,
    responses((status = 200, body = Grant), (status = "4XX", body = ErrorAnswer))
)]
pub(super) async fn grant(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Extension(place): Extension<Place>,
    Body(request): Body<GrantRequest>,
) -> Answer<Grant> {
    let bad = |why: String| ApiError::new(ErrorKind::BadRequest, why);
    let digest: Digest = request.digest.parse().map_err(|e| {
        let e: berth_image::digest::DigestError = e;
        bad(e.to_string())
    })?;
    let platform = platform(request.platform.as_deref())?;
    if request.node.len() > MAX_NODE || request.node.chars().any(char::is_control) {
        return Err(bad("that is not a node's name".into()));
    }
    let image = readers::readable(&app, &caller, &digest, &platform).await?;
    let most = app.config.daemon.grant_s;
    let seconds = request.seconds.unwrap_or(USUAL_S).min(most).max(1);
    let until = Timestamp::now().as_second() + seconds as i64;
    let granted = Granted {
        digest,
        platform,
        uid: caller.uid,
        node: request.node,
        at: (!image.by_everybody).then_some(place),
        until,
    };
    tracing::info!(uid = caller.uid, %digest, node = granted.node, seconds, "granted");
    Ok(Json(Grant {
        grant: app.serving.grants.sign(&granted),
        expires_at: Timestamp::from_second(until).map_or_else(|_| String::new(), |t| t.to_string()),
        seconds,
    }))
}

impl Place {
    /// The same machine is one place, however it is spoken to.
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            address if address.is_loopback() => Self::Here,
            address => Self::Machine(address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_is_good_as_it_was_given_and_not_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let grants = Grants::open(dir.path()).unwrap();
        let now = Timestamp::now();
        let granted = Granted {
            digest: Digest::of(b"image"),
            platform: Platform::host(),
            uid: 1000,
            node: "n1".into(),
            at: Some(Place::of("::ffff:10.0.0.1".parse().unwrap())),
            until: now.as_second() + 60,
        };
        let text = grants.sign(&granted);
        let here = Place::of("10.0.0.1".parse().unwrap());
        assert_eq!(grants.check(&text, here, now), Ok(granted.clone()));
        // After a restart too, but not with another key.
        let again = Grants::open(dir.path()).unwrap();
        assert!(again.check(&text, here, now).is_ok());
        let other = Grants::open(tempfile::tempdir().unwrap().path()).unwrap();
        assert!(other.check(&text, here, now).is_err());
        for place in [Place::Here, Place::of("10.0.0.2".parse().unwrap())] {
            assert!(grants.check(&text, place, now).is_err());
        }
        let late = now + jiff::SignedDuration::from_secs(61);
        assert!(grants.check(&text, here, late).is_err());
        for at in 0..text.len() {
            let mut forged = text.clone().into_bytes();
            forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
            let forged = String::from_utf8(forged).unwrap();
            // The last digit of a base64 text may carry bits that stand for nothing.
            assert!(grants.check(&forged, here, now).is_err(), "changed at {at}");
        }
        for wrong in ["", ".", "a.b", &"x".repeat(5000)] {
            assert!(grants.check(wrong, here, now).is_err());
        }
        std::fs::write(dir.path().join("grant.key"), b"short").unwrap();
        assert!(Grants::open(dir.path()).is_err());
    }
}
