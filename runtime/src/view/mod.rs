//! A job's view of an image: a mount namespace made from the task's own, whose root is the image.
//!
//! The order of the steps is the safety: everything of the user's is opened (by the opener child) and cloned before
//! anything is mounted ([`Laid`], which needs no image yet); where each thing goes is decided on the image alone; only
//! then is the new root put together, entered, and the node's root let go. Mount points are resolved inside the new root, by descriptor. Must run in a process of its
//! own with one thread: it leaves its namespace for good.

mod assemble;
mod bind;
mod error;
mod generated;
mod owner;
mod place;
mod skeleton;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountPropagationFlags, mount_change};

use crate::opener::Opener;
use crate::user::{Account, User};
use assemble::Stage;
use bind::OpenBind;
use error::step;
use owner::Swap;
use place::{Atlas, Spot};

pub use bind::{Bind, IfAbsent, Kind, Link};
pub use error::ViewError;

/// All that decides how a view looks.
#[derive(Debug)]
pub struct ViewSpec {
    pub user: User,
    pub account: Account,
    /// What is bound into the image, in order: a later one covers an earlier one.
    pub binds: Vec<Bind>,
    /// Symbolic links of the container's own. None is made at or below a bind.
    pub links: Vec<Link>,
    /// Bytes that may be written into the image's own tree, in memory; `None` for a read-only view.
    pub writable_bytes: Option<u64>,
    /// Where the user asked to be. It is an error when it is not there.
    pub workdir: Option<PathBuf>,
    /// Where the job is outside.
    pub job_cwd: PathBuf,
    /// The image's own working directory.
    pub image_cwd: Option<PathBuf>,
}

/// A finished view. It lives as long as the descriptor or a process in it.
#[derive(Debug)]
pub struct View {
    pub namespace: OwnedFd,
    /// The first of the wanted working directories that the user may enter there.
    pub cwd: PathBuf,
    /// Folders or files that the user named are bound, or the job's folder: by now there may be others of these names.
    pub names_users_folders: bool,
}

/// Builds the view over `task_namespace`. `image` is a mount that is attached nowhere.
///
/// # Errors
/// [`ViewError`]; nothing of the half-made view stays, since it is this process's alone.
pub fn build(
    spec: &ViewSpec,
    task_namespace: BorrowedFd<'_>,
    image: OwnedFd,
) -> Result<View, ViewError> {
    let ground = Ground::enter(&spec.user, task_namespace)?;
    ground.lay(spec)?.build(image, spec.image_cwd.as_deref())
}

/// Builds the view in this process's own mount namespace, which is in a user namespace of the user's own, and enters
/// it; gives the working directory, which is left to be entered. `image` as in [`build`].
///
/// # Errors
/// [`ViewError`]; the process is of no use then.
pub(crate) fn build_here(spec: &ViewSpec, image: OwnedFd) -> Result<PathBuf, ViewError> {
    let opener = Opener::start_as_is().map_err(ViewError::Opener)?;
    let laid = Laid::new(spec, opener, true)?;
    let (view, opener) = laid.put_together(image, spec.image_cwd.as_deref())?;
    opener.end();
    Ok(view.cwd)
}

/// A mount namespace of this process's own, like the task's, and the child that opens the user's paths there.
pub(crate) struct Ground {
    opener: Opener,
}

impl Ground {
    /// Leaves this process's mount namespace for good.
    pub(crate) fn enter(user: &User, task_namespace: BorrowedFd<'_>) -> Result<Ground, ViewError> {
        enter_copy_of(task_namespace)?;
        let opener = Opener::start(user).map_err(ViewError::Opener)?;
        Ok(Ground { opener })
    }

    /// Has what these binds will need opened meanwhile.
    pub(crate) fn foresee(&mut self, binds: &[Bind]) {
        let places = binds.iter().map(|bind| bind.source.as_path());
        self.opener
            .foresee(places, generated::OF_THE_NODE.iter().map(Path::new));
    }

    /// Everything that can be done without the image.
    pub(crate) fn lay(self, spec: &ViewSpec) -> Result<Laid<'_>, ViewError> {
        Laid::new(spec, self.opener, false)
    }
}

/// A view that lacks nothing but its image.
pub(crate) struct Laid<'a> {
    spec: &'a ViewSpec,
    opener: Opener,
    /// What is bound, opened and cloned.
    binds: Vec<(OpenBind<'a>, Result<OwnedFd, ViewError>)>,
    stage: Stage,
    swap: Option<Swap>,
}

