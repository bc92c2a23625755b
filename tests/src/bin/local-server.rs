//! A server in the guest that only the guest's own programs can reach: it listens on 127.0.0.1 and
//! `[::1]` alone.
//!
//!     port 7    sends back what it hears, and ends when its client has said all
//!     port 8    hears a number, says that many bytes and ends, whatever its client still wants
//!     port 9    never reads
//!     port 19   says something for ever

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    thread,
    time::Duration,
};

type Answer = fn(TcpStream) -> io::Result<()>;

const PORTS: [(u16, Answer); 4] = [(7, echo), (8, some), (9, nothing), (19, everything)];

fn main() -> io::Result<()> {
    for address in ["127.0.0.1", "::1"] {
        for (port, answer) in PORTS {
            let listener = TcpListener::bind((address, port))?;
            thread::spawn(move || {
                for client in listener.incoming().flatten() {
                    // A client that leaves is the test's own doing.
                    thread::spawn(move || answer(client));
                }
            });
        }
    }
    println!("listening");
    loop {
        thread::sleep(Duration::from_secs(1000));
    }
}

fn echo(mut client: TcpStream) -> io::Result<()> {
    let mut bytes = vec![0; 16 << 10];
    loop {
        match client.read(&mut bytes)? {
            0 => return Ok(()),
            len => client.write_all(&bytes[..len])?,
        }
    }
}

fn some(mut client: TcpStream) -> io::Result<()> {
    let mut number = [0; 4];
    client.read_exact(&mut number)?;
    let bytes: Vec<_> = (0..u32::from_be_bytes(number)).map(|at| at as u8).collect();
    client.write_all(&bytes)
}

fn nothing(client: TcpStream) -> io::Result<()> {
    thread::sleep(Duration::from_secs(1000));
    drop(client);
    Ok(())
}

fn everything(mut client: TcpStream) -> io::Result<()> {
    let bytes = vec![b'x'; 16 << 10];
    loop {
        client.write_all(&bytes)?;
    }
}
