//! The pod's network: every interface of its namespace is joined with a card
//! of the guest, and what belongs to the interface is told to the guest.
//!
//! ```text
//!   netns of the pod                                 guest
//!   eth0 (veth, macvlan, …) ──ingress: redirect──► tap ═══ card "eth0"
//!                            ◄──ingress: redirect── tap     same address, routes …
//! ```
//!
//! The interface keeps its addresses, so that whoever made it finds it as it
//! was; since all that comes in is redirected, the host's kernel answers none
//! of it. What is made here is undone when the [`Network`] is dropped.

mod changes;
mod filter;
mod joined;
mod loopback;
mod namespace;
mod request;
mod resolver;
mod syn;
mod sys;

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

use netlink::Link;
use protocol::agent::ConfigureNetworkRequest;
use vmm::config::{Mac, NetConfig, Rate, Resource};

use self::joined::Joined;
pub use self::{
    changes::Changes,
    joined::Error as JoinError,
    loopback::{Error as LoopbackError, Loopback},
    namespace::Namespace,
    resolver::{Resolver, on_loopback},
};

/// Why the pod has no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace.
    #[error("cannot enter the pod's network namespace")]
    Enter(#[source] io::Error),
    /// The one that this process is in.
    #[error(
        "the network namespace of linux.namespaces is the host's own, which a virtual machine would take over; give the container one of its own"
    )]
    Host,
    /// A fresh one.
    #[error("cannot make a network namespace")]
    Make(#[source] io::Error),
    /// What is in it.
    #[error("cannot list the {what} of the pod's network namespace")]
    List {
        /// Of what.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An interface.
    #[error("cannot join the pod's interface {name:?} with the guest")]
    Join {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: JoinError,
    },
}

/// The network of a pod.
#[derive(Debug)]
pub struct Network {
    namespace: Namespace,
    joined: Vec<Joined>,
}

/// Which card it is: an interface that gets another address needs another card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CardId {
    /// The interface's number.
    link: u32,
    mac: [u8; 6],
}

/// A card for the guest.
#[derive(Debug)]
pub struct Card {
    /// Which one.
    pub id: CardId,
    /// The interface that it is joined with, and its own name in the guest.
    pub name: String,
    /// Its address.
    pub mac: Mac,
    /// The longest packet.
    pub mtu: u32,
    /// The tap that it is plugged into.
    pub tap: OwnedFd,
    /// `/dev/vhost-net`, where the host has it.
    pub vhost: Option<OwnedFd>,
}

/// What was joined with an interface that is gone; dropping it undoes that.
#[derive(Debug)]
pub struct Parted(Joined);

impl Parted {
    /// The slot of the guest's bus that its card is still in, if it is.
    pub fn slot(&self) -> Option<u8> {
        self.0.slot
    }
}

/// An interface that the guest does not get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: Reason,
}

/// Why the guest does not get an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It is switched off.
    Down,
    /// Its packets are no Ethernet frames.
    NotEthernet,
    /// It is a port of a bridge or a bond that the guest gets: what comes in goes there.
    Port,
}

impl Network {
    /// The network of the namespace that `fd` stands for, or of a fresh one with a loopback.
    ///
    /// # Errors
    /// When it cannot be entered or made.
    pub fn open(fd: Option<OwnedFd>) -> Result<Self, Error> {
        let namespace = match fd {
            Some(fd) if is_own(&fd).map_err(Error::Enter)? => return Err(Error::Host),
            Some(fd) => Namespace::open(fd).map_err(Error::Enter)?,
            None => Namespace::fresh().map_err(Error::Make)?,
        };
        Ok(Self {
            namespace,
            joined: Vec::new(),
        })
    }

    /// The namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Joins every interface that is there and was not before, and returns the guest's cards
    /// for them.
    ///
    /// # Errors
    /// When one cannot be joined.
    pub fn join(&mut self) -> Result<Vec<Card>, Error> {
        let (cards, failed) = self.join_each()?;
        failed.map_or(Ok(cards), Err)
    }

    /// As [`Network::join`]; why one cannot be joined comes with the cards of the others.
    ///
    /// # Errors
    /// When the interfaces cannot be listed.
    pub fn join_each(&mut self) -> Result<(Vec<Card>, Option<Error>), Error> {
        let mut cards = Vec::new();
        let mut failed = None;
        let all = self.all_links()?;
        let new = all.iter().filter(|link| self.is_new(link));
        let wanted: Vec<_> = new.filter(|link| left(link, &all).is_none()).collect();
        for link in wanted {
            let mac = CardId::of(link).mac;
            let joined = match self.joined.iter().any(|one| one.card().mac == mac) {
                true => Err(JoinError::SameAddress(Mac(mac))),
                false => Joined::new(&self.namespace, link),
            };
            match joined {
                Ok((one, card)) => {
                    self.joined.push(one);
                    cards.push(card);
                }
                Err(source) => {
                    let name = link.name.clone();
                    failed.get_or_insert(Error::Join { name, source });
                }
            }
        }
        Ok((cards, failed))
    }

    /// Notes the slot of the guest's bus that the card for an interface is in.
    pub fn plugged(&mut self, card: CardId, slot: u8) {
        if let Some(one) = self.joined.iter_mut().find(|one| one.card() == card) {
            one.slot = Some(slot);
        }
    }

