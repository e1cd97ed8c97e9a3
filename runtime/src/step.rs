//! One step on one node: a loop that waits for tasks, the image and finished views, and answers.
//!
//! It never waits for anything but events. What may hang (the store, the daemon, users' filesystems) hangs in a child;
//! what takes long has a deadline. It ends when the plugin's end of the socket closes, and everything ends with it:
//! children by their parent's death, namespaces and loop devices with the last descriptor. Or it [stays] for a moment.
//!
//! [stays]: stay

pub(crate) mod stay;

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;

use crate::builder::{Builder, Built};
use crate::channel::{Channel, Packet};
use crate::finder::{self, Search, tag};
use crate::mounted::Image;
use crate::prepared::Prepared;
use crate::preread;
use crate::refusal::{Refusal, code};
use crate::sys::{self, Child};
use crate::trusted::Site;
use crate::wire::{Assembler, Body, Fields, Job};
use stay::Kept;

pub(crate) use stay::Stay;

/// The child that looks for the image, and the way to it.
struct Running {
    channel: Channel,
    assembler: Assembler,
    _child: Child,
    deadline: Instant,
}

/// A task that waits for its answer.
struct Task {
    id: u32,
    channel: Channel,
    view: usize,
}

/// A mount namespace that tasks came from, and their directory.
#[derive(PartialEq, Eq)]
struct Place {
    device: u64,
    inode: u64,
    cwd: PathBuf,
}

/// The view for one place.
struct PlaceView {
    place: Place,
    /// The tasks' own.
    namespace: OwnedFd,
    /// For the log: when it was begun.
    begun: &'static str,
    /// Some task got it.
    is_used: bool,
    state: ViewState,
}

/// What became of it.
enum ViewState {
    Asked,
    Building(Builder),
    Ready {
        namespace: OwnedFd,
        cwd: PathBuf,
        /// Until when what was opened for it is still as good as new.
        fresh_until: Instant,
        /// It shows what the user named.
        names_users_folders: bool,
    },
    Failed(Refusal),
}

/// What is known of the image.
enum ImageState {
    NoJob,
    Searching(Running),
    Ready(Box<Image>),
    Failed(Refusal),
}

struct Step {
    parent: Channel,
    /// What was read before there was a step.
    site: Option<Site>,
    job: Assembler,
    prepared: Option<Box<Prepared>>,
    /// The user's account, as the finder's message has it.
    account: Option<Vec<u8>>,
    image: ImageState,
    /// When the image was found: the user's right to it is as old.
    found: Instant,
    views: Vec<PlaceView>,
    tasks: Vec<Task>,
    progress: Option<Vec<u8>>,
    /// A mount of the image that nobody has read from yet.
    cold: Option<OwnedFd>,
    /// Reads from it for the tasks that are about to start.
    reader: Option<Child>,
    /// A refusal's text goes to one task of the node; the others end without a word.
    told: bool,
    started: Instant,
    /// What an earlier step left, if this is a next one.
    kept: Option<Kept>,
}

/// Serves the step whose plugin holds the other end of `parent`, until that closes. `site` is what was read of the
/// site's files before. With `stay` it then waits for a next step of the same kind, as [`stay`] has it.
pub(crate) fn run(parent: Channel, site: Option<Site>, stay: Option<Stay>) -> io::Result<()> {
    let mut step = Step::new(parent, site);
    loop {
        while step.turn()? {}
        step.log_fetched();
        let next = stay.as_ref().and_then(|stay| step.next(stay));
        let Some(next) = next else { return Ok(()) };
        step = next?;
    }
}

impl Step {
    fn new(parent: Channel, site: Option<Site>) -> Step {
        Step {
            parent,
            site,
            job: Assembler::default(),
            prepared: None,
            account: None,
            image: ImageState::NoJob,
            found: Instant::now(),
            views: Vec::new(),
            tasks: Vec::new(),
            progress: None,
            cold: None,
            reader: None,
            told: false,
            started: Instant::now(),
            kept: None,
        }
    }

    /// Waits for one round of events and deals with them; false at the end.
    fn turn(&mut self) -> io::Result<bool> {
        let (parent, image, views) = self.wait()?;
        if image {
            self.hear_finder();
        }
        for index in views {
            self.hear_builder(index);
        }
        if parent && !self.hear_parent()? {
            return Ok(false);
        }
        self.end_what_is_late();
        self.build_views();
        self.answer_tasks();
        self.read_ahead();
        Ok(true)
    }

