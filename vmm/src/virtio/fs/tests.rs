use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::*;
use crate::virtio::testing::{Buffer, Rig};

const ROOT: u64 = 1;
const REQUESTS: usize = 1;
const HIPRIO: usize = 0;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const IOCTL: u32 = 39;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;
const SYNCFS: u32 = 50;
const TMPFILE: u32 = 51;
const STATX: u32 = 52;

/// A guest's kernel that has mounted a share.
struct Guest {
    rig: Rig<Fs>,
    uid: u32,
    unique: u64,
}

/// A reply: its error, positive, or its body.
type Reply = Result<Vec<u8>, i32>;

fn share(read_only: bool) -> (TempDir, Guest) {
    let directory = TempDir::new().unwrap();
    let opened = fs::File::open(directory.path()).unwrap().into();
    let tag = "share".to_owned();
    let device = Fs::prepare(opened, Settings { tag, read_only }, OwnFiles::IN_PROC).unwrap();
    let guest = Guest {
        rig: Rig::new(device),
        uid: 0,
        unique: 0,
    };
    (directory, guest)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

fn name(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

fn long_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn word_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Guest {
    fn message(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let len = (HEADER_BYTES + body.len()) as u32;
        let mut message = words(&[len, opcode]);
        message.extend(longs(&[self.unique, node]));
        message.extend(words(&[self.uid, self.uid, 1, 0]));
        message.extend(body);
        message
    }

    fn call_with_room(&mut self, opcode: u32, node: u64, body: &[u8], room: usize) -> Reply {
        let message = self.message(opcode, node, body);
        let (head, rest) = message.split_at(HEADER_BYTES);
        let buffers = [
            Buffer::Out(head),
            Buffer::Out(rest),
            Buffer::In(REPLY_BYTES),
            Buffer::In(room),
        ];
        let skip = usize::from(rest.is_empty());
        let chain = match skip {
            0 => self.rig.offer(REQUESTS, &buffers),
            _ => self.rig.offer(
                REQUESTS,
                &[Buffer::Out(head), Buffer::In(REPLY_BYTES), Buffer::In(room)],
            ),
        };
        self.rig.kick(REQUESTS).unwrap();
        let used = self.rig.used(REQUESTS);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, chain.head);
        let reply = self.rig.written(&chain)[..used[0].1 as usize].to_vec();
        assert_eq!(word_at(&reply, 0), used[0].1, "the reply's own length");
        assert_eq!(long_at(&reply, 8), self.unique);
        match word_at(&reply, 4) as i32 {
            0 => Ok(reply[REPLY_BYTES..].to_vec()),
            error => Err(-error),
        }
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Reply {
        self.call_with_room(opcode, node, body, 4096)
    }

    fn lookup(&mut self, parent: u64, entry: &str) -> Result<u64, i32> {
        let reply = self.call(LOOKUP, parent, &name(entry))?;
        match long_at(&reply, 0) {
            0 => Err(libc::ENOENT),
            node => Ok(node),
        }
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<(u64, u32), i32> {
        let reply = self.call(OPEN, node, &words(&[flags as u32, 0]))?;
        Ok((long_at(&reply, 0), word_at(&reply, 8)))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Reply {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[size, 0, 0, 0, 0, 0]));
        self.call_with_room(READ, node, &body, size as usize)
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Reply {
        self.write_with(node, handle, offset, data, 0)
    }

    fn write_with(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
        write_flags: u32,
    ) -> Reply {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[data.len() as u32, write_flags, 0, 0, 2, 0]));
        body.extend(data);
        self.call(WRITE, node, &body)
    }

    fn create(&mut self, entry: &str, mode: u32) -> Result<(u64, u64), i32> {
        let mut body = words(&[libc::O_RDWR as u32, libc::S_IFREG | mode, 0o22, 0]);
        body.extend(name(entry));
        let reply = self.call(CREATE, ROOT, &body)?;
        Ok((long_at(&reply, 0), long_at(&reply, 128)))
    }

    fn names(&mut self, opcode: u32, head: usize) -> Vec<String> {
        let handle = self.open_root();
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let entries = self.entries((opcode, head), handle, offset, 1024);
            let Some((next, _)) = entries.last() else {
                return names;
            };
            offset = *next;
            names.extend(entries.into_iter().map(|(_, name)| name));
        }
    }

    fn open_root(&mut self) -> u64 {
        long_at(&self.call(OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0)
    }

    /// What is listed from an offset on: where the next entry is, and a name.
    fn entries(
        &mut self,
        (opcode, head): (u32, usize),
        handle: u64,
        offset: u64,
        room: u32,
    ) -> Vec<(u64, String)> {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[room, 0, 0, 0, 0, 0]));
        let room = room as usize + REPLY_BYTES;
        let reply = self.call_with_room(opcode, ROOT, &body, room).unwrap();
        let mut entries = Vec::new();
        let mut rest = &reply[..];
        while !rest.is_empty() {
            let entry = &rest[head..];
            let len = word_at(entry, 16) as usize;
            let name = String::from_utf8(entry[24..24 + len].to_vec()).unwrap();
            entries.push((long_at(entry, 8), name));
            rest = &rest[head + (24 + len).next_multiple_of(8)..];
        }
        entries
    }
}

