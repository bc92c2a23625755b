//! What a container has of the host as disks of the machine: plugged in before it is made, taken
//! out when it is removed.

use std::{io, path::Path};

use protocol::{Disk as Slot, agent::HostDevice};

use super::{Error, NewContainer, Pod};
use crate::bundle::Source;

/// Where a container's disks are plugged in.
#[derive(Debug, Default)]
pub(super) struct Disks {
    /// That of its root.
    pub(super) root: Option<Slot>,
    /// By the places of their mounts in the configuration.
    pub(super) volumes: Vec<(usize, Slot)>,
    /// By the host's numbers.
    devices: Vec<(u32, u32, Slot)>,
}

impl Disks {
    /// How the agent is told of the devices.
    pub(super) fn for_guest(&self) -> Vec<HostDevice> {
        let device = |(major, minor, slot): &(u32, u32, Slot)| HostDevice {
            major: *major,
            minor: *minor,
            slot: slot.slot().into(),
            ..Default::default()
        };
        self.devices.iter().map(device).collect()
    }

    /// All of them.
    pub(super) fn slots(&self) -> Vec<Slot> {
        let volumes = self.volumes.iter().map(|(_, slot)| *slot);
        let devices = self.devices.iter().map(|(_, _, slot)| *slot);
        self.root
            .into_iter()
            .chain(volumes)
            .chain(devices)
            .collect()
    }
}

impl Pod {
    /// Plugs in what a container is to have as disks.
    pub(super) async fn plug(&self, new: &NewContainer) -> Result<Disks, Error> {
        let mut disks = Disks::default();
        match self.plug_all(new, &mut disks).await {
            Ok(()) => Ok(disks),
            Err(error) => {
                self.unplug(&disks).await;
                Err(error)
            }
        }
    }

    async fn plug_all(&self, new: &NewContainer, disks: &mut Disks) -> Result<(), Error> {
        let sandbox = &self.sandbox;
        if new.placeholder {
            return Ok(());
        }
        if let Some(root) = new.root.disk()? {
            let file = root.claim().map_err(failed(root.path()))?;
            disks.root = Some(sandbox.plug_disk(file, root.read_only()).await?);
        }
        for volume in new.bundle.volumes() {
            if let Source::Disk(disk) = &volume.source {
                let file = disk.claim().map_err(failed(disk.path()))?;
                let slot = sandbox.plug_disk(file, disk.read_only()).await?;
                disks.volumes.push((volume.index, slot));
            }
        }
        for device in new.bundle.devices() {
            let (major, minor) = (device.major, device.minor);
            let name = format!("{major}:{minor}");
            let file = device.open().map_err(failed(Path::new(&name)))?;
            let slot = sandbox.plug_disk(file, device.read_only).await?;
            disks.devices.push((major, minor, slot));
        }
        Ok(())
    }

    /// Takes a container's disks out, once it lets go of them. What cannot be taken out goes with
    /// the machine.
    pub(super) async fn unplug(&self, disks: &Disks) {
        let slots = disks.slots();
        if slots.is_empty() || self.sandbox.has_ended() {
            return;
        }
        if let Err(error) = self.sandbox.unplug_disks(&slots).await {
            let error = crate::text::chain(&error);
            tracing::warn!(
                error,
                "disks of a container stay in the machine until its end"
            );
        }
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let what = path.display().to_string();
    move |source| Error::Disk { what, source }
}
