//! The socket device with a hostile guest and a program that has asked for it.
#![no_main]

use std::{
    io::Write,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
};

use libfuzzer_sys::fuzz_target;
use vmm::virtio::vsock::Vsock;
use vmm_fuzz::{Buffer, Step, drive};

/// Makes a header of the fuzzer's into one that is not dropped at first sight, most of the time.
fn address(step: &mut Step) {
    let Step::Offer { queue, buffers } = step else {
        return;
    };
    // The transmit queue.
    if *queue % 3 == 1
        && let Some(Buffer::Out(header)) = buffers.first_mut()
        && header.len() >= 32
        && header[0] != 0xff
    {
        header[..16].copy_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        // Ports: the program's in the guest; ours, or the first of the programs'.
        header[16..20].copy_from_slice(&[1, 0, 0, 0]);
        let ours = if header[20] & 1 == 0 {
            1024_u32
        } else {
            1 << 30
        };
        header[20..24].copy_from_slice(&ours.to_le_bytes());
        header[28..30].copy_from_slice(&[1, 0]);
        header[30] %= 9;
        header[31] = 0;
        header.resize(header.len().max(44), 0);
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut steps = steps;
    steps.iter_mut().for_each(address);
    // The kernel chooses an abstract name.
    let any = SocketAddr::from_abstract_name(b"").expect("a name");
    let listener = UnixListener::bind_addr(&any).expect("a listener");
    let address = listener.local_addr().expect("its address");
    let mut client = UnixStream::connect_addr(&address).expect("a program");
    client.write_all(b"CONNECT 1\nhello").expect("its greeting");
    let (_ours, theirs) = UnixStream::pair().expect("a pair");
    let device = Vsock::new(3, listener, vec![(1024, theirs)]).expect("a device");
    drive(device, &steps);
});
