//! Images written, read back by us and by others, and damaged.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::process::Command;

use proptest::prelude::*;
use tempfile::{NamedTempFile, TempDir};

use super::*;
use crate::filesystem::{Attributes, Entry, Inode, InodeId, Kind, Time};

/// A file system under construction.
struct Bench {
    directory: TempDir,
    filesystem: FileSystem,
    spool: Spool,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let spool = Spool::new(directory.path()).unwrap();
        Self {
            directory,
            filesystem: FileSystem::new(),
            spool,
        }
    }

    fn add(&mut self, parent: InodeId, name: &[u8], kind: Kind) -> InodeId {
        let attributes = Attributes {
            mode: 0o644,
            ..Attributes::default()
        };
        let inode = self.filesystem.add(Inode { attributes, kind });
        self.filesystem
            .link(parent, name, Entry { inode, layer: 0 });
        inode
    }

    fn file(&mut self, parent: InodeId, name: &[u8], content: &[u8]) -> InodeId {
        let extent = self.spool.append(content).unwrap();
        self.add(parent, name, Kind::File(extent))
    }

    fn write(&self) -> (NamedTempFile, Written) {
        let mut file = NamedTempFile::new_in(self.directory.path()).unwrap();
        let written = write(&self.filesystem, &self.spool, [7; 16], file.as_file_mut());
        (file, written.unwrap())
    }

    fn error(&self) -> String {
        let mut file = tempfile::tempfile().unwrap();
        write(&self.filesystem, &self.spool, [7; 16], &mut file)
            .unwrap_err()
            .to_string()
    }
}

const ROOT: InodeId = FileSystem::ROOT;

/// What `fsck.erofs` says of an image.
fn checked(image: &NamedTempFile) {
    let output = Command::new("fsck.erofs")
        .arg(image.path())
        .output()
        .expect("fsck.erofs, of Debian's erofs-utils, runs");
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
}

#[test]
fn everything_is_read_back_as_it_was() {
    let mut bench = Bench::new();
    let usr = bench.add(ROOT, b"usr", Kind::Directory(BTreeMap::new()));
    let tool = bench.file(usr, b"tool", b"#!/bin/sh\n");
    bench.filesystem.inode_mut(tool).attributes = Attributes {
        mode: 0o4755,
        uid: 70_000,
        gid: u32::MAX - 1,
        mtime: Time {
            seconds: -5,
            nanoseconds: 999_999_999,
        },
        xattrs: BTreeMap::from([
            (b"security.capability".to_vec(), vec![1, 0, 0, 2, 0, 4]),
            (b"user.note".to_vec(), vec![9; 5000]),
            (b"system.posix_acl_access".to_vec(), vec![2, 0, 0, 0]),
        ]),
    };
    bench.filesystem.link(
        ROOT,
        b"again",
        Entry {
            inode: tool,
            layer: 0,
        },
    );
    bench.add(ROOT, b"bin", Kind::Symlink(b"usr".to_vec()));
    bench.add(usr, b"far", Kind::Symlink(vec![b'x'; 4095]));
    let null = Kind::Device {
        block: false,
        major: 1,
        minor: 3,
    };
    bench.add(usr, b"null", null);
    bench.add(usr, b"pipe", Kind::Fifo);
    bench.file(usr, b"empty", b"");

    let (file, written) = bench.write();
    checked(&file);
    assert_eq!(written.length % (2 << 20), 0);
    let bytes = std::fs::read(file.path()).unwrap();
    assert_eq!(written.digest, crate::digest::Digest::of(&bytes));

    let image = Image::open(file.as_file()).unwrap();
    let found = image.find("bin/tool").unwrap().unwrap();
    let wanted = &bench.filesystem.inode(tool).attributes;
    assert_eq!((found.uid, found.gid), (wanted.uid, wanted.gid));
    assert_eq!((found.mtime, found.links), (wanted.mtime, 2));
    assert_eq!(found.mode, 0o104_755);
    assert_eq!(image.xattrs(&found).unwrap(), wanted.xattrs);
    assert_eq!(
        image.read_file("/again", 100).unwrap().unwrap(),
        b"#!/bin/sh\n"
    );
    assert_eq!(image.read_file("/usr/empty", 0).unwrap().unwrap(), b"");
    let far = image.find("/usr").unwrap().unwrap();
    assert_eq!(far.links, 2);
    assert_eq!(image.names(&far).unwrap().len(), 5);
    let null = image.find("/usr/../bin/null").unwrap().unwrap();
    assert_eq!((null.mode, null.place), (0o020_644, 0x103));
    assert_eq!(image.find("/usr/tool/x").unwrap(), None);
    assert_eq!(image.find("/nothing").unwrap(), None);
    assert!(matches!(
        image.read_file("/usr/tool", 9),
        Err(ReadError::TooLarge { length: 10, .. })
    ));
}

