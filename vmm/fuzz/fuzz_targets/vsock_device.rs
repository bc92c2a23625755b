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
use vmm_fuzz::{Step, drive};

fuzz_target!(|steps: Vec<Step>| {
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
