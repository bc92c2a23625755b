//! The pod's network: cards become the interfaces that the host's namespace of
//! the pod has, with the same names, addresses and routes.
//!
//! Cards are told apart by their addresses. One that is not there yet is on
//! the PCI bus and appears when that is looked at.

mod request;

use std::{fs, io};

use netlink::{Address, Change, Link, Neighbour, Route, Socket};

pub use self::request::Bad;

/// Why the network is not as the host wants it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request.
    #[error(transparent)]
    Bad(#[from] Bad),
    /// A card that is not there.
    #[error("there is no network card {mac} for the interface {name:?}")]
    NoCard {
        /// The interface's name.
        name: String,
        /// The card's address.
        mac: String,
    },
    /// A step.
    #[error("cannot {doing}")]
    Step {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What the host wants.
#[derive(Debug, Default)]
pub struct Network {
    interfaces: Vec<Interface>,
    /// By the interfaces' places in the list, which stand where their numbers will.
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

/// An interface.
#[derive(Debug)]
struct Interface {
    mac: [u8; 6],
    name: String,
    mtu: u32,
    without_arp: bool,
    addresses: Vec<Address>,
}

impl Network {
    /// Makes it so, in the network namespace of the calling thread. What is so already stays.
    ///
    /// # Errors
    /// When a card is missing or the kernel refuses something.
    pub fn configure(self) -> Result<(), Error> {
        let kernel = Socket::open().map_err(doing(|| "talk to the kernel's network".to_owned()))?;
        switch_loopback_on(&kernel)?;
        let links = self.cards(&kernel)?;
        rename(&kernel, &self.interfaces, &links)?;
        for (interface, link) in self.interfaces.into_iter().zip(&links) {
            interface.configure(&kernel, link.index)?;
        }
        let index = |place: u32| links.get(place as usize).map_or(0, |link| link.index);
        for mut neighbour in self.neighbours {
            neighbour.index = index(neighbour.index);
            kernel
                .add_neighbour(&neighbour)
                .map_err(doing(|| format!("add the neighbour {}", neighbour.address)))?;
        }
        for mut route in self.routes {
            for hop in &mut route.hops {
                hop.index = index(hop.index);
            }
            let to = route.destination;
            kernel.add_route(&route).map_err(doing(|| {
                format!("add the route to {}/{}", to.address, to.prefix_len)
            }))?;
        }
        Ok(())
    }

    /// The card of each interface.
    fn cards(&self, kernel: &Socket) -> Result<Vec<Link>, Error> {
        match self.cards_now(kernel) {
            Err(Error::NoCard { .. }) => {
                // What the host has plugged in shows when the bus is looked at.
                fs::write("/sys/bus/pci/rescan", "1")
                    .map_err(doing(|| "look for new cards on the PCI bus".to_owned()))?;
                self.cards_now(kernel)
            }
            cards => cards,
        }
    }

    fn cards_now(&self, kernel: &Socket) -> Result<Vec<Link>, Error> {
        let links = kernel
            .links()
            .map_err(doing(|| "list the network's interfaces".to_owned()))?;
        let card = |interface: &Interface| {
            let found = links.iter().find(|link| link.mac == Some(interface.mac));
            found.cloned().ok_or_else(|| Error::NoCard {
                name: interface.name.clone(),
                mac: request::mac_text(interface.mac),
            })
        };
        self.interfaces.iter().map(card).collect()
    }
}

impl Interface {
    fn configure(self, kernel: &Socket, index: u32) -> Result<(), Error> {
        let Self {
            name,
            mtu,
            without_arp,
            addresses,
            ..
        } = self;
        let settings = Change {
            mtu: Some(mtu),
            without_arp: Some(without_arp),
            ..Change::default()
        };
        kernel.change_link(index, &settings).map_err(doing(|| {
            format!("set up the interface {name:?} with an MTU of {mtu}")
        }))?;
        for mut address in addresses {
            address.index = index;
            kernel
                .add_address(&address)
                .map_err(doing(|| format!("give {} to {name:?}", address.address)))?;
        }
        kernel
            .change_link(index, &up())
            .map_err(doing(|| format!("switch the interface {name:?} on")))
    }
}

/// Gives the links their names. Those that stand in the way step aside first.
fn rename(kernel: &Socket, interfaces: &[Interface], links: &[Link]) -> Result<(), Error> {
    let wrong: Vec<_> = interfaces
        .iter()
        .zip(links)
        .filter(|(interface, link)| interface.name != link.name)
        .collect();
    let name = |link: &Link, name: &str| {
        let change = Change {
            name: Some(name),
            ..Change::default()
        };
        kernel.change_link(link.index, &change).map_err(doing(|| {
            format!("name the interface {:?} {name:?}", link.name)
        }))
    };
    for (_, link) in &wrong {
        if wrong
            .iter()
            .any(|(interface, _)| interface.name == link.name)
        {
            name(link, &format!("aside{}", link.index))?;
        }
    }
    wrong
        .iter()
        .try_for_each(|(interface, link)| name(link, &interface.name))
}

fn switch_loopback_on(kernel: &Socket) -> Result<(), Error> {
    let on = || "switch the loopback on".to_owned();
    let links = kernel.links().map_err(doing(on))?;
    let loopback = links.iter().find(|link| link.flags.is_loopback());
    match loopback.filter(|link| !link.flags.is_up()) {
        Some(link) => kernel.change_link(link.index, &up()).map_err(doing(on)),
        None => Ok(()),
    }
}

fn up() -> Change<'static> {
    Change {
        up: Some(true),
        ..Change::default()
    }
}

fn doing(what: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Step {
        doing: what(),
        source,
    }
}
