//! What a FUSE message asks for: the guest's bytes behind the head become a
//! value here, once. Layouts are those of `linux/fuse.h`, version 7.41.

use std::ffi::CStr;

use super::request::{check_name, opcode};

/// Fixed bytes before the data of a write.
pub const WRITE_BYTES: usize = 40;

/// `FUSE_GETATTR_FH`
const GETATTR_FH: u32 = 1;

/// A name of one entry of a directory: not empty, no path, not `.` or `..`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// The name with the zero behind it.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// What is asked of a node, by opcode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields carry the names of linux/fuse.h")]
pub enum Operation<'a> {
    Lookup {
        name: Name<'a>,
    },
    Forget {
        count: u64,
    },
    /// Pairs of a node and how often it is forgotten.
    BatchForget {
        pairs: &'a [u8],
    },
    GetAttr {
        handle: Option<u64>,
    },
    SetAttr(SetAttr),
    ReadLink,
    SymLink {
        name: Name<'a>,
        target: &'a CStr,
    },
    MkNod {
        name: Name<'a>,
        mode: u32,
        device: u32,
        umask: u32,
    },
    MkDir {
        name: Name<'a>,
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: Name<'a>,
    },
    RmDir {
        name: Name<'a>,
    },
    Rename {
        name: Name<'a>,
        new_parent: u64,
        new_name: Name<'a>,
        flags: u32,
    },
    Link {
        node: u64,
        new_name: Name<'a>,
    },
    Open {
        flags: u32,
        fuse_flags: u32,
    },
    Read {
        handle: u64,
        offset: u64,
        size: u32,
    },
    /// The data follow behind [`WRITE_BYTES`].
    Write {
        handle: u64,
        offset: u64,
        size: u32,
        fuse_flags: u32,
        flags: u32,
    },
    StatFs,
    Release {
        handle: u64,
    },
    Fsync {
        handle: u64,
        data_only: bool,
    },
    SetXattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
        kill_sgid: bool,
    },
    GetXattr {
        name: &'a CStr,
        size: u32,
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: &'a CStr,
    },
    Init {
        major: u32,
        max_readahead: u32,
        flags: u64,
    },
    OpenDir,
    ReadDir {
        handle: u64,
        offset: u64,
        size: u32,
        plus: bool,
    },
    Create(Create<'a>),
    TmpFile(NewFile),
    Interrupt,
    Destroy,
    Fallocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        handle: u64,
        offset: u64,
        whence: u32,
    },
    CopyFileRange(Copy),
    SyncFs,
    Statx {
        handle: Option<u64>,
    },
}

/// A file to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewFile {
    /// Flags of `open`.
    pub flags: u32,
    /// Type and permissions.
    pub mode: u32,
    /// What the caller takes away of them.
    pub umask: u32,
    /// `FOPEN_IN_...`
    pub fuse_flags: u32,
}

/// A file to be made under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Create<'a> {
    /// Its name.
    pub name: Name<'a>,
    /// What it is to be.
    pub file: NewFile,
}

