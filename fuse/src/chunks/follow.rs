//! What goes on beside an image that is served: its trace is asked for and replayed, or, when there is none, made from
//! this start and sent to where the next one looks for it.

use std::sync::{Arc, Weak};
use std::time::Duration;

use berth_image::trace::Trace;

use super::prefetch::Pace;
use super::store::ChunkStore;

/// How long a source may take to give or take a trace.
const LIMIT: Duration = Duration::from_secs(10);
/// A start that touched less is not worth a trace.
const WORTH: u64 = 1 << 20;

/// What a site wants beside the serving of an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// How long the first start of an image is recorded; `None`: traces are replayed, and none are made.
    pub record: Option<Duration>,
    /// Bytes a second at which the rest of an image is fetched; `None`: it is not.
    pub fill: Option<u64>,
}

impl ChunkStore {
    /// Begins all that. It ends with the store.
    pub fn follow(self: &Arc<Self>, policy: Policy) {
        if policy.record.is_some() {
            self.record();
        }
        let store = Arc::downgrade(self);
        let started = std::thread::Builder::new()
            .name("trace".to_owned())
            .spawn(move || run(&store, policy));
        if let Err(error) = started {
            tracing::warn!(%error, "neither traced nor fetched ahead");
        }
    }
}

/// Waits until an image's start is over: `time` has gone by, and nothing records it any more. `false` when the image was
/// closed before.
pub fn start_is_over(weak: &Weak<ChunkStore>, time: Duration) -> bool {
    loop {
        let Some(background) = weak.upgrade().map(|store| store.background()) else {
            return false;
        };
        if background.stopped_within(time) {
            return false;
        }
        if weak.upgrade().is_some_and(|store| !store.is_recording()) {
            return true;
        }
    }
}

fn run(weak: &Weak<ChunkStore>, policy: Policy) {
    let Some(store) = weak.upgrade() else {
        return;
    };
    let trace = store.sources().trace(LIMIT).and_then(|text| {
        let trace = Trace::from_json(&store.sealed().root, store.sealed().hash_offset, &text);
        trace
            .inspect_err(|error| tracing::warn!(%error, "a trace is not used"))
            .ok()
    });
    if let Some(trace) = &trace {
        tracing::info!(bytes = trace.bytes(), "fetches what a start reads");
        store.replay(trace, Pace::default());
        // The recording of this start is not needed.
        drop(store.recorded());
    }
    if let Some(rate) = policy.fill {
        store.fill(Pace {
            bytes_per_s: Some(rate),
            last: true,
        });
    }
    let (None, Some(time)) = (trace, policy.record) else {
        return;
    };
    let background = store.background();
    // Nobody keeps the image open for the sake of its trace.
    drop(store);
    if background.stopped_within(time) {
        return;
    }
    let Some(store) = weak.upgrade() else {
        return;
    };
    match store.recorded() {
        Some(Ok(trace)) if trace.bytes() >= WORTH => {
            store.sources().send_trace(&trace.to_json(), LIMIT);
        }
        _ => tracing::debug!("too little was read for a trace"),
    }
}
