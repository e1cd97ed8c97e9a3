//! The command line: every command, option and example. Help, man pages and completions are made from this.

use std::ffi::OsString;
use std::path::PathBuf;

use berth_image::Platform;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueHint};
use clap_complete::Shell;

/// Container images for Slurm jobs: pulled once, checked, shared by every node.
#[derive(Debug, Parser)]
#[command(
    name = "berth",
    version,
    propagate_version = true,
    disable_help_subcommand = true
)]
#[command(max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Global {
    /// The site's configuration.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "BERTH_CONFIG",
        hide_env_values = true
    )]
    #[arg(default_value = berth_config::DEFAULT_PATH, help_heading = "Global options")]
    pub config: PathBuf,
    /// Results as JSON.
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Say nothing but results and errors.
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Bring images into the store, and wait until they are there.
    ///
    /// The daemon does the work: it goes on when this command is interrupted, and however many ask for an image, it
    /// is fetched and made once. Prints a line with digest and reference for each image that is ready.
    #[command(after_help = "\
Examples:
  berth pull docker://ghcr.io/group/app:2.1
  berth pull ubuntu:24.04 python:3.13     with a default registry in the configuration
  berth pull --platform linux/arm64 ghcr.io/group/app@sha256:…")]
    Pull {
        #[arg(required = true, value_name = "REF")]
        references: Vec<String>,
        #[command(flatten)]
        platform: PlatformArg,
    },
    /// Bring many images into the store, whatever happens to some of them.
    ///
    /// All are tried. At the end stands how many are ready; the exit code is that of the failures where they agree,
    /// otherwise 1. In a list, empty lines and what follows a `#` are skipped.
    #[command(after_help = "\
Examples:
  berth prefetch --file /etc/berth/prefetch.list
  berth prefetch --json ghcr.io/group/app:2.1 ghcr.io/group/other:1
  crontab: 0 3 * * * berth prefetch --quiet --file /etc/berth/prefetch.list")]
    Prefetch {
        #[arg(required_unless_present = "file", value_name = "REF")]
        references: Vec<String>,
        /// Read references from a file, one a line; `-` is stdin.
        #[arg(long, value_name = "LIST")]
        file: Option<PathBuf>,
        #[command(flatten)]
        platform: PlatformArg,
    },
    /// Print the path of an image's SquashFS file, pulling it first where needed.
    ///
    /// The file is a bare SquashFS that Apptainer, Charliecloud, squashfuse and the kernel take as it is; whoever may
    /// use the image may read it. Only the path goes to stdout. With the daemon down it is found in the store, if it
    /// is there, by its signed entries.
    ///
    /// With --mounted it is a folder with the image's files instead, on this node and for you alone: kept by the node
    /// service, so that whoever runs in it finds it warm. It stays as long as somebody is in there or asked for it
    /// lately (`node.service.keep_s`).
    #[command(after_help = "\
Examples:
  apptainer exec \"$(berth path ghcr.io/group/app:2.1)\" app --version
  apptainer exec \"$(berth path --mounted ghcr.io/group/app:2.1)\" app --version
  sbatch --container=\"$(berth path ghcr.io/group/app:2.1)\" job.sh")]
    Path {
        /// Print a folder where the image is mounted.
        #[arg(long)]
        mounted: bool,
        #[arg(value_name = "REF")]
        image: String,
        #[command(flatten)]
        platform: PlatformArg,
    },
    /// Run a command in an image, here and as yourself: no job, no root.
    ///
    /// The command sees the image as a job would: your home, /tmp, /dev and the site's folders are there, the rest is
    /// the image's, read-only. It is a process of yours like any other: its exit code, signals and terminal are its
    /// own, and nothing stays when it ends. Files of others than you show as nobody's.
    #[command(after_help = "\
Examples:
  berth exec ghcr.io/group/app:2.1 app --version
  berth exec --mounts /scratch/data:/data:ro ghcr.io/group/app:2.1 python3 look.py
  berth exec --writable ubuntu:24.04 bash                       what it writes is gone afterwards
  berth exec ./my.sqsh bash                                     a SquashFS file of your own

