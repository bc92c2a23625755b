//! The packets of a socket device (virtio 1.2, section 5.10.6): what the guest
//! wrote becomes a [`Packet`] or the reason why not.

use super::HOST_CID;

/// The size of a packet's header.
pub const HEADER_BYTES: usize = 44;

/// `VIRTIO_VSOCK_TYPE_STREAM`
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will receive no more.
const SHUTDOWN_F_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more.
const SHUTDOWN_F_SEND: u32 = 2;

/// `struct virtio_vsock_hdr`, all of its fields as they are on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes that follow the header.
    pub len: u32,
    /// Kind of socket.
    pub kind: u16,
    /// What the packet is for.
    pub op: u16,
    /// Depends on `op`.
    pub flags: u32,
    /// Bytes of buffer that the sender has for this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer so far.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header; every pattern of bytes is one.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Writes the header as it is on the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet.
    #[must_use]
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Rst as u16,
            ..Self::default()
        }
    }
}

/// What a packet is for (`enum virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Ends or refuses a connection.
    Rst = 3,
    /// Ends one or both directions of a connection.
    Shutdown = 4,
    /// Carries data.
    Rw = 5,
    /// Tells of free buffer space.
    CreditUpdate = 6,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

/// The directions that the sender of a [`Op::Shutdown`] has ended, for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ended {
    /// It will receive no more.
    pub receive: bool,
    /// It will send no more.
    pub send: bool,
}

impl Ended {
    /// The directions as the `flags` of a header; bits without a meaning are ignored.
    pub fn from_flags(flags: u32) -> Self {
        Self {
            receive: flags & SHUTDOWN_F_RECEIVE != 0,
            send: flags & SHUTDOWN_F_SEND != 0,
        }
    }

    /// The `flags` of a header.
    pub fn flags(self) -> u32 {
        let receive = if self.receive { SHUTDOWN_F_RECEIVE } else { 0 };
        let send = if self.send { SHUTDOWN_F_SEND } else { 0 };
        receive | send
    }

    /// Whether both directions are ended.
    pub fn both(self) -> bool {
        self.receive && self.send
    }
}

/// What names a connection between the host and this guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The port at the host.
    pub host_port: u32,
    /// The port in the guest.
    pub guest_port: u32,
}

/// A packet of the guest that makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The connection it belongs to.
    pub key: Key,
    /// The guest's buffer for the connection, in bytes.
    pub buf_alloc: u32,
    /// What the guest has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
    /// What it says.
    pub message: Message,
}

/// What a [`Packet`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// The guest wants a connection.
    Request,
    /// The guest accepts a connection.
    Response,
    /// The guest ends or refuses the connection at once.
    Reset,
    /// The guest ends directions of the connection.
    Shutdown(Ended),
    /// Data, that many bytes.
    Data(u32),
    /// Nothing but the credit, which every packet has.
    CreditUpdate,
    /// The guest asks for the host's credit.
    CreditRequest,
}

/// Why a packet makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reject {
    /// It is not answered.
    Drop,
    /// It is answered with a reset.
    Reset,
    /// It is answered with a reset and its connection, if there is one, is over.
    Kill(Key),
}

/// What the guest `guest_cid` wrote, where `payload` bytes follow the header.
///
/// # Errors
/// When the packet is not for us or does not keep to the standard.
pub fn parse(header: &Header, payload: usize, guest_cid: u32) -> Result<Packet, Reject> {
    if header.src_cid != u64::from(guest_cid) {
        return Err(Reject::Drop);
    }
    let is_reset = header.op == Op::Rst as u16;
    if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
        return Err(if is_reset {
            Reject::Drop
        } else {
            Reject::Reset
        });
    }
    let key = Key {
        host_port: header.dst_port,
        guest_port: header.src_port,
    };
    let message = match header.op {
        op if op == Op::Request as u16 => Message::Request,
        op if op == Op::Response as u16 => Message::Response,
        op if op == Op::Rst as u16 => Message::Reset,
        op if op == Op::Shutdown as u16 => Message::Shutdown(Ended::from_flags(header.flags)),
        op if op == Op::Rw as u16 => {
            if header.len as usize > payload {
                return Err(Reject::Kill(key));
            }
            Message::Data(header.len)
        }
        op if op == Op::CreditUpdate as u16 => Message::CreditUpdate,
        op if op == Op::CreditRequest as u16 => Message::CreditRequest,
        _ => return Err(Reject::Kill(key)),
    };
    Ok(Packet {
        key,
        buf_alloc: header.buf_alloc,
        fwd_cnt: header.fwd_cnt,
        message,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CID: u32 = 3;

    fn header(op: Op) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: HOST_CID,
            src_port: 1024,
            dst_port: 5000,
            kind: TYPE_STREAM,
            op: op as u16,
            ..Header::default()
        }
    }

    #[test]
    fn a_header_lies_on_the_wire_as_the_standard_says() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: 1,
            op: 5,
            flags: 3,
            buf_alloc: 0x4142_4344,
            fwd_cnt: 0x5152_5354,
        };

        let bytes = header.encode();

        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..20], [0x14, 0x13, 0x12, 0x11]);
        assert_eq!(bytes[24..28], [0x34, 0x33, 0x32, 0x31]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[40..], [0x54, 0x53, 0x52, 0x51]);
    }

    #[test]
    fn a_packet_in_the_name_of_another_guest_is_dropped() {
        assert_eq!(parse(&header(Op::Request), 0, CID + 1), Err(Reject::Drop));
    }

    #[test]
    fn a_packet_to_another_machine_is_reset() {
        let header = Header {
            dst_cid: 7,
            ..header(Op::Request)
        };
        assert_eq!(parse(&header, 0, CID), Err(Reject::Reset));
    }

    #[test]
    fn a_reset_is_never_answered_with_a_reset() {
        let header = Header {
            kind: 2,
            ..header(Op::Rst)
        };
        assert_eq!(parse(&header, 0, CID), Err(Reject::Drop));
    }

    #[test]
    fn data_that_is_longer_than_its_buffers_kills_the_connection() {
        let header = Header {
            len: 11,
            ..header(Op::Rw)
        };
        let key = Key {
            host_port: 5000,
            guest_port: 1024,
        };
        assert_eq!(parse(&header, 10, CID), Err(Reject::Kill(key)));
        assert!(parse(&header, 11, CID).is_ok());
    }

    proptest! {
        #[test]
        fn every_header_survives_the_wire(bytes in proptest::array::uniform32(any::<u8>()),
                                          rest in proptest::array::uniform12(any::<u8>())) {
            let mut wire = [0; HEADER_BYTES];
            wire[..32].copy_from_slice(&bytes);
            wire[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::decode(&wire).encode(), wire);
        }

        #[test]
        fn a_packet_has_no_more_data_than_its_buffers(
            op in 0..10_u16, kind in 0..3_u16, len: u32, payload in 0..100_000_usize, flags: u32,
        ) {
            let header = Header { op, kind, len, flags, ..header(Op::Rw) };
            match parse(&header, payload, CID) {
                Ok(Packet { message: Message::Data(len), .. }) => {
                    prop_assert!(len as usize <= payload);
                }
                Ok(packet) => prop_assert_eq!(packet.key.guest_port, 1024),
                Err(_) => prop_assert!(kind != 1 || op == 0 || op > 4),
            }
        }
    }
}