    /// Notes the slots of all cards, in the order in which their interfaces were joined.
    pub fn plugged_in_order(&mut self, slots: impl Iterator<Item = u8>) {
        for (one, slot) in self.joined.iter_mut().zip(slots) {
            one.slot = Some(slot);
        }
    }

    /// Undoes the join of an interface, whose card the guest does not have.
    pub fn part(&mut self, card: CardId) {
        self.joined.retain(|one| one.card() != card);
    }

    /// Parts from the interfaces that are not there any more.
    ///
    /// # Errors
    /// When those that are there cannot be listed.
    pub fn part_from_gone(&mut self) -> Result<Vec<Parted>, Error> {
        let links = self.all_links()?;
        let gone = |one: &mut Joined| !links.iter().any(|link| one.card() == CardId::of(link));
        Ok(self.joined.extract_if(.., gone).map(Parted).collect())
    }

    /// The interfaces that the guest does not get.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn left(&self) -> Result<Vec<Left>, Error> {
        let all = self.all_links()?;
        let new = all.iter().filter(|link| self.is_new(link));
        let left = new.filter_map(|link| {
            let reason = left(link, &all)?;
            let name = link.name.clone();
            Some(Left { name, reason })
        });
        Ok(left.collect())
    }

    /// What the agent is told: all of what belongs to the interfaces that are joined, as it is now.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn request(&self) -> Result<ConfigureNetworkRequest, Error> {
        let kernel = self.namespace.kernel();
        let list = |what| move |source| Error::List { what, source };
        let settings = request::Settings {
            links: kernel.links().map_err(list("interfaces"))?,
            addresses: kernel.addresses().map_err(list("addresses"))?,
            routes: kernel.routes().map_err(list("routes"))?,
            neighbours: kernel.neighbours().map_err(list("neighbours"))?,
        };
        let joined = self.joined.iter().map(Joined::index).collect();
        Ok(settings.request(&joined))
    }

    /// Whether an interface is neither joined nor our own.
    fn is_new(&self, link: &Link) -> bool {
        !link.flags.is_loopback() && !self.joined.iter().any(|one| one.has(link.index))
    }

    fn all_links(&self) -> Result<Vec<Link>, Error> {
        let what = "interfaces";
        let links = self.namespace.kernel().links();
        links.map_err(|source| Error::List { what, source })
    }
}

impl CardId {
    fn of(link: &Link) -> Self {
        Self {
            link: link.index,
            mac: link.mac.unwrap_or_default(),
        }
    }
}

impl Card {
    /// The card for the VMM's configuration; `pass` makes a resource of each descriptor.
    pub fn config(self, mut pass: impl FnMut(OwnedFd) -> Resource) -> NetConfig {
        NetConfig {
            taps: vec![pass(self.tap)],
            vhost: self.vhost.into_iter().map(pass).collect(),
            mac: self.mac,
            mtu: u16::try_from(self.mtu).ok(),
            to_guest: Rate::default(),
            from_guest: Rate::default(),
        }
    }

    /// The card for a VMM that runs, and the descriptors to send along.
    pub fn hot_plug(&self) -> (NetConfig, Vec<BorrowedFd<'_>>) {
        let fds: Vec<_> = [Some(&self.tap), self.vhost.as_ref()]
            .into_iter()
            .flatten()
            .map(|fd| fd.as_fd())
            .collect();
        let config = NetConfig {
            taps: vec![Resource::Fd(0)],
            vhost: self.vhost.iter().map(|_| Resource::Fd(1)).collect(),
            mac: self.mac,
            mtu: u16::try_from(self.mtu).ok(),
            to_guest: Rate::default(),
            from_guest: Rate::default(),
        };
        (config, fds)
    }
}

/// Why the guest does not get an interface of `all`, if it does not.
fn left(link: &Link, all: &[Link]) -> Option<Reason> {
    if !link.flags.is_up() {
        return Some(Reason::Down);
    }
    if !link.ethernet || link.mac.is_none() {
        return Some(Reason::NotEthernet);
    }
    let takes_all = |link: &Link| {
        let kind = link.kind.as_deref().unwrap_or_default();
        link.flags.is_up() && ["bridge", "bond", "team"].contains(&kind)
    };
    let mut masters = all.iter().filter(|one| Some(one.index) == link.master);
    // A tap in a bridge is told of as it cannot be joined.
    (link.kind.as_deref() != Some("tun") && masters.any(takes_all)).then_some(Reason::Port)
}

/// Whether `fd` stands for the network namespace that this process is in.
fn is_own(fd: &OwnedFd) -> io::Result<bool> {
    let given = File::from(fd.try_clone()?).metadata()?;
    let own = fs::metadata("/proc/self/ns/net")?;
    Ok((given.dev(), given.ino()) == (own.dev(), own.ino()))
}

/// The host's own packet mover, where it is and may be used.
fn vhost() -> Option<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/vhost-net");
    file.ok().map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_network_is_not_taken_over() {
        let own = File::open("/proc/self/ns/net").expect("there");
        let error = Network::open(Some(own.into())).expect_err("refused");
        assert!(error.to_string().contains("the host's own"), "{error}");
    }
}
