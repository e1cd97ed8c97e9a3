//! What of an image's environment a task gets.
//!
//! The image wins for what it defines, so that its programs find their libraries; all other variables of the user's
//! stay. Slurm's variables, and those that say who and where the user is, are never the image's to set.

use std::path::Path;

/// As container engines have it, for images that define none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most bytes of an image's variables.
const MOST: usize = 128 << 10;
const NOT_THE_IMAGES: [&str; 11] = [
    "HOME",
    "USER",
    "LOGNAME",
    "PWD",
    "OLDPWD",
    "HOSTNAME",
    "TERM",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "KRB5CCNAME",
    "CUDA_VISIBLE_DEVICES",
];
const PREFIXES_NOT_THE_IMAGES: [&str; 5] = ["SLURM", "SBATCH_", "SRUN_", "PMI_", "PMIX_"];

/// The variables to set, `NAME=VALUE`; `None` when there are more than a task should start with. `bin_dir`, where
/// Slurm's commands are, ends the PATH where it is not on it.
pub(crate) fn of_image(image: &[String], bin_dir: Option<&Path>) -> Option<Vec<String>> {
    let mut taken: Vec<String> = Vec::with_capacity(image.len() + 1);
    let mut bytes = 0;
    let mut has_path = false;
    for entry in image {
        let Some((name, _)) = entry.split_once('=') else {
            continue;
        };
        let strange = name.is_empty() || entry.contains('\0');
        let kept_back = NOT_THE_IMAGES.contains(&name)
            || PREFIXES_NOT_THE_IMAGES.iter().any(|p| name.starts_with(p));
        if strange || kept_back {
            continue;
        }
        has_path |= name == "PATH";
        bytes += entry.len() + 1;
        taken.push(entry.clone());
    }
    if !has_path {
        taken.push(DEFAULT_PATH.to_owned());
    }
    for path in taken.iter_mut().filter(|entry| entry.starts_with("PATH=")) {
        if let Some(folder) = bin_dir.and_then(Path::to_str)
            && !path["PATH=".len()..].split(':').any(|part| part == folder)
        {
            path.push(':');
            path.push_str(folder);
        }
    }
    (bytes <= MOST).then_some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_sets_its_own_and_nothing_of_slurms_or_the_users() {
        let image = [
            "PATH=/opt/bin",
            "LANG=C",
            "SLURM_JOB_ID=1",
            "HOME=/root",
            "=x",
            "odd",
            "E=",
        ];
        let image: Vec<String> = image.map(str::to_owned).into();
        assert_eq!(
            of_image(&image, None).unwrap(),
            ["PATH=/opt/bin", "LANG=C", "E="]
        );
        assert_eq!(of_image(&[], None).unwrap(), [DEFAULT_PATH]);
        assert_eq!(of_image(&[format!("A={}", "x".repeat(MOST))], None), None);
    }

    #[test]
    fn slurms_commands_are_on_the_path() {
        let image = ["PATH=/bin".to_owned()];
        let slurm = Path::new("/usr/bin");
        assert_eq!(
            of_image(&image, Some(slurm)).unwrap(),
            ["PATH=/bin:/usr/bin"]
        );
        assert_eq!(of_image(&[], Some(slurm)).unwrap(), [DEFAULT_PATH]);
    }
}
