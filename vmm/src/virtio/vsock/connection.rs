//! One connection as the protocol sees it: credit in both directions, which
//! directions are ended, and which packets the guest is owed. It does no I/O.
//!
//! ```text
//!   host connects:   requested --RESPONSE--> established
//!   guest connects:                          established
//!
//!   host to guest:   open --end of file at the host | guest receives no more--> ended
//!   guest to host:   open --guest sends no more | host refuses more--> ended
//! ```
//!
//! Credit (virtio 1.2, section 5.10.6.3): each side tells how large its buffer
//! is (`buf_alloc`) and how much it has taken out of it (`fwd_cnt`); the other
//! may have no more than that under way.

use super::packet::{Ended, Header, Message, Op, Packet};

/// The buffer on the way from the guest to the host, in bytes: the most that is ever kept for
/// a host that reads slowly.
pub const BUF_ALLOC: u32 = 256 << 10;

/// The guest is told of free space once this much of it is new.
const UPDATE_AFTER: u32 = BUF_ALLOC / 2;

/// One connection.
#[derive(Debug)]
pub struct Connection {
    established: bool,
    /// What the guest said of its buffer.
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// Bytes given to the guest, modulo 2^32.
    sent: u32,
    /// Whether the guest was asked for its credit since it had none left.
    credit_asked: bool,
    /// Bytes taken from the guest, modulo 2^32.
    received: u32,
    /// Bytes of those that the host took, modulo 2^32: our `fwd_cnt`.
    forwarded: u32,
    /// The last `fwd_cnt` that the guest was told.
    told: u32,
    guest: Ended,
    host: Ended,
    owed: Owed,
}

/// Packets that the guest has to get.
#[derive(Debug, Default)]
struct Owed {
    opening: Option<Op>,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// What a packet means for the host's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing, or only more credit.
    None,
    /// The guest accepted the connection.
    Opened,
    /// That many bytes are for the host.
    Data(u32),
    /// The guest ended directions; see [`Connection::guest_ended`].
    Ended,
    /// The guest is gone.
    Reset,
}

/// The guest broke the protocol: the connection has to be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The packet does not fit the connection's state.
    #[error("a packet that does not fit the state of its connection")]
    State,
    /// More data than the buffer that was promised.
    #[error("more data than the credit allows")]
    Credit,
}

impl Connection {
    /// A connection that the host asks the guest for.
    pub fn requested() -> Self {
        Self::new(false, Op::Request)
    }

    /// A connection that the guest asked for with `request`.
    pub fn accepted(request: &Packet) -> Self {
        let mut connection = Self::new(true, Op::Response);
        connection.take_credit(request);
        connection
    }

    fn new(established: bool, opening: Op) -> Self {
        Self {
            established,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            sent: 0,
            credit_asked: false,
            received: 0,
            forwarded: 0,
            told: 0,
            guest: Ended::default(),
            host: Ended::default(),
            owed: Owed {
                opening: Some(opening),
                ..Owed::default()
            },
        }
    }

    /// Takes a packet of the guest in.
    ///
    /// # Errors
    /// When the guest breaks the protocol.
    pub fn handle(&mut self, packet: &Packet) -> Result<Step, Violation> {
        match (self.established, packet.message) {
            (_, Message::Reset) => return Ok(Step::Reset),
            // Not before it was asked.
            (false, Message::Response) if self.owed.opening.is_none() => self.established = true,
            (false, _) | (true, Message::Request | Message::Response) => {
                return Err(Violation::State);
            }
            (true, _) => {}
        }
        self.take_credit(packet);
        match packet.message {
            Message::Response => Ok(Step::Opened),
            Message::Data(len) => self.take_data(len),
            Message::Shutdown(ended) => {
                self.guest.receive |= ended.receive;
                self.guest.send |= ended.send;
                Ok(Step::Ended)
            }
            Message::CreditRequest => {
                self.owed.credit_update = true;
                Ok(Step::None)
            }
            Message::CreditUpdate | Message::Request | Message::Reset => Ok(Step::None),
        }
    }