impl<'a> Laid<'a> {
    /// `unprivileged` where only a user namespace gives the right to mount.
    fn new(
        spec: &'a ViewSpec,
        mut opener: Opener,
        unprivileged: bool,
    ) -> Result<Laid<'a>, ViewError> {
        let opened = bind::open_sources(&spec.binds, &mut opener)?;
        // One that cannot be cloned is an error only where it is needed.
        let cloned = opened.into_iter().map(|open| {
            let tree = bind::clone_tree(&open);
            (open, tree)
        });
        let binds = cloned.collect();
        // Where the kernel cannot, the user writes where the image lets everybody. In a user namespace of the user's
        // own, root's files are the user's already.
        let wanted = spec.writable_bytes.is_some() && !unprivileged;
        let swap = wanted.then(|| Swap::with_root(&spec.user).ok()).flatten();
        let stage = Stage::new(spec.writable_bytes, unprivileged)?;
        Ok(Laid {
            spec,
            opener,
            binds,
            stage,
            swap,
        })
    }

    /// The view with `image`, a mount that is attached nowhere. `image_cwd` is the image's own working directory.
    pub(crate) fn build(self, image: OwnedFd, image_cwd: Option<&Path>) -> Result<View, ViewError> {
        let (view, opener) = self.put_together(image, image_cwd)?;
        // Closing some thirty descriptors would keep the task waiting; this process ends with its answer.
        std::mem::forget(opener);
        Ok(view)
    }

    /// From an image and opened sources to this namespace's new root.
    fn put_together(
        self,
        image: OwnedFd,
        image_cwd: Option<&Path>,
    ) -> Result<(View, Opener), ViewError> {
        let Laid {
            spec,
            mut opener,
            binds,
            stage,
            swap,
        } = self;
        if let Some(swap) = swap {
            let _ = swap.apply(image.as_fd());
        }
        let mut atlas = Atlas::new(image.as_fd());
        let mut placed: Vec<(OpenBind<'_>, OwnedFd, Spot)> = Vec::with_capacity(binds.len());
        for (open, tree) in binds {
            if let Some(spot) = atlas.place(&open)? {
                placed.push((open, tree?, spot));
            }
        }
        for link in &spec.links {
            atlas.link(link);
        }
        let files = generated::files(spec, &atlas, image.as_fd(), &mut opener)?;
        skeleton::make(stage.skeleton(), image.as_fd(), atlas.missing(), &files)?;
        skeleton::copy_root(stage.upper(), image.as_fd())?;
        let root = stage.root_over(image)?;
        for (open, tree, spot) in &placed {
            bind::attach(root.as_fd(), &mut opener, open, spot, tree.as_fd())?;
        }

        let namespace = open(
            "/proc/thread-self/ns/mnt",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(step("open the new mount namespace"))?;
        assemble::change_root(root)?;
        let cwd = working_directory(spec, image_cwd, &mut opener)?;
        let is_users = |open: &OpenBind<'_>| matches!(open.bind.kind, Kind::Users | Kind::Fallback);
        let view = View {
            namespace,
            cwd,
            names_users_folders: placed.iter().any(|(open, ..)| is_users(open)),
        };
        // Closing some thirty descriptors would keep the task waiting; this process ends with its answer, or execs.
        std::mem::forget(placed);
        Ok((view, opener))
    }
}

/// A namespace like the task's, into which the node's later mounts still come, and out of which none go.
fn enter_copy_of(namespace: BorrowedFd<'_>) -> Result<(), ViewError> {
    nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNS)
        .map_err(|e| ViewError::step("enter the task's mount namespace", e.into()))?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .map_err(|e| ViewError::step("make a mount namespace", e.into()))?;
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", flags).map_err(step("separate the new namespace's mounts"))
}

/// `--container-workdir`, else the job's directory if it is visible, else the image's, else `/`.
///
/// The opener moved into the new root with the rest of the namespace, so it tells what the user may enter there.
fn working_directory(
    spec: &ViewSpec,
    image_cwd: Option<&Path>,
    opener: &mut Opener,
) -> Result<PathBuf, ViewError> {
    if let Some(wanted) = &spec.workdir {
        return match opener.enter(wanted) {
            Ok(_) => Ok(wanted.clone()),
            Err(source) => Err(ViewError::Workdir {
                path: wanted.clone(),
                source,
            }),
        };
    }
    let candidates = [Some(spec.job_cwd.as_path()), image_cwd];
    for path in candidates.into_iter().flatten() {
        let names_one = path.is_absolute() && path != Path::new("/");
        if names_one && opener.enter(path).is_ok() {
            return Ok(path.to_owned());
        }
    }
    Ok(PathBuf::from("/"))
}

/// An `O_PATH` descriptor below `root`, which no name can leave: symbolic links, absolute ones too, stay inside.
fn inside(
    root: BorrowedFd<'_>,
    path: impl AsRef<Path>,
    flags: OFlags,
) -> Result<OwnedFd, rustix::io::Errno> {
    use rustix::fs::ResolveFlags;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::CLOEXEC;
    // Somebody who renames folders while ".." is resolved gets EAGAIN; a few tries, then so be it.
    for _ in 0..8 {
        match rustix::fs::openat2(root, path.as_ref(), flags, Mode::empty(), resolve) {
            Err(rustix::io::Errno::AGAIN) => {}
            other => return other,
        }
    }
    Err(rustix::io::Errno::AGAIN)
}
