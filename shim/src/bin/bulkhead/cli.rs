//! What can be said on the command line.

use std::{path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::store::{AccessArgs, StoreArgs};

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
    Run(Box<RunArgs>),
    /// Say whether this host runs virtual machines, by running one
    Check(CheckArgs),
    /// Fetch an image
    Pull(PullArgs),
    /// List the images that are kept
    Images(ImagesArgs),
    /// Remove names of images, and images
    Rmi(RmiArgs),
    /// Remove images without names, and what was not fetched wholly
    Prune(PruneArgs),
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
    override_usage = "bulkhead run [OPTIONS] IMAGE [COMMAND]...\n       bulkhead run [OPTIONS] --bundle DIR ID",
    after_help = "IMAGE is the name of an image that is kept or at a registry, the begin of its id, or one of\n\
                  oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], containers-storage:NAME and\n\
                  docker-daemon:NAME. With --bundle it is config.json that says what is run, and the argument is\n\
                  the container's name.\n\n\
                  The container's root is the image under a layer in the guest's memory, which takes the writes and\n\
                  is gone with the container.\n\n\
                  The machine has the memory and CPUs that the container is limited to (config.json's\n\
                  linux.resources), and 64 MiB for the guest itself; without limits, 256 MiB and one CPU.\n\n\
                  The standard streams are the container's. With a terminal (--tty, or `process.terminal: true` in\n\
                  config.json) it has this one, whose keys then all go to the container. Signals are passed on.\n\n\
                  The container's network is a loopback interface."
)]
pub(crate) struct RunArgs {
    /// Image; with --bundle, name for the container, unique in its namespace
    #[arg(value_name = "IMAGE")]
    pub(crate) target: String,
    /// What to run, in place of the image's own command
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub(crate) command: Vec<String>,
    /// Directory with config.json and the root file system
    #[arg(short, long, value_name = "DIR", conflicts_with_all = OF_IMAGES)]
    pub(crate) bundle: Option<PathBuf>,
    /// Group that the container belongs to
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(crate) namespace: String,
    /// Memory of the container, or with --bundle of the machine: MiB, or with a unit of b, k, m or g
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<Memory>,
    /// CPUs of the container, or with --bundle of the machine
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<Cpus>,
    #[command(flatten)]
    pub(crate) files: FileArgs,
    /// Show where the start's time went, on stderr, or as JSON in FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub(crate) trace: Option<Option<PathBuf>>,
    #[command(flatten)]
    pub(crate) image_flags: ImageRunArgs,
}

/// What makes no sense with a bundle.
const OF_IMAGES: [&str; 24] = [
    "command",
    "interactive",
    "tty",
    "rm",
    "name",
    "volume",
    "tmpfs",
    "env",
    "env_file",
    "workdir",
    "user",
    "entrypoint",
    "hostname",
    "read_only",
    "cap_add",
    "cap_drop",
    "storage_opt",
    "network",
    "publish",
    "pull",
    "creds",
    "authfile",
    "tls_verify",
    "image_root",
];

/// Flags of `bulkhead run IMAGE`; a bundle says all of it itself.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options with an image")]
pub(crate) struct ImageRunArgs {
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Leave nothing of the container behind, which is always so
    #[arg(long)]
    pub(crate) rm: bool,
    /// Name for the container [default: of the image and of chance]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Mount a directory or file of the host
    #[arg(short, long, value_name = "HOST:CONTAINER[:OPTIONS]")]
    pub(crate) volume: Vec<String>,
    /// Mount a directory in memory
    #[arg(long, value_name = "CONTAINER[:OPTIONS]")]
    pub(crate) tmpfs: Vec<String>,
    /// Set a variable; without a value, the one that it has here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Set variables from the lines of a file
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Start in this directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Run as this user, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Begin the command with this, a program or a JSON list
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// The container's host name [default: its name]
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Allow writes to /run, /tmp, /var/tmp, volumes and --tmpfs alone
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Give a capability, or ALL
    #[arg(long, value_name = "CAPABILITY", value_delimiter = ',')]
    pub(crate) cap_add: Vec<String>,
    /// Take a capability away, or ALL
    #[arg(long, value_name = "CAPABILITY", value_delimiter = ',')]
    pub(crate) cap_drop: Vec<String>,
    /// Put writes on a sparse disk of at most this size instead of in memory
    #[arg(long, value_name = "size=SIZE")]
    pub(crate) storage_opt: Option<String>,
    /// Network of the container: none
    #[arg(long, value_name = "NETWORK")]
    pub(crate) network: Option<String>,
    /// Not supported yet
    #[arg(short, long, value_name = "PORTS")]
    pub(crate) publish: Vec<String>,
    /// When to fetch the image
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Pull::Missing)]
    pub(crate) pull: Pull,
    #[command(flatten)]
    pub(crate) access: AccessArgs,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

