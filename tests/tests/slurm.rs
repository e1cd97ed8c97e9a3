//! Container jobs by every way into Slurm: each test is a sentence about what a user sees.

use berth_tests::cluster::unique;
use berth_tests::suite::{WHERE, container, suite};
use berth_tests::wait_until;

/// The lines that tell where a command ran and how it was; what Slurm and Berth say on standard error is left out.
fn told(text: &str) -> Vec<&str> {
    let tells = |line: &&str| {
        ["VARIANT_ID=", "restart=", "leaked=", "task="]
            .iter()
            .any(|t| line.starts_with(t))
    };
    text.lines().filter(tells).collect()
}

/// How often each line occurs.
fn count(text: &str, line: &str) -> usize {
    text.lines().filter(|l| l.trim() == line).count()
}

#[test]
fn the_main_job_runs_in_the_image_on_both_nodes() {
    let suite = suite();
    let script = format!(
        "#!/bin/bash\n{WHERE}\npython3 /opt/demo/hello.py\nsrun -N2 sh -c 'echo node=$SLURMD_NODENAME; {WHERE}'\n"
    );
    let image = format!("--container={}", suite.python);
    let job = suite
        .cluster
        .sbatch("main", &["-N2", "--nodelist=n1,n2", &image], &script);
    let end = job.end();
    let output = end.ok();
    assert!(output.contains("VARIANT_ID=berth-demo"), "{output}");
    assert!(output.contains("hello from Debian"), "{output}");
    assert_eq!(count(output, "VARIANT_ID=berth-demo"), 3, "{output}");
    assert_eq!(count(output, "node=n1"), 1, "{output}");
    assert_eq!(count(output, "node=n2"), 1, "{output}");
}

#[test]
fn a_directive_in_the_script_names_the_image() {
    let suite = suite();
    let script = format!("#!/bin/sh\n#SBATCH {}\n{WHERE}\n", suite.shell_option());
    let end = suite.cluster.sbatch("directive", &[], &script).end();
    assert_eq!(told(end.ok()), ["VARIANT_ID=shell"]);
}

#[test]
fn sbatch_with_export_none_runs_in_the_image() {
    let suite = suite();
    let script = format!("#!/bin/sh\n{WHERE}\nsrun sh -c '{WHERE}'\necho leaked=$LEAK\n");
    let folder = suite.cluster.scratch("export-none");
    let file = folder.join("job.sh");
    berth_tests::cluster::write_executable(&file, &script);
    let image = suite.shell_option();
    let words = ["--wait", "--export=NONE", "--output=out", &image, "job.sh"];
    let ended = suite
        .cluster
        .user("sbatch", &words)
        .env("LEAK", "yes")
        .folder(&folder)
        .end();
    let output = std::fs::read_to_string(folder.join("out")).unwrap_or_default();
    assert!(ended.code == 0, "{ended}{output}");
    assert_eq!(
        told(&output),
        ["VARIANT_ID=shell", "VARIANT_ID=shell", "leaked="]
    );
}

#[test]
fn variables_of_sbatch_and_srun_name_the_image() {
    let suite = suite();
    let name = format!("docker://{}", suite.shell.name);
    let ended = suite
        .cluster
        .user_sh(&format!("srun sh -c '{}'", WHERE))
        .env("SRUN_CONTAINER", &name)
        .end();
    assert_eq!(ended.ok(), "VARIANT_ID=shell");
}

#[test]
fn the_plugins_own_option_works_as_slurms_does() {
    let suite = suite();
    let image = format!("--image=docker://{}", suite.shell.name);
    let ended = suite
        .cluster
        .user("srun", &["-N2", &image, "sh", "-c", WHERE])
        .end();
    assert_eq!(count(ended.ok(), "VARIANT_ID=shell"), 2);
}

