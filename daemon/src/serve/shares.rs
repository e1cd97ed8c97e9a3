//! Who holds how many of something that there is a bounded number of, and whose is taken when all are held: by who
//! comes late, from who holds most. So neither slowness nor coming back again and again keeps others out, however many
//! of the peers do it together.
//!
//! The rule: who holds at least two fewer than the one who holds most gets that one's oldest. Taking so makes the sum
//! of the squares of what peers hold smaller, and nothing is ever taken back by the same rule: who has less than an
//! equal share gets what it asks for, and two who hold the same do not take from each other. Of N things, held by
//! fewer than N / 2 peers, one can always be taken for who holds none.
//!
//! What was taken still counts as held until its holder has let go of it, so that there are never more than N.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Ends a connection from outside. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Cut(CancellationToken);

impl Cut {
    pub fn is_cut(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Has the connection end.
    pub fn now(&self) {
        self.0.cancel();
    }

    /// Ends when the connection is to end.
    pub fn wait(&self) -> WaitForCancellationFutureOwned {
        self.0.clone().cancelled_owned()
    }
}

/// See the module's head.
#[derive(Debug)]
pub struct Shares<K> {
    peers: HashMap<K, Peer>,
    all: usize,
    taken: usize,
    next: u64,
}

#[derive(Debug, Default)]
struct Peer {
    /// What was not taken yet, oldest first.
    keeps: BTreeMap<u64, Cut>,
    /// With what was taken, and not let go of yet.
    holds: usize,
}

impl<K> Default for Shares<K> {
    fn default() -> Self {
        Self {
            peers: HashMap::new(),
            all: 0,
            taken: 0,
            next: 0,
        }
    }
}

impl<K: Eq + Hash + Clone> Shares<K> {
    /// How many `who` holds.
    pub fn of(&self, who: &K) -> usize {
        self.peers.get(who).map_or(0, |peer| peer.holds)
    }

    /// How many all hold together.
    pub fn all(&self) -> usize {
        self.all
    }

    /// How many of these were taken, and will be let go of at once.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// How many hold something.
    pub fn peers(&self) -> usize {
        self.peers.len()
    }

    /// One more for `who`. The number is what [`Self::remove`] wants.
    pub fn add(&mut self, who: &K, cut: Cut) -> u64 {
        let number = self.next;
        self.next += 1;
        self.all += 1;
        let peer = self.peers.entry(who.clone()).or_default();
        peer.keeps.insert(number, cut);
        peer.holds += 1;
        number
    }

    /// `who` has let go of one.
    pub fn remove(&mut self, who: &K, number: u64) {
        let Some(peer) = self.peers.get_mut(who) else {
            return;
        };
        if peer.keeps.remove(&number).is_none() {
            self.taken -= 1;
        }
        self.all -= 1;
        peer.holds -= 1;
        if peer.holds == 0 {
            self.peers.remove(who);
        }
    }

    /// Takes one for `who`, if the rule lets it: its holder's connection ends.
    pub fn take_for(&mut self, who: &K) -> bool {
        let own = self.peers.get(who).map_or(0, |peer| peer.keeps.len());
        let Some(most) = self.peers.values_mut().max_by_key(|peer| peer.keeps.len()) else {
            return false;
        };
        if most.keeps.len() < own + 2 {
            return false;
        }
        let Some((_, oldest)) = most.keeps.pop_first() else {
            return false;
        };
        self.taken += 1;
        oldest.now();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_less_gets_the_oldest_of_who_has_most_until_they_are_equal() {
        let mut shares = Shares::default();
        let mut cuts = Vec::new();
        for who in ["a", "a", "a", "a", "b", "b", "c"] {
            let cut = Cut::default();
            let number = shares.add(&who, cut.clone());
            cuts.push((who, number, cut));
        }
        assert!(shares.take_for(&"c"));
        let cut = |at: usize| cuts[at].2.is_cut();
        assert!(cut(0) && !cut(1));
        // It still counts.
        assert_eq!((shares.of(&"a"), shares.all(), shares.taken()), (4, 7, 1));
        shares.remove(&"a", 0);
        shares.add(&"c", Cut::default());
        assert_eq!((shares.of(&"a"), shares.all(), shares.taken()), (3, 7, 0));
        // 3, 2, 2: nobody takes from each other, and who has none gets one of three.
        assert!(["a", "b", "c"].iter().all(|who| !shares.take_for(who)));
        assert!(shares.take_for(&"d"));
        assert!(cut(1));
        for (who, number, _) in &cuts[1..] {
            shares.remove(who, *number);
        }
        assert_eq!((shares.all(), shares.taken(), shares.peers()), (1, 0, 1));
    }

    /// Whatever some hold, one who comes last ends up with an equal share, and asks no more often than that.
    #[test]
    fn a_late_comer_gets_an_equal_share_in_as_many_steps() {
        for peers in [1usize, 3, 4, 7] {
            let all = 100;
            let mut shares = Shares::default();
            let mut held: Vec<(usize, u64, Cut)> = (0..all)
                .map(|n| {
                    let cut = Cut::default();
                    (n % peers, shares.add(&(n % peers), cut.clone()), cut)
                })
                .collect();
            let fair = all / (peers + 1);
            for _ in 0..fair {
                assert!(shares.take_for(&99));
                let at = held.iter().position(|(_, _, cut)| cut.is_cut()).unwrap();
                let (who, number, _) = held.swap_remove(at);
                shares.remove(&who, number);
                shares.add(&99, Cut::default());
                // The others come back at once, and get nothing of it.
                assert!(!shares.take_for(&who) || shares.of(&99) > fair);
            }
            assert_eq!((shares.of(&99), shares.all()), (fair, all));
        }
    }
}
