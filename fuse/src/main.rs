//! `berth-fuse`: mounts an image through our own reader.

mod confined;
mod given;
mod lazy;
mod node;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use berth_fuse::block::BlockFs;
use berth_fuse::filesystem::FileSystem;
use berth_fuse::fs::ImageFs;
use berth_fuse::holder::{Held, hold};
use berth_fuse::session::{Options, serve};
use berth_fuse::{mount, slots};
use berth_squashfs::read::{CacheSizes, ReadAt, Reader};
use clap::{Args, Parser, Subcommand, ValueEnum};

use lazy::{Lazy, Recording};

/// Mount a container image through FUSE.
#[derive(Parser)]
#[command(
    version,
    after_help = "Example: berth-fuse mount image.squashfs /mnt/image"
)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Mount an image and serve it until it is unmounted. Prints `mounted` when it is there.
    Mount {
        #[command(flatten)]
        serving: Serving,
        #[command(flatten)]
        lazy: Lazy,
        /// Print, and go on in the background.
        #[arg(long)]
        background: bool,
        /// The image: a file, or `-` for one that only --from has.
        image: PathBuf,
        /// An existing folder.
        folder: PathBuf,
    },
    /// Serve an image on a connection that the other end of a socket makes and sends: for runtimes.
    #[command(hide = true)]
    Hold {
        #[command(flatten)]
        serving: Serving,
        #[command(flatten)]
        lazy: Lazy,
        #[arg(long)]
        channel: RawFd,
        #[arg(long)]
        image: Option<RawFd>,
        /// Serve a file that nobody sealed: in one process that can do nothing else, and with nobody to start another.
        #[arg(long, requires = "image", conflicts_with = "verity_root")]
        confined: bool,
    },
    /// Say whether an image can be served: started by `mount` and `hold`, which do not look into it.
    #[command(hide = true)]
    Check {
        #[command(flatten)]
        serving: Serving,
        #[command(flatten)]
        lazy: Lazy,
        #[arg(long)]
        image: Option<RawFd>,
    },
    /// Serve all images of a node: started by `berth-node`, with a socket at descriptor 0.
    #[command(hide = true)]
    Node {
        #[command(flatten)]
        serving: Serving,
        #[command(flatten)]
        node: node::Everything,
    },
    /// Serve a connection that a holder keeps: started by `mount` and `hold`.
    #[command(hide = true)]
    Serve {
        #[command(flatten)]
        serving: Serving,
        #[command(flatten)]
        lazy: Lazy,
        #[arg(long)]
        device: RawFd,
        #[arg(long)]
        slots: RawFd,
        #[arg(long)]
        image: Option<RawFd>,
    },
}

#[derive(Args, Clone, Copy)]
struct Serving {
    /// Requests worked on at once.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=16))]
    threads: u8,
    /// Seconds after which a request that was not answered fails.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3600))]
    deadline: u32,
    /// Show everything as owned by this user and group.
    #[arg(long, value_name = "UID:GID", value_parser = parse_owner)]
    owner: Option<(u32, u32)>,
    /// What is mounted: the image's files, or one file with its bytes for a loop device and the kernel's driver.
    #[arg(long, value_enum, default_value_t = Mode::Filesystem)]
    mode: Mode,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Filesystem,
    Block,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Filesystem => "filesystem",
            Self::Block => "block",
        }
    }
}

fn parse_owner(text: &str) -> Result<(u32, u32), String> {
    let numbers = text.split_once(':');
    let parsed = numbers.and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    parsed.ok_or_else(|| "not UID:GID".to_owned())
}

impl Serving {
    fn deadline(self) -> Duration {
        Duration::from_secs(u64::from(self.deadline))
    }
}

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("BERTH_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .init();
    let result = match Cli::parse().command {
        Verb::Mount {
            serving,
            lazy,
            background,
            image,
            folder,
        } => run_mount(serving, &lazy, background, &image, &folder),
        Verb::Hold {
            serving,
            lazy,
            channel,
            image,
            confined,
        } => given::run(serving, &lazy, channel, image, confined),
        Verb::Check {
            serving,
            lazy,
            image,
        } => run_check(serving, &lazy, image),
        Verb::Node { serving, node } => node::run(serving, node),
        Verb::Serve {
            serving,
            lazy,
            device,
            slots,
            image,
        } => run_serve(serving, &lazy, device, slots, image),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth: {}", told(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// An error and what is behind it, as one line.
fn told(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        line.push_str(&format!(": {source}"));
        cause = source.source();
    }
    line
}

fn run_mount(
    serving: Serving,
    lazy: &Lazy,
    background: bool,
    image: &Path,
    folder: &Path,
) -> Result<(), Failure> {
    let file = match image == Path::new("-") {
        true => None,
        false => Some(OwnedFd::from(File::open(image).map_err(|error| {
            format!("cannot open \"{}\": {error}", image.display())
        })?)),
    };
    // Say what is wrong with an image before anything is mounted.
    check_apart(serving, lazy, file.as_ref())?;
    let device = match mount::open_device()
        .map_err(mount::MountError::from)
        .and_then(|device| {
            let detached = mount::detached(device.as_fd())?;
            // Root's to say.
            if let Err(error) = mount::read_further_ahead(detached.as_fd()) {
                tracing::debug!(%error, "the kernel reads ahead as it likes");
            }
            mount::attach(detached.as_fd(), folder)?;
            Ok(device)
        }) {
        Ok(device) => device,
        Err(_) if !rustix::process::geteuid().is_root() => mount::by_helper(folder)?,
        Err(error) => return Err(error.into()),
    };
    println!("mounted");
    if background {
        given::leave_terminal()?;
    }
    let held = Held {
        device,
        slots: slots::create()?,
        image: file,
    };
    keep(serving, lazy, held)
}

/// Keeps a connection alive, and a server on it, until what is mounted on it is gone.
fn keep(serving: Serving, lazy: &Lazy, held: Held) -> Result<(), Failure> {
    let descriptors = held.arguments()?;
    let own = std::env::current_exe()?;
    let status = hold(
        || {
            let mut command = Command::new(&own);
            command
                .arg("serve")
                .args(&descriptors)
                .args(lazy.arguments())
                .args(["--threads", &serving.threads.to_string()])
                .args(["--deadline", &serving.deadline.to_string()])
                .args(["--mode", serving.mode.name()])
                .args(
                    serving
                        .owner
                        .map(|(uid, gid)| format!("--owner={uid}:{gid}")),
                );
            command
        },
        |server| tracing::info!(pid = server.id(), "serving"),
    )?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("the server failed ({status})").into()),
    }
}

