//! What is kept, who uses it, and what goes when. Decisions only: no descriptor is opened or closed in here, and the
//! time is told.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// How long an unused mount stays.
    pub(crate) keep: Duration,
    /// Most mounts, used ones counted; used ones never go.
    pub(crate) images: usize,
}

#[derive(Debug)]
pub(crate) struct Entry<M> {
    pub(crate) mount: M,
    pub(crate) users: usize,
    /// Since when nobody uses it, where nobody does.
    idle_since: Instant,
    pub(crate) given: u64,
}

impl<M> Entry<M> {
    pub(crate) fn idle(&self, now: Instant) -> Duration {
        match self.users {
            0 => now.saturating_duration_since(self.idle_since),
            _ => Duration::ZERO,
        }
    }
}

/// Mounts by what they are mounts of.
#[derive(Debug)]
pub(crate) struct Table<K, M> {
    entries: HashMap<K, Entry<M>>,
    limits: Limits,
}

impl<K: Eq + Hash + Clone, M> Table<K, M> {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            entries: HashMap::new(),
            limits,
        }
    }

    /// Keeps nothing that is unused from now on.
    pub(crate) fn drain(&mut self) {
        self.limits.keep = Duration::ZERO;
    }

    /// Adds a mount that nobody uses yet.
    pub(crate) fn add(&mut self, key: K, mount: M, now: Instant) {
        let entry = Entry {
            mount,
            users: 0,
            idle_since: now,
            given: 0,
        };
        self.entries.insert(key, entry);
    }

    /// Counts a user, if there is such a mount.
    pub(crate) fn take(&mut self, key: &K) -> Option<&M> {
        let entry = self.entries.get_mut(key)?;
        entry.users += 1;
        entry.given += 1;
        Some(&entry.mount)
    }

    /// A user of this mount, and not of one that came after it, is gone.
    pub(crate) fn release(&mut self, key: &K, same: impl Fn(&M) -> bool, now: Instant) {
        let entry = self.entries.get_mut(key);
        if let Some(entry) = entry.filter(|entry| same(&entry.mount)) {
            entry.users = entry.users.saturating_sub(1);
            entry.idle_since = now;
        }
    }

    /// Takes a mount out, whoever uses it.
    pub(crate) fn remove(&mut self, key: &K) -> Option<M> {
        self.entries.remove(key).map(|entry| entry.mount)
    }

    /// Whether there is such a mount.
    pub(crate) fn has(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    /// Takes out what was [unused](Self::until_unused) long enough.
    pub(crate) fn unused(
        &mut self,
        time: Duration,
        now: Instant,
        which: impl Fn(&K) -> bool,
    ) -> Vec<M> {
        let all = self.entries.iter();
        let gone = all.filter(|(key, e)| e.users == 0 && e.idle(now) >= time && which(key));
        let gone: Vec<K> = gone.map(|(key, _)| key.clone()).collect();
        gone.iter().filter_map(|key| self.remove(key)).collect()
    }

    /// When the next of those that `which` names will have been unused for so long.
    pub(crate) fn until_unused(
        &self,
        time: Duration,
        now: Instant,
        which: impl Fn(&K) -> bool,
    ) -> Option<Duration> {
        let all = self.entries.iter();
        let idle = all.filter(|(key, entry)| entry.users == 0 && which(key));
        idle.map(|(_, entry)| time.saturating_sub(entry.idle(now)))
            .min()
    }

    /// Takes out what has been unused for too long, and the longest unused of what is too much.
    pub(crate) fn expired(&mut self, now: Instant) -> Vec<M> {
        let mut idle: Vec<(Duration, K)> = (self.entries.iter())
            .filter(|(_, entry)| entry.users == 0)
            .map(|(key, entry)| (entry.idle(now), key.clone()))
            .collect();
        idle.sort_by_key(|(idle, _)| std::cmp::Reverse(*idle));
        let excess = self.entries.len().saturating_sub(self.limits.images);
        let keep = self.limits.keep;
        let gone = idle.into_iter().enumerate();
        let gone = gone.filter(|(at, (idle, _))| *at < excess || *idle >= keep);
        gone.filter_map(|(_, (_, key))| self.remove(&key)).collect()
    }

    /// When [`Self::expired`] will have something to say.
    pub(crate) fn next(&self, now: Instant) -> Option<Duration> {
        let idle = self.entries.values().filter(|entry| entry.users == 0);
        idle.map(|entry| self.limits.keep.saturating_sub(entry.idle(now)))
            .min()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &Entry<M>)> {
        self.entries.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Duration = Duration::from_secs(600);

    fn table(images: usize) -> (Table<&'static str, u32>, Instant) {
        let limits = Limits { keep: KEEP, images };
        (Table::new(limits), Instant::now())
    }

    #[test]
    fn an_unused_mount_goes_after_its_time_and_a_used_one_never() {
        let (mut table, start) = table(4);
        table.add("a", 1, start);
        assert_eq!(table.take(&"a"), Some(&1));
        let later = start + KEEP * 3;
        assert!(table.expired(later).is_empty());
        assert_eq!(table.next(later), None);
        table.release(&"a", |_| true, later);
        assert_eq!(table.next(later), Some(KEEP));
        assert!(table.expired(later + KEEP / 2).is_empty());
        assert_eq!(table.expired(later + KEEP), [1]);
        assert_eq!(table.take(&"a"), None);
    }

    #[test]
    fn of_too_many_the_one_unused_for_longest_goes() {
        let (mut table, start) = table(2);
        let second = Duration::from_secs(1);
        for (at, name) in ["used", "old", "new"].into_iter().enumerate() {
            table.add(name, at as u32, start + second * at as u32);
        }
        table.take(&"used");
        assert_eq!(table.expired(start + second * 5), [1]);
        assert_eq!(table.iter().count(), 2);
        // Only used ones are left: none of them goes.
        table.take(&"new");
        table.add("fourth", 3, start + second * 6);
        table.take(&"fourth");
        assert!(table.expired(start + KEEP * 2).is_empty());
    }

    #[test]
    fn some_go_earlier_than_others_when_they_are_unused() {
        let (mut table, start) = table(4);
        for name in ["a", "b", "used"] {
            table.add(name, name.len() as u32, start);
        }
        table.take(&"used");
        let (early, now) = (KEEP / 3, start + KEEP / 6);
        let which = |key: &&str| *key != "b";
        assert_eq!(table.until_unused(early, now, which), Some(KEEP / 6));
        assert!(table.unused(early, now, which).is_empty());
        assert_eq!(table.unused(early, start + early, which), [1]);
        assert_eq!(table.until_unused(early, now, which), None);
        assert!(table.has(&"b") && table.has(&"used") && !table.has(&"a"));
    }

    #[test]
    fn a_drained_table_keeps_what_is_used_until_it_is_not() {
        let (mut table, start) = table(4);
        table.add("idle", 1, start);
        table.add("used", 2, start);
        table.take(&"used");
        table.drain();
        assert_eq!(table.expired(start), [1]);
        table.release(&"used", |mount| *mount == 2, start);
        assert_eq!(table.expired(start), [2]);
    }
}
