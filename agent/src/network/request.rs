//! The host's request, read.

use std::net::IpAddr;

use netlink::{Address, Destination, Hop, Neighbour, Route};
use protocol::agent;

use super::{Interface, Network};

/// The most interfaces, and the most routes and neighbours each.
const MAX_INTERFACES: usize = 64;
const MAX_ENTRIES: usize = 4096;

/// The kernel's longest name of an interface.
const MAX_NAME: usize = 15;

/// Why a request cannot be carried out.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Bad {
    /// Too much of something.
    #[error("{0} {1} are too many for one network")]
    TooMany(usize, &'static str),
    /// A field.
    #[error("the {what} {value} of a network is none")]
    Value {
        /// Of what.
        what: &'static str,
        /// Its bytes or its number.
        value: String,
    },
    /// A name that no interface of the request has.
    #[error("a {what} names the interface {name:?}, which is not among the network's")]
    Unknown {
        /// What names it.
        what: &'static str,
        /// The name.
        name: String,
    },
}

impl TryFrom<agent::ConfigureNetworkRequest> for Network {
    type Error = Bad;

    fn try_from(request: agent::ConfigureNetworkRequest) -> Result<Self, Bad> {
        for (count, what, most) in [
            (request.interfaces.len(), "interfaces", MAX_INTERFACES),
            (request.routes.len(), "routes", MAX_ENTRIES),
            (request.neighbours.len(), "neighbours", MAX_ENTRIES),
        ] {
            if count > most {
                return Err(Bad::TooMany(count, what));
            }
        }
        let interfaces: Vec<_> = request
            .interfaces
            .into_iter()
            .map(interface)
            .collect::<Result<_, _>>()?;
        let place = |what, name: &str| {
            let place = interfaces.iter().position(|one| one.name == name);
            place.map(|place| place as u32).ok_or_else(|| Bad::Unknown {
                what,
                name: name.to_owned(),
            })
        };
        let mut routes: Vec<_> = request
            .routes
            .iter()
            .map(|one| route(one, &place))
            .collect::<Result<_, _>>()?;
        // A router is reached by a route to its own network, which must be there first.
        routes.sort_by_key(|route| route.hops.iter().any(|hop| hop.gateway.is_some()));
        let neighbour = |one: &agent::Neighbour| {
            Ok(Neighbour {
                index: place("neighbour", &one.interface)?,
                address: ip("address of a neighbour", &one.address)?,
                mac: mac(&one.mac)?,
            })
        };
        Ok(Self {
            neighbours: request
                .neighbours
                .iter()
                .map(neighbour)
                .collect::<Result<_, Bad>>()?,
            interfaces,
            routes,
        })
    }
}

fn interface(one: agent::Interface) -> Result<Interface, Bad> {
    let mut bytes = one.name.bytes();
    let is_name = (1..=MAX_NAME).contains(&one.name.len())
        && ![".", ".."].contains(&one.name.as_str())
        && bytes.all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if !is_name {
        let value = format!("{:?}", one.name);
        let what = "interface name";
        return Err(Bad::Value { what, value });
    }
    Ok(Interface {
        mac: mac(&one.mac)?,
        name: one.name,
        mtu: one.mtu,
        without_arp: one.without_arp,
        addresses: one
            .addresses
            .iter()
            .map(address)
            .collect::<Result<_, _>>()?,
    })
}

fn address(one: &agent::InterfaceAddress) -> Result<Address, Bad> {
    let address = ip("address", &one.address)?;
    Ok(Address {
        index: 0,
        address,
        prefix_len: prefix_len(address, one.prefix_len)?,
        scope: byte("scope", one.scope)?,
        peer: any_ip("peer", &one.peer)?,
        broadcast: any_ip("broadcast address", &one.broadcast)?,
        permanent: true,
        without_route: one.without_route,
    })
}

