//! `berth-runtime`: what Slurm's plugin starts. People use `berth`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Containers for Slurm steps: the helper that the plugin starts.
#[derive(Debug, Parser)]
#[command(name = "berth-runtime", version, about, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build the containers of one step on this node (as root; the plugin holds the other end of descriptor 3)
    Step,
    /// Wait for steps, with the site's configuration read, and spare each the start of this program (as root, a service)
    Standby {
        /// The site's configuration
        #[arg(long, value_name = "FILE", default_value = berth_config::DEFAULT_PATH)]
        config: PathBuf,
    },
    /// Run a command in an image for the user who asks, without root (started by `berth exec`)
    User {
        /// Descriptor of a file that says what to run
        #[arg(long, value_name = "NUMBER")]
        job: i32,
    },
    /// Attach an image at a folder of a user's (as root; the node service starts it)
    #[command(hide = true)]
    Attach {
        #[arg(long)]
        config: PathBuf,
        #[arg(long)]
        uid: u32,
        #[arg(long)]
        gid: u32,
        #[arg(long, value_delimiter = ',')]
        groups: Vec<u32>,
        #[arg(long)]
        platform: String,
        digest: String,
    },
    /// Check a reference, and have the daemon pin and prefetch it (as the user, on a login node)
    Submit {
        /// The site's configuration
        #[arg(long, value_name = "FILE", default_value = berth_config::DEFAULT_PATH)]
        config: PathBuf,
        /// The srun that fetches the answer when it has nodes: its process, this one's parent
        #[arg(long = "for", value_name = "PID", hide = true)]
        waiting: Option<u32>,
        /// The image, as the user typed it
        reference: String,
    },
}

fn main() -> ExitCode {
    // The plugin's own call, once a step and on every start's way: nothing to parse.
    if std::env::args_os().skip(1).eq(["step"]) {
        return berth_runtime::step();
    }
    match Arguments::parse().command {
        Command::Attach {
            config,
            uid,
            gid,
            groups,
            platform,
            digest,
        } => {
            let user = berth_runtime::User { uid, gid, groups };
            berth_runtime::attach::run(&config, user, &digest, &platform)
        }
        Command::Step => berth_runtime::step(),
        Command::Standby { config } => berth_runtime::standby(&config),
        Command::User { job } => berth_runtime::user_view::run(job),
        Command::Submit {
            config,
            waiting,
            reference,
        } => berth_runtime::submit(&config, &reference, waiting),
    }
}