fn setattr(valid: u32, mode: u32, size: u64) -> Vec<u8> {
    let mut body = words(&[valid, 0]);
    body.extend(longs(&[0, size, 0, 0, 0, 0]));
    body.extend(words(&[0, 0, 0, mode, 0, 0, 0, 0]));
    body
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn the_tag_and_one_request_queue_are_in_the_configuration_space() {
    let (_directory, guest) = share(false);
    let config = guest.rig.device.config_space();
    assert_eq!(config.len(), 40);
    assert_eq!(&config[..6], b"share\0");
    assert_eq!(word_at(&config, 36), 1);
}

#[test]
fn a_tag_that_does_not_fit_is_refused() {
    for tag in ["", &"x".repeat(37), "a\0b"] {
        let settings = Settings {
            tag: tag.to_owned(),
            read_only: false,
        };
        let opened = fs::File::open("/").unwrap().into();
        assert!(matches!(
            Fs::prepare(opened, settings, OwnFiles::IN_PROC),
            Err(PrepareError::Tag(_))
        ));
    }
}

#[test]
fn a_file_is_no_directory_to_share() {
    let file = tempfile::tempfile().unwrap().into();
    let settings = Settings {
        tag: "share".to_owned(),
        read_only: false,
    };
    assert!(matches!(
        Fs::prepare(file, settings, OwnFiles::IN_PROC),
        Err(PrepareError::Directory { .. })
    ));
}

#[test]
fn init_agrees_on_large_writes() {
    let (_directory, mut guest) = share(false);
    let mut init = [0; 16];
    init[..4].copy_from_slice(&[7, 38, 1 << 17, 0x73ff_fffb]);
    let reply = guest.call(INIT, 0, &words(&init)).unwrap();
    assert_eq!(word_at(&reply, 0), 7);
    assert_eq!(word_at(&reply, 20), 1 << 20, "max_write");
    let flags = word_at(&reply, 12);
    assert_eq!(flags & (1 << 22), 1 << 22, "MAX_PAGES");
    assert_eq!(flags & (1 << 28), 1 << 28, "HANDLE_KILLPRIV_V2");
    assert_eq!(flags & (1 << 20), 1 << 20, "POSIX_ACL");
    assert_eq!(flags & (1 << 6), 1 << 6, "DONT_MASK");
    assert_eq!(flags & (1 << 16), 0, "no WRITEBACK_CACHE");
    assert_eq!(flags & (1 << 27), 0, "no SUBMOUNTS");
}

#[test]
fn a_file_of_the_host_is_found_and_read() {
    let (directory, mut guest) = share(false);
    fs::write(directory.path().join("greeting"), "hello from the host").unwrap();
    let node = guest.lookup(ROOT, "greeting").unwrap();
    let (handle, _) = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, handle, 6, 100).unwrap(), b"from the host");
    assert_eq!(guest.read(node, handle, 100, 100).unwrap(), b"");
    guest.call(RELEASE, node, &longs(&[handle, 0, 0])).unwrap();
    assert_eq!(guest.read(node, handle, 0, 1), Err(libc::EBADF));
}

#[test]
fn what_the_guest_writes_reaches_the_host() {
    let (directory, mut guest) = share(false);
    let (node, handle) = guest.create("new", 0o666).unwrap();
    let reply = guest.write(node, handle, 0, b"0123456789").unwrap();
    assert_eq!(word_at(&reply, 0), 10);
    guest.write(node, handle, 2, b"XY").unwrap();
    guest.call(FSYNC, node, &longs(&[handle, 1])).unwrap();
    let path = directory.path().join("new");
    assert_eq!(fs::read(&path).unwrap(), b"01XY456789");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
}

#[test]
fn a_file_made_by_the_host_in_between_is_opened_by_create() {
    let (directory, mut guest) = share(false);
    fs::write(directory.path().join("raced"), "first").unwrap();
    let (node, handle) = guest.create("raced", 0o600).unwrap();
    assert_eq!(guest.read(node, handle, 0, 10).unwrap(), b"first");
}

#[test]
fn names_that_lead_out_are_refused_in_every_message() {
    let (_directory, mut guest) = share(false);
    for bad in ["..", ".", "", "a/b", "/etc/passwd", "../escape"] {
        assert_eq!(guest.lookup(ROOT, bad), Err(libc::EINVAL), "{bad:?}");
        assert_eq!(guest.create(bad, 0o600), Err(libc::EINVAL), "{bad:?}");
        let with = |head: &[u8]| [head, &name(bad)].concat();
        let mkdir = with(&words(&[0o755, 0]));
        assert_eq!(guest.call(MKDIR, ROOT, &mkdir), Err(libc::EINVAL));
        let mknod = with(&words(&[libc::S_IFREG | 0o644, 0, 0, 0]));
        assert_eq!(guest.call(MKNOD, ROOT, &mknod), Err(libc::EINVAL));
        assert_eq!(guest.call(UNLINK, ROOT, &name(bad)), Err(libc::EINVAL));
        assert_eq!(guest.call(RMDIR, ROOT, &name(bad)), Err(libc::EINVAL));
        let link = with(&longs(&[ROOT]));
        assert_eq!(guest.call(LINK, ROOT, &link), Err(libc::EINVAL));
        let symlink = [name(bad), name("target")].concat();
        assert_eq!(guest.call(SYMLINK, ROOT, &symlink), Err(libc::EINVAL));
        let rename = [longs(&[ROOT, 0]), name("x"), name(bad)].concat();
        assert_eq!(guest.call(RENAME2, ROOT, &rename), Err(libc::EINVAL));
    }
}

#[test]
fn a_link_is_never_followed() {
    let (directory, mut guest) = share(false);
    symlink("/etc", directory.path().join("out")).unwrap();
    let node = guest.lookup(ROOT, "out").unwrap();
    assert_eq!(guest.call(READLINK, node, &[]).unwrap(), b"/etc");
    assert_eq!(guest.lookup(node, "passwd"), Err(libc::ENOTDIR));
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ENXIO));
    assert_eq!(guest.create("out", 0o600), Err(libc::ENXIO));
}

#[test]
fn a_device_or_fifo_is_not_opened_on_the_host() {
    let (directory, mut guest) = share(false);
    nix::unistd::mkfifo(
        &directory.path().join("fifo"),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    let node = guest.lookup(ROOT, "fifo").unwrap();
    assert_eq!(guest.open(node, libc::O_RDWR), Err(libc::ENXIO));
    assert_eq!(guest.create("fifo", 0o600), Err(libc::ENXIO));
    let mut block = words(&[libc::S_IFBLK | 0o600, 0x0800, 0, 0]);
    block.extend(name("sda"));
    assert_eq!(guest.call(MKNOD, ROOT, &block), Err(libc::EPERM));
}

#[test]
fn a_node_is_the_file_and_not_its_name() {
    let (directory, mut guest) = share(false);
    let path = directory.path().join("file");
    fs::write(&path, "old").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    let (handle, _) = guest.open(node, libc::O_RDONLY).unwrap();
    fs::remove_file(&path).unwrap();
    symlink("/etc/passwd", &path).unwrap();
    assert_eq!(guest.read(node, handle, 0, 10).unwrap(), b"old");
    let (again, _) = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, again, 0, 10).unwrap(), b"old");
}

