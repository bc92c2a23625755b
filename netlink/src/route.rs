//! Routes of the main table.

use std::{io, net::IpAddr};

use crate::{
    Socket,
    message::{Message, attributes, family, ip, ip_bytes, u16_at, u32_at},
    socket::{CREATE, REPLACE},
};

/// `RTM_*ROUTE` of linux/rtnetlink.h.
const NEW: u16 = 24;
const DELETE: u16 = 25;
const GET: u16 = 26;

/// `RTA_*` of linux/rtnetlink.h.
const DESTINATION: u16 = 1;
const INTERFACE: u16 = 4;
const GATEWAY: u16 = 5;
const PRIORITY: u16 = 6;
const PREFERRED_SOURCE: u16 = 7;
const METRICS: u16 = 8;
const MULTIPATH: u16 = 9;
const TABLE: u16 = 15;
const VIA: u16 = 18;
/// `RTAX_MTU`
const METRIC_MTU: u16 = 2;

/// `RT_TABLE_MAIN`
const MAIN: u32 = 254;
/// `RTNH_F_ONLINK`
const ON_LINK: u32 = 4;

/// Length of `struct rtmsg`.
const FIXED: usize = 12;
/// Length of `struct rtnexthop`.
const HOP: usize = 8;

/// Where a route leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    /// The network.
    pub address: IpAddr,
    /// The length of its prefix.
    pub prefix_len: u8,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub destination: Destination,
    /// The ways there, of which one is taken.
    pub hops: Vec<Hop>,
    /// The address that packets are sent from.
    pub source: Option<IpAddr>,
    /// Which of several routes is preferred: the one with less.
    pub priority: u32,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
    /// What happens to packets (`RTN_*`): mostly they are sent on.
    pub kind: u8,
    /// The longest packet, if it is not the interface's.
    pub mtu: Option<u32>,
}

/// A way to a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// The interface's number.
    pub index: u32,
    /// The router, unless the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Whether the router is on the link whatever the addresses say.
    pub on_link: bool,
    /// How often it is taken, from 1.
    pub weight: u16,
}

impl Route {
    /// `RTN_UNICAST`
    pub const UNICAST: u8 = 1;
    /// `RTPROT_KERNEL`: it belongs to an address.
    pub const OF_KERNEL: u8 = 2;
    /// `RTPROT_RA`: a router told of it.
    pub const OF_ROUTER: u8 = 9;
}

impl Socket {
    /// The routes of the main table.
    ///
    /// # Errors
    /// The kernel's.
    pub fn routes(&self) -> io::Result<Vec<Route>> {
        let all = self.list(GET, &[0; FIXED], |body| Some(read(body)))?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Adds a route to the main table, or puts it in the place of the one that is there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_route(&self, route: &Route) -> io::Result<()> {
        self.change(NEW, CREATE | REPLACE, |message| write(message, route))
    }

    /// Removes a route from the main table.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_route(&self, route: &Route) -> io::Result<()> {
        self.change(DELETE, 0, |message| write(message, route))
    }
}

/// Appends a route.
fn write(message: Message, route: &Route) -> Message {
    let Destination {
        address,
        prefix_len,
    } = route.destination;
    let mut fixed = [0; FIXED];
    fixed[0] = family(address);
    fixed[1] = prefix_len;
    fixed[4..8].copy_from_slice(&[MAIN as u8, route.protocol, route.scope, route.kind]);
    let one = match route.hops.as_slice() {
        [hop] => Some(hop),
        _ => None,
    };
    if one.is_some_and(|hop| hop.on_link) {
        fixed[8..].copy_from_slice(&ON_LINK.to_ne_bytes());
    }
    let mut message = message.fixed(&fixed);
    if prefix_len > 0 {
        message = message.with(DESTINATION, &ip_bytes(address));
    }
    message = match one {
        Some(hop) => via(message, address, hop).with(INTERFACE, &hop.index.to_ne_bytes()),
        None if route.hops.is_empty() => message,
        None => message.nested(MULTIPATH, |message| {
            let each = |message, hop| next_hop(message, address, hop);
            route.hops.iter().fold(message, each)
        }),
    };
    if route.priority > 0 {
        message = message.with(PRIORITY, &route.priority.to_ne_bytes());
    }
    message = message.with_any(PREFERRED_SOURCE, route.source.map(ip_bytes));
    match route.mtu {
        Some(mtu) => message.nested(METRICS, |message| {
            message.with(METRIC_MTU, &mtu.to_ne_bytes())
        }),
        None => message,
    }
}

