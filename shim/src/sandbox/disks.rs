//! Disks that are plugged into a running machine and taken out again.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use ::vmm::{
    config::{DeviceConfig, Resource},
    control::{self, Client},
};
use protocol::{Disk, agent::RescanDevicesRequest};
use tokio::task::JoinError;

use super::{CONTROL, Error, Sandbox, no_limit};

/// How long a guest may write back what its file systems hold.
const RELEASE: Duration = Duration::from_secs(40);

impl Sandbox {
    /// Plugs a file or block device in; the guest finds it when it is told of it.
    ///
    /// # Errors
    /// When the VMM does not take it.
    pub async fn plug_disk(&self, file: OwnedFd, read_only: bool) -> Result<Disk, Error> {
        let device = DeviceConfig::Blk {
            disk: Resource::Fd(0),
            read_only,
            serial: String::new(),
        };
        let slot = self
            .command(move |vmm| vmm.add_device(device, &[file.as_fd()]))
            .await
            .map_err(Error::Disk)?;
        Disk::in_slot(slot).ok_or(Error::Disk(control::Error::Unexpected))
    }

    /// Lets the guest leave disks, which waits until they are not used any more, and takes them
    /// out.
    ///
    /// # Errors
    /// When one stays in use, or the VMM does not answer.
    pub async fn unplug_disks(&self, disks: &[Disk]) -> Result<(), Error> {
        let request = RescanDevicesRequest {
            removed: disks.iter().map(|disk| disk.address()).collect(),
            ..Default::default()
        };
        let left = self.call_within(RELEASE, "letting go of disks", async |agent| {
            agent.rescan_devices(no_limit(), &request).await
        });
        left.await?;
        for disk in disks.iter().map(|disk| disk.slot()) {
            let removed = self.command(move |vmm| vmm.remove_device(disk)).await;
            removed.map_err(Error::Disk)?;
        }
        Ok(())
    }

    /// Asks the VMM for something; no runtime waits for it even if it does not answer.
    pub(super) async fn command<T: Send + 'static>(
        &self,
        command: impl FnOnce(&mut Client) -> Result<T, control::Error> + Send + 'static,
    ) -> Result<T, control::Error> {
        let path: PathBuf = self.state.short_path(CONTROL);
        let asked = tokio::task::spawn_blocking(move || command(&mut Client::connect(&path)?));
        let ended = |error: JoinError| Err(control::Error::Send(error.into()));
        asked.await.unwrap_or_else(ended)
    }
}
