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

/// What belongs to interfaces, by their numbers.
#[derive(Debug)]
struct Settings {
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

impl Network {
    /// Makes it so, in the network namespace of the calling thread. What is so already stays, and
    /// what only `before`, the network that the host wanted last, has is removed; what others have
    /// changed is theirs.
    ///
    /// # Errors
    /// When a card is missing or the kernel refuses something.
    pub fn configure(&self, before: &Self) -> Result<(), Error> {
        let kernel = Socket::open().map_err(doing(|| "talk to the kernel's network".to_owned()))?;
        switch_loopback_on(&kernel)?;
        let links = self.cards(&kernel)?;
        let wanted = self.numbered(&links);
        before.numbered(&links).without(&wanted).remove(&kernel)?;
        rename(&kernel, &self.interfaces, &links)?;
        for (interface, link) in self.interfaces.iter().zip(&links) {
            interface.configure(&kernel, link.index)?;
        }
        for neighbour in &wanted.neighbours {
            kernel
                .add_neighbour(neighbour)
                .map_err(doing(|| format!("add the neighbour {}", neighbour.address)))?;
        }
        for route in &wanted.routes {
            kernel
                .add_route(route)
                .map_err(doing(|| format!("add {}", text(route))))?;
        }
        Ok(())
    }

    /// What belongs to those of its interfaces whose cards are among `links`.
    fn numbered(&self, links: &[Link]) -> Settings {
        let index = |interface: &Interface| {
            let card = links.iter().find(|link| link.mac == Some(interface.mac));
            card.map(|link| link.index)
        };
        let numbers: Vec<Option<u32>> = self.interfaces.iter().map(index).collect();
        let number = |place: u32| numbers.get(place as usize).copied().flatten();
        let with_numbers = self.interfaces.iter().zip(&numbers);
        let there = with_numbers.filter_map(|(interface, number)| Some((interface, (*number)?)));
        let route = |route: &Route| {
            let mut route = route.clone();
            for hop in &mut route.hops {
                hop.index = number(hop.index)?;
            }
            Some(route)
        };
        let neighbour = |neighbour: &Neighbour| {
            let index = number(neighbour.index)?;
            Some(Neighbour {
                index,
                ..neighbour.clone()
            })
        };
        Settings {
            addresses: there
                .flat_map(|(interface, index)| interface.addresses_at(index))
                .collect(),
            routes: self.routes.iter().filter_map(route).collect(),
            neighbours: self.neighbours.iter().filter_map(neighbour).collect(),
        }
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
    fn configure(&self, kernel: &Socket, index: u32) -> Result<(), Error> {
        let Self { name, mtu, .. } = self;
        let settings = Change {
            mtu: Some(*mtu),
            without_arp: Some(self.without_arp),
            ..Change::default()
        };
        kernel.change_link(index, &settings).map_err(doing(|| {
            format!("set up the interface {name:?} with an MTU of {mtu}")
        }))?;
        for address in self.addresses_at(index) {
            kernel
                .add_address(&address)
                .map_err(doing(|| format!("give {} to {name:?}", address.address)))?;
        }
        kernel
            .change_link(index, &up())
            .map_err(doing(|| format!("switch the interface {name:?} on")))
    }

    /// Its addresses, when it has this number.
    fn addresses_at(&self, index: u32) -> impl Iterator<Item = Address> {
        let own = self.addresses.iter().cloned();
        own.map(move |address| Address { index, ..address })
    }
}

impl Settings {
    /// Those that `others` are without.
    fn without(mut self, others: &Self) -> Self {
        self.addresses.retain(|one| !others.addresses.contains(one));
        self.routes.retain(|one| !others.routes.contains(one));
        self.neighbours
            .retain(|one| !others.neighbours.contains(one));
        self
    }

    fn remove(&self, kernel: &Socket) -> Result<(), Error> {
        // Before the addresses, with which routes may go by themselves.
        for route in &self.routes {
            let gone = unless_gone(kernel.delete_route(route));
            gone.map_err(doing(|| format!("remove {}", text(route))))?;
        }
        for neighbour in &self.neighbours {
            let gone = unless_gone(kernel.delete_neighbour(neighbour));
            gone.map_err(doing(|| {
                format!("remove the neighbour {}", neighbour.address)
            }))?;
        }
        for address in &self.addresses {
            let gone = unless_gone(kernel.delete_address(address));
            gone.map_err(doing(|| format!("take {} away", address.address)))?;
        }
        Ok(())
    }
}

/// Nothing is wrong when a program of the guest removed it before.
fn unless_gone(removed: io::Result<()>) -> io::Result<()> {
    const GONE: [i32; 4] = [libc::ESRCH, libc::ENOENT, libc::ENODEV, libc::EADDRNOTAVAIL];
    match removed {
        Err(error) if error.raw_os_error().is_some_and(|it| GONE.contains(&it)) => Ok(()),
        removed => removed,
    }
}

fn text(route: &Route) -> String {
    let to = route.destination;
    format!("the route to {}/{}", to.address, to.prefix_len)
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
