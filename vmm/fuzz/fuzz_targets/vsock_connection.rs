//! No sequence of packets makes a connection keep or send more than was promised.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmm::virtio::vsock::{
    HOST_CID,
    connection::{BUF_ALLOC, Connection, Step},
    packet::{Header, TYPE_STREAM, parse},
};

#[derive(Debug, Arbitrary)]
struct Event {
    op: u8,
    flags: u8,
    len: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    taken: u32,
    sent: u32,
    host_ends: u8,
}

fuzz_target!(|events: Vec<Event>| {
    let mut connection = Connection::requested();
    let mut kept = 0_usize;
    for event in events {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 1,
            dst_port: 2,
            len: event.len,
            kind: TYPE_STREAM,
            op: u16::from(event.op % 9),
            flags: u32::from(event.flags),
            buf_alloc: event.buf_alloc,
            fwd_cnt: event.fwd_cnt,
        };
        let Ok(packet) = parse(&header, usize::MAX, 3) else {
            continue;
        };
        match connection.handle(&packet) {
            Ok(Step::Data(len)) => kept += len as usize,
            Ok(_) => {}
            Err(_) => return,
        }
        assert!(kept <= BUF_ALLOC as usize);
        let taken = kept.min(event.taken as usize);
        connection.forward(taken);
        kept -= taken;
        connection.send(connection.room().min(event.sent));
        if event.host_ends & 1 != 0 {
            connection.end_host_send();
        }
        if event.host_ends & 2 != 0 {
            connection.end_host_receive();
        }
        connection.want_credit();
        while connection.next_packet().is_some() {}
    }
});
