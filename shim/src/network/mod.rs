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

/// A card for the guest.
#[derive(Debug)]
pub struct Card {
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
    /// When one cannot be joined; what was joined by this call is undone.
    pub fn join(&mut self) -> Result<Vec<Card>, Error> {
        let mut joined = Vec::new();
        let mut cards = Vec::new();
        for link in self
            .links()?
            .into_iter()
            .filter(|link| left(link).is_none())
        {
            let (one, card) =
                Joined::new(&self.namespace, &link).map_err(|source| Error::Join {
                    name: link.name.clone(),
                    source,
                })?;
            joined.push(one);
            cards.push(card);
        }
        self.joined.append(&mut joined);
        Ok(cards)
    }

    /// The interfaces that the guest does not get.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub fn left(&self) -> Result<Vec<Left>, Error> {
        let links = self.links()?.into_iter();
        Ok(links
            .filter_map(|link| {
                let reason = left(&link)?;
                let name = link.name;
                Some(Left { name, reason })
            })
            .collect())
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

    /// The interfaces that are neither joined nor our own.
    fn links(&self) -> Result<Vec<Link>, Error> {
        let mut links = self
            .namespace
            .kernel()
            .links()
            .map_err(|source| Error::List {
                what: "interfaces",
                source,
            })?;
        links.retain(|link| {
            !link.flags.is_loopback() && !self.joined.iter().any(|one| one.has(link.index))
        });
        Ok(links)
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

/// Why the guest does not get an interface, if it does not.
fn left(link: &Link) -> Option<Reason> {
    if !link.flags.is_up() {
        return Some(Reason::Down);
    }
    (!link.ethernet || link.mac.is_none()).then_some(Reason::NotEthernet)
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
