//! What of an image's environment a task gets.
//!
//! The image wins for what it defines, so that its programs find their libraries; all other variables of the user's
//! stay. Slurm's variables, and those that say who and where the user is, are never the image's to set.

/// As container engines have it, for images that define none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most bytes of an image's variables.
const MOST: usize = 128 << 10;
const NOT_THE_IMAGES: [&str; 8] = [
    "HOME", "USER", "LOGNAME", "PWD", "OLDPWD", "HOSTNAME", "TERM", "TMPDIR",
];
const PREFIXES_NOT_THE_IMAGES: [&str; 3] = ["SLURM_", "SBATCH_", "SRUN_"];

/// The variables to set, `NAME=VALUE`; `None` when there are more than a task should start with.
pub(crate) fn of_image(image: &[String]) -> Option<Vec<&str>> {
    let mut taken: Vec<&str> = Vec::with_capacity(image.len() + 1);
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
        taken.push(entry);
    }
    if !has_path {
        taken.push(DEFAULT_PATH);
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
        assert_eq!(of_image(&image).unwrap(), ["PATH=/opt/bin", "LANG=C", "E="]);
        assert_eq!(of_image(&[]).unwrap(), [DEFAULT_PATH]);
        assert_eq!(of_image(&[format!("A={}", "x".repeat(MOST))]), None);
    }
}
