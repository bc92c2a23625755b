//! The program that containerd starts for containers of the runtime `io.containerd.bulkhead.v2`.
//!
//! What it prints is for containerd, which reads standard output and standard error together:
//! an answer, or one line that says what is wrong.

use std::{
    io::{Read, Write},
    process::ExitCode,
};

use anyhow::Context as _;
use shim::task::{
    arguments::{self, Command, HELP},
    bootstrap::STDIN_MAX,
    delete, info,
    start::{self, Started},
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "containerd-shim-bulkhead-v2: {}",
                shim::text::chain(error.as_ref())
            );
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    match arguments::parse(std::env::args_os().skip(1))? {
        Command::Help => print(HELP.as_bytes()),
        Command::Version => {
            let version = env!("CARGO_PKG_VERSION");
            print(format!("containerd-shim-bulkhead-v2:\n  Version:  {version}\n").as_bytes())
        }
        Command::Info => {
            let mut options = Vec::new();
            std::io::stdin()
                .take(STDIN_MAX)
                .read_to_end(&mut options)
                .context("cannot read standard input")?;
            print(&info::info(&options)?)
        }
        Command::Start(invocation) => match start::start(invocation)? {
            Started::Starter(answer) => Ok(answer.give()?),
            // Its log says what is wrong with it.
            Started::Daemon(daemon) => Ok(daemon.serve()?),
        },
        Command::Delete(invocation) => print(&delete::delete(&invocation)?),
    }
}

fn print(answer: &[u8]) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(answer)
        .and_then(|()| stdout.flush())
        .context("cannot answer on standard output")
}
