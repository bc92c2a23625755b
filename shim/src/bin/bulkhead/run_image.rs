//! `bulkhead run IMAGE`: the image and the flags become a bundle, which is then run as any other.

use std::{
    env,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use nix::fcntl::{Flock, FlockArg};
use rootfs_builder::{
    erofs,
    image::{Store, Stored},
};
use shim::{
    bundle::Bundle,
    cni,
    id::ContainerId,
    image::{
        Location,
        spec::{self, Request},
        users,
        volume::{Used, Volumes},
    },
    pod::Upper,
    sandbox::Media,
};

use super::{
    cli::{ImageRunArgs, Pull, RunArgs},
    network::{self, Asked},
    rmi::as_kept,
    store::fetch,
};

/// Longer files of users are not read.
const USERS_MAX: u64 = 4 << 20;

/// The file system of a disk for what is written.
const FILESYSTEM: &str = "ext4";

/// The link to the log in the bundle of a container that nobody attends.
pub(crate) const LOG: &str = "log";

/// The smallest disk for what is written.
const DISK_MIN: u64 = 8 << 20;

/// An image that is ready to be run.
pub(crate) struct Prepared {
    pub(crate) id: ContainerId,
    pub(crate) bundle: Bundle,
    pub(crate) media: Media,
    pub(crate) upper: Upper,
    /// What the guest's kernel needs to know the image's pages.
    pub(crate) overhead_mib: u64,
    /// Networks that it is attached to.
    pub(crate) attach: Option<cni::Plan>,
    /// The bundle's files. They go when the container is over.
    pub(crate) place: Place,
}

/// Finds or fetches the image and makes a bundle for it.
pub(crate) fn prepare(state_root: &Path, args: &RunArgs) -> anyhow::Result<Prepared> {
    let flags = &args.image_flags;
    let network = Asked::of(flags)?;
    let stored = stored(&args.target, flags)?;
    let disk = stored.open_disk()?;
    let execution = stored.config()?.config.unwrap_or_default();
    let image = erofs::Image::open(&disk).context("cannot read the image")?;
    let text = |path| -> anyhow::Result<String> {
        let bytes = image.read_file(path, USERS_MAX);
        let bytes = bytes.with_context(|| format!("cannot read {path} of the image"))?;
        Ok(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
    };
    let asked = flags.user.as_deref().or(execution.user.as_deref());
    let user = users::resolve(
        asked.unwrap_or_default(),
        &text("/etc/passwd")?,
        &text("/etc/group")?,
    )?;

    let mut place = Place::make(state_root)?;
    let id = id(flags.name.as_deref(), &args.target, &place)?;
    let hostname = flags.hostname.clone().unwrap_or_else(|| host_name(&id));
    let mut request = request(args, hostname.clone())?;
    request.network = network.namespace();
    let volumes = Volumes::new(&flags.volumes.volume_root);
    for volume in request
        .volumes
        .iter_mut()
        .filter(|volume| volume.is_named())
    {
        let copied = volume.copied.then_some((&image, volume.container.as_str()));
        let used = volumes.take(&volume.host, copied)?;
        volume.host = used.path.display().to_string();
        place.volumes.push(used);
    }
    let mut files = vec![
        ("hosts", "/etc/hosts", network::hosts(&hostname)),
        ("hostname", "/etc/hostname", format!("{hostname}\n")),
    ];
    if !matches!(network, Asked::None) {
        let content = network::resolv_conf(&flags.dns);
        files.push(("resolv.conf", "/etc/resolv.conf", content));
    }
    place.fill(&mut request, files)?;
    let config = spec::config(&execution, &user, &request)?;
    place.write("config.json", config.to_string().as_bytes())?;
    fs::create_dir(place.path.join("rootfs")).context("cannot make the bundle")?;
    let length = disk.metadata().context("cannot read the image")?.len();
    let (upper, disks) = match flags.storage_opt.as_deref().map(storage).transpose()? {
        None => (Upper::Memory, Vec::new()),
        Some(bytes) => {
            let disk = self::disk(&flags.store.image_root, bytes)?;
            (Upper::Disk(FILESYSTEM.to_owned()), vec![disk])
        }
    };
    Ok(Prepared {
        id,
        bundle: Bundle::load(&place.path)?,
        media: Media {
            images: vec![disk.into()],
            disks,
        },
        upper,
        // 64 bytes for each page of 4 KiB.
        overhead_mib: (length / 64).div_ceil(1 << 20),
        attach: network.plan(&place.path.join("hosts"), &hostname),
        place,
    })
}

/// The image, fetched where the flags say so.
fn stored(image: &str, flags: &ImageRunArgs) -> anyhow::Result<Stored> {
    let store = flags.store.open()?;
    let fetched = |store: &Store| {
        let location: Location = image.parse()?;
        fetch(store, &location, None, &flags.access, false)
    };
    if Location::has_transport(image) || flags.pull == Pull::Always {
        return fetched(&store);
    }
    match (store.find(&as_kept(&store, image)?)?, flags.pull) {
        (Some(stored), _) => Ok(stored),
        (None, Pull::Never) => {
            bail!("no image {image:?} is kept here; `bulkhead pull` fetches it, or --pull=missing")
        }
        (None, _) => fetched(&store),
    }
}

fn request(args: &RunArgs, hostname: String) -> anyhow::Result<Request> {
    let flags = &args.image_flags;
    let mut env = Vec::new();
    for path in &flags.env_file {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let lines = text.lines().map(str::trim);
        env.extend(
            lines
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(str::to_owned),
        );
    }
    env.extend(flags.env.iter().cloned());
    let volumes = flags.volume.iter().map(|volume| {
        let mut volume: spec::Volume = volume.parse()?;
        if !volume.is_named() {
            // Of the directory that the command runs in, not of the bundle.
            volume.host = std::path::absolute(&volume.host)?.display().to_string();
        }
        anyhow::Ok(volume)
    });
    Ok(Request {
        command: args.command.clone(),
        entrypoint: flags.entrypoint.as_deref().map(entrypoint),
        env: env
            .iter()
            .filter_map(|variable| with_value(variable))
            .collect(),
        working_directory: flags.workdir.clone(),
        terminal: flags.tty,
        hostname,
        read_only: flags.read_only,
        network: None,
        volumes: volumes.collect::<Result<_, _>>()?,
        tmpfs: flags
            .tmpfs
            .iter()
            .map(|tmpfs| tmpfs.parse())
            .collect::<Result<_, _>>()?,
        cap_add: flags.cap_add.clone(),
        cap_drop: flags.cap_drop.clone(),
        memory_bytes: args.make.memory.map(|memory| memory.0),
        milli_cpus: args.make.cpus.map(|cpus| cpus.0),
    })
}

/// A variable without a value has the one that it has here, and is left out where it has none.
fn with_value(variable: &str) -> Option<String> {
    match variable.contains('=') {
        true => Some(variable.to_owned()),
        false => env::var(variable)
            .ok()
            .map(|value| format!("{variable}={value}")),
    }
}

/// A list in JSON, or one program; empty for none at all.
fn entrypoint(text: &str) -> Vec<String> {
    match serde_json::from_str(text) {
        Ok(list) => list,
        Err(_) if text.is_empty() => Vec::new(),
        Err(_) => vec![text.to_owned()],
    }
}

/// The size of the disk for what is written, of `size=10G`.
fn storage(option: &str) -> anyhow::Result<u64> {
    let Some(size) = option.strip_prefix("size=") else {
        bail!("--storage-opt {option:?} is not supported; size=SIZE is");
    };
    let bytes = size
        .parse::<super::cli::Memory>()
        .map_err(anyhow::Error::msg)?
        .0;
    if bytes < DISK_MIN {
        bail!(
            "--storage-opt size={size} is too small; {} MiB are the least",
            DISK_MIN >> 20
        );
    }
    Ok(bytes)
}

/// The name that was asked for, or one of the image's and of chance.
fn id(name: Option<&str>, image: &str, place: &Place) -> anyhow::Result<ContainerId> {
    if let Some(name) = name {
        return Ok(ContainerId::parse(name)?);
    }
    let base = match image.parse() {
        Ok(Location::Registry(reference)) => reference.repository().to_owned(),
        _ => "image".to_owned(),
    };
    let base = base.rsplit('/').next().unwrap_or_default();
    let plain: String = base
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(30)
        .collect();
    Ok(ContainerId::parse(&format!("{plain}-{}", place.chance()))?)
}

/// A host name of an id: what is no letter or digit becomes a dash.
fn host_name(id: &ContainerId) -> String {
    let plain = |character: char| match character.is_ascii_alphanumeric() {
        true => character.to_ascii_lowercase(),
        false => '-',
    };
    let name: String = id.as_str().chars().take(63).map(plain).collect();
    name.trim_matches('-').to_owned()
}

/// A bundle's directory. It is locked while its container is there, so that what a killed command
/// left is found by the next one.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    /// Named volumes that its container has.
    volumes: Vec<Used>,
    _lock: Flock<File>,
}

impl Place {
    fn make(state_root: &Path) -> anyhow::Result<Self> {
        let all = state_root.join("bundles");
        let make = || {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&all)?;
            clear_leftovers(&all);
            let path = tempfile::Builder::new().prefix("").tempdir_in(&all)?.keep();
            let lock = Flock::lock(File::open(&path)?, FlockArg::LockExclusiveNonblock)
                .map_err(|(_, errno)| io::Error::from(errno))?;
            io::Result::Ok(Self {
                path,
                volumes: Vec::new(),
                _lock: lock,
            })
        };
        make().with_context(|| format!("cannot make a bundle in {}", all.display()))
    }

    /// The part of its name that was chosen by chance.
    fn chance(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().to_lowercase()
    }

    /// Writes files that the container has, unless it gets them by a volume.
    fn fill(&self, request: &mut Request, files: Vec<(&str, &str, String)>) -> anyhow::Result<()> {
        for (name, container, content) in files {
            self.write(name, content.as_bytes())?;
            if request
                .volumes
                .iter()
                .all(|volume| volume.container != container)
            {
                request.volumes.push(spec::Volume {
                    host: self.path.join(name).display().to_string(),
                    container: container.to_owned(),
                    options: Vec::new(),
                    copied: false,
                });
            }
        }
        Ok(())
    }

    /// The log of a container that nobody attends, beside the images: it may grow large, and what
    /// the bundle lies in is mostly memory.
    pub(crate) fn log(&self, image_root: &Path) -> anyhow::Result<File> {
        let logs = std::path::absolute(image_root)?.with_file_name("logs");
        let path = logs.join(self.path.file_name().unwrap_or_default());
        let make = || {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&logs)?;
            // What names it is made first, so that who clears leftovers finds it.
            symlink(&path, self.path.join(LOG))?;
            File::options().append(true).create_new(true).open(&path)
        };
        make().with_context(|| format!("cannot make the log {}", path.display()))
    }

    fn write(&self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let path = self.path.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A disk with a file system, which takes room only as it is written, and has no name. It lies
/// beside the images: what the bundle lies in is mostly memory.
fn disk(image_root: &Path, bytes: u64) -> anyhow::Result<OwnedFd> {
    let file = tempfile::tempfile_in(image_root)
        .and_then(|file| file.set_len(bytes.next_multiple_of(4096)).map(|()| file))
        .with_context(|| format!("cannot make a disk in {}", image_root.display()))?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode"])
        .args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
        .arg(&path)
        .output()
        .context("cannot run mkfs.ext4, which Debian's package e2fsprogs brings")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty());
        bail!("mkfs.ext4 fails: {}", last.unwrap_or("it says nothing"));
    }
    Ok(file.into())
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a bundle stays behind");
        }
    }
}

