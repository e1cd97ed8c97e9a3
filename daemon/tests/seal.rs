//! The sealer as a process, with the real converter: what is published, and what is not.

#[path = "../../convert/tests/layers/build.rs"]
mod build;

use std::io::{PipeWriter, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use berth_client::api::ErrorKind;
use berth_image::envelope::MAX_ENVELOPE;
use berth_image::record::{Admission, Record};
use berth_image::{Digest, ImageRef, PrivateKey, RefEntry, Store, layout};
use berthd::seal::client;
use berthd::seal::protocol::{Answer, RefRequest, Request, SealFailure, SealRequest, Sealed};
use build::{Tar, gzip};

const SOON: Duration = Duration::from_secs(30);

struct Site {
    dir: PathBuf,
    _temp: tempfile::TempDir,
    key: PrivateKey,
    sealer: Option<Child>,
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The converter that was built beside this test; `None` (and CI fails) when it was not.
fn converter() -> Option<PathBuf> {
    let beside = std::env::current_exe().unwrap();
    let path = beside.ancestors().nth(2).unwrap().join("berth-convert");
    if path.exists() {
        return Some(path);
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "build berth-convert first"
    );
    eprintln!(
        "left out: {} is missing (cargo build -p berth-convert)",
        path.display()
    );
    None
}

impl Site {
    fn new() -> Option<Self> {
        let converter = converter()?;
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().to_owned();
        let key = PrivateKey::generate().unwrap();
        std::fs::write(dir.join("key"), key.to_pem().unwrap()).unwrap();
        set_mode(&dir.join("key"), 0o600);
        let text = format!(
            "[store]\npath = '{0}/store'\n[seal]\nkey = '{0}/key'\nsocket = '{0}/s'\nstate_dir = '{0}/state'\n\
             converter = '{1}'\n",
            dir.display(),
            converter.display()
        );
        std::fs::write(dir.join("berth.toml"), text).unwrap();
        Some(Self {
            dir,
            _temp: temp,
            key,
            sealer: None,
        })
    }

    fn with_store(self) -> Self {
        Store::init(&self.dir.join("store"), "berthd").unwrap();
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_berthd"));
        command
            .arg("seal")
            .arg("--config")
            .arg(self.dir.join("berth.toml"));
        command
    }

    fn start(mut self) -> Self {
        self.sealer = Some(self.command().spawn().unwrap());
        wait("the sealer answers", || {
            matches!(self.ask(&Request::Status {}, vec![]), Ok(Answer::Status(_)))
        });
        self
    }

    fn stop(&mut self) {
        if let Some(mut sealer) = self.sealer.take() {
            sealer.kill().unwrap();
            sealer.wait().unwrap();
        }
    }

    fn ask(&self, request: &Request, pipes: Vec<OwnedFd>) -> Result<Answer, SealFailure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(client::request(&self.dir.join("s"), request, pipes, |_| {}))
    }

    fn seal(&self, layers: &[Vec<u8>]) -> Result<Sealed, SealFailure> {
        let (pipes, writers): (Vec<OwnedFd>, Vec<PipeWriter>) =
            layers.iter().map(|_| pipe()).unzip();
        let feeders: Vec<_> = (layers.iter().cloned().zip(writers))
            // A sealer that refuses stops reading.
            .map(|(layer, mut pipe)| {
                std::thread::spawn(move || drop(pipe.write_all(&gzip(&layer))))
            })
            .collect();
        let answer = self.ask(&Request::Seal(request(layers)), pipes);
        feeders.into_iter().for_each(|f| f.join().unwrap());
        match answer? {
            Answer::Sealed(sealed) => Ok(*sealed),
            other => panic!("{other:?}"),
        }
    }

    fn store(&self) -> Store {
        Store::open(&self.dir.join("store"), None, None).unwrap()
    }

    fn temps(&self) -> usize {
        std::fs::read_dir(self.dir.join("store/tmp"))
            .unwrap()
            .count()
    }
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < end, "{what}: not in {SOON:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn pipe() -> (OwnedFd, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader.into(), writer)
}

/// A request for an image of these uncompressed layers.
fn request(layers: &[Vec<u8>]) -> SealRequest {
    let diff_ids: Vec<Digest> = layers.iter().map(|l| Digest::of(l)).collect();
    let config = format!(
        r#"{{"os":"linux","architecture":"amd64","config":{{"Env":["A=b"]}},"rootfs":{{"diff_ids":{}}}}}"#,
        serde_json::to_string(&diff_ids).unwrap()
    );
    let layer = |l: &Vec<u8>| {
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        format!(
            r#"{{"mediaType":"{media_type}","digest":"{}"}}"#,
            Digest::of(&gzip(l))
        )
    };
    let manifest = format!(
        r#"{{"config":{{"mediaType":"c","digest":"{}"}},"layers":[{}]}}"#,
        Digest::of(config.as_bytes()),
        layers.iter().map(layer).collect::<Vec<_>>().join(",")
    );
    SealRequest {
        manifest_digest: Digest::of(manifest.as_bytes()),
        manifest,
        config,
        platform: "linux/amd64".parse().unwrap(),
        admission: Admission {
            rule: "default".into(),
            reasons: vec![],
        },
    }
}

fn layers() -> Vec<Vec<u8>> {
    vec![
        Tar::new()
            .dir("etc")
            .file("etc/os-release", b"ID=x\n")
            .end(),
        Tar::new().file("etc/motd", b"hello\n").end(),
    ]
}

#[test]
fn an_image_is_made_once_and_goes_when_it_is_removed() {
    let Some(site) = Site::new() else { return };
    let site = site.with_store().start();
    let sealed = site.seal(&layers()).unwrap();
    let asked = request(&layers());
    assert!(!sealed.existing);
    assert_eq!(sealed.record.run.env, ["A=b"]);

    let store = site.store();
    let path = layout::record(&asked.manifest_digest, &asked.platform);
    let bytes = store.read(&path, MAX_ENVELOPE).unwrap();
    let trusted = [site.key.public()];
    let (record, _) =
        Record::open(&bytes, &trusted, &asked.manifest_digest, &asked.platform).unwrap();
    assert_eq!(record, sealed.record);
    assert_eq!(
        std::fs::metadata(&sealed.path).unwrap().len(),
        record.file.size
    );

    let again = site.seal(&layers()).unwrap();
    assert!(again.existing && again.record == record);

    let reference = ImageRef::parse("r.example/x:1", None).unwrap();
    let asked_ref = RefRequest {
        reference: reference.clone(),
        top: asked.manifest_digest,
        platform: asked.platform.clone(),
        manifest: asked.manifest_digest,
        resolved_at: record.signed_at,
    };
    let written = site.ask(&Request::Ref(asked_ref.clone()), vec![]).unwrap();
    assert!(matches!(written, Answer::RefWritten { serial } if serial > record.serial));
    let bytes = store
        .read(&layout::ref_entry(&reference), MAX_ENVELOPE)
        .unwrap();
    let (entry, _) = RefEntry::open(&bytes, &trusted, &reference).unwrap();
    assert_eq!(entry.manifests[&asked.platform], asked.manifest_digest);

    let remove = Request::Remove {
        manifest: asked.manifest_digest,
        platform: asked.platform,
    };
    assert!(matches!(
        site.ask(&remove, vec![]),
        Ok(Answer::Removed { existed: true })
    ));
    assert!(matches!(
        site.ask(&remove, vec![]),
        Ok(Answer::Removed { existed: false })
    ));
    let emptied = site.ask(&Request::EmptyTrash {}, vec![]);
    assert!(matches!(emptied, Ok(Answer::TrashEmptied { removed: 1 })));
    let refused = site.ask(&Request::Ref(asked_ref), vec![]).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::NotFound);
    assert_eq!(site.temps(), 0);
}

