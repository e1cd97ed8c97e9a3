//! Pure decisions: what a client passes on, and what a node is to do with a step. No Slurm, no system calls.

use crate::names;
use std::collections::BTreeSet;
use std::ffi::CStr;

/// The word that asks for no container.
pub const NONE: &[u8] = b"none";
const MAX_REFERENCE: usize = 4096;

/// A command line that cannot be carried out. Exit code 2.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal(pub String);

/// What a client (sbatch, salloc, srun) was told.
#[derive(Debug, Default, Clone)]
pub struct Asked {
    /// `--container`, as Slurm left it in `SLURM_CONTAINER`.
    pub container: Option<Vec<u8>>,
    /// `--image`.
    pub image: Option<Vec<u8>>,
    pub mounts: Vec<Vec<u8>>,
    pub workdir: Option<Vec<u8>>,
    pub writable: bool,
    /// This client makes a job of its own; otherwise a step of the job it runs in.
    pub new_job: bool,
    /// This client starts tasks itself: srun.
    pub starts_step: bool,
    /// The image of the job around this client.
    pub job_image: Option<Vec<u8>>,
    /// This client's own folder.
    pub cwd: Option<Vec<u8>>,
}

/// What a client does: variables to set, and the reference to ask the daemon about.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ClientPlan {
    pub set: Vec<(&'static CStr, Vec<u8>)>,
    /// The reference that is new in this job.
    pub ask: Option<Vec<u8>>,
    /// The step or job runs in a container, its own or the job's.
    pub contained: bool,
}

pub fn client(asked: &Asked) -> Result<ClientPlan, Refusal> {
    let mut plan = images(asked)?;
    if let Some(cwd) = &asked.cwd
        && plan.contained
        && asked.starts_step
    {
        plan.set.push((names::STEP_CWD, cwd.clone()));
    }
    Ok(plan)
}

fn images(asked: &Asked) -> Result<ClientPlan, Refusal> {
    let own = match (&asked.container, &asked.image) {
        (Some(container), Some(image)) if container != image => {
            return Err(Refusal(
                "--container and --image name different images: give one of them".into(),
            ));
        }
        (container, image) => container.as_ref().or(image.as_ref()),
    };
    let options_given = !asked.mounts.is_empty() || asked.workdir.is_some() || asked.writable;
    let mut plan = ClientPlan::default();
    let Some(reference) = own else {
        if asked.new_job || asked.job_image.is_none() {
            return if options_given {
                Err(no_image())
            } else {
                Ok(plan)
            };
        }
        plan.contained = true;
        plan.set = settings(
            asked,
            [
                names::STEP_MOUNTS,
                names::STEP_WORKDIR,
                names::STEP_WRITABLE,
            ],
        );
        return Ok(plan);
    };
    if reference == NONE {
        if options_given {
            return Err(no_image());
        }
        if asked.starts_step {
            plan.set.push((names::CONTAINER, NONE.to_vec()));
        }
        return Ok(plan);
    }
    check_reference(reference)?;
    plan.contained = true;
    if asked.new_job {
        plan.set.push((names::JOB_IMAGE, reference.clone()));
        plan.set.extend(settings(
            asked,
            [names::JOB_MOUNTS, names::JOB_WORKDIR, names::JOB_WRITABLE],
        ));
    } else {
        plan.set.extend(settings(
            asked,
            [
                names::STEP_MOUNTS,
                names::STEP_WORKDIR,
                names::STEP_WRITABLE,
            ],
        ));
    }
    // For --image too: the node and the guard then know one way only. A batch step finds the job's image.
    if asked.starts_step {
        plan.set.push((names::CONTAINER, reference.clone()));
    }
    plan.ask = Some(reference.clone());
    Ok(plan)
}

fn no_image() -> Refusal {
    Refusal("--container-mounts, --container-workdir and --container-writable need an image: add --container=IMAGE".into())
}

