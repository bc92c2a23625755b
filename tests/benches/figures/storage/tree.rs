//! The tree of files that is unpacked and read: as an archive, and as an image.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::Result;
use rootfs_builder::erofs;
use rootfs_builder::tree::{Node, Tree};

/// How many files it has: a large source tree.
pub(super) const FILES: usize = 20_000;
/// How many of them are read, and are in the image: the first. What it costs to read a file does not
/// depend on how many there are, and the lab's processor is emulated twice.
pub(super) const READ_FILES: usize = 2_000;
/// How many there are in a directory.
pub(super) const FILES_PER_DIRECTORY: usize = 100;
/// The files' sizes in turn, 3 KiB on average.
const SIZES: [usize; 5] = [500, 1000, 2000, 4000, 8000];

fn contents(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i * 7) as u8).collect()
}

fn directory(number: usize) -> String {
    format!("directory-{number:03}")
}

fn file(number: usize) -> String {
    format!(
        "{}/file-{number:05}",
        directory(number / FILES_PER_DIRECTORY)
    )
}

/// Its first files as an image; what it needs besides goes into `dir`.
pub(super) fn image(dir: &Path, path: &Path, files: usize) -> Result<()> {
    for size in SIZES {
        fs::write(dir.join(size.to_string()), contents(size))?;
    }
    let mut tree = Tree::new();
    for number in 0..files / FILES_PER_DIRECTORY {
        tree.add(directory(number), Node::Directory { mode: 0o755 })?;
    }
    for number in 0..files {
        let source = dir.join(SIZES[number % SIZES.len()].to_string());
        tree.add(
            file(number),
            Node::File {
                mode: 0o644,
                source,
            },
        )?;
    }
    Ok(erofs::build(&tree, [1; 16], path)?)
}

/// Its first files as an archive.
pub(super) fn archive(path: &Path, files: usize) -> Result<()> {
    let mut archive = std::io::BufWriter::new(File::create(path)?);
    for i in 0..files {
        if i % FILES_PER_DIRECTORY == 0 {
            archive.write_all(&header(
                &(directory(i / FILES_PER_DIRECTORY) + "/"),
                0,
                b'5',
            )?)?;
        }
        let size = SIZES[i % SIZES.len()];
        archive.write_all(&header(&file(i), size, b'0')?)?;
        archive.write_all(&contents(size))?;
        archive.write_all(&[0; 512][..size.next_multiple_of(512) - size])?;
    }
    archive.write_all(&[0; 1024])?;
    Ok(archive.flush()?)
}

/// A head in the format of POSIX (ustar).
fn header(name: &str, size: usize, kind: u8) -> Result<[u8; 512]> {
    let mut header = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(
        100,
        if kind == b'5' {
            b"0000755\0"
        } else {
            b"0000644\0"
        },
    );
    put(108, b"0001750\0");
    put(116, b"0001750\0");
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, b"14000000000\0");
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}
