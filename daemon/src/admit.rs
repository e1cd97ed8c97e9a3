//! Stage two: whether an image may come in. One pure function from what is known and the site's policy to a verdict
//! with reasons. It is asked before a registry is: what is denied costs no connection.

use berth_client::api::{ErrorBody, ErrorKind};
use berth_config::{Policy, PolicyMode};
use berth_image::ImageRef;
use berth_image::record::Admission;

/// What the policy says of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    /// It may come in, and the site wants to know of it.
    Warn,
    Deny,
}

/// A verdict, under which rule, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    pub admission: Admission,
}

/// Decides whether what `reference` names may come in.
pub fn admit(policy: &Policy, reference: &ImageRef) -> Decision {
    let decision = |verdict, rule: &str, reason: String| Decision {
        verdict,
        admission: Admission {
            rule: rule.into(),
            reasons: vec![reason],
        },
    };
    let Some(registries) = &policy.registries else {
        let reason = "this site has no admission policy".into();
        return decision(Verdict::Allow, "allow-all/default", reason);
    };
    let name = format!("{}/{}", reference.registry(), reference.repository());
    if let Some(entry) = registries.iter().find(|entry| covers(entry, &name)) {
        let reason = format!("policy.registries has `{entry}`");
        return decision(Verdict::Allow, "registries/listed", reason);
    }
    let reason = format!("policy.registries does not have `{name}`");
    match policy.mode {
        PolicyMode::Enforce => decision(Verdict::Deny, "registries/not-listed", reason),
        PolicyMode::Warn => decision(Verdict::Warn, "registries/warn", reason),
    }
}

/// Whether `entry` is `name` or a folder above it.
fn covers(entry: &str, name: &str) -> bool {
    let entry = entry.trim_end_matches('/');
    name.get(..entry.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(entry))
        && matches!(name.as_bytes().get(entry.len()), None | Some(b'/'))
}

impl Decision {
    /// The admission of what may come in, said in the log where the site wants that.
    ///
    /// # Errors
    /// The refusal, for the user.
    pub fn enforce(self, reference: &ImageRef) -> Result<Admission, ErrorBody> {
        match self.verdict {
            Verdict::Allow => Ok(self.admission),
            Verdict::Warn => {
                tracing::warn!(image = %reference, reason = self.admission.reasons.join("; "), "the policy would not allow it");
                Ok(self.admission)
            }
            Verdict::Deny => Err(ErrorBody {
                kind: ErrorKind::Denied,
                message: format!(
                    "this site does not allow `{reference}`: {}",
                    self.admission.reasons.join("; ")
                ),
                hint: Some("ask the site's admins, who set [policy] registries".into()),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(registries: Option<&[&str]>, mode: PolicyMode, name: &str) -> Verdict {
        let policy = Policy {
            registries: registries.map(|r| r.iter().map(|&r| r.into()).collect()),
            mode,
            ..Policy::default()
        };
        let reference = ImageRef::parse(name, None).unwrap();
        let decision = admit(&policy, &reference);
        assert_eq!(
            decision.clone().enforce(&reference).is_err(),
            decision.verdict == Verdict::Deny
        );
        decision.verdict
    }

    #[test]
    fn what_is_listed_is_allowed_and_names_are_compared_in_whole_parts() {
        use PolicyMode::{Enforce, Warn};
        let list: &[&str] = &["ghcr.io/group", "harbor.example:5000"];
        for (name, expected) in [
            ("ghcr.io/group/app:1", Verdict::Allow),
            ("ghcr.io/group:1", Verdict::Allow),
            ("ghcr.io/groupies/app:1", Verdict::Deny),
            ("ghcr.io/other/app:1", Verdict::Deny),
            ("harbor.example:5000/any/thing:1", Verdict::Allow),
            ("harbor.example:50001/any/thing:1", Verdict::Deny),
            ("harbor.example/any/thing:1", Verdict::Deny),
        ] {
            assert_eq!(verdict(Some(list), Enforce, name), expected, "{name}");
        }
        assert_eq!(verdict(Some(list), Warn, "quay.io/a/b:1"), Verdict::Warn);
        assert_eq!(verdict(Some(&[]), Enforce, "quay.io/a/b:1"), Verdict::Deny);
        assert_eq!(verdict(None, Enforce, "quay.io/a/b:1"), Verdict::Allow);
    }
}
