//! Tar archives, read as a stream: what POSIX and GNU write, as far as layers have it.
//!
//! Every byte is a stranger's. A member's extended header is bounded before it is read, and a
//! member's content is for the caller to bound: [`Archive::content`] gives as much as the header
//! declares, which may be anything.

use std::collections::BTreeMap;
use std::io::{self, Read};

use crate::filesystem::Time;

/// Archives consist of these.
const BLOCK: usize = 512;

/// The longest path or target of a link; the kernel's own limit.
const PATH_MAX: usize = 4096;

/// The longest extended header: names and extended attributes of one member.
const EXTENSION_MAX: u64 = 1 << 20;

/// Why an archive cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream below failed.
    #[error("cannot read the archive")]
    Io(#[source] io::Error),
    /// It ends inside of a member.
    #[error("the archive is truncated")]
    Truncated,
    /// A header is none.
    #[error("a header's checksum is wrong: this is no tar archive, or a damaged one")]
    Checksum,
    /// A field of a header makes no sense.
    #[error("the {field} in a header is not valid")]
    Field {
        /// Which.
        field: &'static str,
    },
    /// A path longer than any system takes.
    #[error("a path or target of {length} bytes; at most {PATH_MAX} are possible")]
    Path {
        /// Its length.
        length: usize,
    },
    /// An extended header that is too long.
    #[error("an extended header of {length} bytes; at most {EXTENSION_MAX} are read")]
    Extension {
        /// Its length.
        length: u64,
    },
    /// A member of a kind that layers do not have.
    #[error("{path:?} is {what}, which is not supported; build the image without it")]
    Unsupported {
        /// Its path.
        path: String,
        /// What it is.
        what: String,
    },
}

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of this many bytes.
    File(u64),
    /// Another name for the member of this path.
    HardLink(Vec<u8>),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A device file.
    Device {
        /// Whether it is of blocks rather than characters.
        block: bool,
        /// The device's major number.
        major: u64,
        /// Its minor number.
        minor: u64,
    },
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One member of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its path as it is written.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions, set-id bits and the sticky bit.
    pub mode: u16,
    /// The owning user.
    pub uid: u64,
    /// The owning group.
    pub gid: u64,
    /// When the content changed last.
    pub mtime: Time,
    /// Extended attributes by their full names.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// An archive that is read.
#[derive(Debug)]
pub struct Archive<R> {
    input: R,
    /// Bytes of the current member's content that were not read.
    left: u64,
    /// Zeros that follow it.
    padding: u64,
}

/// What extended headers say of the member that follows.
#[derive(Debug, Default, PartialEq, Eq)]
struct Extension {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Time>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    sparse: bool,
}

impl<R: Read> Archive<R> {
    /// Reads an archive from its begin.
    pub fn new(input: R) -> Self {
        Self {
            input,
            left: 0,
            padding: 0,
        }
    }

    /// The next member; `None` at the end. What is left of the last one's content is passed over.
    ///
    /// # Errors
    ///
    /// When there is none and no end either.
    pub fn next_member(&mut self) -> Result<Option<Member>, Error> {
        let mut extension = Extension::default();
        loop {
            self.pass_over(self.left + self.padding)?;
            (self.left, self.padding) = (0, 0);
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = extension.size.unwrap_or(size(&header)?);
            match header[156] {
                b'x' => extension.add_records(&self.extension(size)?)?,
                b'L' => extension.path = Some(c_string(&self.extension(size)?).to_owned()),
                b'K' => extension.target = Some(c_string(&self.extension(size)?).to_owned()),
                // What holds for all that follows is a comment in practice.
                b'g' => drop(self.extension(size)?),
                _ => return self.member(&header, extension).map(Some),
            }
        }
    }

