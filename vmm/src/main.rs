//! `bulkhead-vmm`: one process, one microVM.

use std::{
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context;
use clap::Parser;
use vmm::{
    control,
    descriptors::{self, Descriptors},
    jail::{self, ThreadKind},
    launch,
    vm::{self, End, Vm},
};

/// Runs one microVM, jailed.
///
/// Exit status: 0 the guest powered off, 3 it asked for a reset, 4 its
/// processor gave up (triple fault), 1 the VM could not be run, 2 the
/// configuration is not valid.
#[derive(Parser)]
#[command(name = "bulkhead-vmm", version)]
struct Arguments {
    /// The VM as JSON; what it names by path is opened first, then a jailed VMM is started
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "config_fd",
        required_unless_present = "config_fd"
    )]
    config: Option<PathBuf>,
    /// The descriptor to read the VM from, by whoever starts a jailed VMM
    #[arg(long, value_name = "NUMBER")]
    config_fd: Option<i32>,
}

const FAILED: u8 = 1;
const BAD_CONFIG: u8 = 2;
const RESET: u8 = 3;
const TRIPLE_FAULT: u8 = 4;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match (arguments.config, arguments.config_fd) {
        (Some(path), _) => launch_file(&path),
        (None, Some(number)) => run(number),
        (None, None) => Ok(BAD_CONFIG),
    };
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("bulkhead-vmm: {error:#}");
            ExitCode::from(exit_status_of(&error))
        }
    }
}

fn exit_status_of(error: &anyhow::Error) -> u8 {
    let unreadable = error.downcast_ref::<descriptors::Error>().is_some();
    let impossible = matches!(
        error.downcast_ref::<vm::Error>(),
        Some(
            vm::Error::Cpus(_)
                | vm::Error::ConsoleLog(_)
                | vm::Error::Descriptor(_)
                | vm::Error::Memory(vm::memory::Error::Size { .. })
        )
    );
    match unreadable || impossible {
        true => BAD_CONFIG,
        false => FAILED,
    }
}

/// For people: opens what the file names, then starts this program again, jailed.
fn launch_file(path: &std::path::Path) -> anyhow::Result<u8> {
    let config = descriptors::read_config_file(path)?;
    let status = launch::run(&config)?;
    if let Some(signal) = status.signal() {
        let hint = match signal {
            libc::SIGSYS => ": it made a system call that its jail forbids, see the kernel's log",
            _ => "",
        };
        anyhow::bail!("the VMM was killed by signal {signal}{hint}");
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(FAILED))
}

/// Runs the VM that the launcher described on a descriptor.
fn run(config: i32) -> anyhow::Result<u8> {
    let config = descriptors::read_config(config)?;
    jail::enter(&config)?;
    let mut descriptors = Descriptors::default();
    let control = match &config.control {
        Some(listener) => Some(descriptors.take("control", listener)?),
        None => None,
    };
    let mut vm = Vm::new(&config, &mut descriptors).context("cannot make the VM")?;
    let end = live(&mut vm, control);
    vm.shut_down();
    match end? {
        End::PowerOff | End::Stopped => Ok(0),
        End::Reset => Ok(RESET),
        End::TripleFault => Ok(TRIPLE_FAULT),
        End::Failed(reason) => Err(anyhow::anyhow!("the VM cannot go on: {reason}")),
    }
}

/// Runs the VM to its end, and answers what asks on the control socket meanwhile.
fn live(vm: &mut Vm, control: Option<OwnedFd>) -> anyhow::Result<End> {
    vm.start().context("cannot start the VM")?;
    jail::confine(ThreadKind::Main).context("cannot confine the main thread")?;
    if let Some(listener) = control {
        let ended = vm
            .ended()
            .try_clone()
            .context("cannot watch for the VM's end")?;
        control::serve(listener, &ended, vm).context("cannot serve the control socket")?;
    }
    Ok(vm.wait())
}
