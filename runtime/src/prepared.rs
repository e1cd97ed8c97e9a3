//! A step that was understood: its configuration, keys, and what its views are made of.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use berth_config::{Config, MountMode};
use berth_image::{Digest, PublicKey};

use crate::environment;
use crate::grant::{self, Grant};
use crate::mounted::{Bytes, Image, Owner};
use crate::mounts::{self, own_path};
use crate::own_image::OwnImage;
use crate::refusal::{Refusal, code};
use crate::sealed;
use crate::serials;
use crate::slurm;
use crate::trusted::{self, Files, Site, TrustError};
use crate::user::Account;
use crate::view::{Bind, IfAbsent, Kind, Link, ViewSpec};
use crate::wanted::Wanted;
use crate::wire::{Fields, Job};

/// A step, ready to be looked for.
pub(crate) struct Prepared {
    pub(crate) job: Job,
    pub(crate) config: Config,
    pub(crate) keys: Vec<PublicKey>,
    /// Of these two.
    pub(crate) files: Files,
    pub(crate) wanted: Wanted,
    pub(crate) slurm_users: Vec<String>,
    slurm_binds: Vec<Bind>,
    slurm_links: Vec<Link>,
    user_binds: Vec<Bind>,
}

impl Prepared {
    /// `known` spares reading the site's files, where it is what they say.
    pub(crate) fn new(job: Job, known: Option<Site>) -> Result<Prepared, Refusal> {
        let refused = |e: TrustError| {
            Refusal::new(code::CONFIG, e.to_string()).hint("tell the site's admins")
        };
        let known = known.filter(|site| site.files.are_of(&job.config));
        let site = known.map_or_else(|| Site::load(&job.config), Ok);
        let Site {
            config,
            keys,
            files,
        } = site.map_err(refused)?;
        trusted::own_folder(&config.node.run_dir).map_err(refused)?;
        let wanted = Wanted::new(&job.reference, &job.pins, &config)?;
        let user_binds = mounts::of_user(&job.mounts, config.node.user_mounts)
            .map_err(|e| Refusal::new(code::USAGE, e.to_string()))?;
        if job.writable && config.node.writable_bytes == 0 {
            let line = "--container-writable is not allowed on this site";
            return Err(Refusal::new(code::USAGE, line));
        }
        let client = slurm::Client::new(&config.node.slurm, job.slurm_conf.as_deref());
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
            files,
            wanted,
            user_binds,
        })
    }

    /// Checks what was found and mounts it.
    pub(crate) fn mount(
        &self,
        found: Fields<'_>,
        data: Option<OwnedFd>,
        format: Option<OwnedFd>,
    ) -> Result<Image, Refusal> {
        let lacks = |what: &str| Refusal::new(code::INTERNAL, format!("what was found: no {what}"));
        if let Some(path) = &self.wanted.own {
            let own = OwnImage::new(path, &self.job.user, self.job.writable);
            return Image::own(own, self.environment(&[])?, &self.config);
        }
        let digest = found.get("digest").unwrap_or_default();
        let digest: Digest = (String::from_utf8_lossy(digest).parse())
            .map_err(|e| Refusal::new(code::INTERNAL, format!("what was found: {e}")))?;
        let bytes = found.get("record").unwrap_or_default();
        let (wanted, user) = (&self.wanted, &self.job.user);
        let daemons = || {
            let grants = Grant::from_fields(found);
            grant::sources(&self.config, &digest, &wanted.platform, &grants)
        };
        let (record, bytes) = match data {
            Some(data) => {
                let record =
                    sealed::verify(wanted, &digest, bytes, &self.keys, data.as_fd(), user)?;
                let format = format.ok_or_else(|| lacks("owner of the store"))?;
                sealed::belongs_to_store(wanted, data.as_fd(), format.as_fd())?;
                let second = self.config.node.mount == MountMode::Lazy;
                let others = if second { daemons() } else { Vec::new() };
                (record, Bytes::Store(data, others))
            }
            None => {
                let record = sealed::believe(wanted, &digest, bytes, &self.keys)?;
                let daemons = daemons();
                if daemons.iter().all(|daemon| daemon.grant.is_none()) {
                    return Err(lacks("grant"));
                }
                (record, Bytes::Daemons(daemons))
            }
        };
        serials::look(&self.config.node.run_dir, &record, &wanted.name())?;
        let environment = self.environment(&record.run.env)?;
        let owner = Owner {
            digest,
            platform: wanted.platform.clone(),
            job: self.job.job,
            uid: user.uid,
        };
        Image::mount(record, environment, bytes, &owner, &self.config)
    }

    /// What tasks get of an image's variables.
    fn environment(&self, image: &[String]) -> Result<Vec<String>, Refusal> {
        let slurm = &self.config.node.slurm;
        let bin_dir = slurm.client.then_some(slurm.bin_dir.as_path());
        environment::of_image(image, bin_dir).ok_or_else(|| {
            let line = format!("the environment of `{}` is too large", self.wanted.name());
            Refusal::new(code::OTHER, line)
        })
    }

    /// What is bound for tasks whose directory is `cwd`, in order.
    pub(crate) fn binds(&self, home: &Path, cwd: &Path) -> Vec<Bind> {
        let (slurm, users) = (&self.slurm_binds, &self.user_binds);
        let mut binds = mounts::of_view(&self.config.node, slurm, home, cwd, users);
        let scripts = self.job.script.iter().map(|s| ("the batch script", s));
        let prologs = self.job.prologs.iter().map(|p| ("Slurm's script", p));
        for (what, path) in scripts.chain(prologs) {
            binds.push(own_path(what, path, Kind::Ordinary, IfAbsent::Fail));
        }
        binds
    }

    /// The view for tasks whose directory is `cwd`, but for what the image says.
    pub(crate) fn view(&self, account: &Account, cwd: &Path) -> ViewSpec {
        ViewSpec {
            user: self.job.user.clone(),
            account: account.clone(),
            binds: self.binds(&account.home, cwd),
            links: self.slurm_links.clone(),
            writable_bytes: (self.job.writable).then_some(self.config.node.writable_bytes),
            workdir: self.job.workdir.clone(),
            job_cwd: cwd.to_owned(),
            image_cwd: None,
        }
    }
}
