//! An image's configuration and what was asked for become a container's configuration, as the OCI
//! runtime specification has it.

use std::{collections::BTreeMap, str::FromStr};

use rootfs_builder::image::json::Execution;
use serde_json::{Value, json};

use super::users::User;

/// Variables that a container has unless image or command line say otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Capabilities of a container's root.
const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// All that Linux has.
const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// As many files a process of a container may have open.
const OPEN_FILES: u64 = 1 << 20;

/// The groups that may ping without a capability: all of them, as of 32-bit ids the kernel takes
/// the lower half. What the guest's network may be sent is the host's to say.
const PING_GROUPS: &str = "0 2147483647";

/// What cannot be run.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Nothing to run.
    #[error("the image says no command to run; give one behind its name")]
    NoCommand,
    /// A capability that Linux does not have.
    #[error("{0:?} is not a capability; they are named such as NET_ADMIN, or ALL")]
    Capability(String),
    /// A variable without a name.
    #[error(
        "{0:?} is not a variable; --env takes NAME=VALUE, or NAME for the value that it has here"
    )]
    Variable(String),
    /// A mount of another form.
    #[error("{text:?} is not a mount: {reason}")]
    Mount {
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A directory of another form.
    #[error("the working directory {0:?} is not an absolute path")]
    WorkingDirectory(String),
}

/// What was asked for beside the image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// What to run, in place of the image's command.
    pub command: Vec<String>,
    /// What begins the command, in place of the image's.
    pub entrypoint: Option<Vec<String>>,
    /// Variables, `NAME=VALUE`.
    pub env: Vec<String>,
    /// Where it starts, in place of the image's.
    pub working_directory: Option<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// The container's host name.
    pub hostname: String,
    /// Whether its files cannot be changed.
    pub read_only: bool,
    /// Directories and files of the host.
    pub volumes: Vec<Volume>,
    /// Directories in memory.
    pub tmpfs: Vec<Tmpfs>,
    /// Capabilities it has beside the usual ones.
    pub cap_add: Vec<String>,
    /// Capabilities it does not have.
    pub cap_drop: Vec<String>,
    /// The network namespace that it joins, in place of one of its own.
    pub network: Option<String>,
    /// The most memory it may have.
    pub memory_bytes: Option<u64>,
    /// The most time it may have, in thousandths of a CPU.
    pub milli_cpus: Option<u64>,
}

/// A directory or file of the host in the container, `HOST:CONTAINER[:OPTIONS]`, or a named
/// volume, `NAME:CONTAINER[:OPTIONS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Where it is on the host, or its name.
    pub host: String,
    /// Where the container has it.
    pub container: String,
    /// How it is mounted.
    pub options: Vec<String>,
    /// Whether an empty volume gets what the image has there.
    pub copied: bool,
}

impl Volume {
    /// Whether it has a name rather than a place.
    pub fn is_named(&self) -> bool {
        !self.host.starts_with(['/', '.'])
    }
}

/// A directory in memory, `CONTAINER[:OPTIONS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    /// Where the container has it.
    pub container: String,
    /// How it is mounted.
    pub options: Vec<String>,
}

impl FromStr for Volume {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |reason| Error::Mount {
            text: text.to_owned(),
            reason,
        };
        let parts: Vec<&str> = text.split(':').collect();
        let (host, container, options) = match parts[..] {
            [host, container] => (host, container, ""),
            [host, container, options] => (host, container, options),
            _ => return Err(wrong("--volume takes HOST:CONTAINER[:OPTIONS]")),
        };
        if host.is_empty() {
            return Err(wrong(
                "what is mounted is missing: a path of the host that begins with / or ., or a \
                 volume's name",
            ));
        }
        if !container.starts_with('/') {
            return Err(wrong("the path in the container must begin with /"));
        }
        let mut kept = Vec::new();
        let mut copied = true;
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option {
                // Labels of SELinux, which the guest does not have.
                "z" | "Z" => {}
                "nocopy" => copied = false,
                "ro" | "rw" | "nosuid" | "suid" | "nodev" | "dev" | "noexec" | "exec" | "rbind"
                | "bind" | "private" | "rprivate" | "slave" | "rslave" => {
                    kept.push(option.to_owned());
                }
                _ => {
                    return Err(wrong(
                        "options are ro, rw, z, nocopy, nosuid, nodev, noexec, bind, rbind, private, \
                         rprivate, slave and rslave",
                    ));
                }
            }
        }
        Ok(Self {
            host: host.to_owned(),
            container: container.to_owned(),
            options: kept,
            copied,
        })
    }
}