Exit codes: the command's; 127 when the image has no such command, 126 when it cannot be run.
Berth's own where there was no container (69: this machine forbids user namespaces, and so on).")]
    Exec(ExecArgs),
    /// Mount an image on a folder, read-only, until `berth umount`.
    ///
    /// Ordinary users need fusermount3 (package fuse3) for it, and are the only ones who see into the folder. Prints
    /// the folder. `berth exec` needs neither.
    #[command(after_help = "\
Examples:
  berth mount ghcr.io/group/app:2.1 ~/app && ls ~/app/opt
  berth mount ./my.sqsh ~/look")]
    Mount {
        /// A reference, a digest, or a path of a SquashFS file (with a `/` in it).
        #[arg(value_name = "REF|DIGEST|FILE")]
        image: String,
        /// An existing folder.
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        folder: PathBuf,
        #[command(flatten)]
        platform: PlatformArg,
    },
    /// Unmount what `berth mount` mounted.
    #[command(after_help = "\
Examples:
  berth umount ~/app")]
    Umount {
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        folder: PathBuf,
    },
    /// List the images in the store.
    Images,
    /// Show what is signed about an image: its source, its file, its environment, how it was made.
    #[command(after_help = "\
Examples:
  berth inspect ghcr.io/group/app:2.1
  berth inspect sha256:0123456789ab
  berth inspect --json \"$(berth path ghcr.io/group/app:2.1)\"")]
    Inspect {
        /// A reference, a digest (twelve digits are enough), or a path printed by `berth path`.
        #[arg(value_name = "REF|DIGEST|PATH")]
        image: String,
        #[command(flatten)]
        platform: PlatformArg,
    },
    /// Remove images from the store, for admins. Running jobs keep what they have.
    Rm {
        /// References or digests (twelve digits are enough).
        #[arg(required = true, value_name = "REF|DIGEST")]
        images: Vec<String>,
    },
    /// Show or record what a start of an image reads: nodes that fetch on demand fetch that first.
    ///
    /// With a command after `--` it is run in the image as by `berth exec`, on a mount of its own, and what it read goes
    /// to the daemon when it has ended with all that it started. A user's trace stays for a day, then another user's may
    /// take its place; an admin's takes any place and stays.
    #[command(after_help = "\
Examples:
  berth trace ghcr.io/group/app:2.1                                       what is known
  berth trace ghcr.io/group/app:2.1 -- python3 -c 'import torch'          record a start
  berth trace ghcr.io/group/app:2.1 --set trace.json                      as `berth-fuse mount --record` wrote it

Exit codes: the command's; where that is 0 and no trace was kept, Berth's own.")]
    Trace {
        /// A reference or a digest (without a command, twelve digits are enough).
        #[arg(value_name = "REF|DIGEST")]
        image: String,
        /// Send the trace in this file.
        #[arg(long, value_name = "FILE", conflicts_with = "command")]
        set: Option<std::path::PathBuf>,
        #[command(flatten)]
        view: ViewArgs,
        /// Record this command.
        #[arg(last = true, value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
        command: Vec<OsString>,
    },
    /// List the pulls in flight, and those that ended lately.
    Pulls {
        /// Follow what is in flight until it ends.
        #[arg(long, short)]
        watch: bool,
    },
    /// Show the daemon's state.
    Status,
    /// What the service of this node keeps mounted, for root.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Look for what would stop a container job on this machine, and say what to do.
    ///
    /// Exits with 1 when a check fails; warnings do not count. Some checks see more as root.
    Doctor,
    /// Check or show the site's configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Make a store.
    #[command(subcommand)]
    Store(StoreCommand),
    /// Make the site's key pair.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Print a shell's completions.
    #[command(after_help = "\
Examples:
  berth completions bash > /usr/share/bash-completion/completions/berth")]
    Completions { shell: Shell },
    /// Write the man pages of all commands into a folder.
    #[command(after_help = "\
Examples:
  berth man /usr/share/man/man1")]
    Man {
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Read a configuration and say everything that is wrong with it.
    Check {
        /// Default: the one that --config names.
        file: Option<PathBuf>,
    },
    /// Print the configuration in effect; what the file does not set is marked as default.
    Show,
}

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the mounts that are kept on this node.
    Status {
        /// Counters in the Prometheus text format instead, as for node_exporter's textfile collector.
        #[arg(long)]
        metrics: bool,
    },
    /// Let go of every mount that no job uses, and keep none until the service is restarted.
    ///
    /// Exits with 1 as long as jobs use some: run it again when they have ended.
    #[command(after_help = "\
