//! How a network card is described.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::Resource;

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The queues of one tap device with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`, 1 to 8. For
    /// people: a persistent tap's directory, `/sys/class/net/NAME`.
    pub taps: Vec<Resource>,
    /// `/dev/vhost-net`, opened once for each queue: the host's kernel then moves the packets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vhost: Vec<Resource>,
    /// The card's address.
    pub mac: Mac,
    /// The longest packet, if the guest is to be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How much may reach the guest.
    #[serde(default, skip_serializing_if = "Rate::is_unlimited")]
    pub to_guest: Rate,
    /// How much the guest may send.
    #[serde(default, skip_serializing_if = "Rate::is_unlimited")]
    pub from_guest: Rate,
}

/// The address of a network card.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

/// A limit for one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Of bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Bucket>,
    /// Of packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<Bucket>,
}

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// How fast it fills.
    pub per_second: u64,
    /// How much it holds, and so what may pass at once after a silence.
    pub burst: u64,
}

impl Rate {
    /// Whether there is no limit.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

impl Mac {
    /// Whether a card can have it: it is neither a group's nor nobody's.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is no address of a network card.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no mac address: write six bytes as in 02:00:00:00:00:01")]
pub struct BadMac(String);

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = || BadMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(bad)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(bad()),
        }
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mac_address_is_six_bytes() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:01",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(BadMac(text.to_owned())));
        }
        assert!(!Mac([1, 0, 0, 0, 0, 0]).is_unicast());
        assert!(!Mac([0; 6]).is_unicast());
        assert!(Mac([2, 0, 0, 0, 0, 0]).is_unicast());
    }

    proptest! {
        #[test]
        fn a_mac_address_is_what_it_is_written_as(bytes: [u8; 6]) {
            prop_assert_eq!(Mac(bytes).to_string().parse(), Ok(Mac(bytes)));
        }
    }
}