impl FromStr for Tmpfs {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (container, options) = text.split_once(':').unwrap_or((text, ""));
        if !container.starts_with('/') {
            return Err(Error::Mount {
                text: text.to_owned(),
                reason: "--tmpfs takes CONTAINER[:OPTIONS], a path that begins with /",
            });
        }
        let options = options.split(',').filter(|option| !option.is_empty());
        Ok(Self {
            container: container.to_owned(),
            options: options.map(str::to_owned).collect(),
        })
    }
}

/// The configuration of a container of an image that runs as `user`.
///
/// # Errors
/// When something was asked for that there is not.
pub fn config(image: &Execution, user: &User, request: &Request) -> Result<Value, Error> {
    let args = args(image, request)?;
    let cwd = request
        .working_directory
        .as_deref()
        .or(image.working_dir.as_deref())
        .filter(|cwd| !cwd.is_empty())
        .unwrap_or("/");
    if !cwd.starts_with('/') {
        return Err(Error::WorkingDirectory(cwd.to_owned()));
    }
    let mut resources = json!({"devices": [{"allow": false, "access": "rwm"}]});
    if let Some(bytes) = request.memory_bytes {
        resources["memory"] = json!({"limit": bytes});
    }
    if let Some(milli) = request.milli_cpus {
        resources["cpu"] = json!({"period": 100_000, "quota": milli * 100});
    }
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let namespaces: Vec<Value> = namespaces
        .iter()
        .map(|kind| match (*kind, &request.network) {
            ("network", Some(path)) => json!({"type": kind, "path": path}),
            _ => json!({"type": kind}),
        })
        .collect();
    let mut config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": request.terminal,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.additional_gids},
            "args": args,
            "env": env(image, user, request)?,
            "cwd": cwd,
            "capabilities": capabilities(user, request)?,
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": OPEN_FILES, "soft": OPEN_FILES}],
        },
        "root": {"path": "rootfs", "readonly": request.read_only},
        "hostname": request.hostname,
        "mounts": mounts(request),
        "linux": {
            "resources": resources,
            "namespaces": namespaces,
            "sysctl": {"net.ipv4.ping_group_range": PING_GROUPS},
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
                "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    });
    if let Some(signal) = &image.stop_signal {
        config["annotations"] = json!({"org.opencontainers.image.stopSignal": signal});
    }
    Ok(config)
}

/// What is executed: the entry point, and behind it what was asked for or the image's command. An
/// entry point from the command line takes the image's command away, since it was not made for it.
fn args(image: &Execution, request: &Request) -> Result<Vec<String>, Error> {
    let entrypoint = request.entrypoint.as_ref();
    let begin = entrypoint.or(image.entrypoint.as_ref());
    let mut args = begin.cloned().unwrap_or_default();
    match (&request.command[..], entrypoint) {
        ([], None) => args.extend(image.cmd.iter().flatten().cloned()),
        (command, _) => args.extend(command.iter().cloned()),
    }
    match args.iter().all(String::is_empty) {
        true => Err(Error::NoCommand),
        false => Ok(args),
    }
}

/// The variables: the usual ones, the image's, and those that were asked for; the last one counts.
fn env(image: &Execution, user: &User, request: &Request) -> Result<Vec<String>, Error> {
    let mut variables: BTreeMap<&str, &str> = BTreeMap::from([
        ("PATH", PATH),
        ("HOSTNAME", &request.hostname),
        ("HOME", user.home.as_deref().unwrap_or("/")),
    ]);
    if request.terminal {
        variables.insert("TERM", "xterm");
    }
    for variable in image.env.iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        variables.insert(name, value);
    }
    for variable in &request.env {
        let (name, value) = variable
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| Error::Variable(variable.clone()))?;
        variables.insert(name, value);
    }
    Ok(variables
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect())
}

