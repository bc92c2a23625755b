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

/// What a sandbox is attached to. Dropping it undoes that.
#[derive(Debug)]
pub(super) struct Attachments {
    state: PathBuf,
    keeper: Keeper,
    attached: Vec<Attached>,
    _reserved: Vec<cni::Reserved>,
}

impl Attachments {
    /// Attaches `namespace` as `plan` says. It waits for the plug-ins.
    ///
    /// # Errors
    /// When it cannot; what was made is undone.
    pub(super) fn make(
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
            let mut attached = Attached::new(network, (&container, &path), interface)
                .with(ports, plan.plugins.clone());
            attached.check()?;
            let made = state
                .record(&Made::Attachment {
                    attached: Box::new(attached.clone()),
                })
                .map_err(Error::from)
                .and_then(|()| attached.add().map_err(Error::from))
                .and_then(|()| {
                    let attached = Box::new(attached.clone());
                    Ok(state.record(&Made::Attachment { attached })?)
                });
            this.attached.push(attached);
            made?;
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

impl Drop for Attachments {
    fn drop(&mut self) {
        if let Err(error) = detach(self.attached.iter().rev(), &self.state) {
            let error = text::chain(&error);
            tracing::warn!(
                error,
                "the network keeps something of the container; `bulkhead gc` tries again"
            );
            self.keeper.keep();
        }
    }
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
    detach(attached.into_iter(), state)
}

fn detach<'a>(
    attached: impl Iterator<Item = &'a Attached>,
    state: &Path,
) -> Result<(), cni::Error> {
    for attached in attached {
        attached.remove()?;
    }
    let path = state.join(NAMESPACE);
    match umount2(&path, MntFlags::MNT_DETACH) {
        Ok(()) => {}
        // It was not mounted yet.
        Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => tracing::warn!(path = %path.display(), %errno, "a mount stays behind"),
    }
    let _ = fs::remove_file(path);
    Ok(())
}
