//! The guest's network beside QEMU's: the same kernel and guest behind a card of ours and of
//! QEMU's microvm, both moved by the monitor itself and both by the host's kernel (vhost).
//!
//! The guest answers on some ports: one sends back what it hears, eight swallow, eight give.

mod machine;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::machine::{ECHO, GIVES, GUEST, Mover, SWALLOWS, Tap};
use crate::RUNS;
use crate::exits::Exits;
use crate::report::Report;

/// Requests of one byte, one after the other.
const REQUESTS: usize = 1000;
/// Bytes of a stream, or of eight together.
const STREAM: usize = 16 << 20;
const BLOCK: usize = 64 << 10;

/// What is measured of a machine: its name with each mover, and its unit.
const FIGURES: [(&str, &str, &str); 10] = [
    ("net.requests_per_s", "net.vhost_requests_per_s", "1/s"),
    ("net.round_trip", "net.vhost_round_trip", "µs"),
    (
        "net.exits_per_request",
        "net.vhost_exits_per_request",
        "exits",
    ),
    ("net.to_guest", "net.vhost_to_guest", "MiB/s"),
    ("net.to_guest_exits", "net.vhost_to_guest_exits", "/pkt"),
    ("net.to_guest_8", "net.vhost_to_guest_8", "MiB/s"),
    ("net.from_guest", "net.vhost_from_guest", "MiB/s"),
    ("net.from_guest_exits", "net.vhost_from_guest_exits", "/pkt"),
    ("net.from_guest_8", "net.vhost_from_guest_8", "MiB/s"),
    (
        "net.from_guest_packet",
        "net.vhost_from_guest_packet",
        "bytes",
    ),
];

/// The figures of one machine, in the order of [`FIGURES`].
type Taken = [f64; FIGURES.len()];

/// Takes [`RUNS`] of each, in turns.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir_in("/dev/shm")?;
    let initramfs = machine::initramfs(dir.path(), STREAM / BLOCK)?;
    for mover in [Mover::Monitor, Mover::Vhost] {
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let tap = Tap::new()?;
            let machine = machine::start_ours(&initramfs, mover)?;
            ours.push(take().with_context(|| format!("ours, {mover:?}"))?);
            drop(machine);
            drop(tap);
            let tap = Tap::new()?;
            let machine = machine::start_qemu(&initramfs, mover)?;
            peer.push(take().with_context(|| format!("QEMU, {mover:?}"))?);
            drop(machine);
            drop(tap);
        }
        for (index, (alone, vhost, unit)) in FIGURES.into_iter().enumerate() {
            let (name, qemu) = match mover {
                Mover::Monitor => (alone, "qemu microvm"),
                Mover::Vhost => (vhost, "qemu + vhost"),
            };
            let column = |runs: &[Taken]| runs.iter().map(|run| run[index]).collect::<Vec<_>>();
            report.compare((name, unit), &column(&ours), (qemu, &column(&peer)));
        }
    }
    Ok(())
}

/// Measures the guest that runs.
fn take() -> Result<Taken> {
    let [requests, round_trip, exits] = requests()?;
    let to = Stream::measure(1, swallow)?;
    let to_8 = Stream::measure(8, swallow)?;
    let from = Stream::measure(1, give)?;
    let from_8 = Stream::measure(8, give)?;
    let taken = [
        requests,
        round_trip,
        exits,
        to.mib_per_s,
        to.exits_per_packet,
        to_8.mib_per_s,
        from.mib_per_s,
        from.exits_per_packet,
        from_8.mib_per_s,
        from.bytes_per_packet,
    ];
    eprintln!("{taken:?}");
    Ok(taken)
}

/// Requests a second, the median of their times in µs, and exits for each.
fn requests() -> Result<[f64; 3]> {
    let mut echo = connect(ECHO)?;
    echo.set_nodelay(true)?;
    let mut times = Vec::with_capacity(REQUESTS);
    let mut byte = [0];
    // the first ones warm the caches of both sides
    for request in 0..REQUESTS / 10 {
        echo.write_all(&[request as u8])?;
        echo.read_exact(&mut byte)?;
    }
    let exits = Exits::count()?;
    let start = Instant::now();
    for request in 0..REQUESTS {
        let sent = Instant::now();
        echo.write_all(&[request as u8])?;
        echo.read_exact(&mut byte)?;
        times.push(sent.elapsed());
        ensure!(byte == [request as u8], "the guest answers something else");
    }
    let time = start.elapsed();
    let exits = exits.read()?.total();
    times.sort();
    Ok([
        REQUESTS as f64 / time.as_secs_f64(),
        times[REQUESTS / 2].as_secs_f64() * 1e6,
        exits as f64 / REQUESTS as f64,
    ])
}

/// How [`STREAM`] bytes went.
struct Stream {
    mib_per_s: f64,
    exits_per_packet: f64,
    bytes_per_packet: f64,
}

impl Stream {
    /// Lets them go through so many connections at once, each with its share.
    fn measure(count: u16, carry: fn(u16, usize) -> Result<()>) -> Result<Self> {
        let share = STREAM / usize::from(count);
        let packets = Tap::packets()?;
        let exits = Exits::count()?;
        let start = Instant::now();
        let carriers: Vec<_> = (0..count)
            .map(|number| thread::spawn(move || carry(number, share)))
            .collect();
        for carrier in carriers {
            let carried = carrier.join();
            carried.map_err(|_| anyhow::anyhow!("a stream's thread failed"))??;
        }
        let time = start.elapsed();
        let exits = exits.read()?.total();
        let packets = Tap::packets()? - packets;
        Ok(Self {
            mib_per_s: STREAM as f64 / f64::from(1 << 20) / time.as_secs_f64(),
            exits_per_packet: exits as f64 / packets as f64,
            bytes_per_packet: STREAM as f64 / packets as f64,
        })
    }
}

/// Lets the guest take `share` bytes.
fn swallow(number: u16, share: usize) -> Result<()> {
    let mut stream = connect(SWALLOWS + number)?;
    let block = vec![0x5a; BLOCK];
    for _ in 0..share / BLOCK {
        stream.write_all(&block)?;
    }
    stream.shutdown(Shutdown::Write)?;
    // the guest's end comes when it has read everything
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Takes `share` bytes of what the guest gives.
fn give(number: u16, share: usize) -> Result<()> {
    let mut stream = connect(GIVES + number)?;
    let mut block = vec![0; 4 * BLOCK];
    let mut total = 0;
    while total < share {
        match stream.read(&mut block)? {
            0 => break,
            read => total += read,
        }
    }
    ensure!(total >= share, "the guest gave {total} bytes of {share}");
    Ok(())
}

/// Connects as soon as the guest listens.
fn connect(port: u16) -> Result<TcpStream> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let address = format!("{GUEST}:{port}").parse()?;
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => {
                return Err(error).context("the guest does not answer");
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}