#[test]
fn files_lie_on_whole_pages() {
    let mut bench = Bench::new();
    for name in [b"a", b"b", b"c"] {
        bench.file(ROOT, name, &[name[0]; 100]);
    }
    let (file, _) = bench.write();
    let bytes = std::fs::read(file.path()).unwrap();
    for name in [b'a', b'b', b'c'] {
        let at = bytes.windows(100).position(|part| part == [name; 100]);
        assert_eq!(at.unwrap() % 4096, 0);
    }
}

#[test]
fn a_directory_of_many_names_is_sorted_as_the_kernel_searches() {
    let mut bench = Bench::new();
    // Also names that sort before `.`, and between it and `..`.
    bench.file(ROOT, b"-first", b"");
    bench.file(ROOT, b"!", b"");
    for index in 0..3000 {
        let name = format!("{index}{}", "x".repeat(index % 200));
        bench.file(ROOT, name.as_bytes(), name.as_bytes());
    }
    let (file, _) = bench.write();
    checked(&file);
    let image = Image::open(file.as_file()).unwrap();
    assert_eq!(image.names(&image.root().unwrap()).unwrap().len(), 3002);
    let name = format!("199{}", "x".repeat(199));
    assert_eq!(
        image.read_file(&name, 4096).unwrap().unwrap(),
        name.as_bytes()
    );
}

#[test]
fn a_tree_may_be_deeper_than_a_stack() {
    let mut bench = Bench::new();
    let mut directory = ROOT;
    for _ in 0..50_000 {
        directory = bench.add(directory, b"d", Kind::Directory(BTreeMap::new()));
    }
    let (file, _) = bench.write();
    assert!(Image::open(file.as_file()).is_ok());
}

#[test]
fn zeros_take_no_room_in_an_image() {
    use std::os::unix::fs::MetadataExt;

    let mut bench = Bench::new();
    let mut file = NamedTempFile::new_in(bench.directory.path()).unwrap();
    let extent = bench
        .spool
        .append(std::io::repeat(0).take(8 << 20))
        .unwrap();
    bench.add(ROOT, b"large", Kind::File(extent));
    write(&bench.filesystem, &bench.spool, [7; 16], file.as_file_mut()).unwrap();
    assert!(file.as_file().metadata().unwrap().blocks() < 64);
}

#[test]
fn a_file_may_be_larger_than_four_gibibytes() {
    let mut bench = Bench::new();
    let extent = crate::filesystem::Extent {
        offset: 0,
        length: (5 << 30) + 1,
    };
    bench.add(ROOT, b"large", Kind::File(extent));
    bench.file(ROOT, b"next", b"next");
    let layout = super::layout::Layout::of(&bench.filesystem).unwrap();
    assert_eq!(layout.blocks, 1 + (5 << 18) + 1 + 1);
}

#[test]
fn what_the_format_cannot_hold_is_refused_by_its_path() {
    let mut bench = Bench::new();
    let etc = bench.add(ROOT, b"etc", Kind::Directory(BTreeMap::new()));
    bench.add(etc, b"link", Kind::Symlink(vec![b'x'; 4096]));
    let error = bench.error();
    assert!(
        error.contains("etc/link") && error.contains("4096"),
        "{error}"
    );

    let mut bench = Bench::new();
    bench.file(ROOT, &[b'n'; 256], b"");
    assert!(bench.error().contains("longer than 255"));

    let mut bench = Bench::new();
    let file = bench.file(ROOT, b"file", b"");
    let xattrs = [(b"com.apple.thing".to_vec(), Vec::new())];
    bench.filesystem.inode_mut(file).attributes.xattrs = xattrs.into();
    assert!(bench.error().contains("\"file\""));
    let xattrs = [(b"user.large".to_vec(), vec![0; 65_536])];
    bench.filesystem.inode_mut(file).attributes.xattrs = xattrs.into();
    assert!(bench.error().contains("65535"));
}