#[test]
fn a_read_only_share_answers_every_change_with_erofs() {
    let (directory, mut guest) = share(true);
    fs::write(directory.path().join("file"), "kept").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    let refused = Err(libc::EROFS);
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags), Err(libc::EROFS));
    }
    let (handle, _) = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, handle, 0, 10).unwrap(), b"kept");
    assert_eq!(guest.write(node, handle, 0, b"x"), refused);
    assert_eq!(guest.create("new", 0o600), Err(libc::EROFS));
    assert_eq!(guest.call(SETATTR, node, &setattr(8, 0, 0)), refused);
    assert_eq!(guest.call(UNLINK, ROOT, &name("file")), refused);
    assert_eq!(guest.call(RMDIR, ROOT, &name("file")), refused);
    let mkdir = [words(&[0o755, 0]), name("d")].concat();
    assert_eq!(guest.call(MKDIR, ROOT, &mkdir), refused);
    let mknod = [words(&[libc::S_IFREG, 0, 0, 0]), name("n")].concat();
    assert_eq!(guest.call(MKNOD, ROOT, &mknod), refused);
    let symlink = [name("l"), name("t")].concat();
    assert_eq!(guest.call(SYMLINK, ROOT, &symlink), refused);
    let link = [longs(&[node]), name("l")].concat();
    assert_eq!(guest.call(LINK, ROOT, &link), refused);
    let rename = [longs(&[ROOT, 0]), name("file"), name("g")].concat();
    assert_eq!(guest.call(RENAME2, ROOT, &rename), refused);
    let fallocate = [longs(&[handle, 0, 1]), words(&[0, 0])].concat();
    assert_eq!(guest.call(FALLOCATE, node, &fallocate), refused);
    let setxattr = [words(&[1, 0, 0, 0]), name("user.x"), b"1".to_vec()].concat();
    assert_eq!(guest.call(SETXATTR, node, &setxattr), refused);
    assert_eq!(fs::read(directory.path().join("file")).unwrap(), b"kept");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn directories_are_made_listed_and_removed() {
    let (directory, mut guest) = share(false);
    for i in 0..40 {
        fs::write(directory.path().join(format!("file-{i:02}")), "").unwrap();
    }
    let mkdir = [words(&[0o755, 0]), name("directory")].concat();
    guest.call(MKDIR, ROOT, &mkdir).unwrap();
    let expected = (0..40)
        .map(|i| format!("file-{i:02}"))
        .chain([".", "..", "directory"].map(str::to_owned));
    let mut expected: Vec<_> = expected.collect();
    expected.sort();
    for (opcode, head) in [(READDIR, 0), (READDIRPLUS, 128)] {
        let mut names = guest.names(opcode, head);
        names.sort();
        assert_eq!(names, expected);
    }
    guest.call(RMDIR, ROOT, &name("directory")).unwrap();
    assert_eq!(guest.lookup(ROOT, "directory"), Err(libc::ENOENT));
}

#[test]
fn each_entry_of_a_directory_is_read_once_and_none_is_opened() {
    const FILES: usize = 500;
    let (directory, mut guest) = share(false);
    for i in 0..FILES {
        fs::write(directory.path().join(format!("file-{i:03}")), "").unwrap();
    }
    let held = guest.rig.device.share.held();
    for (opcode, head) in [(READDIR, 0), (READDIRPLUS, 128)] {
        let before = guest.rig.device.share.read_bytes();
        assert_eq!(guest.names(opcode, head).len(), FILES + 2);
        let read = guest.rig.device.share.read_bytes() - before;
        // `struct linux_dirent64` with a name of 8 bytes.
        assert!(read <= (FILES + 2) * 32, "{read} bytes were read");
    }
    assert_eq!(guest.rig.device.share.held(), held);
}

#[test]
fn two_listings_in_turns_have_all_names_each() {
    let (directory, mut guest) = share(false);
    for i in 0..100 {
        fs::write(directory.path().join(format!("file-{i:03}")), "").unwrap();
    }
    let handles = [guest.open_root(), guest.open_root()];
    let mut seen = [const { Vec::new() }; 2];
    let mut offsets = [0; 2];
    let mut at_end = [false; 2];
    while at_end != [true; 2] {
        for i in 0..2 {
            // Of different sizes, so that what is left over differs too.
            let room = [500, 800][i];
            let entries = guest.entries((READDIR, 0), handles[i], offsets[i], room);
            at_end[i] = entries.is_empty();
            for (offset, name) in entries {
                offsets[i] = offset;
                seen[i].push(name);
            }
        }
    }
    for mut names in seen {
        assert_eq!(names.len(), 102);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 102);
    }
}

#[test]
fn a_file_that_the_host_changed_is_not_read_from_the_cache() {
    const KEEP_CACHE: u32 = 2;
    let (directory, mut guest) = share(false);
    let path = directory.path().join("config");
    fs::write(&path, "").unwrap();
    let node = guest.lookup(ROOT, "config").unwrap();
    let mut keeps = || guest.open(node, libc::O_RDONLY).unwrap().1 & KEEP_CACHE != 0;
    let at_once = in_one_tick(|| {
        fs::write(&path, "one").unwrap();
        [keeps(), keeps()]
    });
    assert_eq!(at_once, [false, false], "it may change in this tick");
    std::thread::sleep(std::time::Duration::from_millis(60));
    assert_eq!([keeps(), keeps()], [false, true]);
    fs::write(&path, "two").unwrap();
    assert!(!keeps());
}

#[test]
fn a_listing_may_be_kept_until_the_directory_changes() {
    const KEEP_CACHE: u32 = 2;
    const CACHE_DIR: u32 = 8;
    let (directory, mut guest) = share(false);
    let mut options = || {
        let reply = guest.call(OPENDIR, ROOT, &words(&[0, 0])).unwrap();
        word_at(&reply, 8)
    };
    std::thread::sleep(std::time::Duration::from_millis(60));
    assert_eq!(options(), CACHE_DIR);
    assert_eq!(options(), CACHE_DIR | KEEP_CACHE);
    let mut names = (0..).map(|i| directory.path().join(format!("new-{i}")));
    let at_once = in_one_tick(|| {
        fs::write(names.next().unwrap(), "").unwrap();
        options()
    });
    assert_eq!(at_once, 0);
}

/// What is seen of a change while a further one would not be: again if that took too long.
fn in_one_tick<T>(mut change: impl FnMut() -> T) -> T {
    // The clock of files is late by up to ten.
    const TICK: Duration = Duration::from_millis(40);
    for _ in 0..20 {
        let begin = Instant::now();
        let seen = change();
        if begin.elapsed() < TICK {
            return seen;
        }
    }
    panic!("20 times longer than {TICK:?}");
}

#[test]
fn a_name_that_is_missing_is_so_for_a_while() {
    let (_directory, mut guest) = share(false);
    let reply = guest.call(LOOKUP, ROOT, &name("missing")).unwrap();
    assert_eq!(long_at(&reply, 0), 0, "no node");
    assert_eq!(long_at(&reply, 16), 1, "for a second");
}

#[test]
fn attributes_are_set_and_read() {
    let (directory, mut guest) = share(false);
    let (node, _) = guest.create("file", 0o600).unwrap();
    guest
        .call(SETATTR, node, &setattr(1 | 8, libc::S_IFREG | 0o4750, 5000))
        .unwrap();
    let metadata = fs::metadata(directory.path().join("file")).unwrap();
    assert_eq!(metadata.len(), 5000);
    assert_eq!(metadata.mode() & 0o7777, 0o4750);
    let reply = guest.call(GETATTR, node, &[0; 16]).unwrap();
    assert_eq!(long_at(&reply, 16), metadata.ino());
    assert_eq!(long_at(&reply, 24), 5000);
    guest.call(STATFS, node, &[]).unwrap();
}

