//! What Slurm calls: one function a hook, one line a context.
#![allow(
    unsafe_code,
    reason = "the symbols and calls of Slurm's plugin interface"
)]

use crate::ffi::{self, Context, Spank, spank_t};
use crate::settings::Settings;
use crate::{client, node, task};
use std::ffi::{c_char, c_int, c_uint};

#[unsafe(no_mangle)]
pub static plugin_name: [u8; 6] = *b"berth\0";
#[unsafe(no_mangle)]
pub static plugin_type: [u8; 6] = *b"spank\0";
#[unsafe(no_mangle)]
pub static plugin_version: c_uint = ffi::SLURM_VERSION;
#[unsafe(no_mangle)]
pub static spank_plugin_version: c_uint = 1;

/// Before options are read.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_init(
    handle: spank_t,
    count: c_int,
    argv: *const *const c_char,
) -> c_int {
    let body = || {
        // SAFETY: the three arguments of a hook, as Slurm passes them.
        let (spank, settings) = unsafe { (Spank::new(handle), read_settings(count, argv)) };
        match ffi::context() {
            context @ (Context::Local | Context::Allocator) => {
                client::init(spank, &settings, context)
            }
            Context::Remote => node::init(spank, &settings),
            Context::Other => {}
        }
    };
    ffi::guarded(body, || {})
}

/// After options were read.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_init_post_opt(
    handle: spank_t,
    count: c_int,
    argv: *const *const c_char,
) -> c_int {
    let body = || {
        // SAFETY: as above.
        let (spank, settings) = unsafe { (Spank::new(handle), read_settings(count, argv)) };
        match ffi::context() {
            context @ (Context::Local | Context::Allocator) => {
                client::init_post_opt(&settings, context)
            }
            Context::Remote => node::init_post_opt(spank, &settings),
            Context::Other => {}
        }
    };
    ffi::guarded(body, node::poison)
}

/// In srun, when the step is there and before its tasks are launched.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_local_user_init(
    _: spank_t,
    _: c_int,
    _: *const *const c_char,
) -> c_int {
    ffi::guarded(client::local_user_init, || {})
}

/// In each task, as root.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_task_init_privileged(
    handle: spank_t,
    _: c_int,
    _: *const *const c_char,
) -> c_int {
    // SAFETY: the handle of a hook.
    let spank = unsafe { Spank::new(handle) };
    // A task left without a container by a panic is ended by task_init, which finds none.
    ffi::guarded(|| task::init_privileged(spank), || {})
}

/// In each task, as the user, last thing before exec.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_task_init(
    handle: spank_t,
    _: c_int,
    _: *const *const c_char,
) -> c_int {
    // SAFETY: the handle of a hook.
    let spank = unsafe { Spank::new(handle) };
    ffi::guarded(|| task::init(spank), task::poison)
}

/// At the end of a client or step.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_exit(_: spank_t, _: c_int, _: *const *const c_char) -> c_int {
    let body = || {
        if ffi::context() == Context::Remote {
            node::exit();
        }
    };
    ffi::guarded(body, || {})
}

/// # Safety
/// A hook's own count and argv.
unsafe fn read_settings(count: c_int, argv: *const *const c_char) -> Settings {
    // SAFETY: the caller's promise.
    Settings::parse(&unsafe { ffi::arguments(count, argv) })
}
