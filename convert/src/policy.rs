//! Which metadata of a layer's entry the image keeps.

use crate::job::{Ownership, Policy};

const CAPABILITY: &str = "security.capability";
const SETID: u16 = 0o6000;

impl Policy {
    /// The mode of an entry in the image.
    pub fn mode(&self, mode: u16, dir: bool) -> u16 {
        let mut mode = mode & 0o7777;
        if !self.keep_setid {
            mode &= !SETID;
        }
        if self.ownership == Ownership::Readable {
            mode |= 0o444;
            if dir || mode & 0o111 != 0 {
                mode |= 0o111;
            }
        }
        mode
    }

    /// The owner and group of an entry in the image.
    pub fn owner(&self, uid: u32, gid: u32) -> (u32, u32) {
        match self.ownership {
            Ownership::Keep => (uid, gid),
            Ownership::Readable => (0, 0),
        }
    }

    /// Whether an xattr stays. SquashFS has no place for names outside three namespaces.
    pub fn keeps(&self, name: &[u8]) -> bool {
        if name == CAPABILITY.as_bytes() {
            return self.keep_setid;
        }
        let storable = [&b"user."[..], b"trusted.", b"security."];
        storable
            .iter()
            .any(|prefix| name.len() > prefix.len() && name.starts_with(prefix))
            && (self.keep_xattrs.iter()).any(|prefix| name.starts_with(prefix.as_bytes()))
    }

    /// What names of xattrs in the image can begin with: every name that stays begins with one of these.
    pub fn xattr_prefixes(&self) -> Vec<String> {
        let mut prefixes = self.keep_xattrs.clone();
        if self.keep_setid {
            prefixes.push(CAPABILITY.to_owned());
        }
        prefixes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readable_is_what_chmod_a_plus_r_x_does() {
        let policy = Policy {
            ownership: Ownership::Readable,
            keep_setid: false,
            keep_xattrs: vec!["user.".into()],
        };
        assert_eq!(policy.mode(0o600, false), 0o644);
        assert_eq!(policy.mode(0o4710, false), 0o755);
        assert_eq!(policy.mode(0o700, true), 0o755);
        assert_eq!(policy.mode(0o1000, true), 0o1555);
        assert_eq!(policy.owner(7, 8), (0, 0));
        assert!(policy.keeps(b"user.x") && !policy.keeps(b"user."));
        assert!(!policy.keeps(b"trusted.overlay.opaque") && !policy.keeps(CAPABILITY.as_bytes()));
    }

    #[test]
    fn keep_keeps_what_the_site_names() {
        let policy = Policy {
            ownership: Ownership::Keep,
            keep_setid: true,
            keep_xattrs: vec!["security.".into(), "system.".into()],
        };
        assert_eq!(policy.mode(0o4700, false), 0o4700);
        assert!(policy.keeps(CAPABILITY.as_bytes()) && policy.keeps(b"security.x"));
        assert!(!policy.keeps(b"user.x") && !policy.keeps(b"system.posix_acl_access"));
    }

    #[test]
    fn prefixes_are_no_wider_than_what_stays() {
        let policy = Policy {
            ownership: Ownership::Keep,
            keep_setid: true,
            keep_xattrs: vec!["user.site.".into()],
        };
        assert_eq!(policy.xattr_prefixes(), ["user.site.", CAPABILITY]);
        let none = Policy {
            keep_setid: false,
            keep_xattrs: Vec::new(),
            ..policy
        };
        assert!(none.xattr_prefixes().is_empty());
    }
}