#[test]
fn set_id_bits_go_with_a_write_when_the_guest_says_so() {
    let (directory, mut guest) = share(false);
    let (node, handle) = guest.create("file", 0o700).unwrap();
    let path = directory.path().join("file");
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    guest.call(SETATTR, node, &setattr(1, 0o6755, 0)).unwrap();
    guest.write_with(node, handle, 0, b"x", 0).unwrap();
    assert_eq!(mode(), 0o6755);
    guest.write_with(node, handle, 0, b"x", 4).unwrap();
    assert_eq!(mode(), 0o755);
}

#[test]
fn set_id_bits_go_when_room_is_made_or_a_range_is_copied() {
    let (directory, mut guest) = share(false);
    let (from, from_handle) = guest.create("from", 0o600).unwrap();
    guest.write(from, from_handle, 0, b"0123456789").unwrap();
    let (node, handle) = guest.create("file", 0o700).unwrap();
    let path = directory.path().join("file");
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    guest.call(SETATTR, node, &setattr(1, 0o6755, 0)).unwrap();
    let allocate = [longs(&[handle, 0, 4096]), words(&[0, 0])].concat();
    guest.call(FALLOCATE, node, &allocate).unwrap();
    assert_eq!(mode(), 0o755);
    guest.call(SETATTR, node, &setattr(1, 0o6755, 0)).unwrap();
    let copy = longs(&[from_handle, 0, node, handle, 0, 5, 0]);
    guest.call(COPY_FILE_RANGE, from, &copy).unwrap();
    assert_eq!(mode(), 0o755);
    // Nobody runs it as a group that may not run it.
    guest.call(SETATTR, node, &setattr(1, 0o2644, 0)).unwrap();
    guest.call(FALLOCATE, node, &allocate).unwrap();
    assert_eq!(mode(), 0o2644);
}