    fn take_credit(&mut self, packet: &Packet) {
        self.guest_buf_alloc = packet.buf_alloc;
        self.guest_fwd_cnt = packet.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    fn take_data(&mut self, len: u32) -> Result<Step, Violation> {
        if self.guest.send {
            return Err(Violation::State);
        }
        let kept = self.received.wrapping_sub(self.forwarded);
        if len > BUF_ALLOC - kept {
            return Err(Violation::Credit);
        }
        self.received = self.received.wrapping_add(len);
        Ok(Step::Data(len))
    }

    /// The host took `count` bytes of what the guest sent, or they were thrown away.
    pub fn forward(&mut self, count: usize) {
        // No more is ever kept than BUF_ALLOC, which is a u32.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
        if self.forwarded.wrapping_sub(self.told) >= UPDATE_AFTER {
            self.owed.credit_update = true;
        }
    }

    /// As [`Connection::forward`], with all that the guest sent so far.
    pub fn forward_all(&mut self) {
        self.forward(self.received.wrapping_sub(self.forwarded) as usize);
    }

    /// How many bytes the guest takes now.
    pub fn room(&self) -> u32 {
        let open = self.established && self.owed.opening.is_none();
        if !open || self.guest.receive || self.host.send {
            return 0;
        }
        self.credit()
    }

    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(under_way)
    }