/// A kind of inode and its name's length, its content's length, and attributes.
type Sketch = (u8, usize, usize, Vec<(u8, usize)>);

fn sketches() -> impl Strategy<Value = Vec<Sketch>> {
    let attributes = proptest::collection::vec((0u8..3, 0usize..3000), 0..3);
    let sketch = (0u8..5, 1usize..200, 0usize..9000, attributes);
    proptest::collection::vec(sketch, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_file_system_passes_the_check_and_is_read_back(sketches in sketches()) {
        let mut bench = Bench::new();
        let mut directories = vec![(ROOT, String::new())];
        let mut made = Vec::new();
        for (index, (kind, name, length, attributes)) in sketches.into_iter().enumerate() {
            let name = format!("{index}{}", "n".repeat(name));
            let (parent, path) = directories[index * 7 % directories.len()].clone();
            let path = format!("{path}/{name}");
            let content = vec![index as u8 + 1; length];
            let inode = match kind {
                0 => bench.add(parent, name.as_bytes(), Kind::Directory(BTreeMap::new())),
                1 => bench.add(parent, name.as_bytes(), Kind::Symlink(vec![b't'; length % 4095 + 1])),
                2 => bench.add(parent, name.as_bytes(), Kind::Fifo),
                _ => bench.file(parent, name.as_bytes(), &content),
            };
            let xattrs = attributes.into_iter().map(|(prefix, length)| {
                let prefix = ["user.", "trusted.", "security."][usize::from(prefix)];
                (format!("{prefix}{length}").into_bytes(), vec![prefix.len() as u8; length])
            });
            bench.filesystem.inode_mut(inode).attributes.xattrs = xattrs.collect();
            match kind {
                0 => directories.push((inode, path)),
                3.. => made.push((inode, path, content)),
                _ => {}
            }
        }
        let (file, _) = bench.write();
        checked(&file);
        let image = Image::open(file.as_file()).unwrap();
        for (inode, path, content) in made {
            let found = image.find(&path).unwrap().unwrap();
            prop_assert_eq!(image.read(&found, 9000).unwrap(), content);
            let attributes = &bench.filesystem.inode(inode).attributes;
            prop_assert_eq!(&image.xattrs(&found).unwrap(), &attributes.xattrs);
        }
    }

    #[test]
    fn a_damaged_image_is_an_error_and_nothing_worse(
        changes in proptest::collection::vec((0usize..6000, any::<u8>()), 1..40),
        keep_superblock in any::<bool>(),
    ) {
        let mut bench = Bench::new();
        let etc = bench.add(ROOT, b"etc", Kind::Directory(BTreeMap::new()));
        bench.file(etc, b"passwd", b"root:x:0:0::/root:/bin/sh\n");
        bench.add(ROOT, b"link", Kind::Symlink(b"etc".to_vec()));
        let (mut file, _) = bench.write();
        let mut bytes = std::fs::read(file.path()).unwrap();
        for (at, byte) in changes {
            bytes[if keep_superblock { 1152 + at } else { 1024 + at }] = byte;
        }
        if keep_superblock {
            bytes[1028..1032].fill(0);
            let sum = disk::checksum(&bytes[1024..4096]);
            bytes[1028..1032].copy_from_slice(&sum.to_le_bytes());
        }
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(&bytes).unwrap();
        if let Ok(image) = Image::open(file.as_file())
            && let Ok(Some(found)) = image.find("/link/passwd")
        {
            let _ = image.read(&found, 1 << 20);
            let _ = image.xattrs(&found);
            let _ = image.names(&found);
        }
    }
}
