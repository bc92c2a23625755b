//! What can be said on the command line: the verbs and flags of OCI runtimes,
//! and a few of our own.

use std::{path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::store::{AccessArgs, StoreArgs, VolumeRootArgs};

/// Runs containers, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(
    name = "bulkhead",
    version,
    disable_version_flag = true,
    args_override_self = true,
    after_help = "The exit status is the container's: 128 + n when signal n ended it, 127 for a missing\n\
                  program, 126 for one that cannot be executed. 125 is a failure of bulkhead itself."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    /// Print the version
    #[arg(short = 'v', long)]
    pub(crate) version: bool,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Where containers' state is by default.
pub(crate) const ROOT: &str = "/run/bulkhead";

/// Flags of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Directory for the state of containers
    #[arg(long, value_name = "DIR", default_value = ROOT)]
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
    /// Take linux.cgroupsPath for slice:prefix:name, as systemd lays cgroups out
    #[arg(long)]
    pub(crate) systemd_cgroup: bool,
    /// Accepted as other runtimes have it; cgroups are made where that is permitted
    #[arg(long, value_name = "true|false|auto", hide = true)]
    pub(crate) rootless: Option<String>,
    /// Accepted as other runtimes have it; nothing is checkpointed
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) criu: Option<PathBuf>,
    /// Group that containers belong to
    #[arg(long, global = true, value_name = "NAME", default_value = "default")]
    pub(crate) namespace: String,
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
    /// Make a container whose program waits for `start`
    Create(CreateArgs),
    /// Execute the program of a container that was made
    Start(IdArgs),
    /// Run a further program in a container
    Exec(Box<ExecArgs>),
    /// Print what is known of a container, as JSON
    State(IdArgs),
    /// List containers
    List(ListArgs),
    /// List the processes of a container
    Ps(PsArgs),
    /// Send a signal to a container
    Kill(KillArgs),
    /// Remove a container
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
    /// Print what a detached container of an image printed
    Logs(IdArgs),
    /// Freeze the processes of a container
    Pause(IdArgs),
    /// Thaw the processes of a container
    Resume(IdArgs),
    /// Change the limits of a container
    Update(Box<UpdateArgs>),
    /// Print the counters of a container
    Events(EventsArgs),
    /// Write a configuration to begin with
    Spec(SpecArgs),
    /// Print what this runtime can do, as JSON
    Features,
    /// Not possible yet
    #[command(hide = true)]
    Checkpoint(AnyArgs),
    /// Not possible yet
    #[command(hide = true)]
    Restore(AnyArgs),
    /// Say whether this host runs virtual machines, by running one
    Check(CheckArgs),
    /// Remove what killed processes of bulkhead left behind
    Gc,
    /// Fetch an image
    Pull(PullArgs),
    /// List the images that are kept
    Images(ImagesArgs),
    /// Remove names of images, and images
    Rmi(RmiArgs),
    /// Remove images without names, and what was not fetched wholly
    Prune(PruneArgs),
    /// Make, list and remove named volumes
    Volume(VolumeArgs),
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

/// What makes a container: `create` and `run`.
#[derive(Debug, Args)]
pub(crate) struct MakeArgs {
    /// Unix socket that gets the master of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// File for the pid of the process that stands for the container
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Memory of the container, or with a bundle of the machine: MiB, or with a unit of b, k, m or g
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<Memory>,
    /// CPUs of the container, or with a bundle of the machine
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<Cpus>,
    #[command(flatten)]
    pub(crate) files: FileArgs,
    /// Accepted as other runtimes have it: in the guest there is nothing to pivot around
    #[arg(long, hide = true)]
    pub(crate) no_pivot: bool,
    /// Accepted as other runtimes have it: the guest's keys are its own
    #[arg(long, hide = true)]
    pub(crate) no_new_keyring: bool,
    /// Further descriptors for the container; none can be given
    #[arg(long, value_name = "N", default_value_t = 0, hide = true)]
    pub(crate) preserve_fds: u32,
}

/// `bulkhead run`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    override_usage = "bulkhead run [OPTIONS] IMAGE [COMMAND]...\n       bulkhead run [OPTIONS] --bundle DIR ID",
    after_help = "IMAGE is the name of an image that is kept or at a registry, the begin of its id, or one of\n\
                  oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], containers-storage:NAME and\n\
                  docker-daemon:NAME. With --bundle, or in a directory with a config.json, it is that file that says\n\
                  what is run, and the argument is the container's name.\n\n\
                  The container's root is the image under a layer in the guest's memory, which takes the writes and\n\
                  is gone with the container.\n\n\
                  The machine has the memory and CPUs that the container is limited to (config.json's\n\
                  linux.resources), and 64 MiB for the guest itself; without limits, 256 MiB and one CPU.\n\n\
                  The standard streams are the container's. With a terminal (--tty, or `process.terminal: true` in\n\
                  config.json) it has this one, whose keys then all go to the container. Signals are passed on.\n\n\
                  A container of an image is attached to a network by CNI plug-ins: to Bulkhead's own bridge, to\n\
                  networks of the host (those in /etc/cni/net.d, or where NETCONFPATH says), or to none. What is run\n\
                  detached prints to a log (`bulkhead logs`) and stays until `bulkhead rm`, unless --rm is given."
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
    #[command(flatten)]
    pub(crate) make: MakeArgs,
    /// Return when the container runs
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Leave the container to `delete` when it has ended
    #[arg(long)]
    pub(crate) keep: bool,
    /// Accepted as other runtimes have it: processes are reaped in the guest
    #[arg(long, hide = true)]
    pub(crate) no_subreaper: bool,
    /// Show where the start's time went, on stderr, or as JSON in FILE
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub(crate) trace: Option<Option<PathBuf>>,
    #[command(flatten)]
    pub(crate) image_flags: ImageRunArgs,
}

