//! Every xattr set, and the namespaces its names may have.

use super::{CheckError, In, Limits};
use crate::read::{ReadAt, Reader};

const CAPABILITY: &[u8] = b"security.capability";

/// Gives the count of sets.
pub(super) fn check<S: ReadAt>(reader: &Reader<S>, limits: &Limits) -> Result<u32, CheckError> {
    let Some(table) = reader.xattrs() else {
        return Ok(0);
    };
    // A pair has at least a head, a name of one byte and a value's length, and belongs to one set.
    let most = table.pairs.most_decoded() / 9;
    let mut total = 0u64;
    for index in 0..table.count {
        let part = || format!("xattr set {index}");
        let set = reader.xattr_set(table, index).within(part)?;
        total += u64::from(set.count);
        if set.count == 0 || total > most {
            return Err(CheckError::broken(
                part(),
                "its count of names is impossible",
            ));
        }
        let mut pairs = reader.pairs_of(table, set).within(part)?;
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut len = 0;
        while let Some(name) = pairs.next_name().within(part)? {
            let mut allowed = limits.xattrs.iter();
            let allowed = allowed.any(|prefix| name.starts_with(prefix.as_bytes()));
            // What a set-id bit gives, by another name: whatever prefixes are allowed.
            if !allowed || (name == CAPABILITY && !limits.setid) {
                return Err(CheckError::forbidden(
                    part(),
                    format!("the xattr {}", name.escape_ascii()),
                ));
            }
            pairs.check_value().within(part)?;
            len += name.len() + 1;
            names.push(name);
        }
        if len > crate::read::XATTR_LIST_MAX {
            return Err(CheckError::broken(
                part(),
                "its names are longer than the kernel lists",
            ));
        }
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(CheckError::broken(part(), "a name is there twice"));
        }
    }
    Ok(table.count)
}