    /// The content of the current member.
    pub fn content(&mut self) -> impl Read + '_ {
        Content { archive: self }
    }

    /// The stream below, which stands where the current member's content begins, as far as that
    /// was not read.
    pub fn input(&self) -> &R {
        &self.input
    }

    /// Reads on to the end of the stream below, behind the end of the archive.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn finish(mut self) -> Result<(), Error> {
        io::copy(&mut self.input, &mut io::sink()).map_err(Error::Io)?;
        Ok(())
    }

    fn member(&mut self, header: &[u8; BLOCK], extension: Extension) -> Result<Member, Error> {
        let path = match extension.path {
            Some(path) => path,
            None => path_of(header),
        };
        let target = extension
            .target
            .unwrap_or_else(|| c_string(&header[157..257]).to_owned());
        for path in [&path, &target] {
            if path.len() > PATH_MAX {
                return Err(Error::Path { length: path.len() });
            }
        }
        let unsupported = |what: String| Error::Unsupported {
            path: String::from_utf8_lossy(&path).into_owned(),
            what,
        };
        if extension.sparse {
            return Err(unsupported("a sparse file".to_owned()));
        }
        let content = match (header[156], extension.size) {
            (b'1'..=b'6', _) => 0,
            (_, Some(size)) => size,
            (_, None) => size(header)?,
        };
        if content > i64::MAX as u64 {
            return Err(Error::Field { field: "size" });
        }
        let device = |block| {
            Ok::<_, Error>(Kind::Device {
                block,
                major: number(&header[329..337], "device number")?,
                minor: number(&header[337..345], "device number")?,
            })
        };
        let kind = match header[156] {
            // Archives older than the standard tell directories by a slash alone.
            0 | b'0' if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' => Kind::File(content),
            b'1' => Kind::HardLink(target),
            b'2' => Kind::Symlink(target),
            b'3' => device(false)?,
            b'4' => device(true)?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(unsupported("a sparse file".to_owned())),
            other => {
                let kind = char::from(other).escape_default();
                return Err(unsupported(format!("a member of type '{kind}'")));
            }
        };
        self.left = content;
        self.padding = content.wrapping_neg() % BLOCK as u64;
        Ok(Member {
            kind,
            mode: (number(&header[100..108], "mode")? & 0o7777) as u16,
            uid: match extension.uid {
                Some(uid) => uid,
                None => number(&header[108..116], "owner")?,
            },
            gid: match extension.gid {
                Some(gid) => gid,
                None => number(&header[116..124], "group")?,
            },
            mtime: match extension.mtime {
                Some(mtime) => mtime,
                None => Time {
                    seconds: signed(&header[136..148], "time")?,
                    nanoseconds: 0,
                },
            },
            xattrs: extension.xattrs,
            path,
        })
    }

    /// The next header. The archive ends with a block of zeros, or where the stream does.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, Error> {
        let mut header = [0; BLOCK];
        let mut count = 0;
        while count < BLOCK {
            match self.input.read(&mut header[count..]) {
                Ok(0) if count == 0 => return Ok(None),
                Ok(0) => return Err(Error::Truncated),
                Ok(more) => count += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Io(error)),
            }
        }
        if header == [0; BLOCK] {
            return Ok(None);
        }
        let blank = |at: usize| (148..156).contains(&at);
        let sum: u64 = header
            .iter()
            .enumerate()
            .map(|(at, byte)| if blank(at) { 32 } else { u64::from(*byte) })
            .sum();
        if number(&header[148..156], "checksum").ok() != Some(sum) {
            return Err(Error::Checksum);
        }
        Ok(Some(header))
    }

    /// The content of an extended header.
    fn extension(&mut self, length: u64) -> Result<Vec<u8>, Error> {
        if length > EXTENSION_MAX {
            return Err(Error::Extension { length });
        }
        let mut bytes = vec![0; length as usize];
        self.input.read_exact(&mut bytes).map_err(ended)?;
        self.pass_over(length.wrapping_neg() % BLOCK as u64)?;
        Ok(bytes)
    }

    fn pass_over(&mut self, length: u64) -> Result<(), Error> {
        let mut part = (&mut self.input).take(length);
        match io::copy(&mut part, &mut io::sink()).map_err(Error::Io)? {
            passed if passed == length => Ok(()),
            _ => Err(Error::Truncated),
        }
    }
}