    /// Which of the parent, the finder and the builders have something to say.
    fn wait(&self) -> io::Result<(bool, bool, Vec<usize>)> {
        let mut fds = vec![PollFd::new(&self.parent, PollFlags::IN)];
        let mut deadline: Option<Instant> = None;
        let searching = match &self.image {
            ImageState::Searching(running) => Some(running),
            _ => None,
        };
        let building: Vec<(usize, &Builder)> = (self.views.iter().enumerate())
            .filter_map(|(index, view)| match &view.state {
                ViewState::Building(builder) => Some((index, builder)),
                _ => None,
            })
            .collect();
        let of_search = searching.map(|r| (r.channel.as_fd(), Some(r.deadline)));
        let of_views = building.iter().map(|(_, b)| (b.as_fd(), b.deadline()));
        let children: Vec<(BorrowedFd<'_>, Option<Instant>)> =
            of_search.into_iter().chain(of_views).collect();
        for (fd, limit) in &children {
            fds.push(PollFd::from_borrowed_fd(*fd, PollFlags::IN));
            deadline = deadline.into_iter().chain(*limit).min();
        }
        let timeout = deadline.map(|d| d.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let parent = ready.next().unwrap_or(false);
        let image = searching.is_some() && ready.next().unwrap_or(false);
        let views = building.iter().zip(ready).filter(|(_, ready)| *ready);
        Ok((parent, image, views.map(|((index, _), _)| *index).collect()))
    }

    /// A job or a task; false when the plugin's end is closed.
    fn hear_parent(&mut self) -> io::Result<bool> {
        let Some(packet) = self.parent.receive()? else {
            return Ok(false);
        };
        match packet.bytes.first() {
            Some(b'J' | b'j') => match self.job.push(b'J', &packet.bytes) {
                Ok(None) => {}
                Ok(Some(body)) => self.start(&body),
                Err(error) => self.fail(foul(&error)),
            },
            _ => self.take_task(packet),
        }
        Ok(true)
    }

    fn start(&mut self, body: &[u8]) {
        let job = match Job::parse(body) {
            Ok(job) => job,
            Err(error) => return self.fail(foul(&error)),
        };
        let Some(job) = self.go_on_with(job) else {
            return;
        };
        let site = self.site.take();
        let found = Prepared::new(job, site).and_then(|prepared| {
            let running = search(&prepared)?;
            Ok((prepared, running))
        });
        match found {
            Ok((prepared, running)) => {
                self.prepared = Some(Box::new(prepared));
                self.image = ImageState::Searching(running);
                self.foresee();
            }
            Err(refusal) => self.fail(refusal),
        }
    }

    fn take_task(&mut self, packet: Packet) {
        let Ok([channel, namespace]) = <[OwnedFd; 2]>::try_from(packet.descriptors) else {
            return;
        };
        let channel = Channel::from_fd(channel);
        let fields = Fields(packet.bytes.get(1..).unwrap_or_default());
        let Ok(stat) = fstat(&namespace) else { return };
        let place = Place {
            device: stat.st_dev,
            inode: stat.st_ino,
            cwd: fields.path("cwd").unwrap_or_default(),
        };
        let known = self.views.iter().position(|view| view.place == place);
        let view = known.unwrap_or_else(|| {
            self.views.push(PlaceView {
                place,
                namespace,
                begun: "asked",
                is_used: false,
                state: ViewState::Asked,
            });
            self.views.len() - 1
        });
        if let Some(progress) = &self.progress {
            let _ = channel.send(progress, &[]);
        }
        self.tasks.push(Task {
            id: fields.number("task").unwrap_or_default(),
            channel,
            view,
        });
    }

    fn hear_finder(&mut self) {
        let ImageState::Searching(running) = &mut self.image else {
            return;
        };
        let packet = match running.channel.receive() {
            Ok(Some(packet)) => packet,
            Ok(None) | Err(_) => {
                return self.fail(ended("the process that looks for the image"));
            }
        };
        let tag = packet.bytes.first().copied().unwrap_or_default();
        if tag == tag::PROGRESS {
            let text = String::from_utf8_lossy(&packet.bytes[1..]);
            let text = crate::text::one_line(&text);
            let packet = [b"P", text.as_bytes()].concat();
            for task in &self.tasks {
                let _ = task.channel.send(&packet, &[]);
            }
            self.progress = Some(packet);
            return;
        }
        let upper = tag.to_ascii_uppercase();
        let body = match running.assembler.push(upper, &packet.bytes) {
            Ok(Some(body)) => body,
            Ok(None) => return,
            Err(error) => return self.fail(foul(&error)),
        };
        match upper {
            tag::ACCOUNT => self.account = Some(body),
            tag::FOUND => self.found(&body, packet.descriptors),
            _ => self.fail(Refusal::from_body(&body)),
        }
    }

    fn found(&mut self, body: &[u8], descriptors: Vec<OwnedFd>) {
        let mut descriptors = descriptors.into_iter();
        let (data, format) = (descriptors.next(), descriptors.next());
        let Some(prepared) = &self.prepared else {
            return self.fail(ended("the process that looks for the image"));
        };
        match prepared.mount(Fields(body), data, format) {
            Ok(image) => {
                self.image = ImageState::Ready(Box::new(image));
                self.found = Instant::now();
            }
            Err(refusal) => self.fail(refusal),
        }
    }

    /// Most tasks come from the mount namespace of slurmstepd, which is also this process's, and start in the folder
    /// that the job's environment names: their view is begun before the image is found and the first of them asks. A
    /// task that comes from elsewhere gets a view of its own.
    fn foresee(&mut self) {
        let cwd = self.prepared.as_ref().and_then(|p| p.job.cwd.clone());
        let Some(cwd) = cwd.filter(|_| self.views.is_empty()) else {
            return;
        };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let Ok(namespace) = open("/proc/self/ns/mnt", flags, Mode::empty()) else {
            return;
        };
        if let Ok(stat) = fstat(&namespace) {
            let place = Place {
                device: stat.st_dev,
                inode: stat.st_ino,
                cwd,
            };
            self.views.push(PlaceView {
                place,
                namespace,
                begun: "ahead",
                is_used: false,
                state: ViewState::Asked,
            });
        }
    }

    /// Has a builder for every view, and tells each what is known so far.
    fn build_views(&mut self) {
        let Some(prepared) = &self.prepared else {
            return;
        };
        for view in &mut self.views {
            // What was opened long before the image came may have changed since.
            let stale = |b: &Builder| !b.has_image() && !b.is_fresh();
            if matches!(&view.state, ViewState::Building(b) if stale(b)) {
                view.state = ViewState::Asked;
            }
            if matches!(view.state, ViewState::Asked) {
                let namespace = view.namespace.as_fd();
                view.state = match Builder::start(prepared, namespace, &view.place.cwd) {
                    Ok(builder) => ViewState::Building(builder),
                    Err(refusal) => ViewState::Failed(refusal),
                };
            }
            let ViewState::Building(builder) = &mut view.state else {
                continue;
            };
            let Some(account) = &self.account else {
                continue;
            };
            builder.tell(account);
            if let ImageState::Ready(image) = &mut self.image
                && !builder.has_image()
            {
                match image.take_mount(&prepared.config) {
                    Ok(mount) => {
                        builder.give(mount.as_fd(), image.working_dir.as_deref());
                        if self.reader.is_none() && !image.is_warm() {
                            self.cold = Some(mount);
                        }
                    }
                    Err(refusal) => view.state = ViewState::Failed(refusal),
                }
            }
        }
    }

    fn hear_builder(&mut self, index: usize) {
        let state = &mut self.views[index].state;
        let ViewState::Building(builder) = state else {
            return;
        };
        *state = match builder.hear() {
            Built::View {
                namespace,
                cwd,
                names_users_folders,
            } => ViewState::Ready {
                namespace,
                cwd,
                fresh_until: builder.fresh_until(),
                names_users_folders,
            },
            Built::Refused(refusal) => ViewState::Failed(refusal),
            Built::Gone => ViewState::Failed(ended("the process that builds the view")),
        };
    }

    fn end_what_is_late(&mut self) {
        let now = Instant::now();
        if matches!(&self.image, ImageState::Searching(r) if now >= r.deadline) {
            let line = "the image did not arrive in time";
            self.fail(
                Refusal::new(code::UNAVAILABLE, line)
                    .hint("`berth pulls` shows how it stands; submit again when it is there"),
            );
        }
        for view in &mut self.views {
            let late = |b: &Builder| b.deadline().is_some_and(|deadline| now >= deadline);
            if matches!(&view.state, ViewState::Building(b) if late(b)) {
                let line = "the container was not ready in time: a filesystem does not answer";
                view.state = ViewState::Failed(Refusal::new(code::UNAVAILABLE, line));
            }
        }
    }

    /// Answers every task whose view is decided.
    fn answer_tasks(&mut self) {
        let tasks = std::mem::take(&mut self.tasks);
        for task in tasks {
            let view = &self.views[task.view];
            let refusal = match (&self.image, &view.state) {
                (ImageState::Failed(refusal), _) | (_, ViewState::Failed(refusal)) => refusal,
                (ImageState::Ready(image), ViewState::Ready { namespace, cwd, .. }) => {
                    let mut body = Body::default().path("cwd", cwd);
                    for variable in &image.environment {
                        body = body.field("env", variable.as_bytes());
                    }
                    let sent = body.send(&task.channel, b'R', &[namespace.as_fd()]);
                    let outcome = if sent.is_ok() { "ready" } else { "gone" };
                    let outcome = format!("{outcome} mount={:?} view={}", image.how(), view.begun);
                    self.log(&task, &outcome);
                    self.views[task.view].is_used = true;
                    continue;
                }
                _ => {
                    self.tasks.push(task);
                    continue;
                }
            };
            let text = if self.told {
                String::new()
            } else {
                refusal.text()
            };
            let body = Body::default()
                .field("code", refusal.code.to_string().as_bytes())
                .field("text", text.as_bytes());
            self.log(&task, &refusal.text());
            if body.send(&task.channel, b'E', &[]).is_ok() {
                self.told = true;
            }
        }
    }

    /// Once a view is ready, the processors are free for what comes next: the tasks' own start.
    fn read_ahead(&mut self) {
        let (ImageState::Ready(image), Some(prepared)) = (&self.image, &self.prepared) else {
            return;
        };
        let is_ready = |view: &PlaceView| matches!(view.state, ViewState::Ready { .. });
        if self.cold.is_none() || !self.views.iter().any(is_ready) {
            return;
        }
        if let (Some(mount), Some(command)) = (self.cold.take(), &prepared.job.command) {
            let (user, environment) = (&prepared.job.user, &image.environment);
            self.reader = preread::start(user, mount.as_fd(), command, environment).ok();
        }
    }

    fn fail(&mut self, refusal: Refusal) {
        self.image = ImageState::Failed(refusal);
    }

    /// At the end, one line on what had to be brought to the node, if anything had.
    fn log_fetched(&self) {
        let (ImageState::Ready(image), Some(prepared)) = (&self.image, &self.prepared) else {
            return;
        };
        if let Some(bytes) = image.fetched(&prepared.config) {
            let (job, uid) = (prepared.job.job, prepared.job.user.uid);
            let ms = self.started.elapsed().as_millis();
            let how = image.how();
            let line = format!("job={job} uid={uid} ms={ms} ended mount={how:?} fetched={bytes}\n");
            let _ = io::stderr().write_all(line.as_bytes());
        }
    }

    /// One line to the plugin's log, where it has one.
    fn log(&self, task: &Task, outcome: &str) {
        let job = self.prepared.as_ref().map_or(0, |p| p.job.job);
        let uid = self.prepared.as_ref().map_or(0, |p| p.job.user.uid);
        let ms = self.started.elapsed().as_millis();
        let outcome = outcome.replace('\n', " ");
        let line = format!("job={job} task={} uid={uid} ms={ms} {outcome}\n", task.id);
        let _ = io::stderr().write_all(line.as_bytes());
    }
}

fn search(prepared: &Prepared) -> Result<Running, Refusal> {
    let failed =
        |e: io::Error| Refusal::new(code::INTERNAL, format!("cannot start a process: {e}"));
    let (ours, theirs) = Channel::pair().map_err(failed)?;
    let search = Search {
        job: &prepared.job,
        config: &prepared.config,
        keys: &prepared.keys,
        wanted: &prepared.wanted,
        users: &prepared.slurm_users,
    };
    let child = sys::fork(|| i32::from(finder::run(&search, &theirs).is_err())).map_err(failed)?;
    Ok(Running {
        channel: ours,
        assembler: Assembler::default(),
        _child: child,
        deadline: Instant::now() + Duration::from_secs(prepared.config.node.wait_s),
    })
}

fn foul(error: &crate::wire::WireError) -> Refusal {
    Refusal::new(code::INTERNAL, format!("the plugin sent {error}"))
        .hint("plugin and berth-runtime must be of one release: tell the site's admins")
}

fn ended(what: &str) -> Refusal {
    Refusal::new(code::INTERNAL, format!("{what} ended without an answer"))
        .hint("this is the node's fault: tell its admins, `berth doctor` may know more")
}
