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
pub mod opcode {
    #![expect(
        missing_docs,
        reason = "the names are the explanation, in fuse(4) and linux/fuse.h"
    )]

    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}

/// How much the guest offers, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Bytes for the device to read.
    pub readable: usize,
    /// Room for the device to write.
    pub writable: usize,
}

/// A message that keeps the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// The number that the reply must carry; `None` when the guest wants no reply.
    pub unique: Option<u64>,
    /// What is asked for, one of [`opcode`] or not.
    pub opcode: u32,
    /// The file that it is asked of.
    pub node: u64,
    /// The user in the guest who asks.
    pub uid: u32,
    /// That user's group.
    pub gid: u32,
    /// Bytes behind the head.
    pub body: usize,
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
/// or the message is too long.
pub fn parse(header: &[u8], lengths: Lengths) -> Result<Message, Refusal> {
    let cut_off = Refusal {
        unique: None,
        errno: libc::EINVAL,
    };
    let number = unique(header).ok_or(cut_off)?;
    let word = |at| word(header, at).ok_or(cut_off);
    let (len, opcode) = (word(0)? as usize, word(4)?);
    let unique = match opcode {
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT | opcode::NOTIFY_REPLY => None,
        _ => Some(number),
    };
    let refuse = |errno| Refusal { unique, errno };
    if lengths.readable > MAX_BYTES || lengths.writable > MAX_BYTES {
        return Err(refuse(libc::E2BIG));
    }
    let body = len
        .checked_sub(HEADER_BYTES)
        .filter(|_| len <= lengths.readable)
        .ok_or(refuse(libc::EINVAL))?;
    if unique.is_some() && lengths.writable < REPLY_BYTES {
        return Err(refuse(libc::EINVAL));
    }
    Ok(Message {
        unique,
        opcode,
        node: u64::from(word(16)?) | u64::from(word(20)?) << 32,
        uid: word(24)?,
        gid: word(28)?,
        body,
    })
}

/// The message's number; `None` when the head is cut off.
pub fn unique(header: &[u8]) -> Option<u64> {
    header.get(..HEADER_BYTES)?;
    Some(u64::from_le_bytes(header.get(8..16)?.try_into().ok()?))
}

/// A reply that has nothing but an error.
pub fn error_reply(unique: u64, errno: i32) -> [u8; REPLY_BYTES] {
    reply_header(unique, errno, REPLY_BYTES)
}

/// The head of a reply of `len` bytes, itself included.
pub fn reply_header(unique: u64, errno: i32, len: usize) -> [u8; REPLY_BYTES] {
    let mut reply = [0; REPLY_BYTES];
    reply[..4].copy_from_slice(&(len as u32).to_le_bytes());
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
        header[16..24].copy_from_slice(&0x1_0000_0002_u64.to_le_bytes());
        header[24..28].copy_from_slice(&1000_u32.to_le_bytes());
        header[28..32].copy_from_slice(&100_u32.to_le_bytes());
        header
    }

    #[test]
    fn a_lookup_with_room_for_a_reply_passes() {
        let lengths = Lengths {
            readable: 45,
            writable: 144,
        };
        assert_eq!(
            parse(&header(45, opcode::LOOKUP, 7), lengths),
            Ok(Message {
                unique: Some(7),
                opcode: opcode::LOOKUP,
                node: 0x1_0000_0002,
                uid: 1000,
                gid: 100,
                body: 5,
            })
        );
    }

    #[test]
    fn a_forget_needs_no_room_for_a_reply() {
        let lengths = Lengths {
            readable: 48,
            writable: 0,
        };
        let message = parse(&header(48, opcode::FORGET, 7), lengths).unwrap();
        assert_eq!(message.unique, None);
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
                prop_assert!(message.body + HEADER_BYTES <= readable);
                if let Some(unique) = message.unique {
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
