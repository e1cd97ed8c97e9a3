//! Tokens: one is asked for at a time per repository, and kept until shortly before it ends (login endpoints have
//! rate limits too). Secrets live here and in [`Credential`], and are shown to nobody but the registry's realm.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::HeaderValue;
use reqwest::{Client, Url};
use serde::Deserialize;

use super::challenge::Challenge;
use super::client::{cause, read_limited};
use super::credentials::Credential;
use super::error::RegistryError;
use super::guard::{Guard, forbidden};

/// Largest answer of a token endpoint, in bytes.
const MAX_TOKEN: u64 = 1 << 20;
/// What a token without `expires_in` lives (distribution's token specification).
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
const LONGEST_LIFE: Duration = Duration::from_secs(3600);

/// Repositories of a registry whose tokens are kept.
const MAX_KEPT: usize = 1024;

pub(super) struct Auth {
    host: String,
    pub(super) credential: Credential,
    kept: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<Kept>>>>>,
    guard: Guard,
    timeout: Duration,
}

#[derive(Clone)]
struct Kept {
    header: HeaderValue,
    until: Instant,
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(alias = "access_token")]
    token: Option<String>,
    expires_in: Option<u64>,
}

impl Auth {
    pub(super) fn new(host: &str, credential: Credential, guard: Guard, timeout: Duration) -> Self {
        Self {
            host: host.into(),
            credential,
            kept: Mutex::default(),
            guard,
            timeout,
        }
    }

    /// The `Authorization` to send at once, if an earlier challenge for `repository` left one.
    pub(super) async fn kept(&self, repository: &str) -> Option<HeaderValue> {
        let slot = self.slot(repository);
        let kept = slot.lock().await;
        kept.as_ref()
            .filter(|k| k.until > Instant::now())
            .map(|k| k.header.clone())
    }

    /// Answers `challenge`. `refused` is what the registry has just not accepted; if somebody else got a newer one
    /// meanwhile, that one is used. `None`: there is nothing (more) to show.
    pub(super) async fn answer(
        &self,
        http: &Client,
        challenge: &Challenge,
        repository: &str,
        refused: Option<&HeaderValue>,
        from: &Url,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let slot = self.slot(repository);
        let mut kept = slot.lock().await;
        if let Some(k) = kept.as_ref()
            && k.until > Instant::now()
            && Some(&k.header) != refused
        {
            return Ok(Some(k.header.clone()));
        }
        let new = match challenge {
            Challenge::Basic => match self.credential.basic() {
                Some(basic) => Kept {
                    header: secret("Basic", &basic, &self.host)?,
                    until: Instant::now() + LONGEST_LIFE,
                },
                None => return Ok(None),
            },
            Challenge::Bearer {
                realm,
                service,
                scope,
            } => {
                let scope = scope
                    .clone()
                    .unwrap_or_else(|| format!("repository:{repository}:pull"));
                self.token(http, realm, service.as_deref(), &scope, repository, from)
                    .await?
            }
        };
        if Some(&new.header) == refused {
            return Ok(None);
        }
        *kept = Some(new.clone());
        Ok(Some(new.header))
    }

    fn slot(&self, repository: &str) -> Arc<tokio::sync::Mutex<Option<Kept>>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MAX_KEPT && !kept.contains_key(repository) {
            // Slots that nobody waits at and that hold nothing of use; or, where all do, any: it costs a question more.
            let idle = |slot: &mut Arc<tokio::sync::Mutex<Option<Kept>>>| match slot.try_lock() {
                Ok(kept) => kept.as_ref().is_none_or(|k| k.until <= Instant::now()),
                Err(_) => false,
            };
            kept.retain(|_, slot| !idle(slot));
            if kept.len() >= MAX_KEPT {
                kept.clear();
            }
        }
        kept.entry(repository.to_owned()).or_default().clone()
    }

    async fn token(
        &self,
        http: &Client,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        repository: &str,
        from: &Url,
    ) -> Result<Kept, RegistryError> {
        let protocol = |why: String| RegistryError::Protocol {
            host: self.host.clone(),
            why,
        };
        let mut url =
            Url::parse(realm).map_err(|_| protocol("its token realm is no URL".into()))?;
        let plain = url.scheme() == "http";
        if !matches!(url.scheme(), "http" | "https") || (plain && from.scheme() == "https") {
            return Err(protocol(
                "its token realm is not https: no credential is sent there".into(),
            ));
        }
        self.guard.check(&url)?;
        let request = match &self.credential {
            Credential::Identity { token, .. } => {
                let form: String = Url::parse_with_params(
                    "x:?",
                    [
                        ("grant_type", "refresh_token"),
                        ("client_id", "berth"),
                        ("service", service.unwrap_or_default()),
                        ("scope", scope),
                        ("refresh_token", token),
                    ],
                )
                .ok()
                .and_then(|u| u.query().map(str::to_owned))
                .unwrap_or_default();
                http.post(url.clone())
                    .header("content-type", "application/x-www-form-urlencoded")
                    .body(form)
            }
            other => {
                if let Some(service) = service {
                    url.query_pairs_mut().append_pair("service", service);
                }
                url.query_pairs_mut().append_pair("scope", scope);
                let request = http.get(url.clone());
                match other.basic() {
                    Some(basic) => {
                        request.header("authorization", secret("Basic", &basic, &self.host)?)
                    }
                    None => request,
                }
            }
        };
        let shown = super::client::shown(&url);
        let unreachable = |why| RegistryError::Unreachable {
            host: self.host.clone(),
            why: format!("token endpoint {shown}: {why}"),
        };
        let response = tokio::time::timeout(self.timeout, request.send())
            .await
            .map_err(|_| unreachable("no answer".into()))?
            .map_err(|e| match forbidden(&e) {
                Some(refused) => refused.into(),
                None => unreachable(cause(&e)),
            })?;
        let status = response.status();
        if matches!(status.as_u16(), 400 | 401 | 403) {
            return Err(RegistryError::Refused {
                host: self.host.clone(),
                repository: repository.into(),
                status: status.as_u16(),
                credential: self.credential.to_string(),
            });
        }
        if !status.is_success() {
            return Err(RegistryError::Status {
                host: self.host.clone(),
                method: "GET".into(),
                url: shown,
                status: status.as_u16(),
                retry_after: super::client::retry_after(&response),
            });
        }
        let body = read_limited(response, MAX_TOKEN, self.timeout).await?;
        // serde's message could quote the token.
        let answer: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|_| protocol("its token endpoint answered no token".into()))?;
        let token = answer
            .token
            .ok_or_else(|| protocol("its token endpoint answered no token".into()))?;
        let life = answer
            .expires_in
            .map_or(DEFAULT_LIFE, Duration::from_secs)
            .min(LONGEST_LIFE);
        Ok(Kept {
            header: secret("Bearer", &token, &self.host)?,
            until: Instant::now() + life - (life / 5).min(Duration::from_secs(30)),
        })
    }
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Auth({}, {})", self.host, self.credential)
    }
}

fn secret(scheme: &str, value: &str, host: &str) -> Result<HeaderValue, RegistryError> {
    let mut header = HeaderValue::from_str(&format!("{scheme} {value}")).map_err(|_| {
        RegistryError::Protocol {
            host: host.into(),
            why: "its token cannot stand in a header".into(),
        }
    })?;
    header.set_sensitive(true);
    Ok(header)
}