/// Whether there is an image to serve.
fn check(serving: Serving, lazy: &Lazy, image: Option<OwnedFd>) -> Result<(), Failure> {
    let source = lazy.open(image, serving.deadline())?;
    ImageFs::new(Reader::open(source, CacheSizes::default())?)?;
    Ok(())
}

/// The same by a process of its own, caged as servers are: this one lives on and starts programs, and looks into nothing
/// that strangers made.
fn check_apart(serving: Serving, lazy: &Lazy, image: Option<&OwnedFd>) -> Result<(), Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("check")
        .args(lazy.arguments())
        .args(["--deadline", &serving.deadline.to_string()]);
    if let Some(image) = image {
        rustix::io::fcntl_setfd(image, rustix::io::FdFlags::empty())?;
        command.args(["--image", &image.as_raw_fd().to_string()]);
    }
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said.lines().find_map(|line| line.strip_prefix("berth: "));
    Err(match why {
        Some(why) => why.into(),
        None => format!("the image cannot be looked at ({})", output.status).into(),
    })
}

fn run_check(serving: Serving, lazy: &Lazy, image: Option<RawFd>) -> Result<(), Failure> {
    let image = image.map(inherited).transpose()?;
    cage(lazy)?;
    check(serving, lazy, image)
}

/// Closes the cage that fits where the image's bytes come from.
fn cage(lazy: &Lazy) -> Result<(), Failure> {
    match lazy.verity_root {
        None => confined::enter(),
        Some(_) => {
            let here = |folder: &'_ Path| folder.as_os_str().is_empty();
            let record = lazy.record.as_deref().and_then(Path::parent);
            let record = record.map(|folder| if here(folder) { Path::new(".") } else { folder });
            confined::stay_in(lazy.cache.as_deref().into_iter().chain(record))
        }
    }
}

fn run_serve(
    serving: Serving,
    lazy: &Lazy,
    device: RawFd,
    slots: RawFd,
    image: Option<RawFd>,
) -> Result<(), Failure> {
    // Nobody who runs under the same uid may look into, or steer, what serves other people's jobs.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let (device, slots) = (inherited(device)?, inherited(slots)?);
    let image = image.map(inherited).transpose()?;
    cage(lazy)?;
    let (source, recording) = lazy.open_to_serve(image, serving.deadline())?;
    serve_image(serving, lazy, source, device, slots)?;
    recording.map_or(Ok(()), Recording::finish)
}

/// Serves a connection until what is mounted on it is gone.
fn serve_image(
    serving: Serving,
    lazy: &Lazy,
    source: Box<dyn ReadAt>,
    device: OwnedFd,
    slots: OwnedFd,
) -> Result<(), Failure> {
    let fs: Arc<dyn FileSystem> = match serving.mode {
        Mode::Block => Arc::new(BlockFs::new(source)?),
        Mode::Filesystem => {
            let reader = Reader::open(source, CacheSizes::default())?;
            let fs = Arc::new(ImageFs::new(reader)?.owned_by(serving.owner));
            // What is recorded is what a start reads, not the tables of all files.
            if lazy.record.is_none() {
                fs.keep_tables(lazy.cache.as_deref());
            }
            fs
        }
    };
    let options = Options {
        threads: usize::from(serving.threads),
        deadline: serving.deadline(),
        beside_reader: true,
    };
    serve(fs, device, slots::map(slots)?, options)?;
    Ok(())
}

/// Takes over a descriptor that the holder left open, and keeps it from our own children.
#[allow(
    unsafe_code,
    reason = "a number on the command line is all that names it"
)]
fn inherited(fd: RawFd) -> Result<OwnedFd, Failure> {
    // SAFETY: only looked at, to see whether there is such a descriptor.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, the holder made it for this process, and nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