/// Attributes to be set, those of `valid` (`FATTR_...`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields carry the names of linux/fuse.h")]
pub struct SetAttr {
    pub valid: u32,
    pub handle: u64,
    pub size: u64,
    pub atime: (u64, u32),
    pub mtime: (u64, u32),
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// A range to be copied from one open file to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields carry the names of linux/fuse.h")]
pub struct Copy {
    pub handle_in: u64,
    pub offset_in: u64,
    pub node_out: u64,
    pub handle_out: u64,
    pub offset_out: u64,
    pub length: u64,
    pub flags: u64,
}

/// Takes the body of a message apart; of a write only the part before the data.
///
/// # Errors
/// The number of the error for the guest: `EINVAL` for what is cut off, the error of a bad name,
/// `ENOSYS` for what is not served.
pub fn decode(opcode: u32, body: &[u8]) -> Result<Operation<'_>, i32> {
    let mut body = Body { rest: body };
    Ok(match opcode {
        opcode::LOOKUP => Operation::Lookup { name: body.name()? },
        opcode::FORGET => Operation::Forget {
            count: body.long()?,
        },
        opcode::BATCH_FORGET => batch_forget(body)?,
        opcode::GETATTR => {
            let flags = body.word()?;
            body.skip(4)?;
            let handle = body.long()?;
            Operation::GetAttr {
                handle: (flags & GETATTR_FH != 0).then_some(handle),
            }
        }
        opcode::SETATTR => Operation::SetAttr(set_attr(body)?),
        opcode::READLINK => Operation::ReadLink,
        opcode::SYMLINK => Operation::SymLink {
            name: body.name()?,
            target: body.text()?,
        },
        opcode::MKNOD => {
            let (mode, device, umask) = (body.word()?, body.word()?, body.word()?);
            body.skip(4)?;
            Operation::MkNod {
                name: body.name()?,
                mode,
                device,
                umask,
            }
        }
        opcode::MKDIR => {
            let (mode, umask) = (body.word()?, body.word()?);
            Operation::MkDir {
                name: body.name()?,
                mode,
                umask,
            }
        }
        opcode::UNLINK => Operation::Unlink { name: body.name()? },
        opcode::RMDIR => Operation::RmDir { name: body.name()? },
        opcode::RENAME | opcode::RENAME2 => {
            let new_parent = body.long()?;
            let mut flags = 0;
            if opcode == opcode::RENAME2 {
                flags = body.word()?;
                body.skip(4)?;
            }
            Operation::Rename {
                name: body.name()?,
                new_parent,
                new_name: body.name()?,
                flags,
            }
        }
        opcode::LINK => Operation::Link {
            node: body.long()?,
            new_name: body.name()?,
        },
        opcode::OPEN => Operation::Open {
            flags: body.word()?,
            fuse_flags: body.word()?,
        },
        opcode::READ => {
            let (handle, offset, size) = body.range()?;
            Operation::Read {
                handle,
                offset,
                size,
            }
        }
        opcode::WRITE => {
            let (handle, offset, size) = body.range()?;
            let fuse_flags = body.word()?;
            body.skip(8)?;
            Operation::Write {
                handle,
                offset,
                size,
                fuse_flags,
                flags: body.word()?,
            }
        }
        opcode::STATFS => Operation::StatFs,
        opcode::RELEASE | opcode::RELEASEDIR => Operation::Release {
            handle: body.long()?,
        },
        opcode::FSYNC | opcode::FSYNCDIR => Operation::Fsync {
            handle: body.long()?,
            data_only: body.word()? & 1 != 0,
        },
        opcode::SETXATTR => set_xattr(body)?,
        opcode::GETXATTR => {
            let size = body.word()?;
            body.skip(4)?;
            Operation::GetXattr {
                name: body.text()?,
                size,
            }
        }
        opcode::LISTXATTR => Operation::ListXattr { size: body.word()? },
        opcode::REMOVEXATTR => Operation::RemoveXattr { name: body.text()? },
        opcode::INIT => {
            let (major, _minor) = (body.word()?, body.word()?);
            let (max_readahead, low) = (body.word()?, body.word()?);
            // Older kernels end here.
            let high = body.word().unwrap_or(0);
            Operation::Init {
                major,
                max_readahead,
                flags: u64::from(low) | u64::from(high) << 32,
            }
        }
        opcode::OPENDIR => Operation::OpenDir,
        opcode::READDIR | opcode::READDIRPLUS => {
            let (handle, offset, size) = body.range()?;
            Operation::ReadDir {
                handle,
                offset,
                size,
                plus: opcode == opcode::READDIRPLUS,
            }
        }
        opcode::CREATE => {
            let file = new_file(&mut body)?;
            Operation::Create(Create {
                name: body.name()?,
                file,
            })
        }
        // The name behind it is no name.
        opcode::TMPFILE => Operation::TmpFile(new_file(&mut body)?),
        opcode::INTERRUPT => Operation::Interrupt,
        opcode::DESTROY => Operation::Destroy,
        opcode::FALLOCATE => Operation::Fallocate {
            handle: body.long()?,
            offset: body.long()?,
            length: body.long()?,
            mode: body.word()?,
        },
        opcode::LSEEK => {
            let (handle, offset, whence) = body.range()?;
            Operation::Lseek {
                handle,
                offset,
                whence,
            }
        }
        opcode::COPY_FILE_RANGE => Operation::CopyFileRange(Copy {
            handle_in: body.long()?,
            offset_in: body.long()?,
            node_out: body.long()?,
            handle_out: body.long()?,
            offset_out: body.long()?,
            length: body.long()?,
            flags: body.long()?,
        }),
        opcode::SYNCFS => Operation::SyncFs,
        opcode::STATX => {
            let flags = body.word()?;
            body.skip(4)?;
            let handle = body.long()?;
            Operation::Statx {
                handle: (flags & GETATTR_FH != 0).then_some(handle),
            }
        }
        // Locks and poll are the guest's own; ioctl is for devices; mappings need a window that
        // is not there.
        _ => return Err(libc::ENOSYS),
    })
}