/// Two daemons may want the same image at the same time: each feeds it, one feeds the one that is made.
#[test]
fn of_two_who_want_the_same_at_once_one_is_served_with_the_others() {
    let Some(site) = Site::new() else { return };
    let site = site.with_store().start();
    let both = std::thread::scope(|scope| {
        let asked = [(), ()].map(|()| scope.spawn(|| site.seal(&layers()).unwrap()));
        asked.map(|one| one.join().unwrap())
    });
    assert_eq!(both.iter().filter(|sealed| sealed.existing).count(), 1);
    assert_eq!(both[0].record, both[1].record);
    assert_eq!(site.temps(), 0);
}

#[test]
fn a_bad_layer_leaves_nothing_and_is_named() {
    let Some(site) = Site::new() else { return };
    let site = site.with_store().start();
    let mut bad = layers();
    bad[1] = Tar::new().file("../escape", b"x").end();
    let refused = site.seal(&bad).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::CorruptLayer);
    assert_eq!(
        (refused.layer, refused.entry.as_deref()),
        (Some(1), Some("../escape"))
    );

    let (asked, other) = (request(&layers()), gzip(&Tar::new().end()));
    let (pipes, writers): (Vec<OwnedFd>, Vec<PipeWriter>) = layers().iter().map(|_| pipe()).unzip();
    writers
        .into_iter()
        .for_each(|mut w| w.write_all(&other).unwrap());
    let refused = site.ask(&Request::Seal(asked), pipes).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::DigestMismatch);
    assert_eq!(site.temps(), 0);
    assert_eq!(site.store().image_dirs().unwrap(), []);
}

