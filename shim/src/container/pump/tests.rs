//! Bytes through pumps: all of them, in order, and no more than a reader takes.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use nix::{fcntl::OFlag, pty::openpty, unistd::pipe2};

use super::*;

fn pipe() -> (File, File) {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).expect("a pipe");
    (reader.into(), writer.into())
}

/// The guest's stream: our end non-blocking, as the runtime makes it.
fn guest() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    ours.set_nonblocking(true).expect("set");
    (ours, theirs)
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn ended(pump: &Pump) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    let end = async { tokio::time::timeout(Duration::from_secs(20), pump.ended()).await };
    runtime.block_on(end).expect("the stream ends");
}

#[test]
fn a_pipe_reaches_the_guest_whole_and_its_end_too() {
    let (reader, mut writer) = pipe();
    let (ours, mut theirs) = guest();
    let sent = pattern(1 << 20);
    let expected = sent.clone();
    let _pump = Pump::start("stdin", reader.into(), ours.into()).expect("started");
    let feeder = std::thread::spawn(move || writer.write_all(&sent));
    let mut received = Vec::new();
    theirs.read_to_end(&mut received).expect("read");
    feeder.join().expect("joined").expect("written");
    assert!(received == expected);
}

#[test]
fn the_guests_bytes_reach_a_file_opened_for_appending() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let sink = OpenOptions::new().append(true).open(file.path());
    let (ours, mut theirs) = guest();
    let pump = Pump::start("stdout", ours.into(), sink.expect("open").into()).expect("started");
    let sent = pattern(300_000);
    theirs.write_all(&sent).expect("written");
    drop(theirs);
    ended(&pump);
    assert!(std::fs::read(file.path()).expect("read") == sent);
}

#[test]
fn a_file_reaches_the_guest_whole() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let sent = pattern(300_000);
    std::fs::write(file.path(), &sent).expect("written");
    let (ours, mut theirs) = guest();
    let source = File::open(file.path()).expect("open");
    let _pump = Pump::start("stdin", source.into(), ours.into()).expect("started");
    let mut received = Vec::new();
    theirs.read_to_end(&mut received).expect("read");
    assert!(received == sent);
}

#[test]
fn a_slow_reader_slows_the_guest_and_loses_nothing() {
    let (mut reader, writer) = pipe();
    let (ours, mut theirs) = guest();
    let pump = Pump::start("stdout", ours.into(), writer.into()).expect("started");
    let sent = pattern(16 << 20);
    let expected = sent.clone();
    // What is on its way while nobody reads is bounded by the kernel's buffers.
    theirs.set_nonblocking(true).expect("set");
    let mut taken = 0;
    let mut idle = 0;
    while idle < 20 {
        match theirs.write(&sent[taken..]) {
            Ok(count) => (taken, idle) = (taken + count, 0),
            Err(_) => {
                idle += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    assert!(taken < 2 << 20, "{taken} bytes were taken with no reader");
    theirs.set_nonblocking(false).expect("set");
    let feeder = std::thread::spawn(move || theirs.write_all(&sent[taken..]));
    let mut received = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = reader.read(&mut chunk) {
        received.extend_from_slice(&chunk[..count]);
    }
    feeder.join().expect("joined").expect("written");
    ended(&pump);
    assert!(received == expected);
}

#[test]
fn a_reader_that_leaves_is_told_to_the_guest() {
    let (reader, writer) = pipe();
    let (ours, mut theirs) = guest();
    let pump = Pump::start("stdout", ours.into(), writer.into()).expect("started");
    drop(reader);
    ended(&pump);
    assert!(theirs.write_all(&[1; 1 << 20]).is_err());
}

#[test]
fn a_guest_that_closes_its_stdin_ends_the_stream() {
    let (_kept, ours) = (guest(), guest());
    let (reader, _writer) = pipe();
    let pump = Pump::start("stdin", reader.into(), ours.0.into()).expect("started");
    drop(ours.1);
    ended(&pump);
}

#[test]
fn a_stream_that_waits_for_input_ends_when_it_is_dropped() {
    let (reader, _writer) = pipe();
    let (ours, _theirs) = guest();
    drop(Pump::start("stdin", reader.into(), ours.into()).expect("started"));
}

#[test]
fn a_stream_whose_reader_takes_nothing_ends_when_it_is_dropped() {
    let (_reader, writer) = pipe();
    let (ours, mut theirs) = guest();
    let pump = Pump::start("stdout", ours.into(), writer.into()).expect("started");
    theirs.set_nonblocking(true).expect("set");
    while theirs.write(&[0; 65536]).is_ok() {
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(pump);
}

/// Writes until nothing more is taken.
fn fill(theirs: &mut UnixStream) {
    theirs.set_nonblocking(true).expect("set");
    let mut idle = 0;
    while idle < 20 {
        if theirs.write(&[b'x'; 65536]).is_ok() {
            idle = 0;
        } else {
            idle += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Ends a stream, which takes no longer than its thread needs to hear of it.
fn ends_when_dropped(pump: Pump) {
    let (done, over) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(pump);
        done.send(()).expect("the test waits");
    });
    over.recv_timeout(Duration::from_secs(5)).expect("it ends");
}

#[test]
fn a_terminal_that_nobody_reads_ends_its_stream_when_that_is_dropped() {
    let pty = openpty(None, None).expect("a pair");
    let shared = pty.slave.try_clone().expect("a copy");
    let (ours, mut theirs) = guest();
    let pump = Pump::start("stdout", ours.into(), pty.slave).expect("started");
    fill(&mut theirs);
    ends_when_dropped(pump);
    let flags = nix::fcntl::fcntl(&shared, nix::fcntl::FcntlArg::F_GETFL).expect("flags");
    assert!(
        !OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK),
        "others would not block"
    );
}

#[test]
fn a_socket_that_nobody_reads_ends_its_stream_when_that_is_dropped() {
    let (sink, _reader) = UnixStream::pair().expect("a pair");
    let (ours, mut theirs) = guest();
    let pump = Pump::start("stdout", ours.into(), sink.into()).expect("started");
    fill(&mut theirs);
    ends_when_dropped(pump);
}

#[test]
fn a_slow_reader_of_a_terminal_gets_all_that_was_written() {
    let pty = openpty(None, None).expect("a pair");
    let mut terminal = nix::sys::termios::tcgetattr(&pty.slave).expect("attributes");
    nix::sys::termios::cfmakeraw(&mut terminal);
    let now = nix::sys::termios::SetArg::TCSANOW;
    nix::sys::termios::tcsetattr(&pty.slave, now, &terminal).expect("set");
    let (ours, mut theirs) = guest();
    let _pump = Pump::start("stdout", ours.into(), pty.slave).expect("started");
    let sent = pattern(300_000);
    let expected = sent.clone();
    let feeder = std::thread::spawn(move || theirs.write_all(&sent).map(|()| theirs));
    let mut master = File::from(pty.master);
    let mut received = vec![0; expected.len()];
    for chunk in received.chunks_mut(50_000) {
        std::thread::sleep(Duration::from_millis(20));
        master.read_exact(chunk).expect("read");
    }
    feeder.join().expect("joined").expect("written");
    assert!(received == expected);
}