#[test]
fn a_job_without_an_image_runs_on_the_host() {
    let suite = suite();
    let ended = suite.cluster.user("srun", &["sh", "-c", WHERE]).end();
    assert_eq!(ended.ok(), "VARIANT_ID=");
    // A variable left over in the user's shell asks for nothing.
    let stale = suite
        .cluster
        .user("srun", &["sh", "-c", WHERE])
        .env("SLURM_CONTAINER", "docker://left.over/x:1")
        .end();
    assert_eq!(stale.ok(), "VARIANT_ID=");
}

#[test]
fn every_task_of_an_array_runs_in_the_image() {
    let suite = suite();
    let script = format!("#!/bin/sh\n{WHERE}\necho task=$SLURM_ARRAY_TASK_ID\n");
    let image = suite.shell_option();
    let words = ["--array=1-4", "--wait", "--output=out-%a", &image];
    let (folder, ended) = suite.cluster.try_sbatch("array", &words, &script);
    ended.ok();
    for task in 1..=4 {
        let output = std::fs::read_to_string(folder.join(format!("out-{task}"))).unwrap();
        assert_eq!(told(&output), ["VARIANT_ID=shell", &format!("task={task}")]);
    }
}

#[test]
fn a_step_inherits_the_jobs_image_unless_it_says_otherwise() {
    let suite = suite();
    let other = suite.push_shell("other");
    let script = format!(
        "#!/bin/sh\n{WHERE}\nsrun sh -c '{WHERE}'\nsrun {} sh -c '{WHERE}'\nsrun --container=none sh -c '{WHERE}'\n",
        container(&other.name)
    );
    let image = suite.shell_option();
    let end = suite.cluster.sbatch("nested", &[&image], &script).end();
    let images = ["shell", "shell", "other", ""];
    assert_eq!(
        told(end.ok()),
        images.map(|image| format!("VARIANT_ID={image}"))
    );
}

#[test]
fn steps_side_by_side_have_their_own_images() {
    let suite = suite();
    let other = suite.push_shell("beside");
    let script = format!(
        "#!/bin/bash\nfor i in 1 2 3; do\n srun -n1 --exact {} sh -c '{WHERE}' &\n srun -n1 --exact {} sh -c '{WHERE}' &\ndone\nwait\n",
        suite.shell_option(),
        container(&other.name)
    );
    let end = suite.cluster.sbatch("beside", &["-n8"], &script).end();
    let output = end.ok();
    assert_eq!(count(output, "VARIANT_ID=shell"), 3, "{output}");
    assert_eq!(count(output, "VARIANT_ID=beside"), 3, "{output}");
}

#[test]
fn many_tasks_on_several_nodes_all_run_in_the_image() {
    let suite = suite();
    let image = suite.shell_option();
    let words = [
        "-N3",
        "-n24",
        &image,
        "sh",
        "-c",
        "echo $SLURM_PROCID; grep VARIANT /etc/os-release",
    ];
    let ended = suite.cluster.user("srun", &words).end();
    assert_eq!(count(ended.ok(), "VARIANT_ID=shell"), 24);
    for rank in 0..24 {
        assert_eq!(count(ended.ok(), &rank.to_string()), 1, "rank {rank}");
    }
}

#[test]
fn salloc_gives_its_commands_the_image() {
    let suite = suite();
    let image = suite.shell_option();
    let words = ["-N2", &image, "srun", "sh", "-c", WHERE];
    let ended = suite.cluster.user("salloc", &words).end();
    assert_eq!(count(&ended.stdout, "VARIANT_ID=shell"), 2, "{ended}");
}

#[test]
fn salloc_without_a_command_gives_a_shell_in_the_image() {
    let suite = suite();
    let line = format!("salloc {}", suite.shell_option());
    let text = format!(
        "printf 'grep VARIANT_ID /etc/os-release\\nexit\\n' | SHELL=/bin/sh script -qec '{line}' /dev/null"
    );
    let ended = suite.cluster.user_sh(&text).end();
    assert!(ended.says("VARIANT_ID=shell"), "{ended}");
}

