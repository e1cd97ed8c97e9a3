//! The plugin's command line options, and what a client was given of them.
//!
//! On nodes the options are registered too, or Slurm would warn about unknown ones, but their values are not read
//! there: they travel as environment variables (see `names`).
#![allow(unsafe_code, reason = "the callback that Slurm calls")]

use crate::ffi::{self, OptionText, Spank};
use crate::plan;
use crate::settings::Settings;
use std::ffi::{c_char, c_int};
use std::sync::{Mutex, PoisonError};

const IMAGE: c_int = 1;
const MOUNTS: c_int = 2;
const WORKDIR: c_int = 3;
const WRITABLE: c_int = 4;

const OPTIONS: [(c_int, OptionText); 4] = [
    (
        IMAGE,
        OptionText {
            name: c"image",
            argument: Some(c"IMAGE"),
            usage: c"run in this container image, as --container does; 'none' for none",
        },
    ),
    (
        MOUNTS,
        OptionText {
            name: c"container-mounts",
            argument: Some(c"SRC[:DST[:FLAGS]]"),
            usage: c"folders and files to show in the container; commas between several, or repeat the option",
        },
    ),
    (
        WORKDIR,
        OptionText {
            name: c"container-workdir",
            argument: Some(c"PATH"),
            usage: c"working directory in the container",
        },
    ),
    (
        WRITABLE,
        OptionText {
            name: c"container-writable",
            argument: None,
            usage: c"let the job write to its view of the image; what it writes is gone at its end",
        },
    ),
];

/// The options of one command line.
#[derive(Debug, Default, Clone)]
pub struct Given {
    pub image: Option<Vec<u8>>,
    pub mounts: Vec<Vec<u8>>,
    pub workdir: Option<Vec<u8>>,
    pub writable: bool,
}

static GIVEN: Mutex<Given> = Mutex::new(Given {
    image: None,
    mounts: Vec::new(),
    workdir: None,
    writable: false,
});

/// Registers what `settings` leaves to us; in `slurm_spank_init` only.
pub fn register(spank: Spank, settings: &Settings) {
    for (value, text) in &OPTIONS {
        if *value != IMAGE || settings.image_option {
            spank.register(text, *value, on_option);
        }
    }
}

/// salloc exports its options, and Slurm would give them to every srun and sbatch inside, over the job's own settings
/// in `names`. Outside of a job the same variables are a user's defaults and stay.
pub fn forget_inherited() {
    for (_, text) in &OPTIONS {
        for prefix in [
            "_SLURM_SPANK_OPTION_berth_",
            "SLURM_SPANK__SLURM_SPANK_OPTION_berth_",
        ] {
            let option = text.name.to_string_lossy().replace('-', "_");
            if let Some(name) = ffi::c_string(format!("{prefix}{option}").as_bytes()) {
                ffi::unset_own_env(&name);
            }
        }
    }
}

/// What was given so far.
pub fn given() -> Given {
    GIVEN.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Slurm calls this for each occurrence, in places twice for the same one, and from another thread never.
unsafe extern "C" fn on_option(option: c_int, argument: *const c_char, remote: c_int) -> c_int {
    ffi::guarded(
        || {
            if remote == 0 {
                // SAFETY: Slurm's argument, alive during the callback.
                let argument = unsafe { ffi::option_argument(argument) };
                take(
                    &mut GIVEN.lock().unwrap_or_else(PoisonError::into_inner),
                    option,
                    argument,
                );
            }
        },
        || {},
    )
}

fn take(given: &mut Given, option: c_int, argument: Option<Vec<u8>>) {
    match option {
        IMAGE => given.image = argument,
        MOUNTS => {
            for entry in plan::split_mounts(argument) {
                if !given.mounts.contains(&entry) {
                    given.mounts.push(entry);
                }
            }
        }
        WORKDIR => given.workdir = argument,
        WRITABLE => given.writable = true,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_add_up_and_calls_twice_do_no_harm() {
        let mut given = Given::default();
        for _ in 0..2 {
            take(&mut given, MOUNTS, Some(b"/a:/b,/c".to_vec()));
            take(&mut given, MOUNTS, Some(b"/d".to_vec()));
            take(&mut given, WRITABLE, None);
        }
        assert_eq!(
            given.mounts,
            vec![b"/a:/b".to_vec(), b"/c".to_vec(), b"/d".to_vec()]
        );
        assert!(given.writable);
    }
}
