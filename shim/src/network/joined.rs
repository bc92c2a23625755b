//! One interface of the pod, joined with a tap.

use std::{io, os::fd::OwnedFd, sync::Arc};

use netlink::{Change, Link, Socket};
use vmm::{config::Mac, virtio::net::tap};

use super::{Card, CardId, Namespace, filter::Filter, vhost};

/// Why an interface cannot be joined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An ipvlan that a redirect never sees a packet of.
    #[error(
        "it is an ipvlan in mode l3s, at which no packet comes in; make it one in mode l2 or l3, or a macvlan"
    )]
    L3s,
    /// A tap whose bridge keeps what is for the guest.
    #[error(
        "it is a tap and the port of a bridge, which takes what is for the tap's address, and so the guest's, for its own; take it out of the bridge"
    )]
    BridgedTap,
    /// One too many with an address.
    #[error(
        "its address {0} is another interface's too, as two ipvlans of one master have it, and the guest tells its cards apart by their addresses"
    )]
    SameAddress(Mac),
    /// The tap device.
    #[error("cannot make a tap; is the module tun there?")]
    Tap(#[source] io::Error),
    /// The tap device that the interface is.
    #[error("cannot attach to it; does another program hold it?")]
    Attach(#[source] io::Error),
    /// The kernel lost it again.
    #[error("the tap {0:?} is gone")]
    Gone(String),
    /// Its settings.
    #[error("cannot set up the tap {0:?}")]
    SetUp(String, #[source] io::Error),
    /// Traffic control.
    #[error(
        "cannot redirect what comes in at {0:?}; are the modules sch_ingress, cls_matchall and act_mirred there?"
    )]
    Redirect(String, #[source] io::Error),
}

/// An interface that is joined; dropping it undoes that.
#[derive(Debug)]
pub(super) struct Joined {
    card: CardId,
    /// The slot of the guest's bus that its card is in, once it is.
    pub(super) slot: Option<u8>,
    _redirects: Vec<Filter>,
    // Dropped last: the redirects are gone by then.
    tap: Option<Tap>,
}

impl Joined {
    /// Joins an interface; one that is a tap itself is given to the guest as it is.
    pub(super) fn new(namespace: &Namespace, link: &Link) -> Result<(Self, Card), Error> {
        let is_tap = link.kind.as_deref() == Some("tun");
        if link.l3s {
            return Err(Error::L3s);
        }
        if is_tap && link.master.is_some() {
            return Err(Error::BridgedTap);
        }
        let mut this = Self {
            card: CardId::of(link),
            slot: None,
            _redirects: Vec::new(),
            tap: None,
        };
        let queue = if is_tap {
            let name = link.name.clone();
            namespace
                .run(move || tap::open_existing(&name))
                .map_err(Error::Attach)?
        } else {
            let (tap, queue) = Tap::new(namespace, link.mtu)?;
            let kernel = namespace.kernel();
            for (from, to, name) in [
                (link.index, tap.index, &link.name),
                (tap.index, link.index, &tap.name),
            ] {
                let redirect = Filter::redirect(kernel, from, to);
                let redirect = redirect.map_err(|source| Error::Redirect(name.clone(), source))?;
                this._redirects.push(redirect);
            }
            this.tap = Some(tap);
            queue
        };
        let card = Card {
            id: this.card,
            name: link.name.clone(),
            mac: Mac(link.mac.unwrap_or_default()),
            mtu: link.mtu,
            tap: queue,
            vhost: vhost(),
        };
        Ok((this, card))
    }

    /// The card.
    pub(super) fn card(&self) -> CardId {
        self.card
    }

    /// The interface's number.
    pub(super) fn index(&self) -> u32 {
        self.card.link
    }

    /// Whether an interface is this one or its tap.
    pub(super) fn has(&self, index: u32) -> bool {
        self.index() == index || self.tap.as_ref().is_some_and(|tap| tap.index == index)
    }
}

/// A tap device, which is removed with this even while the VMM holds it.
#[derive(Debug)]
struct Tap {
    kernel: Arc<Socket>,
    index: u32,
    name: String,
}

impl Tap {
    /// Makes one that is up and says nothing by itself.
    fn new(namespace: &Namespace, mtu: u32) -> Result<(Self, OwnedFd), Error> {
        let (name, mut queues) = namespace
            .run(|| tap::open("bulkhead%d", 1))
            .map_err(Error::Tap)?;
        let gone = || Error::Gone(name.clone());
        let queue = queues.pop().ok_or_else(gone)?;
        let kernel = Arc::clone(namespace.kernel());
        let set_up = |source| Error::SetUp(name.clone(), source);
        let links = kernel.links().map_err(set_up)?;
        let link = links.iter().find(|link| link.name == name);
        let tap = Self {
            index: link.ok_or_else(gone)?.index,
            kernel,
            name: name.clone(),
        };
        let silent = Change {
            silent: true,
            mtu: Some(mtu),
            ..Change::default()
        };
        let up = Change {
            up: Some(true),
            ..Change::default()
        };
        for change in [silent, up] {
            tap.kernel.change_link(tap.index, &change).map_err(set_up)?;
        }
        Ok((tap, queue))
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // It fails when the namespace's other users removed it.
        let _ = self.kernel.delete_link(self.index);
    }
}