#[test]
fn new_files_belong_to_the_guests_caller() {
    let (directory, mut guest) = share(false);
    if !is_root() {
        guest.uid = 1234;
        assert_eq!(guest.create("file", 0o600), Err(libc::EPERM));
        return;
    }
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    guest.uid = 1234;
    guest.create("file", 0o600).unwrap();
    let mkdir = [words(&[0o755, 0]), name("directory")].concat();
    guest.call(MKDIR, ROOT, &mkdir).unwrap();
    guest.uid = 0;
    guest.create("roots", 0o600).unwrap();
    // As if the caller were in the directory's group by a supplementary one.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o770)).unwrap();
    guest.uid = 1234;
    guest.create("by-group", 0o600).unwrap();
    let owner = |name: &str| {
        let metadata = fs::metadata(directory.path().join(name)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("file"), (1234, 1234));
    assert_eq!(owner("directory"), (1234, 1234));
    assert_eq!(owner("roots"), (0, 0));
    assert_eq!(owner("by-group"), (1234, 1234));
}

#[test]
fn extended_attributes_are_kept() {
    let (_directory, mut guest) = share(false);
    let (node, _) = guest.create("file", 0o600).unwrap();
    let missing = [words(&[64, 0]), name("user.none")].concat();
    let answer = guest.call(GETXATTR, node, &missing);
    if answer == Err(libc::EOPNOTSUPP) {
        return; // passed on as it is: the file system below has none
    }
    assert_eq!(answer, Err(libc::ENODATA));
    let set = [words(&[5, 0, 0, 0]), name("user.key"), b"value".to_vec()].concat();
    guest.call(SETXATTR, node, &set).unwrap();
    let get = |size| [words(&[size, 0]), name("user.key")].concat();
    assert_eq!(guest.call(GETXATTR, node, &get(64)).unwrap(), b"value");
    let count = guest.call(GETXATTR, node, &get(0)).unwrap();
    assert_eq!(word_at(&count, 0), 5);
    assert_eq!(guest.call(GETXATTR, node, &get(2)), Err(libc::ERANGE));
    let huge = guest.call(GETXATTR, node, &get(u32::MAX)).unwrap();
    assert_eq!(huge, b"value");
    let names = guest.call(LISTXATTR, node, &words(&[64, 0])).unwrap();
    assert!(names.windows(9).any(|name| name == b"user.key\0"));
}

#[test]
fn asking_for_extended_attributes_opens_nothing_and_follows_no_link() {
    let (directory, mut guest) = share(false);
    let outside = TempDir::new().unwrap();
    let path = directory.path().join("file");
    for path in [&path, &outside.path().join("secret")] {
        fs::write(path, "").unwrap();
        let command = ["-n", "user.key", "-v", "value"];
        let mut set = std::process::Command::new("setfattr");
        assert!(set.args(command).arg(path).status().unwrap().success());
    }
    let get = [words(&[64, 0]), name("user.key")].concat();
    let missing = [words(&[64, 0]), name("user.none")].concat();
    let node = guest.lookup(ROOT, "file").unwrap();
    let held = guest.rig.device.share.held();

    assert_eq!(guest.call(GETXATTR, node, &get).unwrap(), b"value");
    assert_eq!(guest.call(GETXATTR, node, &missing), Err(libc::ENODATA));
    assert_eq!(guest.rig.device.share.held(), held);

    fs::rename(&path, directory.path().join("other")).unwrap();
    assert_eq!(guest.call(GETXATTR, node, &get), Err(libc::ESTALE));
    symlink(outside.path().join("secret"), &path).unwrap();
    assert_eq!(guest.call(GETXATTR, node, &get), Err(libc::ENODATA));
    fs::remove_file(&path).unwrap();
    fs::copy(outside.path().join("secret"), &path).unwrap();
    let mut set = std::process::Command::new("setfattr");
    assert!(
        set.args(["-n", "user.key", "-v", "new"])
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(guest.call(GETXATTR, node, &get), Err(libc::ESTALE));
}

#[test]
fn a_hard_link_is_the_same_node() {
    let (_directory, mut guest) = share(false);
    let (node, _) = guest.create("one", 0o600).unwrap();
    let link = [longs(&[node]), name("two")].concat();
    let reply = guest.call(LINK, ROOT, &link).unwrap();
    assert_eq!(long_at(&reply, 0), node);
    assert_eq!(guest.lookup(ROOT, "two"), Ok(node));
}

#[test]
fn a_node_is_gone_when_it_was_forgotten_as_often_as_it_was_found() {
    let (directory, mut guest) = share(false);
    fs::write(directory.path().join("file"), "").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(guest.lookup(ROOT, "file"), Ok(node));
    let message = guest.message(FORGET, node, &longs(&[1]));
    guest.rig.offer(HIPRIO, &[Buffer::Out(&message)]);
    guest.rig.kick(HIPRIO).unwrap();
    assert_eq!(guest.rig.used(HIPRIO)[0].1, 0, "no reply");
    guest.call(GETATTR, node, &[0; 16]).unwrap();
    let batch = [words(&[1, 0]), longs(&[node, u64::MAX])].concat();
    let message = guest.message(BATCH_FORGET, 0, &batch);
    guest.rig.offer(HIPRIO, &[Buffer::Out(&message)]);
    guest.rig.kick(HIPRIO).unwrap();
    assert_eq!(guest.call(GETATTR, node, &[0; 16]), Err(libc::ESTALE));
}

#[test]
fn the_root_is_never_forgotten() {
    let (_directory, mut guest) = share(false);
    let message = guest.message(FORGET, ROOT, &longs(&[u64::MAX]));
    guest.rig.offer(HIPRIO, &[Buffer::Out(&message)]);
    guest.rig.kick(HIPRIO).unwrap();
    guest.call(GETATTR, ROOT, &[0; 16]).unwrap();
}

#[test]
fn a_share_can_be_mounted_again_after_it_was_unmounted() {
    let (_directory, mut guest) = share(false);
    let (node, _) = guest.create("file", 0o600).unwrap();
    guest.call(DESTROY, 0, &[]).unwrap();
    assert_eq!(guest.call(GETATTR, node, &[0; 16]), Err(libc::ESTALE));
    guest.lookup(ROOT, "file").unwrap();
}

#[test]
fn a_message_that_is_cut_off_gets_an_error() {
    let (_directory, mut guest) = share(false);
    for opcode in [
        LOOKUP, OPEN, READ, WRITE, CREATE, SETATTR, RENAME2, GETXATTR,
    ] {
        assert_eq!(guest.call(opcode, ROOT, &[]), Err(libc::EINVAL), "{opcode}");
        assert_eq!(
            guest.call(opcode, ROOT, b"xy"),
            Err(libc::EINVAL),
            "{opcode}"
        );
    }
    assert_eq!(guest.call(IOCTL, ROOT, &[0xff; 32]), Err(libc::ENOSYS));
    assert_eq!(guest.call(4711, ROOT, &[]), Err(libc::ENOSYS));
}

#[test]
fn a_header_that_is_cut_off_is_given_back_empty() {
    let (_directory, mut guest) = share(false);
    guest
        .rig
        .offer(REQUESTS, &[Buffer::Out(&[1; 20]), Buffer::In(64)]);
    guest.rig.offer(REQUESTS, &[Buffer::In(64)]);
    guest.rig.kick(REQUESTS).unwrap();
    let written: Vec<_> = guest.rig.used(REQUESTS).iter().map(|used| used.1).collect();
    assert_eq!(written, [0, 0]);
}

#[test]
fn data_outside_of_memory_gets_efault() {
    let (_directory, mut guest) = share(false);
    let message = guest.message(LOOKUP, ROOT, &name("x"));
    let chain = guest.rig.offer(
        REQUESTS,
        &[
            Buffer::Out(&message),
            Buffer::Out(b"x"),
            Buffer::In(REPLY_BYTES),
        ],
    );
    guest
        .rig
        .write_descriptor(REQUESTS, chain.head + 1, 1 << 40, 4096, 1, chain.head + 2);
    guest.rig.kick(REQUESTS).unwrap();
    let reply = guest.rig.written(&chain);
    assert_eq!(word_at(&reply, 4) as i32, -libc::EFAULT);
}

#[test]
fn many_requests_make_one_interrupt() {
    let (directory, mut guest) = share(false);
    fs::write(directory.path().join("file"), "").unwrap();
    for _ in 0..5 {
        let message = guest.message(LOOKUP, ROOT, &name("file"));
        guest
            .rig
            .offer(REQUESTS, &[Buffer::Out(&message), Buffer::In(144)]);
    }
    guest.rig.kick(REQUESTS).unwrap();
    assert_eq!(guest.rig.used(REQUESTS).len(), 5);
    assert_eq!(guest.rig.active.counters.read().interrupts, 1);
}

#[test]
fn garbage_never_panics_and_never_leads_out() {
    use proptest::prelude::*;
    let outside = TempDir::new().unwrap();
    let (directory, mut guest) = share(false);
    fs::write(directory.path().join("a"), "a").unwrap();
    let before = fs::read_dir(outside.path()).unwrap().count();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(300));
    let guest = std::cell::RefCell::new(&mut guest);
    let body = proptest::collection::vec(
        prop_oneof![
            Just(0u8),
            Just(1),
            Just(b'a'),
            Just(b'/'),
            Just(b'.'),
            any::<u8>()
        ],
        0..120,
    );
    runner
        .run(&(0u32..60, 0u64..4, body), |(opcode, node, body)| {
            if [FORGET, BATCH_FORGET, 36, 41].contains(&opcode) {
                return Ok(());
            }
            let mut guest = guest.borrow_mut();
            let _ = guest.call_with_room(opcode, node, &body, 256);
            guest.rig.rewind();
            Ok(())
        })
        .unwrap();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), before);
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn a_file_without_a_name_is_written_and_then_linked() {
    let (directory, mut guest) = share(false);
    let body = words(&[libc::O_RDWR as u32, libc::S_IFREG | 0o644, 0o022, 0]);
    let reply = guest.call(TMPFILE, ROOT, &[body, name("/")].concat());
    let reply = reply.unwrap();
    let (node, handle) = (long_at(&reply, 0), long_at(&reply, 128));
    guest.write(node, handle, 0, b"out of nothing").unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);

    let link = [longs(&[node]), name("linked")].concat();
    guest.call(LINK, ROOT, &link).unwrap();
    guest.call(RELEASE, node, &longs(&[handle, 0, 0])).unwrap();

    let linked = fs::read(directory.path().join("linked")).unwrap();
    assert_eq!(linked, b"out of nothing");
    assert_eq!(guest.lookup(ROOT, "linked"), Ok(node));
    let (again, _) = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, again, 7, 10).unwrap(), b"nothing");
}

#[test]
fn a_range_is_copied_from_file_to_file() {
    let (directory, mut guest) = share(false);
    let (from, from_handle) = guest.create("from", 0o600).unwrap();
    let (to, to_handle) = guest.create("to", 0o600).unwrap();
    guest.write(from, from_handle, 0, b"0123456789").unwrap();
    let copy = |length, flags| longs(&[from_handle, 2, to, to_handle, 1, length, flags]);
    let reply = guest.call(COPY_FILE_RANGE, from, &copy(5, 0)).unwrap();
    assert_eq!(word_at(&reply, 0), 5);
    assert_eq!(fs::read(directory.path().join("to")).unwrap(), b"\x0023456");
    let refused = guest.call(COPY_FILE_RANGE, from, &copy(5, 1));
    assert_eq!(refused, Err(libc::EINVAL));
    let other_node = guest.call(COPY_FILE_RANGE, to, &copy(5, 0));
    assert_eq!(other_node, Err(libc::EBADF));
}

