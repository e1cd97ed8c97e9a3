//! Which scripts slurmd runs inside the task's view: `TaskProlog` and `TaskEpilog` of slurm.conf.
//!
//! Slurm starts TaskProlog after the task has entered the image, by the path it has on the host, so that path must be
//! there. Read best effort: a script that is not found here is not bound, and Slurm then ends the task.

use std::path::{Path, PathBuf};

const MAX_BYTES: u64 = 4 * 1024 * 1024;
const MAX_FILES: usize = 64;

/// Absolute paths of the site's task prolog and epilog.
pub fn task_scripts(slurm_conf: &Path) -> Vec<Vec<u8>> {
    let mut scripts = Vec::new();
    let mut files = vec![slurm_conf.to_path_buf()];
    let mut next = 0;
    while let Some(file) = files.get(next).cloned() {
        next += 1;
        let small =
            std::fs::metadata(&file).is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_BYTES);
        let Some(text) = small.then(|| std::fs::read(&file).ok()).flatten() else {
            continue;
        };
        let found = parse(&String::from_utf8_lossy(&text));
        scripts.extend(found.scripts);
        for include in found.includes {
            let path = match file.parent() {
                Some(folder) => folder.join(&include),
                None => PathBuf::from(include),
            };
            if files.len() < MAX_FILES && !files.contains(&path) {
                files.push(path);
            }
        }
    }
    scripts
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    scripts: Vec<Vec<u8>>,
    includes: Vec<String>,
}

fn parse(text: &str) -> Found {
    let mut found = Found::default();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some((word, rest)) = line.split_once(char::is_whitespace)
            && word.eq_ignore_ascii_case("include")
        {
            found.includes.push(rest.trim().into());
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        let key = key.trim();
        if key.eq_ignore_ascii_case("TaskProlog") || key.eq_ignore_ascii_case("TaskEpilog") {
            // Newer releases take a list.
            for path in value.trim().trim_matches('"').split(',') {
                if path.starts_with('/') {
                    found.scripts.push(path.as_bytes().to_vec());
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_and_includes_are_found() {
        let found = parse(
            "ClusterName=x\n  taskprolog = \"/a/b\" # ours\n#TaskEpilog=/no\nTaskEpilog=/c,/d\ninclude nodes.conf\n",
        );
        assert_eq!(
            found.scripts,
            vec![b"/a/b".to_vec(), b"/c".to_vec(), b"/d".to_vec()]
        );
        assert_eq!(found.includes, ["nodes.conf"]);
    }
}
