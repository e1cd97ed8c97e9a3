//! DSSE envelopes (Dead Simple Signing Envelope v1.0.2): how everything that Berth signs is signed.
//!
//! The payload is an in-toto statement. It is parsed only after a trusted key's signature over it was verified.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::key::{KeyId, PrivateKey, PublicKey};
use crate::shown::{clip, parse_error};

/// Media type of an in-toto statement.
pub const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
/// Largest envelope read, in bytes. A record of an image with 1,000 layers is below 200 KiB.
pub const MAX_ENVELOPE: usize = 1 << 20;
/// Most signatures looked at in one envelope.
const MAX_SIGNATURES: usize = 16;

#[derive(Serialize, Deserialize)]
struct Envelope {
    #[serde(rename = "payloadType")]
    payload_type: String,
    payload: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Serialize, Deserialize)]
struct EnvelopeSignature {
    #[serde(default)]
    keyid: String,
    sig: String,
}

/// Why an envelope is not believed.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    #[error("larger than {MAX_ENVELOPE} bytes")]
    TooLarge,
    #[error("not a DSSE envelope: {0}")]
    Malformed(String),
    #[error("payload type is `{0}`, expected {PAYLOAD_TYPE}")]
    PayloadType(String),
    #[error("signed by {signers}, none of which is among the {trusted} trusted keys")]
    UnknownKey { signers: String, trusted: usize },
    #[error("the signature of key {0} does not match the content")]
    BadSignature(KeyId),
    #[error("the signed content is not what was expected: {0}")]
    Content(String),
}

/// `DSSEv1 SP len(type) SP type SP len(payload) SP payload`.
fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut out = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    )
    .into_bytes();
    out.extend_from_slice(payload);
    out
}

/// Signs `statement`, and returns the envelope as the bytes of a JSON file.
///
/// # Errors
/// [`EnvelopeError::Content`] when `statement` cannot be written as JSON.
pub fn seal<T: Serialize>(statement: &T, key: &PrivateKey) -> Result<Vec<u8>, EnvelopeError> {
    let content = |e: serde_json::Error| EnvelopeError::Content(e.to_string());
    let payload = serde_json::to_vec(statement).map_err(content)?;
    let signature = key.sign(&pre_authentication_encoding(PAYLOAD_TYPE, &payload));
    let envelope = Envelope {
        payload_type: PAYLOAD_TYPE.into(),
        payload: STANDARD.encode(payload),
        signatures: vec![EnvelopeSignature {
            keyid: key.public().id().hex(),
            sig: STANDARD.encode(signature),
        }],
    };
    let mut out = serde_json::to_vec_pretty(&envelope).map_err(content)?;
    out.push(b'\n');
    Ok(out)
}

/// Verifies that one of `trusted` signed the envelope in `bytes`, and returns its statement and that key's id.
///
/// # Errors
/// [`EnvelopeError`]; nothing of the payload is parsed before its signature was found good.
pub fn open<T: DeserializeOwned>(
    bytes: &[u8],
    trusted: &[PublicKey],
) -> Result<(T, KeyId), EnvelopeError> {
    if bytes.len() > MAX_ENVELOPE {
        return Err(EnvelopeError::TooLarge);
    }
    let envelope: Envelope =
        serde_json::from_slice(bytes).map_err(|e| EnvelopeError::Malformed(parse_error(&e)))?;
    if envelope.payload_type != PAYLOAD_TYPE {
        return Err(EnvelopeError::PayloadType(clip(&envelope.payload_type)));
    }
    let payload = STANDARD
        .decode(&envelope.payload)
        .map_err(|e| EnvelopeError::Malformed(format!("payload: {e}")))?;
    let message = pre_authentication_encoding(PAYLOAD_TYPE, &payload);
    let mut refused = None;
    for signature in envelope.signatures.iter().take(MAX_SIGNATURES) {
        let Some(key) = trusted.iter().find(|k| k.id().hex() == signature.keyid) else {
            continue;
        };
        match STANDARD.decode(&signature.sig) {
            Ok(sig) if key.verifies(&message, &sig) => {
                let statement = serde_json::from_slice(&payload)
                    .map_err(|e| EnvelopeError::Content(parse_error(&e)))?;
                return Ok((statement, key.id()));
            }
            _ => refused = Some(key.id()),
        }
    }
    Err(match refused {
        Some(id) => EnvelopeError::BadSignature(id),
        None => EnvelopeError::UnknownKey {
            signers: signers(&envelope),
            trusted: trusted.len(),
        },
    })
}

fn signers(envelope: &Envelope) -> String {
    if envelope.signatures.is_empty() {
        return "nobody".into();
    }
    let ids: Vec<String> = (envelope.signatures.iter().take(3))
        .map(|s| {
            format!(
                "key {}",
                clip(&s.keyid.chars().take(16).collect::<String>())
            )
        })
        .collect();
    ids.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_trusted_untouched_envelope_opens() {
        let key = PrivateKey::generate().unwrap();
        let other = PrivateKey::generate().unwrap();
        let bytes = seal(&serde_json::json!({"a": 1}), &key).unwrap();
        let (v, id) = open::<serde_json::Value>(&bytes, &[other.public(), key.public()]).unwrap();
        assert_eq!((v["a"].as_u64(), id), (Some(1), key.public().id()));

        let refused = open::<serde_json::Value>(&bytes, &[other.public()]);
        assert!(
            matches!(refused, Err(EnvelopeError::UnknownKey { .. })),
            "{refused:?}"
        );

        let mut envelope: Envelope = serde_json::from_slice(&bytes).unwrap();
        envelope.payload = STANDARD.encode(r#"{"a":2}"#);
        let forged = serde_json::to_vec(&envelope).unwrap();
        let refused = open::<serde_json::Value>(&forged, &[key.public()]);
        assert!(
            matches!(refused, Err(EnvelopeError::BadSignature(_))),
            "{refused:?}"
        );
    }

    #[test]
    fn encoding_is_the_one_of_the_specification() {
        // The example of the DSSE protocol document.
        assert_eq!(
            pre_authentication_encoding("http://example.com/HelloWorld", b"hello world"),
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }
}