#[test]
fn holes_are_found() {
    let (directory, mut guest) = share(false);
    let (node, handle) = guest.create("sparse", 0o600).unwrap();
    guest.write(node, handle, 1 << 20, b"data").unwrap();
    let mut seek = |offset, whence: i32| {
        let body = [longs(&[handle, offset]), words(&[whence as u32, 0])].concat();
        guest
            .call(LSEEK, node, &body)
            .map(|reply| long_at(&reply, 0))
    };
    assert_eq!(seek(0, libc::SEEK_DATA), Ok(1 << 20));
    assert_eq!(seek(0, libc::SEEK_HOLE), Ok(0));
    assert_eq!(seek(1 << 21, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(0, libc::SEEK_END), Err(libc::EINVAL));
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let body = [longs(&[handle, 0, 2 << 20]), words(&[punch as u32, 0])].concat();
    guest.call(FALLOCATE, node, &body).unwrap();
    let file = fs::metadata(directory.path().join("sparse")).unwrap();
    assert_eq!((file.len(), file.blocks()), ((1 << 20) + 4, 0));
}

#[test]
fn the_time_of_birth_is_told() {
    let (directory, mut guest) = share(false);
    let (node, _) = guest.create("file", 0o640).unwrap();
    let reply = guest.call(STATX, node, &[0; 24]).unwrap();
    assert_eq!(reply.len(), 288);
    let born = fs::metadata(directory.path().join("file"))
        .unwrap()
        .created();
    let Ok(born) = born else {
        assert_eq!(word_at(&reply, 32) & libc::STATX_BTIME, 0);
        return;
    };
    let born = born.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(word_at(&reply, 32) & libc::STATX_BTIME, libc::STATX_BTIME);
    assert_eq!(long_at(&reply, 32 + 80), born.as_secs());
    assert_eq!(word_at(&reply, 32 + 88), born.subsec_nanos());
}

#[test]
fn all_of_a_share_is_synced_from_a_directory() {
    let (_directory, mut guest) = share(false);
    let (node, handle) = guest.create("file", 0o600).unwrap();
    guest.write(node, handle, 0, b"x").unwrap();
    guest.call(SYNCFS, ROOT, &longs(&[0])).unwrap();
    assert_eq!(guest.call(SYNCFS, node, &longs(&[0])), Err(libc::EINVAL));
}

#[test]
fn names_are_any_bytes_up_to_255() {
    let (directory, mut guest) = share(false);
    let mut every: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
    every.push(b'x');
    for bytes in [&every[..], b"\xff\xfe", b" ", b"-rf *", b"\n"] {
        let body = [&words(&[0o755, 0])[..], bytes, b"\0"].concat();
        let reply = guest.call(MKDIR, ROOT, &body).unwrap();
        let found = guest.call(LOOKUP, ROOT, &[bytes, b"\0"].concat()).unwrap();
        assert_eq!(long_at(&found, 0), long_at(&reply, 0));
        let name = std::os::unix::ffi::OsStrExt::from_bytes(bytes);
        assert!(directory.path().join::<&std::ffi::OsStr>(name).is_dir());
    }
    let long = [&[b'a'; 256][..], b"\0"].concat();
    assert_eq!(guest.call(LOOKUP, ROOT, &long), Err(libc::ENAMETOOLONG));
}

#[test]
fn a_name_that_means_another_file_by_now_is_stale() {
    let (directory, mut guest) = share(false);
    let path = directory.path().join("file");
    fs::write(&path, "first").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    // Moved in: the first one's number cannot have been used again.
    fs::write(directory.path().join("other"), "second").unwrap();
    fs::rename(directory.path().join("other"), &path).unwrap();
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ESTALE));
    assert_eq!(
        guest.open(node, libc::O_RDWR | libc::O_TRUNC),
        Err(libc::ESTALE)
    );
    assert_eq!(guest.call(GETATTR, node, &[0; 16]), Err(libc::ESTALE));
    assert_eq!(
        guest.call(SETATTR, node, &setattr(1, 0o777, 0)),
        Err(libc::ESTALE)
    );
    assert_eq!(fs::read(&path).unwrap(), b"second");
    assert_ne!(guest.lookup(ROOT, "file"), Ok(node));

    fs::remove_file(&path).unwrap();
    symlink("/etc/passwd", &path).unwrap();
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ESTALE));
    fs::remove_file(&path).unwrap();
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ESTALE));
}

#[test]
fn what_took_the_place_of_a_file_is_not_even_opened() {
    let (directory, mut guest) = share(false);
    let path = directory.path().join("file");
    fs::write(&path, "").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::rename(&fifo, &path).unwrap();
    // A fifo that nobody reads would answer by itself, with ENXIO.
    assert_eq!(guest.open(node, libc::O_WRONLY), Err(libc::ESTALE));
}

#[test]
fn a_number_of_the_hosts_that_is_used_again_is_another_node() {
    let (directory, mut guest) = share(false);
    let path = directory.path().join("file");
    fs::write(&path, "").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    fs::remove_file(&path).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::create_dir(&path).unwrap();
    let other = guest.lookup(ROOT, "file").unwrap();
    assert_ne!(
        other,
        node,
        "the same inode: {}",
        fs::metadata(&path).unwrap().ino() == inode
    );
}

#[test]
fn a_moved_file_is_still_the_same_node() {
    let (_directory, mut guest) = share(false);
    for entry in ["a", "b"] {
        let mkdir = [words(&[0o755, 0]), name(entry)].concat();
        guest.call(MKDIR, ROOT, &mkdir).unwrap();
    }
    let (a, b) = (
        guest.lookup(ROOT, "a").unwrap(),
        guest.lookup(ROOT, "b").unwrap(),
    );
    let mkdir = [words(&[0o755, 0]), name("inner")].concat();
    let inner = long_at(&guest.call(MKDIR, a, &mkdir).unwrap(), 0);
    let rename = [longs(&[b, 0]), name("inner"), name("moved")].concat();
    guest.call(RENAME2, a, &rename).unwrap();
    guest.call(GETATTR, inner, &[0; 16]).unwrap();
    // Exchanged with one another.
    let exchange = [longs(&[ROOT]), words(&[2, 0]), name("a"), name("b")].concat();
    guest.call(RENAME2, ROOT, &exchange).unwrap();
    guest.call(GETATTR, inner, &[0; 16]).unwrap();
    assert_eq!(guest.lookup(b, "moved"), Ok(inner));
    assert_eq!(guest.lookup(ROOT, "a"), Ok(b));
    let unknown = [longs(&[ROOT]), words(&[8, 0]), name("a"), name("b")].concat();
    assert_eq!(guest.call(RENAME2, ROOT, &unknown), Err(libc::EINVAL));
}