/// What makes no sense with a bundle.
const OF_IMAGES: [&str; 27] = [
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
    "dns",
    "volume_root",
    "pull",
    "creds",
    "authfile",
    "cert_dir",
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
    /// Remove the container at its end; in the foreground it always is
    #[arg(long)]
    pub(crate) rm: bool,
    /// Name for the container [default: of the image and of chance]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Mount a directory or file of the host, or a named volume
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
    /// Networks of the container: `bulkhead`, `none`, names of CNI networks, or ns:PATH to join a namespace
    #[arg(
        long,
        visible_alias = "net",
        value_name = "NETWORK[,NETWORK]",
        default_value = "bulkhead"
    )]
    pub(crate) network: String,
    /// Lead a port of the host to one of the container
    #[arg(short, long, value_name = "[IP:]HOST:CONTAINER[/PROTOCOL]")]
    pub(crate) publish: Vec<String>,
    /// Name server [default: the host's, but for those on its loopback]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) dns: Vec<std::net::IpAddr>,
    /// When to fetch the image
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = Pull::Missing)]
    pub(crate) pull: Pull,
    #[command(flatten)]
    pub(crate) volumes: VolumeRootArgs,
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

/// `bulkhead create`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct CreateArgs {
    /// Name for the container, unique in its namespace
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// Directory with config.json and the root file system
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    #[command(flatten)]
    pub(crate) make: MakeArgs,
}

/// Commands that only need a container.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct IdArgs {
    /// The container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
}

/// `bulkhead exec`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "The process is that of the configuration with the flags' changes, or the one in the file of\n\
                  --process. The exit status is the program's."
)]
pub(crate) struct ExecArgs {
    /// The container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// The program and its arguments
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub(crate) command: Vec<String>,
    /// Unix socket that gets the master of the program's terminal
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Its working directory
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
    /// A variable of its environment
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Give it a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Its user and group
    #[arg(short, long, value_name = "UID[:GID]")]
    pub(crate) user: Option<String>,
    /// A further group
    #[arg(short = 'g', long, value_name = "GID")]
    pub(crate) additional_gids: Vec<u32>,
    /// File with its description, a `process` of config.json
    #[arg(short, long, value_name = "FILE")]
    pub(crate) process: Option<PathBuf>,
    /// Return when it runs
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// File for the pid of the process that stands for it
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Its label; the virtual machine stands in the place of such profiles
    #[arg(long, value_name = "LABEL", hide = true)]
    pub(crate) process_label: Option<String>,
    /// Its profile; the virtual machine stands in the place of such profiles
    #[arg(long, value_name = "PROFILE", hide = true)]
    pub(crate) apparmor: Option<String>,
    /// Keep it from new privileges
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// A further capability
    #[arg(short, long, value_name = "CAPABILITY")]
    pub(crate) cap: Vec<String>,
    /// Further descriptors for it; none can be given
    #[arg(long, value_name = "N", default_value_t = 0, hide = true)]
    pub(crate) preserve_fds: u32,
    /// A cgroup below the container's; none but the container's can be chosen
    #[arg(long, value_name = "PATH", hide = true)]
    pub(crate) cgroup: Vec<String>,
    /// If the container is frozen, wait until it is not
    #[arg(long)]
    pub(crate) ignore_paused: bool,
}

/// `bulkhead list`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct ListArgs {
    /// How they are printed
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    /// Print names only
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// `bulkhead ps`.
#[derive(Debug, Args)]
#[command(
    args_override_self = true,
    after_help = "The table lists the processes in the guest, by the guest's ids. As JSON the ids are those of the\n\
                  host's processes that stand for the container and its execs."
)]
pub(crate) struct PsArgs {
    /// The container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// How they are printed
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
    /// Options of the host's ps; only the table of -ef can be had
    #[arg(
        value_name = "OPTION",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        hide = true
    )]
    pub(crate) options: Vec<String>,
}

/// `bulkhead kill`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct KillArgs {
    /// The container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// The signal: a number or a name
    #[arg(value_name = "SIGNAL", default_value = "SIGTERM")]
    pub(crate) signal: String,
    /// Send it to all processes of the container
    #[arg(short, long)]
    pub(crate) all: bool,
}

