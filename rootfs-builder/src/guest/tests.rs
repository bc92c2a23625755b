//! The guest image as a whole: reproducible, complete, and read back by other programs.

use std::fs;
use std::process::{Command, Stdio};

use super::*;
use tempfile::TempDir;

/// A directory with a file that stands for the agent.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        fs::write(dir.path().join("agent"), agent).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn erofs(&self, name: &str) -> PathBuf {
        let image = self.path(name);
        write_erofs(&self.path("agent"), &image).unwrap();
        image
    }

    fn cpio(&self, name: &str) -> PathBuf {
        let archive = self.path(name);
        write_cpio(&self.path("agent"), &archive).unwrap();
        archive
    }
}

fn stdout(program: &str, arguments: &[&str], input: &Path) -> Vec<u8> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(fs::File::open(input).unwrap())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "{program} failed");
    output.stdout
}

#[test]
fn the_same_agent_gives_the_same_image() {
    let (one, other) = (Bench::new(), Bench::new());
    assert_eq!(
        fs::read(one.erofs("a.img")).unwrap(),
        fs::read(other.erofs("b.img")).unwrap()
    );
}

#[test]
fn the_same_agent_gives_the_same_initramfs() {
    let (one, other) = (Bench::new(), Bench::new());
    assert_eq!(
        fs::read(one.cpio("a")).unwrap(),
        fs::read(other.cpio("b")).unwrap()
    );
}

#[test]
fn an_image_fills_whole_regions_of_two_mebibytes() {
    let bench = Bench::new();
    assert_eq!(
        fs::metadata(bench.erofs("guest.img")).unwrap().len(),
        2 << 20
    );
}

#[test]
fn the_agent_lies_in_the_image_in_one_piece_on_whole_pages() {
    let bench = Bench::new();
    let image = fs::read(bench.erofs("guest.img")).unwrap();
    let agent = fs::read(bench.path("agent")).unwrap();
    let whole = image
        .chunks(4096)
        .position(|page| page == &agent[..4096])
        .unwrap()
        * 4096;
    assert_eq!(image[whole..][..agent.len()], agent);
}

#[test]
fn the_initramfs_holds_the_agent_and_the_directories_it_needs() {
    let bench = Bench::new();
    let archive = bench.cpio("guest.cpio");
    let list = stdout("cpio", &["-tv", "--quiet", "--numeric-uid-gid"], &archive);
    let list = String::from_utf8(list).unwrap();
    let entries: Vec<(&str, &str)> = list
        .lines()
        .map(|line| {
            (
                line.split(' ').next().unwrap(),
                line.rsplit(' ').next().unwrap(),
            )
        })
        .collect();
    let expected = [
        ("drwxr-xr-x", "dev"),
        ("drwxr-xr-x", "etc"),
        ("-rwxr-xr-x", "init"),
        ("dr-xr-xr-x", "proc"),
        ("drwxr-xr-x", "run"),
        ("dr-xr-xr-x", "sys"),
        ("drwxrwxrwt", "tmp"),
    ];
    assert_eq!(entries, expected);
    let agent = stdout("cpio", &["-i", "--quiet", "--to-stdout", "init"], &archive);
    assert_eq!(agent, fs::read(bench.path("agent")).unwrap());
}

#[test]
fn a_missing_agent_is_named_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("guest.img");
    let error = write_erofs(&dir.path().join("agent"), &image).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("no agent at {}", dir.path().join("agent").display())
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn an_image_that_cannot_be_written_is_named_with_the_reason() {
    let bench = Bench::new();
    let image = bench.path("missing/guest.img");
    let error = write_erofs(&bench.path("agent"), &image).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("missing/guest.img"), "{cause}");
}
