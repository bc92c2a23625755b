//! What belongs to the pod's interfaces, as the agent is told.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use netlink::{Address, Link, Neighbour, Route};
use protocol::agent;

/// The settings of a namespace.
pub(super) struct Settings {
    pub(super) links: Vec<Link>,
    pub(super) addresses: Vec<Address>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

impl Settings {
    /// What belongs to the interfaces whose numbers are in `joined`, and to no other.
    ///
    /// What the guest's kernel will make or hear of by itself is left out: routes that belong to
    /// addresses, and whatever a router announces.
    pub(super) fn request(&self, joined: &BTreeSet<u32>) -> agent::ConfigureNetworkRequest {
        let links = self
            .links
            .iter()
            .filter(|link| joined.contains(&link.index));
        let names: BTreeMap<u32, &str> = links
            .clone()
            .map(|link| (link.index, link.name.as_str()))
            .collect();
        let interfaces = links.map(|link| self.interface(link)).collect();
        let routes = self.routes.iter();
        let neighbours = self.neighbours.iter();
        agent::ConfigureNetworkRequest {
            interfaces,
            routes: routes.filter_map(|one| route(one, &names)).collect(),
            neighbours: neighbours
                .filter_map(|one| {
                    Some(agent::Neighbour {
                        interface: (*names.get(&one.index)?).to_owned(),
                        address: bytes(one.address),
                        mac: one.mac.to_vec(),
                        ..Default::default()
                    })
                })
                .collect(),
            ..Default::default()
        }
    }

    fn interface(&self, link: &Link) -> agent::Interface {
        let own = |address: &&Address| address.index == link.index && address.permanent;
        let address = |address: &Address| agent::InterfaceAddress {
            address: bytes(address.address),
            prefix_len: address.prefix_len.into(),
            scope: address.scope.into(),
            peer: address.peer.map(bytes).unwrap_or_default(),
            broadcast: address.broadcast.map(bytes).unwrap_or_default(),
            without_route: address.without_route,
            ..Default::default()
        };
        agent::Interface {
            mac: link.mac.map(Vec::from).unwrap_or_default(),
            name: link.name.clone(),
            mtu: link.mtu,
            addresses: self.addresses.iter().filter(own).map(address).collect(),
            without_arp: link.flags.is_without_arp(),
            ..Default::default()
        }
    }
}

/// A route; nothing if it is the kernel's or leads by an interface without a name.
fn route(route: &Route, names: &BTreeMap<u32, &str>) -> Option<agent::Route> {
    if matches!(route.protocol, Route::OF_KERNEL | Route::OF_ROUTER) || route.hops.is_empty() {
        return None;
    }
    let hop = |hop: &netlink::Hop| {
        Some(agent::Hop {
            interface: (*names.get(&hop.index)?).to_owned(),
            gateway: hop.gateway.map(bytes).unwrap_or_default(),
            on_link: hop.on_link,
            weight: hop.weight.into(),
            ..Default::default()
        })
    };
    Some(agent::Route {
        destination: bytes(route.destination.address),
        prefix_len: route.destination.prefix_len.into(),
        hops: route.hops.iter().map(hop).collect::<Option<_>>()?,
        source: route.source.map(bytes).unwrap_or_default(),
        priority: route.priority,
        scope: route.scope.into(),
        protocol: route.protocol.into(),
        kind: route.kind.into(),
        mtu: route.mtu.unwrap_or(0),
        ..Default::default()
    })
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use netlink::{Destination, Hop, LinkFlags};

    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            mtu: 1450,
            flags: LinkFlags(0x81),
            ethernet: true,
            kind: Some("veth".to_owned()),
            master: None,
            l3s: false,
        }
    }

    fn address(index: u32, address: [u8; 4]) -> Address {
        Address {
            index,
            address: address.into(),
            prefix_len: 24,
            scope: 0,
            peer: None,
            broadcast: Some([10, 0, 0, 255].into()),
            permanent: true,
            without_route: false,
        }
    }

    fn default_route(index: u32, protocol: u8) -> Route {
        Route {
            destination: Destination {
                address: [0; 4].into(),
                prefix_len: 0,
            },
            hops: vec![Hop {
                index,
                gateway: Some([10, 0, 0, 1].into()),
                on_link: true,
                weight: 1,
            }],
            source: None,
            priority: 7,
            scope: 0,
            protocol,
            kind: Route::UNICAST,
            mtu: Some(1400),
        }
    }

    #[test]
    fn only_what_belongs_to_joined_interfaces_is_told() {
        let mut passing = address(2, [10, 0, 0, 3]);
        passing.permanent = false;
        let settings = Settings {
            links: vec![link(2, "eth0"), link(3, "bulkhead0")],
            addresses: vec![
                address(2, [10, 0, 0, 2]),
                passing,
                address(3, [10, 9, 0, 2]),
            ],
            routes: vec![
                default_route(2, 3),
                default_route(2, Route::OF_KERNEL),
                default_route(3, 3),
            ],
            neighbours: vec![Neighbour {
                index: 2,
                address: [10, 0, 0, 1].into(),
                mac: [2, 0, 0, 0, 0, 9],
            }],
        };

        let request = settings.request(&BTreeSet::from([2]));

        let [interface] = request.interfaces.as_slice() else {
            panic!("{request:?}");
        };
        assert_eq!(interface.name, "eth0");
        assert_eq!((interface.mtu, interface.without_arp), (1450, true));
        assert_eq!(interface.mac, [2, 0, 0, 0, 0, 2]);
        assert_eq!(interface.addresses.len(), 1);
        assert_eq!(interface.addresses[0].address, [10, 0, 0, 2]);
        let [route] = request.routes.as_slice() else {
            panic!("{request:?}");
        };
        assert_eq!((route.prefix_len, route.priority, route.mtu), (0, 7, 1400));
        assert_eq!(route.hops[0].interface, "eth0");
        assert_eq!(route.hops[0].gateway, [10, 0, 0, 1]);
        assert!(route.hops[0].on_link);
        assert_eq!(request.neighbours[0].interface, "eth0");
    }
}