Examples:
  berth node drain && umount /pfs")]
    Drain,
}

#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Make the store of the configuration, and the site's key pair where there is none.
    ///
    /// Run it as the user of the sealer, who is to own both, or as root with --user. Does nothing to a store or a key
    /// that is there.
    Init {
        #[command(flatten)]
        user: UserArg,
    },
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make the key pair that `seal.key` and `node.keys` name. Never replaces a key.
    Generate {
        #[command(flatten)]
        user: UserArg,
    },
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    #[command(flatten)]
    pub view: ViewArgs,
    #[command(flatten)]
    pub platform: PlatformArg,
    /// A reference, a digest, or a path of a SquashFS file (with a `/` in it).
    #[arg(value_name = "REF|DIGEST|FILE")]
    pub image: String,
    /// The command and its arguments.
    #[arg(
        required = true,
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    #[arg(value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,
}

/// What a container is to look like; a job's options with the same names after `--container-`.
#[derive(Debug, Args)]
pub struct ViewArgs {
    /// Show folders or files of this machine in the container, as a job's --container-mounts.
    #[arg(
        long,
        alias = "container-mounts",
        requires = "command",
        value_delimiter = ',',
        value_name = "SRC[:DST[:ro|rw]],…"
    )]
    pub mounts: Vec<OsString>,
    /// Start in this folder, as the container sees it. Default: the current one where it is visible.
    #[arg(
        long,
        alias = "container-workdir",
        value_name = "DIR",
        requires = "command"
    )]
    pub workdir: Option<PathBuf>,
    /// Let the command write anywhere, into memory: it is gone afterwards.
    #[arg(long, alias = "container-writable", requires = "command")]
    pub writable: bool,
}

#[derive(Debug, Args)]
pub struct UserArg {
    /// Who owns the store and the private key: the sealer's user. For root only.
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
}

#[derive(Debug, Args)]
pub struct PlatformArg {
    /// os/architecture[/variant], as in linux/arm64. Default: this machine's.
    #[arg(long)]
    pub platform: Option<Platform>,
}

/// Commands by what they are for, as `berth --help` lists them.
const GROUPS: [(&str, &[&str]); 5] = [
    (
        "Images",
        &[
            "pull", "prefetch", "path", "images", "inspect", "trace", "rm",
        ],
    ),
    ("Using them here", &["exec", "mount", "umount"]),
    ("The daemon", &["pulls", "status"]),
    (
        "This machine and site",
        &["node", "doctor", "config", "store", "key"],
    ),
    ("Set-up", &["completions", "man"]),
];

const EXAMPLES: &str = "\
Examples:
  sbatch --container=docker://ghcr.io/group/app:2.1 job.sh     run a job in an image; nothing else is needed
  berth pull docker://ghcr.io/group/app:2.1                    bring it into the store beforehand
  apptainer exec \"$(berth path ghcr.io/group/app:2.1)\" cmd     use it with another runtime
  berth doctor                                                 what would stop a job on this machine?";

/// The whole command with its grouped help.
pub fn command() -> clap::Command {
    let command = Cli::command();
    let mut groups = String::new();
    for (title, names) in GROUPS {
        groups += &format!("{title}:\n");
        for name in names {
            let about = command.find_subcommand(name).and_then(|c| c.get_about());
            groups += &format!(
                "  {name:<12} {}\n",
                about.map(ToString::to_string).unwrap_or_default()
            );
        }
        groups.push('\n');
    }
    let template = format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{groups}{{options}}\n\n{EXAMPLES}\n\n`berth COMMAND --help` says more.\n"
    );
    command
        .help_template(template)
        .override_usage("berth COMMAND [ARGUMENTS]")
        .after_help(EXAMPLES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_command_stands_in_a_group() {
        let grouped: Vec<&str> = GROUPS
            .iter()
            .flat_map(|(_, names)| *names)
            .copied()
            .collect();
        for sub in command().get_subcommands() {
            assert!(grouped.contains(&sub.get_name()), "{}", sub.get_name());
        }
    }
}