/// The capabilities. Another user than root has none but those that were asked for, and may get
/// the others by a program with the set-user-id bit.
fn capabilities(user: &User, request: &Request) -> Result<Value, Error> {
    let named = |name: &String| {
        let upper = name.to_ascii_uppercase();
        let full = match upper.starts_with("CAP_") {
            true => upper,
            false => format!("CAP_{upper}"),
        };
        match (
            full.as_str(),
            ALL_CAPABILITIES.binary_search(&full.as_str()),
        ) {
            ("CAP_ALL", _) => Ok(ALL_CAPABILITIES.to_vec()),
            (_, Ok(at)) => Ok(vec![ALL_CAPABILITIES[at]]),
            (_, Err(_)) => Err(Error::Capability(name.clone())),
        }
    };
    let all = |names: &[String]| -> Result<Vec<&'static str>, Error> {
        let lists: Result<Vec<_>, Error> = names.iter().map(named).collect();
        Ok(lists?.concat())
    };
    let (added, dropped) = (all(&request.cap_add)?, all(&request.cap_drop)?);
    // What is named counts for more than `all`.
    let all_dropped = dropped.len() >= ALL_CAPABILITIES.len();
    let has = |capability: &&&str| match added.contains(*capability) {
        true => all_dropped || !dropped.contains(*capability),
        false => CAPABILITIES.contains(*capability) && !dropped.contains(*capability),
    };
    let bounding: Vec<&str> = ALL_CAPABILITIES.iter().filter(has).copied().collect();
    if user.uid == 0 {
        return Ok(json!({
            "bounding": bounding, "effective": bounding, "permitted": bounding,
        }));
    }
    let own: Vec<&str> = bounding
        .iter()
        .filter(|capability| added.contains(*capability))
        .copied()
        .collect();
    Ok(json!({
        "bounding": bounding, "effective": own, "permitted": own,
        "inheritable": own, "ambient": own,
    }))
}