fn route(
    one: &agent::Route,
    place: &impl Fn(&'static str, &str) -> Result<u32, Bad>,
) -> Result<Route, Bad> {
    let address = ip("destination", &one.destination)?;
    let hop = |hop: &agent::Hop| {
        Ok(Hop {
            index: place("route", &hop.interface)?,
            gateway: any_ip("gateway", &hop.gateway)?,
            on_link: hop.on_link,
            weight: u16::try_from(hop.weight)
                .ok()
                .filter(|weight| (1..=256).contains(weight))
                .ok_or_else(|| number("weight", hop.weight))?,
        })
    };
    Ok(Route {
        destination: Destination {
            address,
            prefix_len: prefix_len(address, one.prefix_len)?,
        },
        hops: one.hops.iter().map(hop).collect::<Result<_, _>>()?,
        source: any_ip("source", &one.source)?,
        priority: one.priority,
        scope: byte("scope", one.scope)?,
        protocol: byte("protocol", one.protocol)?,
        kind: byte("kind of route", one.kind)?,
        mtu: (one.mtu > 0).then_some(one.mtu),
    })
}

fn prefix_len(address: IpAddr, len: u32) -> Result<u8, Bad> {
    let most = if address.is_ipv4() { 32 } else { 128 };
    byte("prefix length", len)
        .ok()
        .filter(|len| *len <= most)
        .ok_or_else(|| number("prefix length", len))
}

fn byte(what: &'static str, value: u32) -> Result<u8, Bad> {
    u8::try_from(value).map_err(|_| number(what, value))
}

fn number(what: &'static str, value: u32) -> Bad {
    let value = value.to_string();
    Bad::Value { what, value }
}

fn any_ip(what: &'static str, bytes: &[u8]) -> Result<Option<IpAddr>, Bad> {
    match bytes {
        [] => Ok(None),
        bytes => ip(what, bytes).map(Some),
    }
}

fn ip(what: &'static str, bytes: &[u8]) -> Result<IpAddr, Bad> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let any = v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
    any.map_err(|_| Bad::Value {
        what,
        value: format!("{bytes:?}"),
    })
}

fn mac(bytes: &[u8]) -> Result<[u8; 6], Bad> {
    bytes.try_into().map_err(|_| Bad::Value {
        what: "card's address",
        value: format!("{bytes:?}"),
    })
}

/// The address of a card as people write it.
pub(super) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> agent::ConfigureNetworkRequest {
        let hop = |gateway: &[u8]| agent::Hop {
            interface: "eth0".to_owned(),
            gateway: gateway.to_vec(),
            weight: 1,
            ..Default::default()
        };
        let route = |gateway: &[u8]| agent::Route {
            destination: vec![10, 0, 0, 0],
            prefix_len: 8,
            hops: vec![hop(gateway)],
            ..Default::default()
        };
        agent::ConfigureNetworkRequest {
            interfaces: vec![agent::Interface {
                mac: vec![2, 0, 0, 0, 0, 1],
                name: "eth0".to_owned(),
                mtu: 1500,
                ..Default::default()
            }],
            routes: vec![route(&[10, 0, 0, 1]), route(&[])],
            ..Default::default()
        }
    }

    #[test]
    fn routes_on_the_link_come_before_those_by_a_router() {
        let network = Network::try_from(request()).unwrap();
        let gateways: Vec<_> = network
            .routes
            .iter()
            .map(|route| route.hops[0].gateway)
            .collect();
        assert_eq!(gateways, [None, Some([10, 0, 0, 1].into())]);
    }

    #[test]
    fn what_is_no_network_is_refused() {
        let bad = |change: fn(&mut agent::ConfigureNetworkRequest)| {
            let mut request = request();
            change(&mut request);
            Network::try_from(request).unwrap_err().to_string()
        };
        for (change, expected) in [
            (
                (|r| r.interfaces[0].mac = vec![1]) as fn(&mut agent::ConfigureNetworkRequest),
                "the card's address [1] of a network is none",
            ),
            (
                |r| r.interfaces[0].name = "../x".to_owned(),
                "the interface name \"../x\" of a network is none",
            ),
            (
                |r| r.routes[0].prefix_len = 33,
                "the prefix length 33 of a network is none",
            ),
            (
                |r| r.routes[0].hops[0].interface = "eth7".to_owned(),
                "a route names the interface \"eth7\", which is not among the network's",
            ),
            (
                |r| r.routes[0].source = vec![1, 2, 3],
                "the source [1, 2, 3] of a network is none",
            ),
            (
                |r| r.interfaces = vec![r.interfaces[0].clone(); 65],
                "65 interfaces are too many for one network",
            ),
        ] {
            assert_eq!(bad(change), expected);
        }
    }
}
