//! The head of a FUSE message, as the guest wrote it, and the limits that
//! every message must keep before it is looked at further.

/// Bytes of `struct fuse_in_header`, with which every message begins.
pub const HEADER_BYTES: usize = 40;
/// Bytes of `struct fuse_out_header`, with which every reply begins.
pub const REPLY_BYTES: usize = 16;

/// The most that a message or the room for its reply may have: 1 MiB of data and some heads.
pub const MAX_BYTES: usize = (1 << 20) + 4096;

/// The longest name of a directory entry.
const NAME_MAX: usize = 255;

/// The numbers of the messages that are served, from `linux/fuse.h`.
mod opcode {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const IOCTL: u32 = 39;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const POLL: u32 = 40;
    pub(super) const NOTIFY_REPLY: u32 = 41;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const RENAME2: u32 = 45;
    pub(super) const LSEEK: u32 = 46;
}

/// How much the guest offers, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Bytes for the device to read.
    pub readable: usize,
    /// Room for the device to write.
    pub writable: usize,
}

/// A message that may be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// The guest waits for a reply.
    Answered {
        /// The number that the reply must carry.
        unique: u64,
    },
    /// The guest wants no reply.
    Silent,
}

/// A message that is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The message's number; without one it gets no reply.
    pub unique: Option<u64>,
    /// What the reply says.
    pub errno: i32,
}

/// Takes the head of a message apart. `header` may be shorter than [`HEADER_BYTES`].
///
/// # Errors
/// When the head is cut off or speaks of more than was given, there is no room for a reply,
/// the message is too long or of a kind that is not served.
pub fn parse(header: &[u8], lengths: Lengths) -> Result<Message, Refusal> {
    let (Some(unique), Some(len), Some(opcode)) =
        (unique(header), word(header, 0), word(header, 4))
    else {
        return Err(Refusal {
            unique: None,
            errno: libc::EINVAL,
        });
    };
    if matches!(
        opcode,
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT | opcode::NOTIFY_REPLY
    ) {
        return check_length(len, lengths)
            .map(|()| Message::Silent)
            .map_err(|errno| Refusal {
                unique: None,
                errno,
            });
    }
    let checked = check_length(len, lengths).and_then(|()| {
        if lengths.writable < REPLY_BYTES {
            return Err(libc::EINVAL);
        }
        if !is_served(opcode) {
            return Err(libc::ENOSYS);
        }
        Ok(Message::Answered { unique })
    });
    checked.map_err(|errno| Refusal {
        unique: Some(unique),
        errno,
    })
}

/// The message's number; `None` when the head is cut off.
pub fn unique(header: &[u8]) -> Option<u64> {
    header.get(..HEADER_BYTES)?;
    Some(u64::from_le_bytes(header.get(8..16)?.try_into().ok()?))
}

/// A reply that has nothing but an error.
pub fn error_reply(unique: u64, errno: i32) -> [u8; REPLY_BYTES] {
    let mut reply = [0; REPLY_BYTES];
    reply[..4].copy_from_slice(&(REPLY_BYTES as u32).to_le_bytes());
    reply[4..8].copy_from_slice(&errno.wrapping_neg().to_le_bytes());
    reply[8..].copy_from_slice(&unique.to_le_bytes());
    reply
}

/// Checks that a name is one of a directory's own entries: no path, not the directory itself,
/// not the one above.
///
/// # Errors
/// The number of the error for the guest.
pub fn check_name(name: &[u8]) -> Result<(), i32> {
    if name.len() > NAME_MAX {
        return Err(libc::ENAMETOOLONG);
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err(libc::EINVAL);
    }
    Ok(())
}

fn check_length(len: u32, lengths: Lengths) -> Result<(), i32> {
    if lengths.readable > MAX_BYTES || lengths.writable > MAX_BYTES {
        return Err(libc::E2BIG);
    }
    if (len as usize) < HEADER_BYTES || len as usize > lengths.readable {
        return Err(libc::EINVAL);
    }
    Ok(())
}

/// Ioctl and poll are for the guest's own devices; mappings need a window that is not there;
/// what came after them is not known to the server.
fn is_served(opcode: u32) -> bool {
    match opcode {
        opcode::IOCTL | opcode::POLL => false,
        opcode::LOOKUP..=opcode::RENAME2 | opcode::LSEEK => true,
        _ => false,
    }
}

fn word(header: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(len: u32, opcode: u32, unique: u64) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&len.to_le_bytes());
        header[4..8].copy_from_slice(&opcode.to_le_bytes());
        header[8..16].copy_from_slice(&unique.to_le_bytes());
        header
    }

    #[test]
    fn a_lookup_with_room_for_a_reply_passes() {
        let lengths = Lengths {
            readable: 45,
            writable: 144,
        };
        assert_eq!(
            parse(&header(45, 1, 7), lengths),
            Ok(Message::Answered { unique: 7 })
        );
    }

    #[test]
    fn an_ioctl_is_refused_with_enosys() {
        let lengths = Lengths {
            readable: 72,
            writable: 32,
        };
        assert_eq!(
            parse(&header(72, 39, 7), lengths),
            Err(Refusal {
                unique: Some(7),
                errno: libc::ENOSYS
            })
        );
    }

    #[test]
    fn a_forget_needs_no_room_for_a_reply() {
        let lengths = Lengths {
            readable: 48,
            writable: 0,
        };
        assert_eq!(parse(&header(48, 2, 7), lengths), Ok(Message::Silent));
    }

    #[test]
    fn only_names_of_entries_are_names() {
        for name in [&b""[..], b".", b"..", b"a/b", b"/", b"/etc", b"../x"] {
            assert_eq!(check_name(name), Err(libc::EINVAL), "{name:?}");
        }
        assert_eq!(check_name(&[b'a'; 256]), Err(libc::ENAMETOOLONG));
        for name in [&b"a"[..], b"...", b".hidden", b"\xff\xfe", &[b'a'; 255]] {
            assert_eq!(check_name(name), Ok(()), "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_passes_keeps_the_limits(
            header in proptest::collection::vec(any::<u8>(), 0..64),
            readable in 0usize..(2 << 20),
            writable in 0usize..(2 << 20),
        ) {
            if let Ok(message) = parse(&header, Lengths { readable, writable }) {
                prop_assert!(header.len() >= HEADER_BYTES);
                prop_assert!(readable <= MAX_BYTES && writable <= MAX_BYTES);
                prop_assert!(word(&header, 0).is_some_and(|len| len as usize <= readable));
                if let Message::Answered { unique } = message {
                    prop_assert!(writable >= REPLY_BYTES);
                    prop_assert_eq!(error_reply(unique, 1)[8..].to_vec(), header[8..16].to_vec());
                }
            }
        }

        #[test]
        fn every_name_that_passes_has_no_slash(name in proptest::collection::vec(any::<u8>(), 0..300)) {
            if check_name(&name).is_ok() {
                prop_assert!(!name.contains(&b'/') && name != b"." && name != b"..");
            }
        }
    }
}