fn mounts(request: &Request) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": source, "options": options});
    let safe = ["nosuid", "noexec", "nodev"];
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &safe),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &safe),
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", "ro"],
        ),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
    ];
    let mut tmpfs = |destination: &str, options: &[String]| {
        let own: Vec<&str> = options.iter().map(String::as_str).collect();
        let options = ["nosuid", "nodev"].into_iter().chain(own);
        mounts.push(mount(
            destination,
            "tmpfs",
            "tmpfs",
            &options.collect::<Vec<_>>(),
        ));
    };
    if request.read_only {
        // Programs expect to write there, whatever else is fixed.
        for (place, mode) in [
            ("/run", "mode=755"),
            ("/tmp", "mode=1777"),
            ("/var/tmp", "mode=1777"),
        ] {
            if !request.tmpfs.iter().any(|tmpfs| tmpfs.container == place) {
                tmpfs(place, &[mode.to_owned()]);
            }
        }
    }
    for asked in &request.tmpfs {
        tmpfs(&asked.container, &asked.options);
    }
    for volume in &request.volumes {
        let recursive = match volume.options.iter().any(|option| option == "bind") {
            true => &[][..],
            false => &["rbind"][..],
        };
        let own = volume.options.iter().map(String::as_str);
        let options: Vec<&str> = recursive.iter().copied().chain(own).collect();
        mounts.push(mount(&volume.container, "bind", &volume.host, &options));
    }
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> User {
        User {
            uid: 0,
            gid: 0,
            additional_gids: Vec::new(),
            home: Some("/root".to_owned()),
        }
    }

    fn list(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn image() -> Execution {
        Execution {
            entrypoint: Some(list(&["/entry"])),
            cmd: Some(list(&["serve", "--all"])),
            env: Some(list(&["LANG=C", "PATH=/bin"])),
            working_dir: Some("/srv".to_owned()),
            ..Execution::default()
        }
    }

    fn made(request: &Request) -> Value {
        config(&image(), &root(), request).unwrap()
    }

    #[test]
    fn the_image_says_what_is_run_and_how() {
        let config = made(&Request::default());
        let process = &config["process"];
        assert_eq!(process["args"], json!(["/entry", "serve", "--all"]));
        assert_eq!(process["cwd"], "/srv");
        assert_eq!(
            process["env"],
            json!(["HOME=/root", "HOSTNAME=", "LANG=C", "PATH=/bin"])
        );
        // Without a capability that others would miss, and for every user.
        assert_eq!(
            config["linux"]["sysctl"],
            json!({"net.ipv4.ping_group_range": "0 2147483647"})
        );
        // What the runtime reads is what was meant.
        serde_json::from_value::<oci_spec::runtime::Spec>(config).unwrap();
    }

    #[test]
    fn the_command_line_says_it_better() {
        let config = made(&Request {
            command: list(&["check"]),
            env: list(&["LANG=de", "X=a=b"]),
            working_directory: Some("/".to_owned()),
            terminal: true,
            ..Request::default()
        });
        let process = &config["process"];
        assert_eq!(process["args"], json!(["/entry", "check"]));
        assert_eq!(process["cwd"], "/");
        let env = process["env"].as_array().unwrap();
        for variable in ["LANG=de", "X=a=b", "TERM=xterm"] {
            assert!(env.contains(&json!(variable)), "{env:?}");
        }
        let entry = |entrypoint: &[&str], command: &[&str]| {
            let request = Request {
                entrypoint: Some(list(entrypoint)),
                command: list(command),
                ..Request::default()
            };
            config_args(&request)
        };
        assert_eq!(entry(&["/sh"], &[]), json!(["/sh"]));
        assert_eq!(entry(&[], &["ls", "-l"]), json!(["ls", "-l"]));
    }

    fn config_args(request: &Request) -> Value {
        made(request)["process"]["args"].clone()
    }

    #[test]
    fn nothing_to_run_is_told() {
        let nothing = config(&Execution::default(), &root(), &Request::default());
        assert_eq!(nothing, Err(Error::NoCommand));
    }

    #[test]
    fn capabilities_are_added_and_dropped_by_name() {
        let bounding = |add: &[&str], drop: &[&str]| {
            let request = Request {
                cap_add: list(add),
                cap_drop: list(drop),
                ..Request::default()
            };
            let set = capabilities(&root(), &request).unwrap()["bounding"].clone();
            set.as_array().unwrap().len()
        };
        assert_eq!(bounding(&[], &[]), 11);
        assert_eq!(bounding(&["net_admin", "CAP_SYS_TIME"], &[]), 13);
        assert_eq!(bounding(&[], &["all"]), 0);
        assert_eq!(bounding(&["chown"], &["ALL"]), 1);
        assert_eq!(bounding(&["ALL"], &[]), 41);
        assert_eq!(bounding(&["ALL"], &["SYS_ADMIN"]), 40);
        let unknown = Request {
            cap_add: list(&["FLY"]),
            ..Request::default()
        };
        let error = capabilities(&root(), &unknown).unwrap_err();
        assert_eq!(error, Error::Capability("FLY".to_owned()));
        assert!(ALL_CAPABILITIES.is_sorted());
    }

    #[test]
    fn another_user_than_root_has_what_was_asked_for_alone() {
        let user = User { uid: 7, ..root() };
        let request = Request {
            cap_add: list(&["NET_ADMIN"]),
            ..Request::default()
        };
        let set = capabilities(&user, &request).unwrap();
        assert_eq!(set["effective"], json!(["CAP_NET_ADMIN"]));
        assert_eq!(set["ambient"], json!(["CAP_NET_ADMIN"]));
        assert_eq!(set["bounding"].as_array().unwrap().len(), 12);
    }

    #[test]
    fn limits_become_those_of_the_specification() {
        let config = made(&Request {
            memory_bytes: Some(64 << 20),
            milli_cpus: Some(1500),
            ..Request::default()
        });
        let resources = &config["linux"]["resources"];
        assert_eq!(resources["memory"]["limit"], 64 << 20);
        assert_eq!(
            resources["cpu"],
            json!({"period": 100_000, "quota": 150_000})
        );
    }

    #[test]
    fn volumes_and_tmpfs_become_mounts() {
        let config = made(&Request {
            volumes: vec!["/data:/srv/data:ro,Z".parse().unwrap()],
            tmpfs: vec!["/tmp:size=1m,mode=700".parse().unwrap()],
            read_only: true,
            ..Request::default()
        });
        let mounts = config["mounts"].as_array().unwrap();
        let at = |place: &str| {
            let found = mounts.iter().filter(|mount| mount["destination"] == place);
            found.cloned().collect::<Vec<_>>()
        };
        assert_eq!(
            at("/srv/data"),
            [
                json!({"destination": "/srv/data", "type": "bind", "source": "/data",
                    "options": ["rbind", "ro"]})
            ]
        );
        let tmp = at("/tmp");
        assert_eq!(tmp.len(), 1);
        assert_eq!(
            tmp[0]["options"],
            json!(["nosuid", "nodev", "size=1m", "mode=700"])
        );
        assert_eq!(at("/var/tmp").len(), 1);
        assert_eq!(config["root"]["readonly"], true);
    }

    #[test]
    fn volumes_may_have_names() {
        let named: Volume = "name:/data:nocopy,ro".parse().unwrap();
        assert!(named.is_named() && !named.copied);
        assert_eq!(named.options, ["ro"]);
        for place in ["/a:/data", "./a:/data"] {
            let volume: Volume = place.parse().unwrap();
            assert!(!volume.is_named() && volume.copied);
        }
    }

    #[test]
    fn mounts_of_other_forms_are_refused_with_the_right_one() {
        for text in ["/only", ":/data", "/a:b", "/a:/b:fast", "/a:/b:ro:x"] {
            let error = text.parse::<Volume>().unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        assert!("tmp".parse::<Tmpfs>().is_err());
    }

    #[test]
    fn variables_without_a_name_are_refused() {
        let request = Request {
            env: list(&["=x"]),
            ..Request::default()
        };
        let error = config(&image(), &root(), &request).unwrap_err();
        assert_eq!(error, Error::Variable("=x".to_owned()));
    }
}