fn settings(
    asked: &Asked,
    [mounts, workdir, writable]: [&'static CStr; 3],
) -> Vec<(&'static CStr, Vec<u8>)> {
    let mut set = Vec::new();
    if !asked.mounts.is_empty() {
        set.push((mounts, asked.mounts.join(&b',')));
    }
    if let Some(path) = &asked.workdir {
        set.push((workdir, path.clone()));
    }
    if asked.writable {
        set.push((writable, b"1".to_vec()));
    }
    set
}

/// Only what no reference can look like; the helper and the node parse it properly.
pub fn check_reference(reference: &[u8]) -> Result<(), Refusal> {
    let shown = || {
        String::from_utf8_lossy(reference)
            .escape_debug()
            .to_string()
    };
    if reference.is_empty() {
        return Err(Refusal(
            "the image's name is empty: give --container=docker://HOST/NAME:TAG".into(),
        ));
    }
    if reference.len() > MAX_REFERENCE {
        return Err(Refusal(format!(
            "the image's name is longer than {MAX_REFERENCE} bytes"
        )));
    }
    if reference.starts_with(b"-")
        || !reference.iter().all(u8::is_ascii_graphic)
        || reference.contains(&b',')
    {
        return Err(Refusal(format!("'{}' is not an image's name", shown())));
    }
    Ok(())
}

/// What the environment of a step says on the node.
#[derive(Debug, Default, Clone)]
pub struct StepEnv {
    pub container: Option<Vec<u8>>,
    pub job_image: Option<Vec<u8>>,
    pub job_mounts: Option<Vec<u8>>,
    pub job_workdir: Option<Vec<u8>>,
    pub job_writable: Option<Vec<u8>>,
    pub step_mounts: Option<Vec<u8>>,
    pub step_workdir: Option<Vec<u8>>,
    pub step_writable: Option<Vec<u8>>,
}

/// The container a step is to run in.
#[derive(Debug, PartialEq, Eq)]
pub struct Wish {
    pub reference: Vec<u8>,
    pub mounts: Vec<Vec<u8>>,
    pub workdir: Vec<u8>,
    pub writable: bool,
}

/// The step's own image, else the job's, else none. The job's mounts and folder come with the job's image only.
pub fn node(env: &StepEnv) -> Option<Wish> {
    let filled = |value: &Option<Vec<u8>>| value.clone().filter(|bytes| !bytes.is_empty());
    let job_image = filled(&env.job_image);
    let reference = filled(&env.container).or_else(|| job_image.clone())?;
    if reference == NONE {
        return None;
    }
    let inherits = job_image.as_ref() == Some(&reference);
    let jobs = filled(&env.job_mounts).filter(|_| inherits);
    let steps = filled(&env.step_mounts);
    let lists: Vec<Vec<u8>> = jobs.into_iter().chain(steps).collect();
    let mounts = split_mounts(Some(lists.join(&b',')));
    let workdir = filled(&env.step_workdir)
        .or_else(|| filled(&env.job_workdir).filter(|_| inherits))
        .unwrap_or_default();
    let writable = env.step_writable.as_deref() == Some(b"1")
        || (inherits && env.job_writable.as_deref() == Some(b"1"));
    Some(Wish {
        reference,
        mounts,
        workdir,
        writable,
    })
}

/// `A,B,C` in order, empty and repeated entries left out: Slurm calls option callbacks twice in places. A list is the
/// user's, and slurmstepd waits for this: the time grows with its length alone.
pub fn split_mounts(list: Option<Vec<u8>>) -> Vec<Vec<u8>> {
    let list = list.unwrap_or_default();
    let mut known = BTreeSet::new();
    list.split(|byte| *byte == b',')
        .filter(|entry| !entry.is_empty() && known.insert(*entry))
        .map(<[u8]>::to_vec)
        .collect()
}

/// The job's pins with one more; a new answer for the same reference replaces the old one.
pub fn add_pin(pins: &[u8], reference: &[u8], digest: &[u8]) -> Vec<u8> {
    let mut entries: Vec<Vec<u8>> = pins
        .split(|byte| *byte == b',')
        .filter(|entry| {
            let name = entry.rsplitn(2, |byte| *byte == b'=').nth(1);
            !entry.is_empty() && name != Some(reference)
        })
        .map(<[u8]>::to_vec)
        .collect();
    entries.push([reference, b"=", digest].concat());
    entries.join(&b',')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(text: &str) -> Option<Vec<u8>> {
        Some(text.as_bytes().to_vec())
    }

    fn value(plan: &ClientPlan, name: &CStr) -> Option<Vec<u8>> {
        plan.set
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| value.clone())
    }

    #[test]
    fn a_new_job_carries_its_image_and_settings() {
        let asked = Asked {
            container: some("docker://a/b:1"),
            mounts: vec![b"/x:/y".to_vec(), b"/z".to_vec()],
            workdir: some("/w"),
            writable: true,
            new_job: true,
            ..Asked::default()
        };
        let plan = client(&asked).unwrap();
        assert_eq!(plan.ask, some("docker://a/b:1"));
        assert_eq!(value(&plan, names::JOB_IMAGE), some("docker://a/b:1"));
        assert_eq!(value(&plan, names::JOB_MOUNTS), some("/x:/y,/z"));
        assert_eq!(value(&plan, names::JOB_WORKDIR), some("/w"));
        assert_eq!(value(&plan, names::JOB_WRITABLE), some("1"));
        assert_eq!(value(&plan, names::STEP_MOUNTS), None);
    }

    #[test]
    fn a_plain_step_inherits_and_asks_nobody() {
        let asked = Asked {
            job_image: some("x"),
            mounts: vec![b"/data".to_vec()],
            ..Asked::default()
        };
        let plan = client(&asked).unwrap();
        assert!(plan.contained);
        assert_eq!(plan.ask, None);
        assert_eq!(plan.set, vec![(names::STEP_MOUNTS, b"/data".to_vec())]);
    }

    #[test]
    fn a_new_job_never_inherits() {
        let asked = Asked {
            job_image: some("x"),
            new_job: true,
            ..Asked::default()
        };
        assert_eq!(client(&asked).unwrap(), ClientPlan::default());
    }

    #[test]
    fn a_step_with_its_own_image_leaves_the_jobs_image_alone() {
        let asked = Asked {
            job_image: some("x"),
            image: some("y"),
            starts_step: true,
            ..Asked::default()
        };
        let plan = client(&asked).unwrap();
        assert_eq!(value(&plan, names::JOB_IMAGE), None);
        assert_eq!(value(&plan, names::CONTAINER), some("y"));
        assert_eq!(plan.ask, some("y"));
    }

    #[test]
    fn only_who_starts_tasks_in_a_container_says_where() {
        let srun = Asked {
            image: some("y"),
            starts_step: true,
            cwd: some("/scratch"),
            ..Asked::default()
        };
        let cwd = |asked: &Asked| value(&client(asked).unwrap(), names::STEP_CWD);
        assert_eq!(cwd(&srun), some("/scratch"));
        let sbatch = Asked {
            starts_step: false,
            new_job: true,
            ..srun.clone()
        };
        assert_eq!(cwd(&sbatch), None);
        let on_the_host = Asked {
            image: None,
            ..srun
        };
        assert_eq!(cwd(&on_the_host), None);
    }

    #[test]
    fn none_asks_for_the_host() {
        let asked = Asked {
            job_image: some("x"),
            image: some("none"),
            starts_step: true,
            ..Asked::default()
        };
        let plan = client(&asked).unwrap();
        assert!(!plan.contained);
        assert_eq!(plan.set, vec![(names::CONTAINER, b"none".to_vec())]);
    }

    #[test]
    fn contradictions_and_nonsense_are_refused() {
        let both = Asked {
            container: some("x"),
            image: some("y"),
            ..Asked::default()
        };
        assert!(client(&both).is_err());
        let no_image = Asked {
            mounts: vec![b"/x".to_vec()],
            new_job: true,
            ..Asked::default()
        };
        assert!(client(&no_image).is_err());
        for bad in ["", "a b", "-x", "a,b", "a\nb", "caf\u{e9}"] {
            assert!(check_reference(bad.as_bytes()).is_err(), "{bad:?}");
        }
        for good in [
            "docker://h:5000/a/b:1@sha256:ab",
            "python",
            "/store/images/sha256/ab/x/rootfs.squashfs",
        ] {
            assert_eq!(check_reference(good.as_bytes()), Ok(()), "{good}");
        }
    }

    #[test]
    fn the_node_prefers_the_steps_own_image() {
        let env = StepEnv {
            container: some("y"),
            job_image: some("x"),
            job_mounts: some("/a"),
            job_workdir: some("/jw"),
            job_writable: some("1"),
            step_mounts: some("/b,/c"),
            ..StepEnv::default()
        };
        let wish = node(&env).unwrap();
        assert_eq!(wish.reference, b"y");
        assert_eq!(wish.mounts, vec![b"/b".to_vec(), b"/c".to_vec()]);
        assert_eq!(wish.workdir, b"");
        assert!(!wish.writable);
    }

    #[test]
    fn the_jobs_image_brings_the_jobs_settings() {
        let env = StepEnv {
            container: some(""),
            job_image: some("x"),
            job_mounts: some("/a,/b"),
            job_workdir: some("/jw"),
            job_writable: some("1"),
            step_mounts: some("/c,/a"),
            step_workdir: some("/sw"),
            ..StepEnv::default()
        };
        let wish = node(&env).unwrap();
        assert_eq!(wish.reference, b"x");
        assert_eq!(wish.mounts.len(), 3);
        assert_eq!(wish.workdir, b"/sw");
        assert!(wish.writable);
    }

    /// One that compared each entry with all others would be at it for minutes.
    #[test]
    fn a_list_without_end_is_read_in_one_go() {
        let entries: Vec<String> = (0..200_000).map(|n| format!("/{n:x}")).collect();
        let list = [entries.join(","), entries.join(",")].join(",");
        let mounts = split_mounts(Some(list.into_bytes()));
        assert!(mounts.iter().eq(entries.iter().map(String::as_bytes)));
    }

    #[test]
    fn no_image_or_none_is_the_host() {
        assert_eq!(node(&StepEnv::default()), None);
        assert_eq!(
            node(&StepEnv {
                container: some("none"),
                job_image: some("x"),
                ..StepEnv::default()
            }),
            None
        );
    }

    #[test]
    fn pins_are_replaced_by_reference() {
        let pins = add_pin(b"", b"a:1", b"sha256:1");
        assert_eq!(pins, b"a:1=sha256:1");
        let pins = add_pin(&pins, b"b", b"sha256:2");
        assert_eq!(
            add_pin(&pins, b"a:1", b"sha256:3"),
            b"b=sha256:2,a:1=sha256:3"
        );
    }
}
