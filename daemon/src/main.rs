//! `berthd`: the site daemon, and its sealer.

use std::path::PathBuf;
use std::process::ExitCode;

use berth_config::{Config, DEFAULT_PATH, LogFormat};
use berthd::{serve, start};
use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

const EXAMPLES: &str = "\
Examples:
  berthd --config /etc/berth/berth.toml    the daemon; starts its sealer unless [seal] spawn = false
  berthd seal                              the sealer, as a service and user of its own
  berthd openapi > berth.json              the API's description

Exit codes: 2 usage, 69 store or socket not to be had, 70 internal, 77 permission, 78 configuration.
RUST_LOG sets what is logged (default: info), as in RUST_LOG=berthd=debug.";

/// Berth's site daemon: pulls container images once, has them sealed, and serves them to the cluster.
#[derive(Debug, Parser)]
#[command(name = "berthd", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    file: ConfigFile,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct ConfigFile {
    /// The site's configuration.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the sealer: it owns the store and the key, has images made, signs and publishes them.
    Seal {
        #[command(flatten)]
        file: ConfigFile,
        /// End when this process, our parent, does.
        #[arg(long, hide = true)]
        parent: Option<i32>,
    },
    /// Print the OpenAPI description of the daemon's API.
    Openapi,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        None => match load(&arguments.file) {
            Ok(config) => daemon(config, arguments.file.config),
            Err(code) => code,
        },
        Some(Command::Seal { file, parent }) => match load(&file) {
            Ok(config) => seal(&config, parent),
            Err(code) => code,
        },
        Some(Command::Openapi) => match serve::openapi().to_pretty_json() {
            Ok(text) => {
                println!("{text}");
                ExitCode::SUCCESS
            }
            Err(e) => fail(&e, None, 70),
        },
    }
}

fn load(file: &ConfigFile) -> Result<Config, ExitCode> {
    let config = Config::load(&file.config).map_err(|e| fail(&e, None, 78))?;
    log(config.daemon.log_format);
    Ok(config)
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(false).with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}

fn daemon(config: Config, path: PathBuf) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(e) => return fail(&e, None, 70),
    };
    let ended = runtime.block_on(async {
        let stop = stop_on_signals()?;
        Ok::<_, std::io::Error>(start::run(config, path, stop).await)
    });
    // Transfers that still wait for the network end with the process; what they wrote is gone on with.
    runtime.shutdown_background();
    match ended {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(e)) => fail(&e, e.hint().as_deref(), e.exit_code()),
        Err(e) => fail(&e, None, 70),
    }
}

fn stop_on_signals() -> std::io::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        told.cancel();
    });
    Ok(stop)
}

fn seal(config: &Config, parent: Option<i32>) -> ExitCode {
    match berthd::seal::run(config, parent) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e, e.hint().as_deref(), e.exit_code()),
    }
}

/// One line that says what and why, one that says what to do.
fn fail(error: &dyn std::fmt::Display, hint: Option<&str>, code: u8) -> ExitCode {
    eprintln!("berth: {error}");
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(code)
}