/// Appends a hop's router, which may be of the other family than the destination.
fn via(message: Message, destination: IpAddr, hop: &Hop) -> Message {
    match hop.gateway {
        None => message,
        Some(gateway) if gateway.is_ipv4() == destination.is_ipv4() => {
            message.with(GATEWAY, &ip_bytes(gateway))
        }
        Some(gateway) => {
            let family = u16::from(family(gateway)).to_ne_bytes();
            message.with(VIA, &[&family[..], &ip_bytes(gateway)].concat())
        }
    }
}

/// Appends a hop as one of several (`struct rtnexthop`).
fn next_hop(message: Message, destination: IpAddr, hop: &Hop) -> Message {
    let inside = via(Message::new(0, 0), destination, hop).finish(0);
    let attributes = &inside[crate::message::HEADER..];
    let flags = if hop.on_link { ON_LINK as u8 } else { 0 };
    let weight = hop.weight.clamp(1, 256) - 1;
    let mut bytes = ((HOP + attributes.len()) as u16).to_ne_bytes().to_vec();
    bytes.extend([flags, weight as u8]);
    bytes.extend(hop.index.to_ne_bytes());
    bytes.extend(attributes);
    message.fixed(&bytes)
}

/// Reads a route; nothing if it is of another table or of no protocol that has addresses.
fn read(body: &[u8]) -> Option<Route> {
    let [family, prefix_len, _, _, table, protocol, scope, kind] = *body.first_chunk()?;
    let unspecified = match family {
        2 => IpAddr::from([0; 4]),
        10 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let flags = u32_at(body, 8)?;
    let mut table = u32::from(table);
    let mut route = Route {
        destination: Destination {
            address: unspecified,
            prefix_len,
        },
        hops: Vec::new(),
        source: None,
        priority: 0,
        scope,
        protocol,
        kind,
        mtu: None,
    };
    let (mut index, mut gateway) = (None, None);
    for (kind, value) in attributes(body.get(FIXED..)?) {
        match kind {
            DESTINATION => route.destination.address = ip(value)?,
            INTERFACE => index = u32_at(value, 0),
            GATEWAY => gateway = ip(value),
            VIA => gateway = ip(value.get(2..)?),
            PRIORITY => route.priority = u32_at(value, 0)?,
            PREFERRED_SOURCE => route.source = ip(value),
            TABLE => table = u32_at(value, 0)?,
            MULTIPATH => route.hops = hops(value),
            METRICS => {
                let mtu = attributes(value).find(|(kind, _)| *kind == METRIC_MTU);
                route.mtu = mtu.and_then(|(_, value)| u32_at(value, 0));
            }
            _ => {}
        }
    }
    if let Some(index) = index {
        route.hops.push(Hop {
            index,
            gateway,
            on_link: flags & ON_LINK != 0,
            weight: 1,
        });
    }
    (table == MAIN).then_some(route)
}

fn hops(mut bytes: &[u8]) -> Vec<Hop> {
    let mut hops = Vec::new();
    while let Some(hop) = hop(&mut bytes) {
        hops.push(hop);
    }
    hops
}

fn hop(bytes: &mut &[u8]) -> Option<Hop> {
    let len = usize::from(u16_at(bytes, 0)?);
    let own = bytes.get(..len).filter(|own| own.len() >= HOP)?;
    *bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    let gateway = attributes(&own[HOP..]).find_map(|(kind, value)| match kind {
        GATEWAY => ip(value),
        VIA => ip(value.get(2..)?),
        _ => None,
    });
    Some(Hop {
        index: u32_at(own, 4)?,
        gateway,
        on_link: u32::from(own[2]) & ON_LINK != 0,
        weight: u16::from(own[3]) + 1,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn several_hops_are_read_as_they_are_written() {
        let destination = IpAddr::from([10, 0, 0, 0]);
        let hops = [
            Hop {
                index: 3,
                gateway: Some(IpAddr::from([10, 1, 0, 1])),
                on_link: true,
                weight: 1,
            },
            Hop {
                index: 4,
                gateway: Some(IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 1])),
                on_link: false,
                weight: 7,
            },
        ];
        let each = |message, hop| next_hop(message, destination, hop);
        let bytes = hops.iter().fold(Message::new(0, 0), each).finish(0);
        assert_eq!(super::hops(&bytes[16..]), hops);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_their_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(super::hops(&bytes).len() <= bytes.len());
            let _ = super::read(&bytes);
        }
    }
}