/// `bulkhead delete`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct DeleteArgs {
    /// The container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// Kill it first if it runs
    #[arg(short, long)]
    pub(crate) force: bool,
}

/// `bulkhead update`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct UpdateArgs {
    /// The container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// File with the limits, a `linux.resources` of config.json; - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub(crate) resources: Option<PathBuf>,
    /// Weight of its I/O, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    pub(crate) blkio_weight: Option<u16>,
    /// Period of the CPU limit, in microseconds
    #[arg(long, value_name = "US")]
    pub(crate) cpu_period: Option<u64>,
    /// CPU time in a period, in microseconds
    #[arg(long, value_name = "US", allow_hyphen_values = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// CPU time saved up for later periods, in microseconds
    #[arg(long, value_name = "US")]
    pub(crate) cpu_burst: Option<u64>,
    /// Whether it has CPU time only when nothing else wants it: 1, or 0
    #[arg(long, value_name = "0|1")]
    pub(crate) cpu_idle: Option<i64>,
    /// CPU time beside others
    #[arg(long, value_name = "SHARES")]
    pub(crate) cpu_share: Option<u64>,
    /// Period of the real-time limit, in microseconds
    #[arg(long, value_name = "US", hide = true)]
    pub(crate) cpu_rt_period: Option<u64>,
    /// Real-time CPU time in a period, in microseconds
    #[arg(long, value_name = "US", hide = true, allow_hyphen_values = true)]
    pub(crate) cpu_rt_runtime: Option<i64>,
    /// CPUs
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_mems: Option<String>,
    /// Memory of the kernel, which no kernel tells apart any more
    #[arg(long, value_name = "BYTES", hide = true, allow_hyphen_values = true)]
    pub(crate) kernel_memory: Option<Limit>,
    /// The same of its TCP
    #[arg(long, value_name = "BYTES", hide = true, allow_hyphen_values = true)]
    pub(crate) kernel_memory_tcp: Option<Limit>,
    /// Share of the CPU's caches
    #[arg(long, value_name = "SCHEMA", hide = true)]
    pub(crate) l3_cache_schema: Option<String>,
    /// Share of the bandwidth to memory
    #[arg(long, value_name = "SCHEMA", hide = true)]
    pub(crate) mem_bw_schema: Option<String>,
    /// Memory, in bytes or with a unit of k, m or g; -1 is no limit
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub(crate) memory: Option<Limit>,
    /// Memory that is kept for it, in the same way
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub(crate) memory_reservation: Option<Limit>,
    /// Memory and swap, in the same way
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub(crate) memory_swap: Option<Limit>,
    /// Processes and threads
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
}

/// `bulkhead events`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct EventsArgs {
    /// The container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// How often counters are printed
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(crate) interval: String,
    /// Print the counters once
    #[arg(long)]
    pub(crate) stats: bool,
}

/// `bulkhead spec`.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct SpecArgs {
    /// Directory to write config.json to
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(crate) bundle: PathBuf,
    /// With a user namespace, for a user without privileges
    #[arg(long)]
    pub(crate) rootless: bool,
}

/// Commands that are refused whatever they are given.
#[derive(Debug, Args)]
pub(crate) struct AnyArgs {
    /// Anything
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) rest: Vec<String>,
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

/// `bulkhead volume`.
#[derive(Debug, Args)]
pub(crate) struct VolumeArgs {
    #[command(flatten)]
    pub(crate) root: VolumeRootArgs,
    #[command(subcommand)]
    pub(crate) command: VolumeCommand,
}

/// The commands about named volumes.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make volumes, unless they are there
    Create {
        /// Their names
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
    /// List them
    #[command(name = "list", visible_alias = "ls")]
    List,
    /// Remove volumes with all that is in them
    #[command(name = "remove", visible_alias = "rm")]
    Remove {
        /// Their names
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
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
        bytes(text, "m").ok_or(FORM).map(Self)
    }
}

/// A limit of memory: bytes, or with a unit; -1 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit(pub(crate) i64);

impl FromStr for Limit {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "a number of bytes, one with a unit of b, k, m or g, or -1 for no limit";
        let limit = match text {
            "-1" => Some(-1),
            _ => bytes(text, "b").and_then(|bytes| i64::try_from(bytes).ok()),
        };
        limit.ok_or(FORM).map(Self)
    }
}

/// The bytes of a number with a unit, which is `unit` if there is none.
fn bytes(text: &str, unit: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let own = text[digits.len()..].to_ascii_lowercase();
    let shift = match if own.is_empty() { unit } else { own.as_str() } {
        "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return None,
    };
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(1 << shift)
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
    fn limits_are_bytes_or_have_units() {
        let limit = |text: &str| text.parse::<Limit>().ok().map(|limit| limit.0);
        assert_eq!(limit("4096"), Some(4096));
        assert_eq!(limit("512M"), Some(512 << 20));
        assert_eq!(limit("-1"), Some(-1));
        for text in ["", "-2", "1t", "m", "9999999999g"] {
            assert_eq!(limit(text), None, "{text}");
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
        let Some(Command::Run(args)) = Cli::parse_from(words).command else {
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
