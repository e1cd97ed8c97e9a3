//! The border to Slurm and to libc: bindings, the guard round every `extern "C"` body, and thin safe calls.
//!
//! Invariant: nothing here keeps a pointer that Slurm gave beyond the hook in which it was given, and no panic leaves
//! a hook. Everything else in this crate that needs `unsafe` is a system call and says so.
#![allow(unsafe_code, reason = "SPANK is a C interface")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What bindgen makes of the installed `slurm/spank.h`, by the allow-list in `build.rs`.
#[allow(
    non_camel_case_types,
    missing_debug_implementations,
    dead_code,
    unused_imports,
    clippy::all,
    reason = "generated from Slurm's header"
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/spank.rs"));
}

pub use bindings::spank_t;
use bindings::{spank_context as context_id, spank_item};

/// Slurm's loader compares this with its own release (YY.MM).
pub const SLURM_VERSION: u32 = bindings::SLURM_VERSION_NUMBER;

const SUCCESS: c_int = 0;
/// Slurm's `ESPANK_ENV_NOEXIST`, the same number in every release since 21.08.
const ENV_NOEXIST: c_int = 3004;
/// Slurm's `ESPANK_NOSPACE`, likewise.
const NO_SPACE: c_int = 3005;
/// Linux's own limit for one environment string (MAX_ARG_STRLEN): nothing longer can reach a task.
const MAX_ENV: usize = 128 * 1024;

/// Where a hook is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// srun.
    Local,
    /// sbatch, salloc, scrontab.
    Allocator,
    /// slurmstepd and the tasks it forks.
    Remote,
    /// slurmd, prolog and epilog, and what a later Slurm may add: nothing of ours.
    Other,
}

pub fn context() -> Context {
    // SAFETY: no arguments; callable at any time after the plugin was loaded.
    match unsafe { bindings::spank_context() } {
        context_id::S_CTX_LOCAL => Context::Local,
        context_id::S_CTX_ALLOCATOR => Context::Allocator,
        context_id::S_CTX_REMOTE => Context::Remote,
        _ => Context::Other,
    }
}

/// Runs a hook's body. A panic becomes `on_panic`, and Slurm always hears success: a hook that fails in slurmstepd's
/// own process would drain the node or, `optional`, let the command run on the host.
pub fn guarded(body: impl FnOnce(), on_panic: impl FnOnce()) -> c_int {
    if catch_unwind(AssertUnwindSafe(body)).is_err() {
        // A second panic would be a bug in three lines of code that allocate nothing; it must not cross either.
        let _ = catch_unwind(AssertUnwindSafe(on_panic));
    }
    0
}

/// The plugin's arguments from plugstack.conf.
///
/// # Safety
/// `argv` holds `count` C strings, as Slurm passes them to a hook.
pub unsafe fn arguments(count: c_int, argv: *const *const c_char) -> Vec<String> {
    let mut arguments = Vec::new();
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the caller's promise covers index < count.
        let argument = unsafe { *argv.add(index) };
        if !argument.is_null() {
            // SAFETY: a C string of Slurm's that lives as long as the hook.
            let text = unsafe { CStr::from_ptr(argument) };
            arguments.push(text.to_string_lossy().into_owned());
        }
    }
    arguments
}

/// One command line option as registered with Slurm.
#[derive(Debug)]
pub struct OptionText {
    pub name: &'static CStr,
    /// The word shown for the argument; `None` for a flag.
    pub argument: Option<&'static CStr>,
    pub usage: &'static CStr,
}

pub type OptionCallback = unsafe extern "C" fn(c_int, *const c_char, c_int) -> c_int;

/// Slurm's handle, valid for one hook.
#[derive(Clone, Copy, Debug)]
pub struct Spank(spank_t);

/// Why a variable of the job cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnvError {
    TooLong,
    Slurm(c_int),
}

impl Spank {
    /// # Safety
    /// `handle` is what Slurm passed to the running hook.
    pub unsafe fn new(handle: spank_t) -> Self {
        Self(handle)
    }

