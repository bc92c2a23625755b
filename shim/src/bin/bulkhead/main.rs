//! The `bulkhead` command.
//!
//! Its exit status is the container's; 125 with one line `bulkhead: ...` on
//! stderr is a failure of its own.

use std::process::ExitCode;

use clap::Parser;

mod check;
mod cli;
mod images;
mod log;
mod prune;
mod pull;
mod rmi;
mod run;
mod run_image;
mod store;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let trace = shim::sandbox::Trace::start();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let outcome = log::start(&cli.global).and_then(|()| match cli.command {
        Command::Run(args) => run::run(&cli.global, &args, &trace),
        Command::Check(args) => check::check(&cli.global, &args),
        Command::Pull(args) => pull::pull(&args),
        Command::Images(args) => images::images(&args),
        Command::Rmi(args) => rmi::rmi(&args),
        Command::Prune(args) => prune::prune(&args),
    });
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let message = shim::text::chain(error.as_ref());
            tracing::error!("{message}");
            eprintln!("bulkhead: {message}");
            ExitCode::from(exit_status(&error))
        }
    }
}

/// Help and version, or what is wrong with the command line: that is a failure of ours too.
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
    let pod = error.downcast_ref::<shim::pod::Error>();
    pod.map_or(shim::container::FAILED, |error| error.kind().exit_status())
}