#[test]
fn a_requeued_job_gets_the_same_bits_though_the_tag_moved() {
    let suite = suite();
    let tag = format!("test/moving-{}:1", unique());
    let first = berth_tests::Image::shell("first").push(suite.cluster.registry(), &tag);
    let script = format!(
        "#!/bin/sh\n{WHERE}\necho restart=${{SLURM_RESTART_COUNT:-0}}\n[ -n \"$SLURM_RESTART_COUNT\" ] || sleep 300\n"
    );
    let image = container(&first.name);
    let words = ["--requeue", "--open-mode=append", &image];
    let job = suite.cluster.sbatch("requeue", &words, &script);
    wait_until("the job runs its script", 60, || {
        job.output().contains("restart=0").then_some(())
    });
    let moved = berth_tests::Image::shell("second").push(suite.cluster.registry(), &tag);
    assert_ne!(first.digest, moved.digest);
    suite
        .cluster
        .root("scontrol", &["requeue", &job.id])
        .end()
        .ok();
    let end = job.end();
    let expected = [
        "VARIANT_ID=first",
        "restart=0",
        "VARIANT_ID=first",
        "restart=1",
    ];
    assert_eq!(told(end.ok()), expected);
}

#[test]
fn scancel_ends_a_container_job_and_leaves_nothing() {
    let suite = suite();
    let image = suite.push_shell(&format!("cancel-{}", unique()));
    let script = format!("#!/bin/sh\n{WHERE}\nsleep 1000\n");
    let job = suite
        .cluster
        .sbatch("cancel", &[&container(&image.name)], &script);
    wait_until("the job runs its script", 60, || {
        job.output().contains("VARIANT_ID=cancel").then_some(())
    });
    job.cancel();
    assert_eq!(job.end().state, "CANCELLED");
    suite.cluster.assert_unused(&image.digest);
}

#[test]
fn a_killed_task_leaves_nothing() {
    let suite = suite();
    let image = suite.push_shell(&format!("killed-{}", unique()));
    let option = container(&image.name);
    let words = ["--quiet", &option, "sh", "-c", "kill -9 $$"];
    let ended = suite.cluster.user("srun", &words).end();
    assert_eq!(ended.code, 137, "{ended}");
    suite.cluster.assert_unused(&image.digest);
}

#[test]
fn references_of_every_form_find_the_image() {
    let suite = suite();
    let shell = &suite.shell;
    let (name, _) = shell.name.rsplit_once(':').unwrap();
    let path = suite
        .cluster
        .berth(&["path", &format!("docker://{}", shell.name)]);
    for reference in [
        "test/shell:1".to_owned(),
        shell.name.clone(),
        format!("docker://{name}@{}", shell.digest),
        path.ok().to_owned(),
    ] {
        let option = format!("--container={reference}");
        let ended = suite
            .cluster
            .user("srun", &[&option, "sh", "-c", WHERE])
            .end();
        assert_eq!(ended.ok(), "VARIANT_ID=shell", "{reference}");
    }
}

#[test]
fn the_exit_code_and_standard_input_pass_through() {
    let suite = suite();
    let image = suite.shell_option();
    let ended = suite
        .cluster
        .user("srun", &[&image, "sh", "-c", "exit 7"])
        .end();
    assert_eq!(ended.code, 7, "{ended}");
    let piped = suite
        .cluster
        .user_sh(&format!("echo through | srun {image} cat"))
        .end();
    assert_eq!(piped.ok(), "through");
}

#[test]
fn heterogeneous_steps_with_a_container_are_refused_in_one_line() {
    let suite = suite();
    let image = suite.shell_option();
    let words = ["-n1", &image, "true", ":", "-n1", &image, "true"];
    let ended = suite.cluster.user("srun", &words).end();
    let text = ended.failed();
    assert!(
        text.contains("berth") && text.contains("heterogeneous"),
        "{text}"
    );
}