    /// Registers an option; only in `slurm_spank_init`. Slurm copies all of it.
    pub fn register(self, text: &OptionText, value: c_int, callback: OptionCallback) {
        let mut option = bindings::spank_option {
            name: text.name.as_ptr().cast_mut(),
            arginfo: text
                .argument
                .map_or(std::ptr::null_mut(), |word| word.as_ptr().cast_mut()),
            usage: text.usage.as_ptr().cast_mut(),
            has_arg: c_int::from(text.argument.is_some()),
            val: value,
            cb: Some(callback),
        };
        // SAFETY: the strings are static, Slurm reads and copies the structure during the call. A refusal (another
        // plugin owns the name) leaves the option with its owner, which Slurm itself reports.
        unsafe { bindings::spank_option_register(self.0, &mut option) };
    }

    /// A variable of the job's or task's environment; `None` when it is not set.
    pub fn env(self, name: &CStr) -> Result<Option<Vec<u8>>, EnvError> {
        let mut size = 1024;
        loop {
            let mut buffer = vec![0u8; size];
            let length = c_int::try_from(size).unwrap_or(c_int::MAX);
            // SAFETY: the buffer has `length` writable bytes; Slurm ends what it writes with NUL.
            let code = unsafe {
                bindings::spank_getenv(self.0, name.as_ptr(), buffer.as_mut_ptr().cast(), length)
            };
            match code {
                SUCCESS => {
                    let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(size);
                    buffer.truncate(end);
                    return Ok(Some(buffer));
                }
                ENV_NOEXIST => return Ok(None),
                NO_SPACE if size < MAX_ENV => size *= 8,
                NO_SPACE => return Err(EnvError::TooLong),
                code => return Err(EnvError::Slurm(code)),
            }
        }
    }

    /// Sets a variable of the task. False when Slurm refused.
    pub fn set_env(self, name: &CStr, value: &CStr) -> bool {
        // SAFETY: two C strings that Slurm copies.
        unsafe { bindings::spank_setenv(self.0, name.as_ptr(), value.as_ptr(), 1) == SUCCESS }
    }

    /// Removes a variable of the job or task; one that is not there is no error.
    pub fn unset_env(self, name: &CStr) {
        // SAFETY: a C string that Slurm only reads.
        unsafe { bindings::spank_unsetenv(self.0, name.as_ptr()) };
    }

    /// An item that Slurm stores as 32 bits (uid, gid, ids).
    fn item_u32(self, item: spank_item::Type) -> Option<u32> {
        let mut value: u32 = 0;
        // SAFETY: every item asked for through this function is documented as a pointer to 32 bits.
        let code = unsafe { bindings::spank_get_item(self.0, item, &raw mut value) };
        (code == SUCCESS).then_some(value)
    }

    pub fn uid(self) -> Option<u32> {
        self.item_u32(spank_item::S_JOB_UID)
    }
    pub fn gid(self) -> Option<u32> {
        self.item_u32(spank_item::S_JOB_GID)
    }
    pub fn job(self) -> Option<u32> {
        self.item_u32(spank_item::S_JOB_ID)
    }
    pub fn step(self) -> Option<u32> {
        self.item_u32(spank_item::S_JOB_STEPID)
    }
    /// This node's number within the step.
    pub fn node(self) -> Option<u32> {
        self.item_u32(spank_item::S_JOB_NODEID)
    }
    /// The task's number on this node; task hooks only.
    pub fn local_task(self) -> Option<u32> {
        self.item_u32(spank_item::S_TASK_ID)
    }
    pub fn global_task(self) -> Option<u32> {
        self.item_u32(spank_item::S_TASK_GLOBAL_ID)
    }

    /// The job's supplementary groups.
    pub fn groups(self) -> Option<Vec<u32>> {
        let mut list: *mut libc::gid_t = std::ptr::null_mut();
        let mut count: c_int = 0;
        // SAFETY: documented as (gid_t **, int *).
        let code = unsafe {
            bindings::spank_get_item(
                self.0,
                spank_item::S_JOB_SUPPLEMENTARY_GIDS,
                &raw mut list,
                &raw mut count,
            )
        };
        let count = usize::try_from(count).ok()?;
        if code != SUCCESS || (list.is_null() && count > 0) {
            return None;
        }
        if count == 0 {
            return Some(Vec::new());
        }
        // SAFETY: Slurm's own array of `count` ids, alive during the hook.
        Some(unsafe { std::slice::from_raw_parts(list, count) }.to_vec())
    }

