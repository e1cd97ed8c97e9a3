//! Two daemons of one site, over one store: either may go, before a job starts and while it reads.

use std::fs;

use berth_tests::http::request;
use berth_tests::image::{Layer, Pushed, digest, noise};
use berth_tests::suite::{WHERE, container};
use berth_tests::{Cluster, Ended, Image, Options, wait_until};

/// Bytes of each image's first file. A second one is more than what is read ahead after the first.
const BIG: usize = 3 << 20;

/// Two daemons, as clients without their sockets find them, and nodes without the store.
struct Site {
    cluster: Cluster,
    urls: Vec<String>,
    /// berth.toml as the daemons were started with it, and as clients and nodes have it.
    ours: String,
    theirs: String,
}

impl Site {
    fn up() -> Self {
        let options = Options::new(&["--nodes", "1", "--daemons", "2"]);
        let cluster = Cluster::own("test-failover", &options);
        let urls = cluster.get("BERTH_URLS").trim_matches('\'').split(' ');
        let urls: Vec<String> = urls.map(str::to_owned).collect();
        assert_eq!(urls.len(), 2);
        let ours = fs::read_to_string(cluster.folder().join("etc/berth.toml")).unwrap();
        let store = cluster.store().display().to_string();
        let theirs = ours
            .replace(cluster.get("BERTH_SOCKET"), "/nonexistent/berthd.sock")
            .replace(&store, "/nonexistent/store");
        let site = Self {
            cluster,
            urls,
            ours,
            theirs,
        };
        site.write(&site.theirs);
        site
    }

    fn write(&self, text: &str) {
        fs::write(self.cluster.folder().join("etc/berth.toml"), text).unwrap();
    }

    fn start_first(&self) {
        self.write(&self.ours);
        self.cluster.service("start", "berthd");
        self.write(&self.theirs);
    }

    /// An image of two big files, and their sums.
    fn push(&self, variant: &str, seed: u64) -> (Pushed, [String; 2]) {
        let files = [noise(seed, BIG), noise(seed + 1, 3 * BIG)];
        let layer = Layer::new()
            .file("first", &files[0], 0o644)
            .file("second", &files[1], 0o644);
        let image = Image::shell(variant).layer(&layer);
        let image = image.push(self.cluster.registry(), &format!("test/{variant}:1"));
        let sums = files.map(|file| digest(&file)["sha256:".len()..].to_owned());
        (image, sums)
    }

    /// A step in an image, which no daemon's silence of a moment ago keeps from asking.
    fn srun(&self, image: &Pushed, command: &str) -> Ended {
        let words = [&container(&image.name), "sh", "-c", command];
        let remembers = self.cluster.scratch("failover");
        let run = self.cluster.user("srun", &words);
        run.env("XDG_RUNTIME_DIR", remembers).end()
    }

    /// Image bytes that a daemon sent so far.
    fn sent(&self, at: usize) -> u64 {
        self.figure(at, "berth_served_bytes_total ")
            .expect("a figure")
    }

    /// Submissions that a daemon pinned the image of.
    fn pinned(&self, at: usize) -> u64 {
        let pinned = "berth_requests_total{method=\"POST\",route=\"/v1/pins\",status=\"200\"} ";
        self.figure(at, pinned).unwrap_or(0)
    }

    fn figure(&self, at: usize, name: &str) -> Option<u64> {
        let address = self.urls[at].strip_prefix("http://").unwrap();
        let answer = request(address, "GET", "/metrics", &[], b"").unwrap();
        let text = String::from_utf8(answer.body).unwrap();
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name))?;
        Some(value.parse().unwrap())
    }
}

#[test]
fn a_second_daemon_goes_on_for_the_first_and_the_first_for_the_second() {
    let site = Site::up();
    let cluster = &site.cluster;
    let (image, sums) = site.push("reads", 20);
    cluster.berth(&["pull", &image.name]).ok();
    // The first one goes in the middle of what a job reads.
    let script = format!(
        "#!/bin/sh\n#SBATCH {}\nbusybox sha256sum < /first\ntouch begun\n\
         while [ ! -e end ]; do sleep 0.1; done\nbusybox sha256sum < /second\n{WHERE}\n",
        container(&image.name)
    );
    let job = cluster.sbatch("failover", &[], &script);
    wait_until("the job has read", 60, || {
        job.folder.join("begun").exists().then_some(())
    });
    assert!(site.sent(0) > 0 && site.sent(1) == 0, "the first is first");
    cluster.service("kill", "berthd");
    fs::write(job.folder.join("end"), "").unwrap();
    let end = job.end();
    let expected = format!("{}  -\n{}  -\nVARIANT_ID=reads\n", sums[0], sums[1]);
    assert_eq!(end.ok(), expected);
    assert!(site.sent(1) > BIG as u64, "{} bytes", site.sent(1));

    // Without the first one, what nobody has made yet is pulled, submitted and run.
    let (pulled, _) = site.push("pulled", 30);
    cluster.berth(&["pull", &pulled.name]).ok();
    let words = ["exec", &pulled.name, "sh", "-c", WHERE];
    assert_eq!(cluster.berth(&words).ok().trim(), "VARIANT_ID=pulled");
    let (submitted, sums) = site.push("submitted", 40);
    let read = format!("busybox sha256sum < /first; {WHERE}");
    let pinned = site.pinned(1);
    let ended = site.srun(&submitted, &read);
    let expected = format!("{}  -\nVARIANT_ID=submitted", sums[0]);
    assert_eq!(ended.ok().trim(), expected);
    assert_eq!(site.pinned(1), pinned + 1);
    let said = cluster.root("berth", &["--json", "doctor"]).end().stdout;
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let checks = said["checks"].as_array().unwrap();
    let details = checks.iter().filter(|check| check["name"] == "daemon");
    let details: Vec<_> = details
        .map(|check| check["detail"].as_str().unwrap())
        .collect();
    assert_eq!(details.len(), 2, "{details:?}");
    let gone = format!("cannot reach the daemon at {}: ", site.urls[0]);
    assert!(details[0].starts_with(&gone), "{details:?}");

    // The first one was not told of what the second one made. It finds it, also when it is alone.
    site.start_first();
    cluster.service("kill", "berthd-2");
    let ended = site.srun(&pulled, WHERE);
    assert_eq!(ended.ok().trim(), "VARIANT_ID=pulled");

    // With neither nobody can say what an image is, and the job does not run on the host.
    cluster.service("kill", "berthd");
    let ended = site.srun(&pulled, WHERE);
    assert_ne!(ended.code, 0, "{ended}");
    assert!(!ended.stdout.contains("VARIANT_ID"), "{ended}");
    for url in &site.urls {
        assert!(ended.stderr.contains(url.as_str()), "{ended}");
    }
    cluster.assert_nodes_idle();
}
