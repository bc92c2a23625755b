//! What can be said on the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs containers, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(
    name = "bulkhead",
    version,
    after_help = "The exit status is the container's: 128 + n when signal n ended it, 127 for a missing\n\
                  program, 126 for one that cannot be executed. 125 is a failure of bulkhead itself."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags before the command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Directory for the state of containers
    #[arg(long, value_name = "DIR", default_value = "/run/bulkhead")]
    pub(crate) root: PathBuf,
    /// File that log lines are appended to [default: stderr]
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Form of log lines
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// Log what is of use to developers too
    #[arg(long)]
    pub(crate) debug: bool,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// key=value
    Text,
    /// One JSON object a line
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a container in a virtual machine of its own
    Run(RunArgs),
    /// Say whether this host runs virtual machines, by running one
    Check(CheckArgs),
}

/// The files of a machine, where they are not those beside the program.
#[derive(Debug, Args)]
pub(crate) struct FileArgs {
    /// The guest's kernel, a vmlinux [default: the one installed with bulkhead]
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The guest's image, an EROFS file system [default: the one installed with bulkhead]
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,
    /// The VMM, `bulkhead-vmm` [default: the one beside bulkhead]
    #[arg(long, value_name = "FILE")]
    pub(crate) vmm: Option<PathBuf>,
    /// How many seconds the guest may take to boot
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) start_timeout: u64,
}

/// `bulkhead run`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "The standard streams are the container's. With `process.terminal: true` in config.json it has\n\
                  this terminal, whose keys then all go to the container. Signals are passed on.\n\n\
                  The machine has the memory and CPUs that config.json limits the container to (linux.resources),\n\
                  and 64 MiB for the guest itself; without limits, 256 MiB and one CPU.\n\n\
                  The container's network is a loopback interface."
)]
pub(crate) struct RunArgs {
    /// Name for the container, unique in its namespace
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// Directory with config.json and the root file system
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    /// Group that the container belongs to
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(crate) namespace: String,
    /// Memory of the machine
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u64>,
    /// CPUs of the machine
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<u64>,
    #[command(flatten)]
    pub(crate) files: FileArgs,
    /// Show where the start's time went, on stderr, or as JSON in FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub(crate) trace: Option<Option<PathBuf>>,
}

/// `bulkhead check`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "The exit status is 0 where virtual machines run, else 1. For each thing missing the report says\n\
                  what to do."
)]
pub(crate) struct CheckArgs {
    /// Print nothing, only exit
    #[arg(long, conflicts_with = "json")]
    pub(crate) quiet: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) files: FileArgs,
}

impl FileArgs {
    /// The files: those that were named, and those beside the program.
    pub(crate) fn files(&self) -> shim::sandbox::Files {
        let mut files = shim::sandbox::Files::beside_program();
        let named = [
            (&mut files.kernel, &self.kernel),
            (&mut files.image, &self.image),
            (&mut files.vmm, &self.vmm),
        ];
        for (file, name) in named {
            if let Some(name) = name {
                file.clone_from(name);
            }
        }
        files
    }
}
