//! The console between a guest's driver and pipes of the host.

use std::io::{Read, Seek, Write};

use super::*;
use crate::virtio::testing::{Buffer, Rig};

fn console(input: Option<OwnedFd>) -> (Rig<Console>, io::PipeReader) {
    let (reader, writer) = io::pipe().unwrap();
    let output = File::from(OwnedFd::from(writer));
    (Rig::new(Console::new(output, input).unwrap()), reader)
}

#[test]
fn output_reaches_the_reader_in_order() {
    let (mut rig, mut reader) = console(None);
    rig.offer(TX, &[Buffer::Out(b"hello "), Buffer::Out(b"world")]);
    rig.offer(TX, &[Buffer::Out(b"!\n")]);

    rig.kick(TX).unwrap();

    let mut text = [0; 13];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello world!\n");
    assert_eq!(rig.used(TX).len(), 2);
    assert!(rig.interrupted(TX));
}

#[test]
fn a_reader_that_stands_still_does_not_hold_the_guest_up() {
    let (mut rig, mut reader) = console(None);
    let page = [b'y'; 4096];
    let mut sent = 0;
    for _ in 0..40 {
        rig.offer(TX, &[Buffer::Out(&page)]);
        rig.kick(TX).unwrap();
        assert_eq!(rig.used(TX).len(), 1);
        sent += page.len();
    }
    let mut received = 0;
    let mut piece = [0; 8192];
    while received < sent {
        received += reader.read(&mut piece).unwrap();
        rig.poll(0);
    }
    assert!(!rig.poll(0), "nothing is watched when nothing is kept");
}

#[test]
fn input_waits_for_a_buffer_without_waking_the_device() {
    let (reader, mut writer) = io::pipe().unwrap();
    let (mut rig, _output) = console(Some(reader.into()));
    writer.write_all(b"ls\n").unwrap();
    assert!(rig.poll(0));
    assert!(!rig.poll(0), "no wake-up until the guest has a buffer");

    let chain = rig.offer(RX, &[Buffer::In(100)]);
    rig.kick(RX).unwrap();
    rig.poll(0);

    assert_eq!(rig.used(RX), [(chain.head, 3)]);
    assert_eq!(rig.written(&chain)[..3], *b"ls\n");
}

#[test]
fn the_end_of_the_input_is_the_end_of_its_watching() {
    let (reader, writer) = io::pipe().unwrap();
    let (mut rig, _output) = console(Some(reader.into()));
    rig.offer(RX, &[Buffer::In(100)]);
    rig.kick(RX).unwrap();
    drop(writer);

    // A child that another test has just forked has the writer for another moment.
    assert!(rig.poll(5000));
    assert!(!rig.poll(0));
    assert!(rig.used(RX).is_empty());
}

#[test]
fn input_may_come_from_a_file() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"script").unwrap();
    file.rewind().unwrap();
    let (mut rig, _output) = console(Some(file.into()));
    let chain = rig.offer(RX, &[Buffer::In(4)]);
    let next = rig.offer(RX, &[Buffer::In(4)]);

    rig.kick(RX).unwrap();

    assert_eq!(rig.used(RX), [(chain.head, 4), (next.head, 2)]);
    assert_eq!(rig.written(&chain), b"scri");
}

#[test]
fn a_buffer_without_room_stops_the_device() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"x").unwrap();
    file.rewind().unwrap();
    let (mut rig, _output) = console(Some(file.into()));
    rig.offer(RX, &[Buffer::Out(b"not writable")]);
    assert!(matches!(
        rig.kick(RX),
        Err(Error::BadRequest { queue: RX, .. })
    ));
}
