//! The pod's network while its machine runs: its loopback at the host is the guest's, and
//! interfaces that come later become cards of the guest.
//!
//! They come when a hook has run (docker's), or between a container's making and its start (docker
//! again, `ctr run --cni`), by which time whoever makes them is done with it. So it is looked then;
//! and whenever the kernel says that something has changed, as by `docker network connect`.

use std::{collections::HashMap, net::IpAddr, path::PathBuf, time::Duration};

use ::vmm::config::DeviceConfig;
use protocol::{
    agent::{ConfigureNetworkRequest, RescanDevicesRequest},
    pci_address,
};
use tokio::time::sleep;

use super::{Error, Sandbox, agent, no_limit};
use crate::{
    network::{self, Changes, Loopback, Network, Parted, Resolver},
    text::chain,
};

/// How long a network is left alone after it could not be followed, at first and at most: what was
/// tried in vain is itself a change of it.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What joins the pod's network namespace with the guest. Dropping it undoes that.
#[derive(Debug)]
pub(super) struct Wires {
    // Dropped first: it is in the namespace that the other may end.
    loopback: Option<Loopback>,
    /// Name servers on the namespace's loopback.
    resolvers: HashMap<IpAddr, Resolver>,
    vsock: PathBuf,
    /// What is announced of the namespace, until somebody listens.
    changes: Option<Changes>,
    network: Network,
    /// What the agent was told last.
    told: ConfigureNetworkRequest,
}

impl Wires {
    /// Leads the namespace's loopback to the machine that listens at `vsock`, too.
    pub(super) fn new(network: Network, vsock: PathBuf) -> Self {
        let path = vsock.clone();
        let dial = move || {
            let path = path.clone();
            async move { agent::forward(&path).await }
        };
        let loopback = Loopback::start(network.namespace(), dial);
        let loopback = loopback.inspect_err(|error| {
            tracing::warn!(
                error = chain(error),
                "connections to 127.0.0.1 in the pod's network namespace do not reach the guest"
            );
        });
        let changes = Changes::open(network.namespace()).inspect_err(|error| {
            tracing::warn!(
                error = chain(error),
                "the guest's network follows that of the pod only when containers start"
            );
        });
        Self {
            loopback: loopback.ok(),
            resolvers: HashMap::new(),
            vsock,
            changes: changes.ok(),
            network,
            told: ConfigureNetworkRequest::default(),
        }
    }

    /// What the agent is to be told, if that is not what it was told last.
    pub(super) fn news(&mut self) -> Result<Option<ConfigureNetworkRequest>, network::Error> {
        let request = self.network.request()?;
        if request == self.told {
            return Ok(None);
        }
        self.told = request.clone();
        Ok(Some(request))
    }
}

impl Sandbox {
    /// Lets the guest ask name servers on the loopback of the pod's network namespace, those that
    /// it cannot ask yet.
    pub fn serve_resolvers(&self, addresses: &[IpAddr]) {
        let mut wires = self.wires();
        let Some(Wires {
            resolvers,
            vsock,
            network,
            ..
        }) = &mut *wires
        else {
            return;
        };
        for address in addresses {
            resolvers.entry(*address).or_insert_with(|| {
                let vsock = vsock.clone();
                let dial = async move { agent::lookup(&vsock).await };
                Resolver::start(network.namespace(), *address, dial)
            });
        }
    }

    /// Leads no connection to the guest any more: its machine is about to end. What the kernel needs
    /// for this, it needs at the same time as for the machine's end.
    pub fn leave_loopback(&self) {
        if let Some(wires) = &mut *self.wires() {
            wires.loopback = None;
            wires.resolvers.clear();
        }
    }

    /// Plugs in cards for the interfaces that have come into the pod's network namespace; the
    /// guest hears of them when it is set up, or by [`Sandbox::follow_network`].
    ///
    /// # Errors
    /// When one cannot be joined or plugged in.
    pub async fn plug_in(&self) -> Result<(), Error> {
        let _turn = self.plugging.lock().await;
        self.plug().await
    }