struct Content<'a, R> {
    archive: &'a mut Archive<R>,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.archive.left;
        let room = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if room == 0 {
            // Not every reader below likes to be asked for nothing.
            return Ok(0);
        }
        let count = self.archive.input.read(&mut buffer[..room])?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                Error::Truncated,
            ));
        }
        self.archive.left -= count as u64;
        Ok(count)
    }
}

fn ended(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::Truncated,
        _ => Error::Io(error),
    }
}

impl Extension {
    /// Takes the records of a POSIX extended header: `length keyword=value\n`, one after the
    /// other, the length being that of the whole record.
    fn add_records(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        const DAMAGED: Error = Error::Field {
            field: "extended header",
        };
        while !bytes.is_empty() {
            let space = bytes.iter().take(8).position(|byte| *byte == b' ');
            let space = space.ok_or(DAMAGED)?;
            let length = decimal(&bytes[..space]).ok_or(DAMAGED)? as usize;
            let record = bytes.get(space + 1..length).ok_or(DAMAGED)?;
            let record = record.strip_suffix(b"\n").ok_or(DAMAGED)?;
            let equals = record.iter().position(|byte| *byte == b'=');
            let (keyword, value) = record.split_at(equals.ok_or(DAMAGED)?);
            self.add(keyword, &value[1..])?;
            bytes = &bytes[length..];
        }
        Ok(())
    }

    fn add(&mut self, keyword: &[u8], value: &[u8]) -> Result<(), Error> {
        let count = |field| decimal(value).ok_or(Error::Field { field }).map(Some);
        match keyword {
            b"path" => self.path = Some(value.to_owned()),
            b"linkpath" => self.target = Some(value.to_owned()),
            b"size" => self.size = count("size")?,
            b"uid" => self.uid = count("owner")?,
            b"gid" => self.gid = count("group")?,
            b"mtime" => {
                self.mtime = Some(time(value).ok_or(Error::Field { field: "time" })?);
            }
            _ if keyword.starts_with(b"GNU.sparse.") => self.sparse = true,
            _ => {
                if let Some(name) = keyword.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_owned(), value.to_owned());
                }
            }
        }
        Ok(())
    }
}

/// The path in a header: behind a prefix where the standard's form has one.
fn path_of(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = c_string(&header[..100]);
    // GNU's own form has other things where the standard has the prefix.
    let standard = &header[257..263] == b"ustar\0";
    match c_string(&header[345..500]) {
        prefix if standard && !prefix.is_empty() => [prefix, b"/", name].concat(),
        _ => name.to_owned(),
    }
}

fn size(header: &[u8; BLOCK]) -> Result<u64, Error> {
    match header[156] {
        // Whatever they say, these have no content.
        b'1'..=b'6' => Ok(0),
        _ => number(&header[124..136], "size"),
    }
}

/// The bytes before the first zero.
fn c_string(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|byte| *byte == 0);
    &bytes[..end.unwrap_or(bytes.len())]
}

fn number(field: &[u8], name: &'static str) -> Result<u64, Error> {
    let value = signed(field, name)?;
    u64::try_from(value).map_err(|_| Error::Field { field: name })
}

/// A number in a header: octal digits, or binary where the first bit is set.
fn signed(field: &[u8], name: &'static str) -> Result<i64, Error> {
    let invalid = || Error::Field { field: name };
    if let [first, rest @ ..] = field
        && first & 0x80 != 0
    {
        // The second bit is the sign.
        let start = i128::from(first & 0x7f) - i128::from(first & 0x40) * 2;
        let value = rest.iter().try_fold(start, |value, byte| {
            value.checked_mul(256)?.checked_add(i128::from(*byte))
        });
        let value = value.ok_or_else(invalid)?;
        return i64::try_from(value).map_err(|_| invalid());
    }
    let text = field.trim_ascii_start();
    let end = text.iter().position(|byte| matches!(byte, 0 | b' '));
    let digits = &text[..end.unwrap_or(text.len())];
    digits.iter().try_fold(0i64, |value, digit| match digit {
        b'0'..=b'7' => value
            .checked_mul(8)
            .and_then(|value| value.checked_add(i64::from(digit - b'0')))
            .ok_or_else(invalid),
        _ => Err(invalid()),
    })
}

