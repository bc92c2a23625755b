//! The pod's network while its machine runs: its loopback at the host is the guest's, and
//! interfaces that come later become cards of the guest.
//!
//! They come when a hook has run (docker's), or between a container's making and its start (docker
//! again, `ctr run --cni`), by which time whoever makes them is done with it. So it is looked then.

use std::{collections::HashMap, net::IpAddr, path::PathBuf};

use ::vmm::{config::DeviceConfig, control::Client};
use protocol::agent::ConfigureNetworkRequest;

use super::{CONTROL, Error, Sandbox, agent, no_limit};
use crate::{
    network::{self, Card, Loopback, Network, Resolver},
    text::chain,
};

/// What joins the pod's network namespace with the guest. Dropping it undoes that.
#[derive(Debug)]
pub(super) struct Wires {
    // Dropped first: it is in the namespace that the other may end.
    loopback: Option<Loopback>,
    /// Name servers on the namespace's loopback.
    resolvers: HashMap<IpAddr, Resolver>,
    vsock: PathBuf,
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
        Self {
            loopback: loopback.ok(),
            resolvers: HashMap::new(),
            vsock,
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
        self.plug().await?;
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

    async fn plug(&self) -> Result<(), Error> {
        let cards = match &mut *self.wires() {
            Some(wires) => wires.network.join()?,
            None => return Ok(()),
        };
        for card in cards {
            let (name, path) = (card.name.clone(), self.state.short_path(CONTROL));
            // The VMM answers at once, and no runtime waits for it even if it does not.
            let plugged = tokio::task::spawn_blocking(move || add(&card, path)).await;
            match plugged {
                Ok(Ok(slot)) => tracing::info!(name, slot, "an interface was plugged in"),
                Ok(Err(source)) => return Err(Error::Plug { name, source }),
                Err(source) => {
                    let what = "the thread that plugs in a card";
                    let source = source.into();
                    return Err(Error::Make { what, source });
                }
            }
        }
        Ok(())
    }

    pub(super) async fn tell_network(&self, network: ConfigureNetworkRequest) -> Result<(), Error> {
        let connected = self.call_at_start("setting the guest's network up", async |agent| {
            agent.configure_network(no_limit(), &network).await
        });
        connected.await.map(drop)
    }
}

fn add(card: &Card, control: PathBuf) -> Result<u8, ::vmm::control::Error> {
    let (config, descriptors) = card.hot_plug();
    Client::connect(&control)?.add_device(DeviceConfig::Net(config), &descriptors)
}
