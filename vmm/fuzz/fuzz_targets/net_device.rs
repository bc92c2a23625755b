//! A network card of two pairs with a hostile guest, and a host that sends.
#![no_main]

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
};

use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use vmm::virtio::net::{
    Net, Settings,
    config::{Mac, Rate},
    tap::{Abilities, Tap},
};
use vmm_fuzz::{Machine, Step};

fuzz_target!(|input: (Vec<Step>, Vec<u16>)| {
    let (steps, packets) = input;
    let (first, host) = cable();
    let (second, _other) = cable();
    let mut host = File::from(host);
    let taps = [first, second].map(|socket| Tap::packets(socket).expect("a tap"));
    let settings = Settings {
        mac: Mac([2, 0, 0, 0, 0, 1]),
        mtu: None,
        to_guest: Rate::default(),
        from_guest: Rate::default(),
    };
    let abilities = Abilities { udp_segments: true };
    let device = Net::new((taps.into(), abilities), Vec::new(), settings).expect("a card");
    let mut machine = Machine::new(device);
    let mut packets = packets.iter();
    for step in &steps {
        if let Some(len) = packets.next() {
            let _ = host.write(&vec![0x5a; 12 + usize::from(*len)]);
        }
        if machine.step(step).is_err() {
            return;
        }
        while matches!(host.read(&mut [0; 64]), Ok(1..)) {}
    }
});

/// Both ends of a cable.
fn cable() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a pair of sockets")
}
