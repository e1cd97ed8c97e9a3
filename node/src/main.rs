//! `berth-node`: the node service. Root's part of it, the keeper: it keeps images mounted between jobs, and holds what
//! must outlive the unprivileged process that serves images on demand.
//!
//! It reads its configuration, fixed messages of local peers ([`berth_mount::keeper`]) and the facts of descriptors
//! that root's runtime hands over. It parses nothing of images, of the store, or of the network. Jobs never depend on
//! it: what they were given stays when it ends, and where it is absent they mount by themselves.
//!
//! - [`table`]: what is kept, and what goes when: pure decisions;
//! - [`den`]: the mount namespace of its own in which kept mounts hang;
//! - [`places`]: where users find images; [`finder`] looks for them with their rights;
//! - [`copies`]: images that are whole on this node, verified and owned by root;
//! - [`server`]: root's side of the unprivileged process;
//! - [`service`]: requests and their answers;
//! - [`shelf`]: what the next keeper finds;
//! - [`signals`]: how it is told to stop.

mod copies;
mod den;
mod finder;
mod image;
mod peer;
mod places;
mod server;
mod service;
mod setup;
mod shelf;
mod signals;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Keep images mounted between jobs on this node, and serve images on demand.
#[derive(Debug, Parser)]
#[command(
    name = "berth-node",
    version,
    after_help = "Example: berth-node --config /etc/berth/berth.toml\nSIGTERM ends it; jobs keep what they have. Jobs that start without it mount by themselves."
)]
struct Arguments {
    /// The site's configuration; root's alone to change.
    #[arg(long, value_name = "FILE", default_value = berth_config::DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("BERTH_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
    let arguments = Arguments::parse();
    match setup::prepare(&arguments.config).and_then(service::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("berth: {}", failure.why);
            if let Some(hint) = &failure.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(failure.code)
        }
    }
}
