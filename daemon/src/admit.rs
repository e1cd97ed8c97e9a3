//! Stage two: whether an image may come in. One pure function from what is known to a verdict with reasons.

use berth_image::record::Admission;

use crate::resolve::Resolution;
use crate::resolve::manifest::Manifest;

/// Decides whether the image may be made, and says under which rule. Every image may, until there are policies.
pub fn admit(_resolution: &Resolution, _manifest: &Manifest) -> Admission {
    Admission {
        rule: "allow-all/default".into(),
        reasons: vec!["this site has no admission policy".into()],
    }
}
