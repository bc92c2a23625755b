//! The sandbox's attachments to networks: made once its namespace is there, noted in the journal,
//! and undone when the machine is gone, by whoever finds the journal.
//!
//! The namespace is mounted on a file of the state directory. Plug-ins want a path of it; and it
//! outlives a killed owner, so that they find in it what they have to undo.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use rootfs_builder::digest::Digest;

use super::{
    Error,
    state::{Keeper, Made, StateDir},
};
use crate::{
    cni::{self, Attached},
    text,
};

/// The file that the namespace is mounted on.
const NAMESPACE: &str = "netns";

/// How long dropping attachments may take: nothing else is served meanwhile, and somebody may have
/// asked for the end. What is not undone then is what a killed process leaves.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a sandbox is attached to. Dropping it undoes that.
#[derive(Debug)]
pub(super) struct Attachments {
    state: PathBuf,
    keeper: Keeper,
    attached: Vec<Attached>,
    /// Whether it was undone, or is left to others.
    is_over: bool,
    _reserved: Vec<cni::Reserved>,
}

impl Attachments {
    /// Attaches `namespace` as `plan` says. It waits for the plug-ins; whoever does not want to wait
    /// any more drops it.
    ///
    /// # Errors
    /// When it cannot; what was made is undone.
    pub(super) async fn make(
        state: &StateDir,
        namespace: &OwnedFd,
        plan: cni::Plan,
    ) -> Result<Self, Error> {
        let path = state.path().join(NAMESPACE);
        state.record(&Made::Namespace)?;
        let mut this = Self {
            state: state.path().to_owned(),
            keeper: state.keeper(),
            attached: Vec::new(),
            is_over: false,
            _reserved: plan.reserved,
        };
        let mounted = || {
            File::create_new(&path)?;
            let source = format!("/proc/self/fd/{}", namespace.as_raw_fd());
            let (none, bind) = (None::<&str>, MsFlags::MS_BIND);
            mount(Some(&*source), &path, none, bind, none).map_err(std::io::Error::from)
        };
        mounted().map_err(|source| Error::Make {
            what: "a name of the network namespace",
            source,
        })?;
        // Unique on this host, and of the form that plug-ins take.
        let digest = Digest::of(state.path().as_os_str().as_encoded_bytes()).hex();
        let container = format!("bulkhead-{}", &digest[..32]);
        for (number, network) in plan.networks.into_iter().enumerate() {
            // Ports lead to the first one.
            let ports = match number {
                0 => plan.ports.clone(),
                _ => Vec::new(),
            };
            let interface = format!("eth{number}");
            let attached = Attached::new(network, (&container, &path), interface)
                .with(ports, plan.plugins.clone());
            attached.check()?;
            record(state, &attached)?;
            // From here on it is undone, however far it comes.
            this.attached.push(attached);
            if let Some(attached) = this.attached.last_mut() {
                attached.add().await?;
                record(state, attached)?;
            }
        }
        if let Some((hosts, name)) = &plan.hosts {
            this.tell(hosts, name).map_err(|source| Error::Make {
                what: "the container's hosts file",
                source,
            })?;
        }
        Ok(this)
    }

    /// Adds the addresses to a hosts file.
    fn tell(&self, hosts: &Path, name: &str) -> std::io::Result<()> {
        let mut file = File::options().append(true).open(hosts)?;
        let all: Vec<_> = self.attached.iter().flat_map(Attached::addresses).collect();
        for (address, _) in &all {
            writeln!(file, "{address}\t{name}")?;
        }
        if let Some(gateway) = all.iter().find_map(|(_, gateway)| *gateway) {
            writeln!(
                file,
                "{gateway}\thost.containers.internal host.docker.internal"
            )?;
        }
        Ok(())
    }
}

impl Attachments {
    /// Undoes it, while other tasks go on.
    pub(super) async fn remove(mut self) {
        let mut removed = Ok(());
        while let (Ok(()), Some(attached)) = (&removed, self.attached.last()) {
            removed = attached.remove().await;
            self.attached.pop();
        }
        self.finish(removed);
    }

    fn finish(&mut self, removed: Result<(), cni::Error>) {
        self.is_over = true;
        match removed {
            Ok(()) => forget_namespace(&self.state),
            Err(error) => {
                let error = text::chain(&error);
                tracing::warn!(
                    error,
                    "the network keeps something of the container; `bulkhead gc` tries again"
                );
                self.keeper.keep();
            }
        }
    }
}

impl Drop for Attachments {
    fn drop(&mut self) {
        if !self.is_over {
            let removed = cni::remove_now(self.attached.iter().rev(), Some(PATIENCE));
            self.finish(removed);
        }
    }
}

fn record(state: &StateDir, attached: &Attached) -> Result<(), Error> {
    let attached = Box::new(attached.clone());
    Ok(state.record(&Made::Attachment { attached })?)
}

/// Undoes what a killed owner of `state` made of it.
pub(super) fn undo_leftover(made: &[Made], state: &Path) -> Result<(), cni::Error> {
    let mut attached: Vec<&Attached> = Vec::new();
    for made in made.iter().rev() {
        // The later one of an interface knows what the plug-ins answered.
        if let Made::Attachment { attached: one } = made
            && !attached
                .iter()
                .any(|known| known.interface() == one.interface())
        {
            attached.push(one);
        }
    }
    cni::remove_now(attached.into_iter(), None)?;
    forget_namespace(state);
    Ok(())
}

/// Takes the namespace's name away.
fn forget_namespace(state: &Path) {
    let path = state.join(NAMESPACE);
    match umount2(&path, MntFlags::MNT_DETACH) {
        Ok(()) => {}
        // It was not mounted yet.
        Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => tracing::warn!(path = %path.display(), %errno, "a mount stays behind"),
    }
    let _ = fs::remove_file(path);
}
