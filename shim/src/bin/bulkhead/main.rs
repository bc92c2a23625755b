//! The `bulkhead` command.
//!
//! Its exit status is the container's; 125 with one line `bulkhead: ...` on
//! stderr is a failure of its own.

// A reader that has gone is no panic: `say` prints.
#![deny(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory, Parser};

mod check;
mod cli;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod gc;
mod images;
mod kill;
mod list;
mod log;
mod logs;
mod network;
mod new;
mod prune;
mod ps;
mod pull;
mod rmi;
mod run;
mod run_image;
mod say;
mod simple;
mod spec;
mod state;
mod store;
mod update;
mod version;
mod volume;

use cli::{Cli, Command, Global};
use shim::{
    oci::{ClientError, Home, HomeError},
    pod::Kind,
    sandbox::Trace,
};

fn main() -> ExitCode {
    let trace = Trace::start();
    let closed = shim::oci::close_inherited().context("cannot close what was inherited");
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if cli.version {
        return match say::say(version::text()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(say::UNREAD_STATUS),
        };
    }
    let Some(command) = cli.command else {
        let _ = Cli::command().print_help();
        return ExitCode::SUCCESS;
    };
    let logged = closed.and_then(|()| log::start(&cli.global));
    match logged.and_then(|()| carry_out(&cli.global, command, &trace)) {
        Ok(status) => ExitCode::from(status),
        Err(error) if error.is::<say::Unread>() => ExitCode::from(say::UNREAD_STATUS),
        Err(error) => {
            let message = shim::text::chain(error.as_ref());
            tracing::error!("{message}");
            say::complain(format_args!("bulkhead: {message}\n"));
            ExitCode::from(exit_status(&error))
        }
    }
}

fn carry_out(global: &Global, command: Command, trace: &Trace) -> anyhow::Result<u8> {
    match command {
        Command::Run(args) => run::run(global, &args, trace),
        Command::Create(args) => create::create(global, &args, trace),
        Command::Start(args) => simple::start(global, &args),
        Command::Exec(args) => exec::exec(global, &args),
        Command::State(args) => state::state(global, &args),
        Command::List(args) => list::list(global, &args),
        Command::Ps(args) => ps::ps(global, &args),
        Command::Kill(args) => kill::kill(global, &args),
        Command::Delete(args) => delete::delete(global, &args),
        Command::Logs(args) => logs::logs(global, &args),
        Command::Pause(args) => simple::pause(global, &args),
        Command::Resume(args) => simple::resume(global, &args),
        Command::Update(args) => update::update(global, &args),
        Command::Events(args) => events::events(global, &args),
        Command::Spec(args) => spec::spec(&args),
        Command::Features => features::features(),
        Command::Checkpoint(_) | Command::Restore(_) => simple::no_checkpoints(),
        Command::Check(args) => check::check(global, &args),
        Command::Gc => gc::gc(global),
        Command::Pull(args) => pull::pull(&args),
        Command::Images(args) => images::images(&args),
        Command::Rmi(args) => rmi::rmi(&args),
        Command::Prune(args) => prune::prune(&args),
        Command::Volume(args) => volume::volume(&args),
    }
}

/// Where the containers of this root and namespace are.
fn home(global: &Global) -> anyhow::Result<Home> {
    let namespace = shim::id::Namespace::parse(&global.namespace)?;
    Ok(Home::new(&global.root, &namespace))
}

/// Help, or what is wrong with the command line: that is a failure of ours too.
fn usage(error: &clap::Error) -> ExitCode {
    // There is nowhere left to tell that it cannot be printed.
    let _ = error.print();
    match error.use_stderr() {
        true => ExitCode::from(shim::container::FAILED),
        false => ExitCode::SUCCESS,
    }
}

/// The one place where an error becomes an exit status.
fn exit_status(error: &anyhow::Error) -> u8 {
    if let Some(run::Interrupted(signal)) = error.downcast_ref() {
        return 128 + *signal as u8;
    }
    kind(error).map_or(shim::container::FAILED, Kind::exit_status)
}

fn kind(error: &anyhow::Error) -> Option<Kind> {
    if let Some(error) = error.downcast_ref::<shim::pod::Error>() {
        return Some(error.kind());
    }
    if let Some(error) = error.downcast_ref::<HomeError>() {
        return Some(error.kind());
    }
    match error.downcast_ref()? {
        ClientError::Refused { kind, .. } => Some(*kind),
        _ => None,
    }
}