    /// The first word of the step's command: in a batch step the script in slurmd's spool.
    pub fn command(self) -> Option<Vec<u8>> {
        let mut count: c_int = 0;
        let mut argv: *mut *mut c_char = std::ptr::null_mut();
        // SAFETY: documented as (int *, char ***).
        let code = unsafe {
            bindings::spank_get_item(
                self.0,
                spank_item::S_JOB_ARGV,
                &raw mut count,
                &raw mut argv,
            )
        };
        if code != SUCCESS || count < 1 || argv.is_null() {
            return None;
        }
        // SAFETY: `count` pointers; the first is there.
        let first = unsafe { *argv };
        if first.is_null() {
            return None;
        }
        // SAFETY: a C string of Slurm's, alive during the hook.
        Some(unsafe { CStr::from_ptr(first) }.to_bytes().to_vec())
    }
}

/// The argument of an option callback.
///
/// # Safety
/// `argument` is null or a C string, as Slurm passes it to a callback.
pub unsafe fn option_argument(argument: *const c_char) -> Option<Vec<u8>> {
    if argument.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { CStr::from_ptr(argument) }.to_bytes();
    // A flag that came by environment arrives as this word.
    (bytes != b"(null)").then(|| bytes.to_vec())
}

/// A variable of this very process (the client, or slurmstepd), not of the job.
pub fn own_env(name: &CStr) -> Option<Vec<u8>> {
    // SAFETY: hooks run in the one thread of a client, and in slurmstepd before it changes its environment.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: getenv's answer is a C string; it is copied at once.
    Some(unsafe { CStr::from_ptr(value) }.to_bytes().to_vec())
}

/// Sets a variable of this process; clients only.
pub fn set_own_env(name: &CStr, value: &CStr) {
    // SAFETY: a client calls hooks in its one thread. Slurm itself uses setenv here.
    unsafe { libc::setenv(name.as_ptr(), value.as_ptr(), 1) };
}

/// Removes a variable of this process; clients only.
pub fn unset_own_env(name: &CStr) {
    // SAFETY: as for `set_own_env`.
    unsafe { libc::unsetenv(name.as_ptr()) };
}

/// Writes text to stderr as it is. No formatting machinery, no lock, no buffer.
pub fn write_stderr(text: &[u8]) {
    let mut rest = text;
    while !rest.is_empty() {
        // SAFETY: the slice's own pointer and length.
        let written = unsafe { libc::write(2, rest.as_ptr().cast::<c_void>(), rest.len()) };
        match usize::try_from(written) {
            Ok(0) => return,
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(_) if errno() == libc::EINTR => {}
            Err(_) => return,
        }
    }
}

/// Ends this process at once: no destructors, no handlers of Slurm's.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: always sound.
    unsafe { libc::_exit(c_int::from(code)) }
}

pub fn errno() -> c_int {
    // SAFETY: glibc's pointer to this thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}

/// Words for an error number, without libc's message catalogues: those would be read from inside the image.
pub fn errno_text(number: c_int) -> &'static str {
    match number {
        libc::ENOENT => "no such file",
        libc::EACCES => "permission denied",
        libc::EPERM => "not permitted",
        libc::ENOTDIR => "not a directory",
        libc::ENOEXEC => "not a program of this machine",
        libc::ENOMEM => "out of memory",
        libc::EMFILE | libc::ENFILE => "too many open files",
        libc::EAGAIN => "try again later",
        libc::EPIPE | libc::ECONNRESET | libc::ECONNREFUSED => "the other side ended",
        libc::EINVAL => "invalid argument",
        libc::ETIMEDOUT => "timed out",
        libc::ESTALE => "stale file handle",
        libc::EIO => "input/output error",
        _ => "system error",
    }
}

/// A C string from bytes; `None` when they hold a NUL.
pub fn c_string(bytes: &[u8]) -> Option<CString> {
    CString::new(bytes).ok()
}