fn decimal(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

/// Seconds since the epoch with an optional sign and fraction.
fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    let mut nanoseconds = 0;
    for place in 0..9 {
        let digit = fraction.get(place).unwrap_or(&b'0');
        nanoseconds = nanoseconds * 10 + u32::from(digit.checked_sub(b'0').filter(|d| *d < 10)?);
    }
    Some(match (negative, nanoseconds) {
        (false, nanoseconds) => Time {
            seconds,
            nanoseconds,
        },
        (true, 0) => Time {
            seconds: -seconds,
            nanoseconds: 0,
        },
        (true, nanoseconds) => Time {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layer::testing::{self, Header};

    fn members(bytes: &[u8]) -> Result<Vec<(Member, Vec<u8>)>, Error> {
        let mut archive = Archive::new(bytes);
        let mut members = Vec::new();
        while let Some(member) = archive.next_member()? {
            let mut content = Vec::new();
            // A stranger may declare more than there is.
            archive
                .content()
                .take(1 << 20)
                .read_to_end(&mut content)
                .map_err(ended)?;
            members.push((member, content));
        }
        archive.finish()?;
        Ok(members)
    }

    #[test]
    fn members_come_in_order_with_their_content() {
        let archive = testing::archive(&[
            Header::directory("etc/"),
            Header::file("etc/motd", b"hello"),
            Header::symlink("etc/link", "motd"),
        ]);
        let members = members(&archive).unwrap();
        let paths: Vec<_> = members.iter().map(|(member, _)| &member.path[..]).collect();
        assert_eq!(paths, [&b"etc/"[..], b"etc/motd", b"etc/link"]);
        assert_eq!(members[1].1, b"hello");
        assert_eq!(members[2].0.kind, Kind::Symlink(b"motd".to_vec()));
    }

    #[test]
    fn extended_headers_hold_for_the_next_member_alone() {
        let long = "d/".repeat(150) + "file";
        let archive = testing::archive(&[
            Header::file("short", b"one")
                .pax("path", long.as_bytes())
                .pax("mtime", b"-1.25")
                .pax("uid", b"3000000")
                .pax("SCHILY.xattr.user.note", b"a=b\nc"),
            Header::file("second", b"two"),
        ]);
        let members = members(&archive).unwrap();
        let first = &members[0].0;
        assert_eq!(first.path, long.as_bytes());
        assert_eq!(first.uid, 3_000_000);
        let time = Time {
            seconds: -2,
            nanoseconds: 750_000_000,
        };
        assert_eq!(first.mtime, time);
        assert_eq!(first.xattrs[&b"user.note"[..]], b"a=b\nc");
        assert_eq!(members[1].0.path, b"second");
        assert!(members[1].0.xattrs.is_empty());
    }

    #[test]
    fn gnu_long_names_are_read() {
        let name = "n".repeat(200);
        let archive = testing::archive(&[
            Header::raw(b'L', "././@LongLink", (name.clone() + "\0").as_bytes()),
            Header::raw(b'K', "././@LongLink", b"target\0"),
            Header::symlink("nnn", "ttt"),
        ]);
        let members = members(&archive).unwrap();
        assert_eq!(members[0].0.path, name.as_bytes());
        assert_eq!(members[0].0.kind, Kind::Symlink(b"target".to_vec()));
    }

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(signed(b"0000644\0", "").unwrap(), 0o644);
        assert_eq!(signed(b"   644 \0", "").unwrap(), 0o644);
        assert_eq!(signed(b"\0\0\0\0\0\0\0\0", "").unwrap(), 0);
        assert_eq!(
            signed(&[0x80, 0, 0, 0, 0, 0x20, 0, 0], "").unwrap(),
            1 << 21
        );
        assert_eq!(signed(&[0xff; 12], "").unwrap(), -1);
        assert!(signed(b"0000689\0", "").is_err());
        assert!(signed(&[0xbf; 20], "").is_err());
        assert!(number(&[0xff; 12], "").is_err());
    }

    #[test]
    fn an_archive_without_its_end_mark_ends_where_the_stream_does() {
        let archive = testing::archive(&[Header::file("file", b"hello")]);
        assert_eq!(members(&archive[..1024]).unwrap().len(), 1);
    }

    #[test]
    fn a_truncated_archive_is_an_error() {
        let archive = testing::archive(&[Header::file("file", &[1; 2000])]);
        for length in [100, 513, 1500, 2100] {
            let error = members(&archive[..length]).unwrap_err();
            assert!(matches!(error, Error::Truncated), "{length}: {error:?}");
        }
    }

    /// A reader that takes it badly to be asked for nothing, as one of packed bytes may.
    struct Picky<'a>(&'a [u8]);

    impl Read for Picky<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match buffer.is_empty() {
                true => Err(io::Error::other("asked for nothing")),
                false => self.0.read(buffer),
            }
        }
    }

    #[test]
    fn the_end_of_a_content_is_not_asked_for_below() {
        let bytes = testing::archive(&[Header::file("file", b"hello"), Header::file("e", b"")]);
        let mut archive = Archive::new(Picky(&bytes));
        let mut count = 0;
        while archive.next_member().unwrap().is_some() {
            count += io::copy(&mut archive.content(), &mut io::sink()).unwrap();
        }
        assert_eq!(count, 5);
    }

    #[test]
    fn what_is_no_archive_is_told_by_its_checksum() {
        assert!(matches!(members(&[b'x'; 1024]), Err(Error::Checksum)));
    }

    #[test]
    fn sparse_files_and_strange_members_are_refused_by_their_path() {
        for (header, what) in [
            (Header::raw(b'S', "holes", b""), "sparse"),
            (
                Header::file("holes", b"").pax("GNU.sparse.major", b"1"),
                "sparse",
            ),
            (Header::raw(b'M', "holes", b""), "type 'M'"),
        ] {
            let error = members(&testing::archive(&[header])).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("holes") && text.contains(what), "{text}");
        }
    }

    #[test]
    fn an_extended_header_is_bounded_before_it_is_read() {
        let mut header = testing::archive(&[Header::raw(b'x', "pax", b"")]);
        header[124..136].copy_from_slice(b"77777777777\0");
        testing::seal(&mut header[..512]);
        assert!(matches!(members(&header), Err(Error::Extension { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_members_or_an_error(
            mut blocks in proptest::collection::vec(
                proptest::collection::vec(any::<u8>(), BLOCK), 0..6),
            kinds in proptest::collection::vec(proptest::sample::select(b"01234567xgLKS\0".to_vec()), 6),
            sizes in proptest::collection::vec(0u64..3000, 6),
        ) {
            for ((block, kind), size) in blocks.iter_mut().zip(&kinds).zip(&sizes) {
                block[156] = *kind;
                for field in [100..108, 108..116, 116..124, 136..148, 329..337, 337..345] {
                    block[field].fill(b'7');
                }
                block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
                testing::seal(block);
            }
            let _ = members(&blocks.concat());
        }

        #[test]
        fn any_extended_header_is_records_or_an_error(bytes in "[0-9]{1,2} [a-zA-Z.=\n]{0,30}") {
            let _ = Extension::default().add_records(bytes.as_bytes());
        }

        #[test]
        fn a_time_is_what_its_digits_say(seconds in -1_000_000i64..1_000_000, millis in 0u32..1000) {
            let whole = time(format!("{seconds}").as_bytes()).unwrap();
            prop_assert_eq!(whole, Time { seconds, nanoseconds: 0 });
            let text = format!("{}.{millis:03}", seconds.unsigned_abs());
            let time = time(text.as_bytes()).unwrap();
            prop_assert_eq!(time.nanoseconds, millis * 1_000_000);
        }
    }
}
