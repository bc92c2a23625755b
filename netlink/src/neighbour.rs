//! Neighbours that are known for good.

use std::{io, net::IpAddr};

use crate::{
    Socket,
    message::{Message, attributes, family, ip, ip_bytes, u16_at, u32_at},
    socket::{CREATE, REPLACE},
};

/// `RTM_*NEIGH` of linux/rtnetlink.h.
const NEW: u16 = 28;
const DELETE: u16 = 29;
const GET: u16 = 30;

/// `NDA_*` of linux/neighbour.h.
const DESTINATION: u16 = 1;
const HARDWARE: u16 = 2;

/// `NUD_PERMANENT`
const PERMANENT: u16 = 0x80;

/// Length of `struct ndmsg`.
const FIXED: usize = 12;

/// Who has an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's number.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Whose it is.
    pub mac: [u8; 6],
}

impl Socket {
    /// The neighbours that somebody entered for good.
    ///
    /// # Errors
    /// The kernel's.
    pub fn neighbours(&self) -> io::Result<Vec<Neighbour>> {
        let all = self.list(GET, &[0; FIXED], |body| Some(read(body)))?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Enters a neighbour for good.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_neighbour(&self, neighbour: &Neighbour) -> io::Result<()> {
        self.change(NEW, CREATE | REPLACE, |message| {
            named(message, neighbour).with(HARDWARE, &neighbour.mac)
        })
    }

    /// Removes the neighbour that has an address.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_neighbour(&self, neighbour: &Neighbour) -> io::Result<()> {
        self.change(DELETE, 0, |message| named(message, neighbour))
    }
}

/// Appends what tells a neighbour from others.
fn named(message: Message, neighbour: &Neighbour) -> Message {
    let mut fixed = [0; FIXED];
    fixed[0] = family(neighbour.address);
    fixed[4..8].copy_from_slice(&neighbour.index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&PERMANENT.to_ne_bytes());
    message
        .fixed(&fixed)
        .with(DESTINATION, &ip_bytes(neighbour.address))
}

fn read(body: &[u8]) -> Option<Neighbour> {
    if u16_at(body, 8)? & PERMANENT == 0 {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for (kind, value) in attributes(body.get(FIXED..)?) {
        match kind {
            DESTINATION => address = ip(value),
            HARDWARE => mac = value.try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        index: u32_at(body, 4)?,
        address: address?,
        mac: mac?,
    })
}
