//! A step that was understood: its configuration, keys, and what its views are made of.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use berth_config::Config;
use berth_image::digest::hex;
use berth_image::{Digest, PublicKey, Record};
use berth_mount::{ImageFile, LoopDevice};

use crate::environment;
use crate::mounts::{self, own_path};
use crate::refusal::{Refusal, code};
use crate::sealed;
use crate::slurm;
use crate::trusted;
use crate::user::Account;
use crate::view::{Bind, IfAbsent, Kind, Link, ViewSpec};
use crate::wanted::Wanted;
use crate::wire::{Fields, Job};

/// A step, ready to be looked for.
pub(crate) struct Prepared {
    pub(crate) job: Job,
    pub(crate) config: Config,
    pub(crate) keys: Vec<PublicKey>,
    pub(crate) wanted: Wanted,
    pub(crate) slurm_users: Vec<String>,
    slurm_binds: Vec<Bind>,
    slurm_links: Vec<Link>,
    user_binds: Vec<Bind>,
}

/// The image of a step, checked and mounted.
pub(crate) struct Image {
    record: Record,
    /// Variables that each task gets, `NAME=VALUE`.
    pub(crate) environment: Vec<String>,
    device: LoopDevice,
    /// The first mount, made ahead of the first task.
    spare: Option<OwnedFd>,
}

impl Prepared {
    pub(crate) fn new(job: Job) -> Result<Prepared, Refusal> {
        let site = |e: trusted::TrustError| {
            Refusal::new(code::CONFIG, e.to_string()).hint("tell the site's admins")
        };
        let config = trusted::load_config(&job.config).map_err(site)?;
        let keys = trusted::load_keys(&config).map_err(site)?;
        trusted::own_folder(&config.node.run_dir).map_err(site)?;
        let wanted = Wanted::new(&job.reference, &job.pins, &config)?;
        let user_binds = mounts::of_user(&job.mounts, config.node.user_mounts)
            .map_err(|e| Refusal::new(code::USAGE, e.to_string()))?;
        if job.writable && config.node.writable_bytes == 0 {
            let line = "--container-writable is not allowed on this site";
            return Err(Refusal::new(code::USAGE, line));
        }
        let client = slurm::Client::new(&config.node.slurm);
        let munge = config.api.munge_socket.as_deref();
        let (slurm_binds, slurm_links) = client.parts(&config.node.run_dir, munge);
        let slurm_users = client.users();
        Ok(Prepared {
            slurm_binds,
            slurm_links,
            slurm_users,
            job,
            config,
            keys,
            wanted,
            user_binds,
        })
    }

    /// Checks what was found and mounts it.
    pub(crate) fn mount(&self, found: Fields<'_>, data: OwnedFd) -> Result<Image, Refusal> {
        let digest = found.get("digest").unwrap_or_default();
        let digest: Digest = (String::from_utf8_lossy(digest).parse())
            .map_err(|e| Refusal::new(code::INTERNAL, format!("what was found: {e}")))?;
        let bytes = found.get("record").unwrap_or_default();
        let (wanted, user) = (&self.wanted, &self.job.user);
        let slurm = &self.config.node.slurm;
        let record = sealed::verify(wanted, &digest, bytes, &self.keys, data.as_fd(), user)?;
        let bin_dir = slurm.client.then_some(slurm.bin_dir.as_path());
        let environment = environment::of_image(&record.run.env, bin_dir).ok_or_else(|| {
            let line = format!("the environment of `{}` is too large", wanted.name());
            Refusal::new(code::OTHER, line)
        })?;
        let root = hex(&record.file.verity_root);
        let file = ImageFile {
            file: data.as_fd(),
            data_size: record.file.hash_offset,
            label: &format!("berth-{}", &root[..48]),
        };
        let device = LoopDevice::attach(file, &self.config.node.run_dir).map_err(of_mount)?;
        let spare = Some(device.mount().map_err(of_mount)?);
        Ok(Image {
            record,
            environment,
            device,
            spare,
        })
    }

    /// The view for tasks whose directory is `cwd`.
    pub(crate) fn view(
        &self,
        account: &Account,
        image: &Image,
        cwd: &Path,
    ) -> Result<ViewSpec, Refusal> {
        let node = &self.config.node;
        let (slurm, users) = (&self.slurm_binds, &self.user_binds);
        let mut binds = mounts::of_view(node, slurm, &account.home, cwd, users);
        let scripts = self.job.script.iter().map(|s| ("the batch script", s));
        let prologs = self.job.prologs.iter().map(|p| ("Slurm's script", p));
        for (what, path) in scripts.chain(prologs) {
            binds.push(own_path(what, path, Kind::Ordinary, IfAbsent::Fail));
        }
        Ok(ViewSpec {
            user: self.job.user.clone(),
            account: account.clone(),
            binds,
            links: self.slurm_links.clone(),
            writable_bytes: self.job.writable.then_some(node.writable_bytes),
            workdir: self.job.workdir.clone(),
            job_cwd: cwd.to_owned(),
            image_cwd: image.record.run.working_dir.as_ref().map(PathBuf::from),
        })
    }
}

impl Image {
    /// A mount of the image, attached nowhere.
    pub(crate) fn take_mount(&mut self) -> Result<OwnedFd, Refusal> {
        match self.spare.take() {
            Some(mount) => Ok(mount),
            None => self.device.mount().map_err(of_mount),
        }
    }
}

fn of_mount(error: berth_mount::MountError) -> Refusal {
    Refusal::new(code::INTERNAL, format!("cannot mount the image: {error}"))
        .hint("this is the node's fault: tell its admins, `berth doctor` may know more")
}