/// When an image is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pull {
    /// If none of its name is kept
    Missing,
    /// In any case
    Always,
    /// Not at all
    Never,
}

/// `bulkhead pull`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "IMAGE is a name such as alpine, example.org/team/app:1.2 or app@sha256:..., or one of oci:DIR[:TAG],\n\
                  oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], and by way of skopeo containers-storage:NAME\n\
                  and docker-daemon:NAME. What is fetched is verified against the digests that lead to it.\n\n\
                  The image's id is printed."
)]
pub(crate) struct PullArgs {
    /// Image to fetch
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// Further name for it
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Show no bars
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) access: AccessArgs,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

/// `bulkhead images`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct ImagesArgs {
    /// Print the ids alone
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Form of the list
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

/// `bulkhead rmi`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "An image goes with its last name. A running container keeps what it has of it."
)]
pub(crate) struct RmiArgs {
    /// Names, or begins of ids
    #[arg(value_name = "IMAGE", required = true)]
    pub(crate) images: Vec<String>,
    /// Remove an image with all of its names
    #[arg(short, long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

/// `bulkhead prune`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct PruneArgs {
    /// Remove images with names too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Form of the report
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

/// The form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// A size in bytes: a number of MiB, or one with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory(pub(crate) u64);

impl FromStr for Memory {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "a number of MiB, or one with a unit of b, k, m or g";
        let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
        let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "b" => 0,
            "k" | "kb" | "kib" => 10,
            "" | "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            _ => return Err(FORM),
        };
        let number: u64 = digits.parse().map_err(|_| FORM)?;
        let bytes = number.checked_mul(1 << shift);
        bytes.map(Self).ok_or("more than there can be")
    }
}

/// Thousandths of a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cpus(pub(crate) u64);

impl FromStr for Cpus {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "a number such as 2 or 0.5";
        let cpus: f64 = text.parse().map_err(|_| FORM)?;
        // Far more than any machine has.
        match (0.0..=1e6).contains(&cpus) {
            true => Ok(Self((cpus * 1000.0).round() as u64)),
            false => Err(FORM),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(text: &str) -> Option<u64> {
        text.parse::<Memory>().ok().map(|memory| memory.0)
    }

    #[test]
    fn sizes_have_units_or_are_mebibytes() {
        assert_eq!(memory("256"), Some(256 << 20));
        assert_eq!(memory("1g"), Some(1 << 30));
        assert_eq!(memory("512MB"), Some(512 << 20));
        assert_eq!(memory("4096b"), Some(4096));
        for text in ["", "m", "1t", "-1", "1.5g", "99999999999999g"] {
            assert_eq!(memory(text), None, "{text}");
        }
    }

    #[test]
    fn cpus_may_be_parts() {
        let cpus = |text: &str| text.parse::<Cpus>().ok().map(|cpus| cpus.0);
        assert_eq!(cpus("1.5"), Some(1500));
        assert_eq!(cpus("0"), Some(0));
        for text in ["-1", "NaN", "inf", "two"] {
            assert_eq!(cpus(text), None, "{text}");
        }
    }

    #[test]
    fn flags_behind_the_image_are_the_containers() {
        let words = [
            "bulkhead", "run", "-it", "-m", "1g", "alpine", "ls", "-m", "--help",
        ];
        let Command::Run(args) = Cli::parse_from(words).command else {
            panic!("another command");
        };
        assert_eq!(args.target, "alpine");
        assert_eq!(args.command, ["ls", "-m", "--help"]);
        assert!(args.image_flags.interactive && args.image_flags.tty);
    }

    #[test]
    fn a_bundle_says_itself_what_is_run() {
        for words in [&["-e", "A=b", "x"][..], &["--read-only", "x"], &["x", "ls"]] {
            let begin = ["bulkhead", "run", "--bundle", "/b"];
            let error = Cli::try_parse_from(begin.iter().chain(words)).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::ArgumentConflict);
        }
        let words = ["bulkhead", "run", "--memory", "300", "--bundle", "/b", "x"];
        assert!(Cli::try_parse_from(words).is_ok());
    }
}