    /// `count` bytes were given to the guest, no more than [`Connection::room`].
    pub fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// There is data for the guest and no room: asks the guest for credit, once.
    pub fn want_credit(&mut self) {
        let open = self.established && !self.guest.receive && !self.host.send;
        if open && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            self.owed.credit_request = true;
        }
    }

    /// The host sends no more: end of file.
    pub fn end_host_send(&mut self) {
        self.owed.shutdown |= !self.host.send;
        self.host.send = true;
    }

    /// The host takes no more.
    pub fn end_host_receive(&mut self) {
        self.owed.shutdown |= !self.host.receive;
        self.host.receive = true;
    }

    /// The directions that the host has ended.
    pub fn host_ended(&self) -> Ended {
        self.host
    }

    /// The directions that the guest has ended.
    pub fn guest_ended(&self) -> Ended {
        self.guest
    }

    /// Whether the guest has agreed to the connection.
    pub fn is_established(&self) -> bool {
        self.established
    }

    /// Whether the guest knows nothing of the connection yet.
    pub fn is_unasked(&self) -> bool {
        self.owed.opening == Some(Op::Request)
    }

    /// Whether [`Connection::next_packet`] has one.
    pub fn owes(&self) -> bool {
        let owed = &self.owed;
        let waiting = !self.established && owed.opening.is_none();
        !waiting
            && (owed.opening.is_some()
                || owed.shutdown
                || owed.credit_update
                || owed.credit_request)
    }

    /// Whether the guest has to be told that the host ended a direction.
    pub fn owes_shutdown(&self) -> bool {
        self.owed.shutdown
    }

    /// The next packet without data that the guest is owed: operation, flags and credit.
    pub fn next_packet(&mut self) -> Option<Header> {
        if !self.owes() {
            return None;
        }
        let owed = &mut self.owed;
        let (op, flags) = if let Some(op) = owed.opening.take() {
            (op, 0)
        } else if std::mem::take(&mut owed.shutdown) {
            (Op::Shutdown, self.host.flags())
        } else if std::mem::take(&mut owed.credit_request) {
            (Op::CreditRequest, 0)
        } else {
            (Op::CreditUpdate, 0)
        };
        Some(self.stamp(Header {
            op: op as u16,
            flags,
            ..Header::default()
        }))
    }

    /// Puts our credit on a packet, which spares a [`Op::CreditUpdate`].
    pub fn stamp(&mut self, header: Header) -> Header {
        self.owed.credit_update = false;
        self.told = self.forwarded;
        Header {
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
            ..header
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::packet::Key, *};

    fn packet(message: Message) -> Packet {
        Packet {
            key: Key {
                host_port: 1,
                guest_port: 2,
            },
            buf_alloc: 1000,
            fwd_cnt: 0,
            message,
        }
    }

    fn established() -> Connection {
        let mut connection = Connection::requested();
        connection.next_packet().unwrap();
        connection.handle(&packet(Message::Response)).unwrap();
        connection
    }

    #[test]
    fn a_request_is_made_once_and_nothing_else_before_its_answer() {
        let mut connection = Connection::requested();
        assert!(connection.is_unasked());
        assert_eq!(connection.next_packet().unwrap().op, Op::Request as u16);
        connection.end_host_send();
        assert_eq!(connection.next_packet(), None);
        assert_eq!(connection.room(), 0);
    }

    #[test]
    fn credit_is_what_the_guest_has_not_taken_out_yet() {
        let mut connection = established();
        connection.send(600);
        assert_eq!(connection.room(), 400);
        let update = Packet {
            fwd_cnt: 500,
            ..packet(Message::CreditUpdate)
        };
        connection.handle(&update).unwrap();
        assert_eq!(connection.room(), 900);
    }

    #[test]
    fn a_guest_that_takes_out_what_it_never_got_has_no_credit() {
        let mut connection = established();
        let lie = Packet {
            fwd_cnt: 5,
            ..packet(Message::CreditUpdate)
        };
        connection.handle(&lie).unwrap();
        assert_eq!(connection.room(), 0);
    }

    #[test]
    fn the_count_of_bytes_wraps_around() {
        let mut connection = established();
        let step = BUF_ALLOC / 2;
        let mut told = 0;
        for _ in 0..(1_u64 << 33) / u64::from(step) {
            connection.handle(&packet(Message::Data(step))).unwrap();
            connection.forward(step as usize);
            told += u64::from(connection.next_packet().is_some());
        }
        assert_eq!(told, (1 << 33) / u64::from(step));
        assert!(connection.handle(&packet(Message::Data(BUF_ALLOC))).is_ok());
    }

    #[test]
    fn a_shutdown_names_all_directions_that_are_ended() {
        let mut connection = established();
        connection.end_host_receive();
        assert_eq!(connection.next_packet().unwrap().flags, 1);
        connection.end_host_receive();
        assert_eq!(connection.next_packet(), None);
        connection.end_host_send();
        assert_eq!(connection.next_packet().unwrap().flags, 3);
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            1 => Just(Message::Request),
            1 => Just(Message::Response),
            1 => Just(Message::Reset),
            1 => (0..4_u32).prop_map(|flags| Message::Shutdown(Ended::from_flags(flags))),
            4 => (0..2 * BUF_ALLOC).prop_map(Message::Data),
            1 => Just(Message::CreditUpdate),
            1 => Just(Message::CreditRequest),
        ]
    }

    proptest! {
        #[test]
        fn no_more_is_kept_than_promised_and_no_more_sent_than_allowed(
            events in proptest::collection::vec((message(), any::<u32>(), any::<u32>(), any::<u16>()), 0..200),
        ) {
            let mut connection = established();
            let mut kept = 0;
            for (message, buf_alloc, fwd_cnt, count) in events {
                let packet = Packet { buf_alloc, fwd_cnt, ..packet(message) };
                match connection.handle(&packet) {
                    Ok(Step::Data(len)) => kept += len as usize,
                    Ok(_) => {}
                    Err(_) => prop_assert!(message != Message::CreditUpdate),
                }
                prop_assert!(kept <= BUF_ALLOC as usize);
                let taken = kept.min(usize::from(count));
                connection.forward(taken);
                kept -= taken;
                prop_assert!(connection.room() <= buf_alloc.max(connection.guest_buf_alloc));
                connection.send(connection.room().min(u32::from(count)));
                connection.want_credit();
                connection.next_packet();
            }
        }
    }
}