    /// Brings the guest's network up to date with the pod's network namespace.
    ///
    /// # Errors
    /// As [`Sandbox::plug_in`], and when the agent refuses.
    pub async fn follow_network(&self) -> Result<(), Error> {
        let _turn = self.plugging.lock().await;
        // What fails of one interface does not keep the others away.
        let unplugged = self.unplug_gone().await;
        let plugged = self.plug().await;
        let told = self.tell_news().await;
        unplugged.and(plugged).and(told)
    }

    /// Brings the guest's network up to date whenever that of the pod has changed, until the machine
    /// ends; `followed` is called each time.
    pub async fn keep_following_network(&self, followed: impl Fn()) {
        let changes = self.wires().as_mut().and_then(|wires| wires.changes.take());
        let Some(changes) = changes else {
            return;
        };
        tokio::select! {
            biased;
            () = self.vmm.ended() => {}
            () = self.follow_each(changes, followed) => {}
        }
    }

    async fn follow_each(&self, changes: Changes, followed: impl Fn()) {
        let mut pause = PAUSE;
        loop {
            if let Err(error) = changes.settled().await {
                let error = chain(&error);
                tracing::warn!(error, "changes of the pod's network are not heard any more");
                return;
            }
            match self.follow_network().await {
                Ok(()) => pause = PAUSE,
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(error, "the guest's network is not as the pod's");
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
            followed();
        }
    }

    async fn tell_news(&self) -> Result<(), Error> {
        let news = match &mut *self.wires() {
            Some(wires) => wires.news()?,
            None => None,
        };
        let Some(network) = news else {
            return Ok(());
        };
        let told = self.tell_network(network).await;
        if told.is_err()
            && let Some(wires) = &mut *self.wires()
        {
            // To be told again.
            wires.told = ConfigureNetworkRequest::default();
        }
        told
    }

    /// Takes out the cards of interfaces that are gone.
    async fn unplug_gone(&self) -> Result<(), Error> {
        let gone = match &mut *self.wires() {
            Some(wires) => wires.network.part_from_gone()?,
            None => return Ok(()),
        };
        let slots: Vec<u8> = gone.iter().filter_map(Parted::slot).collect();
        if slots.is_empty() {
            return Ok(());
        }
        let request = RescanDevicesRequest {
            removed: slots.iter().copied().map(pci_address).collect(),
            ..Default::default()
        };
        let left = self.call("letting go of network cards", async |agent| {
            agent.rescan_devices(no_limit(), &request).await
        });
        left.await?;
        for slot in slots {
            let removed = self.command(move |vmm| vmm.remove_device(slot)).await;
            removed.map_err(|source| Error::Unplug { slot, source })?;
            tracing::info!(slot, "an interface was unplugged");
        }
        Ok(())
    }

    async fn plug(&self) -> Result<(), Error> {
        let (cards, failed) = match &mut *self.wires() {
            Some(wires) => wires.network.join_each()?,
            None => return Ok(()),
        };
        let mut failed = failed.map(Error::from);
        for card in cards {
            let (id, name) = (card.id, card.name.clone());
            let added = self.command(move |vmm| {
                let (config, descriptors) = card.hot_plug();
                vmm.add_device(DeviceConfig::Net(config), &descriptors)
            });
            let added = added.await;
            let mut wires = self.wires();
            let network = wires.as_mut().map(|wires| &mut wires.network);
            match added {
                Ok(slot) => {
                    tracing::info!(name, slot, "an interface was plugged in");
                    network.into_iter().for_each(|it| it.plugged(id, slot));
                }
                Err(source) => {
                    network.into_iter().for_each(|it| it.part(id));
                    failed.get_or_insert(Error::Plug { name, source });
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    pub(super) async fn tell_network(&self, network: ConfigureNetworkRequest) -> Result<(), Error> {
        let connected = self.call_at_start("setting the guest's network up", async |agent| {
            agent.configure_network(no_limit(), &network).await
        });
        connected.await.map(drop)
    }
}
