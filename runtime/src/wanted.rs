//! Which image a step means: a pure decision from what was typed, pinned and configured.

use std::path::{Path, PathBuf};

use berth_config::Config;
use berth_image::{Digest, ImageRef, Platform, layout};

use crate::refusal::{Refusal, code};

/// What is to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// None when a path was given: then there is nothing to pull.
    pub(crate) reference: Option<ImageRef>,
    /// A SquashFS file of the user's own, which nobody sealed.
    pub(crate) own: Option<PathBuf>,
    /// None when a tag has to be resolved.
    pub(crate) digest: Option<Digest>,
    /// Whether the digest is the user's own, which may be that of an index.
    pub(crate) may_be_index: bool,
    pub(crate) platform: Platform,
}

impl Wanted {
    /// `text` as the user typed it; `pins` is `TEXT=DIGEST,…` as the submission left it, user input too: a pin that
    /// makes no sense is refused, since without it another image might run than the one that was asked for.
    pub(crate) fn new(text: &str, pins: &str, config: &Config) -> Result<Wanted, Refusal> {
        let usage = |line: String| Refusal::new(code::USAGE, line);
        let platform = Platform::host();
        if text.starts_with('/') {
            let path = Path::new(text);
            let Some((digest, of_path)) = layout::parse_data_path(&config.store.path, path) else {
                if !config.node.user_images {
                    let line = format!("`{text}` is no image of this site's store");
                    return Err(usage(line).hint(
                        "give a reference (docker://…) or a path that `berth path` printed: image files of users' own \
                         are not allowed on this site (`node.user_images`)",
                    ));
                }
                return Ok(Wanted {
                    reference: None,
                    own: Some(path.to_owned()),
                    digest: None,
                    may_be_index: false,
                    platform,
                });
            };
            if of_path != platform {
                return Err(usage(format!(
                    "`{text}` is an image for {of_path}, this node is {platform}"
                )));
            }
            return Ok(Wanted {
                reference: None,
                own: None,
                digest: Some(digest),
                may_be_index: false,
                platform,
            });
        }
        let default = config.default_registry.as_deref();
        let reference = ImageRef::parse(text, default).map_err(|e| usage(e.to_string()))?;
        let mut pinned = None;
        for pin in pins.split(',') {
            if let Some((of, digest)) = pin.rsplit_once('=')
                && of == text
            {
                let digest = digest.parse::<Digest>();
                pinned = Some(digest.map_err(|e| usage(format!("SLURM_BERTH_PIN: {e}")))?);
            }
        }
        let own = reference.digest();
        Ok(Wanted {
            digest: pinned.or(own),
            may_be_index: pinned.is_none() && own.is_some(),
            reference: Some(reference),
            own: None,
            platform,
        })
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        match (&self.reference, &self.own, &self.digest) {
            (Some(reference), ..) => reference.to_string(),
            (None, Some(path), _) => path.display().to_string(),
            (None, None, Some(digest)) => digest.to_string(),
            (None, None, None) => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_belong_to_the_text_they_were_made_for() {
        let config = Config::default();
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        let pins = format!("a.b/x:1={one},docker://a.b/x:1={two}");
        let digest = |text| Wanted::new(text, &pins, &config).unwrap().digest;
        assert_eq!(digest("a.b/x:1"), Some(one));
        assert_eq!(digest("docker://a.b/x:1"), Some(two));
        assert_eq!(digest("a.b/x:2"), None);
        assert!(Wanted::new("a.b/x:1", "a.b/x:1=sha256:0", &config).is_err());
    }

    #[test]
    fn a_path_is_an_image_of_the_stores_or_a_file_of_the_users() {
        let mut config = Config::default();
        let platform = Platform::host();
        let digest = Digest::of(b"1");
        let dir = config
            .store
            .path
            .join(layout::image_dir(&digest, &platform));
        let path = dir.join(format!("rootfs-{}.squashfs", Digest::of(b"2").hex()));
        let wanted = Wanted::new(path.to_str().unwrap(), "", &config).unwrap();
        assert_eq!((wanted.digest, wanted.reference), (Some(digest), None));
        assert_eq!(wanted.own, None);
        let own = Path::new("/home/u/x.squashfs");
        let wanted = Wanted::new("/home/u/x.squashfs", "", &config).unwrap();
        assert_eq!((wanted.digest, wanted.own), (None, Some(own.to_owned())));
        config.node.user_images = false;
        for wrong in ["/home/u/x.squashfs", "/etc/passwd", "", "a b"] {
            let refusal = Wanted::new(wrong, "", &config).unwrap_err();
            assert_eq!(refusal.code, code::USAGE, "{wrong}");
        }
    }
}
