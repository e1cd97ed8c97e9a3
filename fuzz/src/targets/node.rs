//! Bytes as packets of the node service: requests of users to the keeper, and what its unprivileged server says to it.
//! What is understood can be said again.

use std::fmt::Debug;

use berth_mount::keeper::{self, Answer, MountRequest, Request};
use berth_mount::serving::{Order, Report};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Target;

pub const TARGET: Target = Target {
    name: "node",
    run,
    seeds,
};

fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8]) {
    let Ok(said) = keeper::decode::<T>(data) else {
        return;
    };
    // Escapes can make it longer than a packet may be; then it is refused, and not cut.
    if let Ok(bytes) = keeper::encode(&said) {
        assert_eq!(keeper::decode::<T>(&bytes).as_ref(), Ok(&said));
    }
}

fn run(data: &[u8]) {
    check::<Request>(data);
    check::<Answer>(data);
    check::<Order>(data);
    check::<Report>(data);
}

fn seeds() -> Vec<Vec<u8>> {
    let mount = MountRequest {
        digest: "sha256:00".into(),
        platform: "linux/amd64".into(),
        verity_root: "ab".repeat(32),
        hash_offset: 4096,
        file_size: 8192,
        mode: keeper::Mode::Lazy,
        job: Some("1.0".into()),
        uid: 1000,
        sources: vec![keeper::Source {
            at: "http://site:1/x".into(),
            grant: Some("g".into()),
            until: Some(1),
        }],
    };
    let requests = [
        Request::Mount(mount.clone()),
        Request::Attach(mount),
        Request::Path {
            digest: "sha256:00".into(),
            platform: "linux/amd64".into(),
        },
        Request::Status,
    ];
    let reports = [
        Report::Ready { id: 1 },
        Report::Failed {
            id: 2,
            why: "gone".into(),
        },
        Report::Whole { id: 1 },
        Report::Standing {
            oldest_ms: 3,
            metrics: "a 1\n".into(),
            fetched: vec![(1, 2)],
        },
    ];
    let requests = requests.iter().map(keeper::encode);
    let reports = reports.iter().map(keeper::encode);
    requests
        .chain(reports)
        .map(|bytes| bytes.expect("it fits a packet"))
        .collect()
}
