//! Which copies there are, and which go when room is wanted: decisions only.

use std::collections::{HashMap, HashSet};
use std::time::SystemTime;

use super::Id;
use super::verity::file_len;

#[derive(Debug)]
struct Copy {
    bytes: u64,
    last: SystemTime,
    verified: bool,
}

/// See the module's head.
#[derive(Debug, Default)]
pub(crate) struct List {
    copies: HashMap<Id, Copy>,
    /// Most bytes of all.
    pub(crate) most: u64,
}

impl List {
    /// Adds one; until it is verified it counts, and no more.
    pub(crate) fn add(&mut self, id: Id, last: SystemTime, verified: bool) {
        let bytes = file_len(id.data).unwrap_or(0);
        let copy = Copy {
            bytes,
            last,
            verified,
        };
        self.copies.insert(id, copy);
    }

    pub(crate) fn verified(&mut self, id: &Id) {
        if let Some(copy) = self.copies.get_mut(id) {
            copy.verified = true;
        }
    }

    pub(crate) fn remove(&mut self, id: &Id) {
        self.copies.remove(id);
    }

    /// Whether there is one, verified or not.
    pub(crate) fn has(&self, id: &Id) -> bool {
        self.copies.contains_key(id)
    }

    /// Whether there is one that may be mounted.
    pub(crate) fn is_verified(&self, id: &Id) -> bool {
        self.copies.get(id).is_some_and(|copy| copy.verified)
    }

    /// Somebody uses it now.
    pub(crate) fn used(&mut self, id: &Id, now: SystemTime) {
        if let Some(copy) = self.copies.get_mut(id) {
            copy.last = now;
        }
    }

    /// Those that may be mounted.
    pub(crate) fn count(&self) -> usize {
        self.copies.values().filter(|copy| copy.verified).count()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.copies.values().map(|copy| copy.bytes).sum()
    }

    /// Which go so that so many bytes more are within the limit, the one that was not used for longest first; `None` if
    /// all that are not `held` were not enough.
    pub(crate) fn room_for(&self, more: u64, held: &HashSet<Id>) -> Option<Vec<Id>> {
        let mut all: Vec<_> = self.copies.iter().collect();
        all.retain(|(id, _)| !held.contains(id));
        all.sort_by_key(|(_, copy)| copy.last);
        let mut wanted = self.bytes().checked_add(more)?.saturating_sub(self.most);
        let mut gone = Vec::new();
        for (id, copy) in all {
            if wanted == 0 {
                break;
            }
            wanted = wanted.saturating_sub(copy.bytes);
            gone.push(*id);
        }
        (wanted == 0).then_some(gone)
    }

    pub(crate) fn ids(&self) -> Vec<Id> {
        self.copies.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Of three blocks and a tree of two.
    fn id(number: u8) -> Id {
        Id {
            root: [number; 32],
            data: 3 * 4096,
        }
    }

    #[test]
    fn the_longest_unused_comes_first_and_only_what_is_verified_is_mounted() {
        let mut list = List {
            most: 10 * 4096,
            ..List::default()
        };
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        list.add(id(1), at(1), false);
        assert!(list.has(&id(1)) && !list.is_verified(&id(1)));
        assert_eq!((list.count(), list.bytes()), (0, 5 * 4096));
        list.verified(&id(1));
        list.verified(&id(9));
        assert!(list.is_verified(&id(1)) && !list.has(&id(9)));
        let (held, none) = (HashSet::from([id(1)]), HashSet::new());
        assert_eq!(list.room_for(5 * 4096, &held), Some(Vec::new()));
        assert_eq!(list.room_for(5 * 4096 + 1, &held), None);
        assert_eq!(list.room_for(5 * 4096 + 1, &none), Some(vec![id(1)]));
        assert_eq!(list.room_for(10 * 4096 + 1, &none), None);
        assert_eq!(list.room_for(u64::MAX, &none), None);
        list.add(id(2), at(2), true);
        assert_eq!((list.count(), list.bytes()), (2, 10 * 4096));
        assert_eq!(list.room_for(1, &none), Some(vec![id(1)]));
        assert_eq!(list.room_for(1, &held), Some(vec![id(2)]));
        list.used(&id(1), at(3));
        assert_eq!(list.room_for(1, &none), Some(vec![id(2)]));
        assert_eq!(list.room_for(10 * 4096, &none), Some(vec![id(2), id(1)]));
        assert_eq!(list.room_for(10 * 4096, &held), None);
        list.remove(&id(2));
        assert_eq!(list.room_for(5 * 4096, &held), Some(Vec::new()));
        // The site has lowered its limit.
        list.most = 4096;
        assert_eq!(list.room_for(0, &none), Some(vec![id(1)]));
    }
}