#[test]
fn the_files_of_a_large_tree_are_not_all_held() {
    let (directory, mut guest) = share(false);
    guest.rig.device.share.hold_at_most(10);
    let mut nodes = Vec::new();
    let mut parent = ROOT;
    for depth in 0..200 {
        let mkdir = [words(&[0o755, 0]), name("d")].concat();
        let node = long_at(&guest.call(MKDIR, parent, &mkdir).unwrap(), 0);
        nodes.push(node);
        guest.rig.rewind();
        parent = node;
        assert!(guest.rig.device.share.held() <= depth + 1);
    }
    for _ in 0..20 {
        guest.lookup(ROOT, "d").unwrap();
    }
    assert!(
        guest.rig.device.share.held() <= 11,
        "{}",
        guest.rig.device.share.held()
    );
    // The deepest is opened again by all the names above it.
    guest.call(SETATTR, parent, &setattr(1, 0o700, 0)).unwrap();
    let deepest: std::path::PathBuf = std::iter::repeat_n("d", 200).collect();
    let mode = fs::metadata(directory.path().join(deepest)).unwrap().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn a_guest_may_not_know_more_files_than_it_has_memory_for() {
    let (directory, mut guest) = share(false);
    for entry in ["first", "second"] {
        fs::write(directory.path().join(entry), "").unwrap();
    }
    guest.rig.device.share.know_at_most(2);
    let first = guest.lookup(ROOT, "first").unwrap();
    assert_eq!(guest.lookup(ROOT, "second"), Err(libc::ENOMEM));
    assert_eq!(guest.lookup(ROOT, "first"), Ok(first));
    guest.call(DESTROY, 0, &[]).unwrap();
    guest.lookup(ROOT, "second").unwrap();
    assert_eq!(guest.lookup(ROOT, "first"), Err(libc::ENOMEM));
}

#[test]
fn a_name_is_not_taken_for_gone_when_there_is_no_room_to_look() {
    let (directory, mut guest) = share(false);
    fs::create_dir(directory.path().join("mountpoint")).unwrap();
    let node = guest.lookup(ROOT, "mountpoint").unwrap();
    let (file, handle) = guest.create("file", 0o600).unwrap();
    guest.rig.device.share.limit_to(1);
    assert_eq!(guest.open(file, libc::O_RDONLY), Err(libc::ENFILE));
    assert_eq!(guest.lookup(ROOT, "mountpoint"), Err(libc::ENOMEM));
    let release = guest.call(RELEASE, file, &longs(&[handle, 0, 0]));
    release.unwrap();
    guest.rig.device.share.limit_to(2);
    assert_eq!(guest.lookup(ROOT, "mountpoint"), Ok(node));
}

#[test]
fn directories_that_the_host_moved_into_one_another_are_stale() {
    let (directory, mut guest) = share(false);
    fs::create_dir_all(directory.path().join("a/x")).unwrap();
    fs::create_dir_all(directory.path().join("b/y")).unwrap();
    let (a, b) = (
        guest.lookup(ROOT, "a").unwrap(),
        guest.lookup(ROOT, "b").unwrap(),
    );
    let (x, y) = (guest.lookup(a, "x").unwrap(), guest.lookup(b, "y").unwrap());
    assert_eq!(guest.lookup(y, "none"), Err(libc::ENOENT), "now it is held");
    fs::rename(directory.path().join("b"), directory.path().join("a/x/b")).unwrap();
    assert_eq!(guest.lookup(x, "b"), Ok(b));
    fs::rename(directory.path().join("a/x/b/y"), directory.path().join("y")).unwrap();
    fs::rename(directory.path().join("a"), directory.path().join("y/a")).unwrap();
    assert_eq!(guest.lookup(y, "a"), Ok(a), "it is held, wherever it is");
    guest.rig.device.share.hold_at_most(0);
    for _ in 0..20 {
        let _ = guest.lookup(ROOT, "none");
    }
    // a is below y, which was last found in b, which is below x, which is below a.
    assert_eq!(guest.lookup(x, "b"), Err(libc::ESTALE));
    assert_eq!(guest.lookup(ROOT, "y"), Ok(y));
    assert_eq!(guest.lookup(x, "b"), Ok(b), "found again from above");
}

#[test]
fn numbers_that_the_guest_was_never_told_are_refused() {
    let (_directory, mut guest) = share(false);
    let (node, handle) = guest.create("file", 0o600).unwrap();
    for stale in [0, node + 1, u64::MAX] {
        assert_eq!(guest.lookup(stale, "file"), Err(libc::ESTALE));
        assert_eq!(guest.call(GETATTR, stale, &[0; 16]), Err(libc::ESTALE));
        assert_eq!(guest.open(stale, libc::O_RDONLY), Err(libc::ESTALE));
        let link = [longs(&[stale]), name("l")].concat();
        assert_eq!(guest.call(LINK, ROOT, &link), Err(libc::ESTALE));
        let rename = [longs(&[stale, 0]), name("file"), name("g")].concat();
        assert_eq!(guest.call(RENAME2, ROOT, &rename), Err(libc::ESTALE));
        assert_eq!(guest.read(node, stale, 0, 1), Err(libc::EBADF));
        let release = guest.call(RELEASE, node, &longs(&[stale, 0, 0]));
        assert_eq!(release, Err(libc::EBADF));
    }
    assert_eq!(
        guest.read(ROOT, handle, 0, 1),
        Err(libc::EBADF),
        "of another node"
    );
    assert_eq!(guest.call(READDIR, node, &[0; 40]), Err(libc::EBADF));
}

#[test]
fn absurd_sizes_and_offsets_are_bounded() {
    let (directory, mut guest) = share(false);
    let (node, handle) = guest.create("file", 0o600).unwrap();
    guest.write(node, handle, 0, b"0123456789").unwrap();
    let mut body = longs(&[handle, 4]);
    body.extend(words(&[u32::MAX, 0, 0, 0, 0, 0]));
    assert_eq!(guest.call_with_room(READ, node, &body, 3).unwrap(), b"456");
    assert_eq!(guest.read(node, handle, u64::MAX, 8), Err(libc::EFBIG));
    assert_eq!(
        guest.write(node, handle, u64::MAX - 4, b"x"),
        Err(libc::EFBIG)
    );
    let mut body = longs(&[handle, 0]);
    body.extend(words(&[1 << 20, 0, 0, 0, 2, 0]));
    body.extend(b"short");
    assert_eq!(guest.call(WRITE, node, &body), Err(libc::EINVAL));
    assert_eq!(
        guest.call(SETATTR, node, &setattr(8, 0, u64::MAX)),
        Err(libc::EFBIG)
    );
    let allocate = [longs(&[handle, 0, u64::MAX]), words(&[0, 0])].concat();
    assert_eq!(guest.call(FALLOCATE, node, &allocate), Err(libc::EFBIG));
    let handle = long_at(&guest.call(OPENDIR, ROOT, &words(&[0, 0])).unwrap(), 0);
    for offset in [u64::MAX, 1 << 62] {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[u32::MAX, 0, 0, 0, 0, 0]));
        let _ = guest.call_with_room(READDIRPLUS, ROOT, &body, 4096);
    }
    assert_eq!(
        fs::read(directory.path().join("file")).unwrap(),
        b"0123456789"
    );
}