#[test]
fn a_client_that_goes_away_ends_its_conversion_and_nobody_elses() {
    let Some(site) = Site::new() else { return };
    let site = site.with_store().start();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let (pipes, writers): (Vec<OwnedFd>, Vec<PipeWriter>) = layers().iter().map(|_| pipe()).unzip();
    let (socket, asked) = (site.dir.join("s"), Request::Seal(request(&layers())));
    let task = runtime.spawn(async move { client::request(&socket, &asked, pipes, |_| {}).await });
    wait("the conversion runs", || site.temps() > 0);
    // Another image is made meanwhile.
    let other = vec![Tar::new().file("other", b"x").end()];
    assert!(!site.seal(&other).unwrap().existing);
    task.abort();
    wait("the conversion is given up", || site.temps() == 0);
    drop(writers);
    assert!(!site.seal(&layers()).unwrap().existing);
}

#[test]
fn a_sealer_that_was_killed_sweeps_and_goes_on() {
    let Some(site) = Site::new() else { return };
    let mut site = site.with_store().start();
    let first = site.seal(&layers()).unwrap();
    site.stop();
    std::fs::write(site.dir.join("store/tmp/half"), "x").unwrap();
    let site = site.start();
    assert_eq!(site.temps(), 0);
    let other = vec![Tar::new().file("other", b"x").end()];
    assert!(site.seal(&other).unwrap().record.serial > first.record.serial);
    assert!(site.seal(&layers()).unwrap().existing);
}

#[test]
fn an_unmounted_or_other_store_is_refused() {
    let Some(site) = Site::new() else { return };
    std::fs::create_dir(site.dir.join("store")).unwrap();
    let refused = site.command().output().unwrap();
    assert_eq!(refused.status.code(), Some(69));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is not a Berth store"));

    let mut site = site.with_store().start();
    site.stop();
    std::fs::remove_dir_all(site.dir.join("store")).unwrap();
    let site = site.with_store();
    let refused = site.command().output().unwrap();
    assert_eq!(refused.status.code(), Some(69));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is another store"));

    set_mode(&site.dir.join("key"), 0o644);
    assert_eq!(site.command().output().unwrap().status.code(), Some(78));
}