fn batch_forget(mut body: Body<'_>) -> Result<Operation<'_>, i32> {
    let count = body.word()? as usize;
    body.skip(4)?;
    let bytes = count.checked_mul(16).ok_or(libc::EINVAL)?;
    Ok(Operation::BatchForget {
        pairs: body.bytes(bytes)?,
    })
}

fn set_attr(mut body: Body<'_>) -> Result<SetAttr, i32> {
    let valid = body.word()?;
    body.skip(4)?;
    let (handle, size) = (body.long()?, body.long()?);
    body.skip(8)?;
    let (atime, mtime, _ctime) = (body.long()?, body.long()?, body.long()?);
    let (atime_ns, mtime_ns, _ctime_ns) = (body.word()?, body.word()?, body.word()?);
    let mode = body.word()?;
    body.skip(4)?;
    let (uid, gid) = (body.word()?, body.word()?);
    body.skip(4)?;
    Ok(SetAttr {
        valid,
        handle,
        size,
        atime: (atime, atime_ns),
        mtime: (mtime, mtime_ns),
        mode,
        uid,
        gid,
    })
}

/// In the form of `FUSE_SETXATTR_EXT`, which is agreed on.
fn set_xattr(mut body: Body<'_>) -> Result<Operation<'_>, i32> {
    /// `FUSE_SETXATTR_ACL_KILL_SGID`
    const ACL_KILL_SGID: u32 = 1;
    let (size, flags, more) = (body.word()?, body.word()?, body.word()?);
    body.skip(4)?;
    Ok(Operation::SetXattr {
        name: body.text()?,
        value: body.bytes(size as usize)?,
        flags,
        kill_sgid: more & ACL_KILL_SGID != 0,
    })
}

fn new_file(body: &mut Body<'_>) -> Result<NewFile, i32> {
    Ok(NewFile {
        flags: body.word()?,
        mode: body.word()?,
        umask: body.word()?,
        fuse_flags: body.word()?,
    })
}

/// What is left of a message.
struct Body<'a> {
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], i32> {
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or(libc::EINVAL)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn skip(&mut self, count: usize) -> Result<(), i32> {
        self.bytes(count).map(|_| ())
    }

    fn word(&mut self) -> Result<u32, i32> {
        let (word, rest) = self.rest.split_first_chunk().ok_or(libc::EINVAL)?;
        self.rest = rest;
        Ok(u32::from_le_bytes(*word))
    }

    fn long(&mut self) -> Result<u64, i32> {
        let (long, rest) = self.rest.split_first_chunk().ok_or(libc::EINVAL)?;
        self.rest = rest;
        Ok(u64::from_le_bytes(*long))
    }

    /// A handle, an offset and a size.
    fn range(&mut self) -> Result<(u64, u64, u32), i32> {
        Ok((self.long()?, self.long()?, self.word()?))
    }

    /// Text with a zero behind it.
    fn text(&mut self) -> Result<&'a CStr, i32> {
        let text = CStr::from_bytes_until_nul(self.rest).map_err(|_| libc::EINVAL)?;
        self.rest = &self.rest[text.count_bytes() + 1..];
        Ok(text)
    }

    fn name(&mut self) -> Result<Name<'a>, i32> {
        let name = self.text()?;
        check_name(name.to_bytes())?;
        Ok(Name(name))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_rename_has_two_names() {
        let mut body = 7_u64.to_le_bytes().to_vec();
        body.extend([2, 0, 0, 0, 0, 0, 0, 0]);
        body.extend(b"old\0new\0");
        assert_eq!(
            decode(opcode::RENAME2, &body),
            Ok(Operation::Rename {
                name: Name(c"old"),
                new_parent: 7,
                new_name: Name(c"new"),
                flags: 2,
            })
        );
    }

    #[test]
    fn a_value_longer_than_the_message_is_refused() {
        let mut body = u32::MAX.to_le_bytes().to_vec();
        body.extend([0; 12]);
        body.extend(b"user.x\0value");
        assert_eq!(decode(opcode::SETXATTR, &body), Err(libc::EINVAL));
    }

    #[test]
    fn as_many_are_forgotten_as_there_are() {
        let mut body = 2_u32.to_le_bytes().to_vec();
        body.extend([0; 4]);
        body.extend([0; 31]);
        assert_eq!(decode(opcode::BATCH_FORGET, &body), Err(libc::EINVAL));
        body.push(0);
        assert!(decode(opcode::BATCH_FORGET, &body).is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_every_name_is_checked(
            opcode in 0_u32..64,
            body in proptest::collection::vec(prop_oneof![Just(0u8), Just(b'/'), Just(b'.'), any::<u8>()], 0..160),
        ) {
            let names = match decode(opcode, &body) {
                Ok(Operation::Lookup { name } | Operation::Unlink { name } | Operation::MkDir { name, .. }) => vec![name],
                Ok(Operation::Rename { name, new_name, .. }) => vec![name, new_name],
                Ok(Operation::Create(create)) => vec![create.name],
                _ => Vec::new(),
            };
            for name in names {
                prop_assert_eq!(check_name(name.as_c_str().to_bytes()), Ok(()));
            }
        }
    }
}