#[test]
fn a_default_acl_counts_instead_of_the_umask() {
    let (directory, mut guest) = share(false);
    // user::rwx group::rwx other::---, as the kernel stores it: version 2, then entries.
    let mut acl = words(&[2]);
    for (tag, permissions) in [(1_u16, 7_u16), (4, 7), (0x20, 0)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(words(&[u32::MAX]));
    }
    let attribute = name("system.posix_acl_default");
    let set = [words(&[acl.len() as u32, 0, 0, 0]), attribute, acl].concat();
    match guest.call(SETXATTR, ROOT, &set) {
        Err(libc::EOPNOTSUPP) => return, // the file system below has none
        done => done.unwrap(),
    };
    guest.create("inherits", 0o666).unwrap();
    let mode = fs::metadata(directory.path().join("inherits"))
        .unwrap()
        .mode();
    assert_eq!(mode & 0o777, 0o660, "not 0o644 by the umask");
}

#[test]
fn an_acl_that_is_set_by_a_stranger_takes_the_group_bit() {
    let (directory, mut guest) = share(false);
    let (node, _) = guest.create("file", 0o600).unwrap();
    let path = directory.path().join("file");
    let set = |kill| [words(&[1, 0, kill, 0]), name("user.x"), b"1".to_vec()].concat();
    if guest.call(SETXATTR, node, &set(0)) == Err(libc::EOPNOTSUPP) {
        return;
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o2755)).unwrap();
    guest.call(SETXATTR, node, &set(0)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o2755);
    guest.call(SETXATTR, node, &set(1)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o755);
}

/// Lets `test` run in a mount namespace of its own; only root can have one.
fn with_own_mounts(test: impl FnOnce() + Send + 'static) {
    assert!(is_root(), "mounts are root's: run the tests as root");
    let thread = std::thread::spawn(|| {
        use nix::mount::{MsFlags, mount};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).unwrap();
        test();
    });
    thread.join().unwrap();
}

fn mount_tmpfs(on: &Path) {
    let none: Option<&str> = None;
    nix::mount::mount(none, on, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
}

#[test]
fn mounts_below_the_share_come_and_go() {
    with_own_mounts(|| {
        let (directory, mut guest) = share(false);
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&two).unwrap();
        let below = guest.lookup(ROOT, "one").unwrap();

        mount_tmpfs(&one);
        mount_tmpfs(&two);
        let mounted = guest.lookup(ROOT, "one").unwrap();
        assert_ne!(mounted, below, "another file has its name now");
        fs::write(one.join("file"), "in one").unwrap();
        fs::write(two.join("file"), "in two").unwrap();
        let inode = |path: &Path| fs::metadata(path.join("file")).unwrap().ino();
        assert_eq!(
            inode(&one),
            inode(&two),
            "as file systems begin to count alike"
        );
        let file = guest.lookup(mounted, "file").unwrap();
        let other = guest.lookup(ROOT, "two").unwrap();
        let other = guest.lookup(other, "file").unwrap();
        assert_ne!(file, other);
        let mut shown = |node| long_at(&guest.call(GETATTR, node, &[0; 16]).unwrap(), 16);
        assert_ne!(shown(file), shown(other), "the guest sees one device");
        let (handle, _) = guest.open(file, libc::O_RDONLY).unwrap();
        let (other_handle, _) = guest.open(other, libc::O_RDONLY).unwrap();

        // Lazily, as what is open is in use; then all of it is let go.
        nix::mount::umount2(&one, nix::mount::MntFlags::MNT_DETACH).unwrap();
        assert_eq!(guest.read(file, handle, 0, 9).unwrap(), b"in one");
        assert!(guest.rig.poll(1000), "the device is told");
        assert_eq!(guest.read(file, handle, 0, 9), Err(libc::ESTALE));
        assert_eq!(guest.open(file, libc::O_RDONLY), Err(libc::ESTALE));
        assert_eq!(guest.call(GETATTR, mounted, &[0; 16]), Err(libc::ESTALE));
        guest.call(RELEASE, file, &longs(&[handle, 0, 0])).unwrap();
        assert_eq!(guest.lookup(ROOT, "one"), Ok(below));
        assert_eq!(guest.read(other, other_handle, 0, 9).unwrap(), b"in two");
    });
}

#[test]
fn a_race_between_moving_and_looking_never_leads_out() {
    let outside = TempDir::new().unwrap();
    fs::write(outside.path().join("file"), "secret").unwrap();
    let (directory, mut guest) = share(false);
    let (inner, link) = (
        directory.path().join("inner"),
        directory.path().join("link"),
    );
    fs::create_dir(&inner).unwrap();
    fs::write(inner.join("file"), "ours").unwrap();
    symlink(outside.path(), &link).unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let racer = std::thread::spawn({
        let (stop, inner, link) = (stop.clone(), inner.clone(), link.clone());
        move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let exchange = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                let here = nix::fcntl::AT_FDCWD;
                nix::fcntl::renameat2(here, &inner, here, &link, exchange).unwrap();
            }
        }
    });
    guest.rig.device.share.hold_at_most(0);
    let mut read = 0;
    for _ in 0..2000 {
        guest.rig.rewind();
        let Ok(found) = guest.lookup(ROOT, "inner") else {
            continue;
        };
        let Ok(file) = guest.lookup(found, "file") else {
            continue;
        };
        let Ok((handle, _)) = guest.open(file, libc::O_RDWR) else {
            continue;
        };
        assert_eq!(guest.read(file, handle, 0, 9).unwrap(), b"ours");
        guest.call(RELEASE, file, &longs(&[handle, 0, 0])).unwrap();
        read += 1;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    racer.join().unwrap();
    assert!(read > 0, "it was there at least once");
    assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"secret");
}
