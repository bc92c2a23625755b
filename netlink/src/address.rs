//! Addresses of interfaces.

use std::{io, net::IpAddr};

use crate::{
    Socket,
    message::{Message, attributes, family, ip, ip_bytes, u32_at},
    socket::{CREATE, REPLACE},
};

/// `RTM_*ADDR` of linux/rtnetlink.h.
const NEW: u16 = 20;
const DELETE: u16 = 21;
const GET: u16 = 22;

/// `IFA_*` of linux/if_addr.h.
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const BROADCAST: u16 = 4;
const FLAGS: u16 = 8;

/// `IFA_F_*` of linux/if_addr.h.
const NO_DAD: u32 = 0x02;
const PERMANENT: u32 = 0x80;
const NO_PREFIX_ROUTE: u32 = 0x200;

/// Length of `struct ifaddrmsg`.
const FIXED: usize = 8;

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The interface's number.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// The length of the network's prefix.
    pub prefix_len: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// The other end, of a link between two.
    pub peer: Option<IpAddr>,
    /// The broadcast address.
    pub broadcast: Option<IpAddr>,
    /// Whether somebody gave it to the interface, rather than a router or the kernel for a time.
    pub permanent: bool,
    /// Whether no route to its network belongs to it.
    pub without_route: bool,
}

impl Socket {
    /// The addresses of the namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn addresses(&self) -> io::Result<Vec<Address>> {
        self.list(GET, &[0; FIXED], read)
    }

    /// Gives an interface an address, which is not looked for elsewhere before.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_address(&self, address: &Address) -> io::Result<()> {
        let mut flags = PERMANENT;
        if address.address.is_ipv6() {
            flags |= NO_DAD;
        }
        if address.without_route {
            flags |= NO_PREFIX_ROUTE;
        }
        self.change(NEW, CREATE | REPLACE, |message| {
            named(message, address)
                .with_any(BROADCAST, address.broadcast.map(ip_bytes))
                .with(FLAGS, &flags.to_ne_bytes())
        })
    }

    /// Takes an address from its interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_address(&self, address: &Address) -> io::Result<()> {
        self.change(DELETE, 0, |message| named(message, address))
    }
}

/// Appends what tells an address from others.
fn named(message: Message, address: &Address) -> Message {
    let mut fixed = [0; FIXED];
    let family = family(address.address);
    fixed[..4].copy_from_slice(&[family, address.prefix_len, 0, address.scope]);
    fixed[4..].copy_from_slice(&address.index.to_ne_bytes());
    let peer = address.peer.unwrap_or(address.address);
    message
        .fixed(&fixed)
        .with(LOCAL, &ip_bytes(address.address))
        .with(ADDRESS, &ip_bytes(peer))
}

fn read(body: &[u8]) -> Option<Address> {
    let (mut local, mut address, mut broadcast) = (None, None, None);
    let mut flags = u32::from(*body.get(2)?);
    for (kind, value) in attributes(body.get(FIXED..)?) {
        match kind {
            ADDRESS => address = ip(value),
            LOCAL => local = ip(value),
            BROADCAST => broadcast = ip(value),
            FLAGS => flags = u32_at(value, 0)?,
            _ => {}
        }
    }
    let own = local.or(address)?;
    Some(Address {
        index: u32_at(body, 4)?,
        address: own,
        prefix_len: *body.get(1)?,
        scope: *body.get(3)?,
        peer: address.filter(|other| *other != own),
        broadcast,
        permanent: flags & PERMANENT != 0,
        without_route: flags & NO_PREFIX_ROUTE != 0,
    })
}
