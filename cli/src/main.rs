//! `berth`: what people type. Reads the configuration, asks the daemon or looks into the store, and says what came
//! of it: results on stdout, everything said to a person on stderr, and an exit code.

mod args;
mod command;
mod context;
mod doctor;
mod error;
mod interrupt;
mod local;
mod output;
mod programs;
mod progress;

use std::process::ExitCode;

use clap::FromArgMatches;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use args::{Cli, Command, ConfigCommand, KeyCommand, NodeCommand, StoreCommand};
use context::Context;
use error::{Failure, USAGE};

fn main() -> ExitCode {
    let result = parse().and_then(run);
    ExitCode::from(match result {
        Ok(()) => 0,
        Err(failure) => failure.report(),
    })
}

fn parse() -> Result<Cli, Failure> {
    args::command()
        .try_get_matches()
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map_err(|e| match e.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                let _ = e.print();
                Failure::silent(0)
            }
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                let _ = e.print();
                Failure::silent(USAGE)
            }
            ErrorKind::MissingSubcommand => without_command(&e),
            _ => usage(&e),
        })
}

/// `berth` alone gets the help, `berth config` alone one line.
fn without_command(error: &clap::Error) -> Failure {
    match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(name)) if name != "berth" => {
            Failure::new(USAGE, format!("`{name}` needs a command"))
                .hint(format!("`{name} --help` lists them"))
        }
        _ => {
            output::note(&args::command().render_help().to_string());
            Failure::silent(USAGE)
        }
    }
}

/// clap's error as the one line and the hint that all our errors are.
fn usage(error: &clap::Error) -> Failure {
    let text = error.to_string();
    let mut lines = text.lines().take_while(|l| !l.trim().is_empty());
    let first = lines.next().unwrap_or_default();
    let rest: Vec<&str> = lines.map(str::trim).collect();
    let message = format!("{first} {}", rest.join(", "));
    let message = message
        .strip_prefix("error: ")
        .unwrap_or(&message)
        .trim_end();
    let suggestion = [
        ContextKind::SuggestedArg,
        ContextKind::SuggestedSubcommand,
        ContextKind::SuggestedValue,
    ];
    let near = suggestion.iter().find_map(|kind| match error.get(*kind) {
        Some(ContextValue::String(s)) => Some(s.clone()),
        Some(ContextValue::Strings(s)) => s.last().cloned(),
        _ => None,
    });
    Failure::new(USAGE, message).hint(match near {
        Some(near) => format!("did you mean `{near}`?"),
        None => "`berth --help` and `berth COMMAND --help` list what there is".into(),
    })
}

fn run(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        // What needs no configuration, or looks at it itself.
        Command::Completions { shell } => command::generate::completions(shell),
        Command::Man { dir } => command::generate::man(&dir),
        Command::Config(ConfigCommand::Check { file }) => {
            command::config::check(&file.unwrap_or(cli.global.config), cli.global.json)
        }
        Command::Umount { folder } => command::mount::umount(&folder),
        Command::Doctor => doctor::run(&cli.global),
        other => configured(other, &Context::load(&cli.global)?),
    }
}

fn configured(command: Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Pull {
            references,
            platform,
        } => command::pull::pull(context, &references, platform.platform),
        Command::Prefetch {
            references,
            file,
            platform,
        } => command::pull::prefetch(context, references, file.as_deref(), platform.platform),
        Command::Path {
            mounted,
            image,
            platform,
        } => command::path::path(context, &image, platform.platform, mounted),
        Command::Exec(args) => command::exec::exec(context, args),
        Command::Mount {
            image,
            folder,
            platform,
        } => command::mount::mount(context, &image, &folder, platform.platform),
        Command::Images => command::images::images(context),
        Command::Inspect { image, platform } => {
            command::inspect::inspect(context, &image, platform.platform)
        }
        Command::Rm { images } => command::rm::rm(context, &images),
        Command::Trace {
            image,
            set,
            view,
            command,
        } => match command.is_empty() {
            true => command::trace::trace(context, &image, set.as_deref()),
            false => command::record::record(context, &image, command, view),
        },
        Command::Pulls { watch } => command::pulls::pulls(context, watch),
        Command::Status => command::status::status(context),
        Command::Node(NodeCommand::Status { metrics }) => command::node::status(context, metrics),
        Command::Node(NodeCommand::Drain) => command::node::drain(context),
        Command::Config(_) => command::config::show(context),
        Command::Store(StoreCommand::Init { user }) => {
            command::store::init(context, user.user.as_deref())
        }
        Command::Key(KeyCommand::Generate { user }) => {
            command::store::generate(context, user.user.as_deref())
        }
        Command::Completions { .. }
        | Command::Man { .. }
        | Command::Doctor
        | Command::Umount { .. } => Ok(()),
    }
}