/// Removes bundles whose command was killed.
fn clear_leftovers(all: &Path) {
    for entry in fs::read_dir(all).into_iter().flatten().flatten() {
        let path = entry.path();
        // One that was made this moment has no lock yet, and nothing in it.
        let empty = fs::read_dir(&path).is_ok_and(|mut entries| entries.next().is_none());
        let locked = File::open(&path)
            .is_ok_and(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err());
        if !empty && !locked {
            tracing::info!(path = %path.display(), "removing the bundle of a killed command");
            let _ = remove(&path);
        }
    }
}

/// Removes a bundle and its log.
fn remove(bundle: &Path) -> io::Result<()> {
    if let Ok(log) = fs::read_link(bundle.join(LOG)) {
        match fs::remove_file(log) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::remove_dir_all(bundle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entrypoint_is_a_list_or_one_program() {
        assert_eq!(entrypoint("/bin/sh"), ["/bin/sh"]);
        assert_eq!(entrypoint(r#"["/bin/sh", "-c"]"#), ["/bin/sh", "-c"]);
        assert!(entrypoint("").is_empty());
    }

    #[test]
    fn names_are_made_of_the_images() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::make(directory.path()).unwrap();
        for (image, begin) in [
            ("example.org:5000/team/web-app:1.2", "webapp-"),
            ("alpine", "alpine-"),
            ("oci:/tmp/layout:3", "image-"),
        ] {
            let id = id(None, image, &place).unwrap();
            assert!(id.as_str().starts_with(begin), "{id}");
        }
        assert_eq!(id(Some("web"), "alpine", &place).unwrap().as_str(), "web");
        let id = ContainerId::parse("A.b_c").unwrap();
        assert_eq!(host_name(&id), "a-b-c");
    }

    #[test]
    fn a_place_goes_with_its_container_and_a_killed_ones_with_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let left = directory.path().join("bundles/left");
        fs::create_dir_all(&left).unwrap();
        fs::write(left.join("config.json"), "{}").unwrap();
        let first = Place::make(directory.path()).unwrap();
        first.write("config.json", b"{}").unwrap();
        assert!(!left.exists());
        let path = first.path.clone();
        let second = Place::make(directory.path()).unwrap();
        assert!(path.exists(), "a living one's place was taken");
        drop((first, second));
        assert_eq!(
            fs::read_dir(directory.path().join("bundles"))
                .unwrap()
                .count(),
            0
        );
    }

    #[test]
    fn only_a_disks_size_can_be_said_of_storage() {
        assert_eq!(storage("size=1g").unwrap(), 1 << 30);
        assert!(
            storage("size=1k")
                .unwrap_err()
                .to_string()
                .contains("8 MiB")
        );
        assert!(storage("dm.basesize=1g").is_err());
    }
}
