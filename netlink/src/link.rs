//! Network interfaces.

use std::io;

use crate::{
    Socket,
    message::{attributes, text, u16_at, u32_at},
    socket::{CREATE, EXCLUSIVE},
};

/// `RTM_*LINK` of linux/rtnetlink.h.
const NEW: u16 = 16;
const DELETE: u16 = 17;
const GET: u16 = 18;

/// `IFLA_*` of linux/if_link.h.
const ADDRESS: u16 = 1;
const NAME: u16 = 3;
const MTU: u16 = 4;
const MASTER: u16 = 10;
const INFO: u16 = 18;
const AF_SPEC: u16 = 26;
/// `IFLA_INFO_KIND`, `IFLA_INFO_DATA`
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
/// `IFLA_IPVLAN_MODE`, `IPVLAN_MODE_L3S`
const IPVLAN_MODE: u16 = 1;
const IPVLAN_L3S: u16 = 2;
/// `IFLA_INET6_ADDR_GEN_MODE`, `IN6_ADDR_GEN_MODE_NONE`
const INET6_MODE: u16 = 8;
const INET6_MODE_NONE: u8 = 1;
const AF_INET6: u16 = 10;

/// `ARPHRD_ETHER`
const ETHERNET: u16 = 1;

/// Length of `struct ifinfomsg`.
const FIXED: usize = 16;

/// The flags of an interface (`IFF_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkFlags(pub u32);

impl LinkFlags {
    const UP: u32 = 0x1;
    const LOOPBACK: u32 = 0x8;
    const NO_ARP: u32 = 0x80;

    /// Whether it is switched on.
    pub fn is_up(self) -> bool {
        self.0 & Self::UP != 0
    }

    /// Whether it is the loopback.
    pub fn is_loopback(self) -> bool {
        self.0 & Self::LOOPBACK != 0
    }

    /// Whether neighbours are found without asking.
    pub fn is_without_arp(self) -> bool {
        self.0 & Self::NO_ARP != 0
    }
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its address, if it is of six bytes.
    pub mac: Option<[u8; 6]>,
    /// The longest packet.
    pub mtu: u32,
    /// Its flags.
    pub flags: LinkFlags,
    /// Whether its packets are Ethernet frames.
    pub ethernet: bool,
    /// What it is, as `veth` or `tun`; nothing for hardware and loopback.
    pub kind: Option<String>,
    /// The bridge or bond that it is a port of.
    pub master: Option<u32>,
    /// Whether it is an ipvlan in mode l3s: its packets come in by the master alone.
    pub l3s: bool,
}

/// What is to be another way.
#[derive(Debug, Clone, Default)]
pub struct Change<'a> {
    /// Its name.
    pub name: Option<&'a str>,
    /// Its address.
    pub mac: Option<[u8; 6]>,
    /// The longest packet.
    pub mtu: Option<u32>,
    /// Whether it is switched on.
    pub up: Option<bool>,
    /// Whether neighbours are found without asking.
    pub without_arp: Option<bool>,
    /// It makes no IPv6 address for itself.
    pub silent: bool,
}

impl Socket {
    /// The interfaces of the namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        self.list(GET, &[0; FIXED], read)
    }

    /// Changes an interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn change_link(&self, index: u32, change: &Change<'_>) -> io::Result<()> {
        let (mut flags, mut mask) = (0, 0);
        for (value, flag) in [
            (change.up, LinkFlags::UP),
            (change.without_arp, LinkFlags::NO_ARP),
        ] {
            if let Some(value) = value {
                mask |= flag;
                flags |= if value { flag } else { 0 };
            }
        }
        self.change(NEW, 0, |message| {
            let message = message
                .fixed(&fixed(index, flags, mask))
                .with_any(ADDRESS, change.mac)
                .with_any(MTU, change.mtu.map(u32::to_ne_bytes));
            let message = match change.name {
                Some(name) => message.with_text(NAME, name),
                None => message,
            };
            match change.silent {
                true => message.nested(AF_SPEC, |message| {
                    message.nested(AF_INET6, |message| {
                        message.with(INET6_MODE, &[INET6_MODE_NONE])
                    })
                }),
                false => message,
            }
        })
    }

    /// Makes an interface of a kind that needs no more than its name, as `dummy` or `bridge`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_link(&self, name: &str, kind: &str) -> io::Result<()> {
        self.change(NEW, CREATE | EXCLUSIVE, |message| {
            message
                .fixed(&fixed(0, 0, 0))
                .with_text(NAME, name)
                .nested(INFO, |message| message.with_text(INFO_KIND, kind))
        })
    }

    /// Removes an interface.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_link(&self, index: u32) -> io::Result<()> {
        self.change(DELETE, 0, |message| message.fixed(&fixed(index, 0, 0)))
    }
}

/// `struct ifinfomsg`
fn fixed(index: u32, flags: u32, mask: u32) -> [u8; FIXED] {
    let mut bytes = [0; FIXED];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..].copy_from_slice(&mask.to_ne_bytes());
    bytes
}

fn read(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        ethernet: u16_at(body, 2)? == ETHERNET,
        index: u32_at(body, 4)?,
        flags: LinkFlags(u32_at(body, 8)?),
        name: String::new(),
        mac: None,
        mtu: 0,
        kind: None,
        master: None,
        l3s: false,
    };
    for (kind, value) in attributes(body.get(FIXED..)?) {
        match kind {
            ADDRESS => link.mac = value.try_into().ok(),
            NAME => link.name = text(value),
            MTU => link.mtu = u32_at(value, 0)?,
            MASTER => link.master = u32_at(value, 0),
            INFO => {
                let part = |which| attributes(value).find(|(kind, _)| *kind == which);
                link.kind = part(INFO_KIND).map(|(_, value)| text(value));
                if link.kind.as_deref() == Some("ipvlan")
                    && let Some((_, data)) = part(INFO_DATA)
                {
                    let mode = attributes(data).find(|(kind, _)| *kind == IPVLAN_MODE);
                    link.l3s = mode.and_then(|(_, mode)| u16_at(mode, 0)) == Some(IPVLAN_L3S);
                }
            }
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_namespace_has_a_loopback() {
        let links = Socket::open().unwrap().links().unwrap();
        let loopback = links.iter().find(|link| link.flags.is_loopback()).unwrap();
        assert_eq!(loopback.name, "lo");
        assert!(!loopback.ethernet);
    }
}
