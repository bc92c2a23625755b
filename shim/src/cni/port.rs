//! Ports of the host that lead to the container, `[[IP:]HOST:]CONTAINER[/PROTOCOL]`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// Why ports cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another form.
    #[error(
        "{text:?} publishes no port: {reason}; --publish takes [IP:]HOST:CONTAINER[/PROTOCOL], ports or ranges of them"
    )]
    Form {
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Somebody has it.
    #[error("cannot take the host's port {port} for {protocol}; does another program have it?")]
    Taken {
        /// Which.
        port: u16,
        /// For what.
        protocol: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What is spoken at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of the host that leads to one of the container. The form is that of the capability
/// `portMappings`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// At the host.
    pub host_port: u16,
    /// In the container.
    pub container_port: u16,
    /// Of what.
    pub protocol: Protocol,
    /// The host's address, if it is not every one.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// A port that is kept from other programs. Packets do not come to it: they are led away before.
#[derive(Debug)]
pub enum Reserved {
    /// By a socket of TCP.
    Tcp(TcpListener),
    /// By one of UDP.
    Udp(UdpSocket),
}

impl Port {
    /// Reads what `--publish` takes; a range is as many ports.
    ///
    /// # Errors
    /// When it has another form.
    pub fn parse(text: &str) -> Result<Vec<Self>, Error> {
        let wrong = |reason| Error::Form {
            text: text.to_owned(),
            reason,
        };
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return Err(wrong("the protocols are tcp, udp and sctp")),
        };
        let (rest, container) = ports
            .rsplit_once(':')
            .ok_or_else(|| wrong("the host's port is missing"))?;
        let (address, host) = rest.rsplit_once(':').unwrap_or(("", rest));
        let host_ip = match address.trim_start_matches('[').trim_end_matches(']') {
            "" => None,
            address => Some(
                address
                    .parse()
                    .map_err(|_| wrong("what is in front of the ports is no IP address"))?,
            ),
        };
        if host.is_empty() {
            return Err(wrong("the host's port is missing"));
        }
        let not_ports = || wrong("ports are numbers from 1 to 65535");
        let host = range(host).ok_or_else(not_ports)?;
        let container = range(container).ok_or_else(not_ports)?;
        if host.len() != container.len() {
            return Err(wrong("the two ranges differ in length"));
        }
        Ok(host
            .zip(container)
            .map(|(host_port, container_port)| Self {
                host_port,
                container_port,
                protocol,
                host_ip,
            })
            .collect())
    }

    /// Keeps it from others for as long as the value lives. Nothing else knows of SCTP here.
    ///
    /// # Errors
    /// When somebody has it.
    pub fn reserve(&self) -> Result<Option<Reserved>, Error> {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let address = SocketAddr::new(self.host_ip.unwrap_or(any), self.host_port);
        let taken = |protocol| {
            move |source| Error::Taken {
                port: address.port(),
                protocol,
                source,
            }
        };
        Ok(match self.protocol {
            Protocol::Tcp => {
                let socket = TcpListener::bind(address).map_err(taken("TCP"))?;
                Some(Reserved::Tcp(socket))
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(address).map_err(taken("UDP"))?;
                Some(Reserved::Udp(socket))
            }
            Protocol::Sctp => None,
        })
    }
}

fn range(text: &str) -> Option<std::ops::RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = digits.then(|| u16::from_str(text).ok()).flatten();
        number.filter(|number| *number > 0)
    };
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some(first..=last)
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use proptest::prelude::*;

    use super::*;

    fn one(text: &str) -> Port {
        Port::parse(text).unwrap().remove(0)
    }

    #[test]
    fn ports_have_addresses_protocols_and_ranges() {
        let port = one("8080:80");
        assert_eq!((port.host_port, port.container_port), (8080, 80));
        assert_eq!((port.protocol, port.host_ip), (Protocol::Tcp, None));
        let port = one("127.0.0.1:53:5353/udp");
        assert_eq!(port.protocol, Protocol::Udp);
        assert_eq!(port.host_ip, Some("127.0.0.1".parse().unwrap()));
        assert_eq!(one("[::1]:1:2").host_ip, Some("::1".parse().unwrap()));
        let range = Port::parse("8000-8002:80-82").unwrap();
        let pairs: Vec<_> = range
            .iter()
            .map(|p| (p.host_port, p.container_port))
            .collect();
        assert_eq!(pairs, [(8000, 80), (8001, 81), (8002, 82)]);
        let json = serde_json::to_value(one("1.2.3.4:1:2")).unwrap();
        let expected = serde_json::json!(
            {"hostPort": 1, "containerPort": 2, "protocol": "tcp", "hostIP": "1.2.3.4"}
        );
        assert_eq!(json, expected);
    }

    #[test]
    fn other_forms_are_refused_with_the_right_one() {
        for text in [
            "80", ":80", "0:80", "80:0", "70000:80", "1-3:1-2", "2-1:2-1", "x:80:80", "1:2/icmp",
            "", "+1:2",
        ] {
            let error = Port::parse(text).unwrap_err().to_string();
            assert!(error.contains("[IP:]HOST:CONTAINER"), "{error}");
        }
    }

    #[test]
    fn a_port_that_another_has_is_told() {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let number = other.local_addr().unwrap().port();
        let port = one(&format!("127.0.0.1:{number}:80"));
        let error = port.reserve().unwrap_err().to_string();
        assert!(error.contains(&number.to_string()), "{error}");
        drop(other);
        // A child that another test is just starting may have a copy of it for a moment.
        let free = (0..500).find_map(|_| {
            let reserved = port.reserve().ok();
            if reserved.is_none() {
                thread::sleep(Duration::from_millis(10));
            }
            reserved
        });
        let reserved = free.expect("the port is free");
        assert!(port.reserve().is_err());
        drop(reserved);
    }

    proptest! {
        #[test]
        fn no_text_is_taken_for_more_ports_than_there_are(text in "[0-9:/\\-a-z.\\[\\]]{0,30}") {
            if let Ok(ports) = Port::parse(&text) {
                prop_assert!(!ports.is_empty() && ports.len() <= 65535);
            }
        }
    }
}
