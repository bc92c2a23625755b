//! What each call gives, a line each, in a fixed order and without anything
//! that differs from run to run.

use std::{
    ffi::OsStr,
    fmt::Debug,
    fs,
    os::unix::{ffi::OsStrExt, net::UnixListener},
    path::Path,
};

use crate::sys::{self, Errno, Mapping, Outcome, by};

/// A user of no privileges, that user's group and a supplementary one.
const USER: u32 = 1001;
const GROUP: u32 = 1001;
const OTHERS: u32 = 2002;

const RW: i32 = libc::O_RDWR | libc::O_CREAT;

/// Does everything below `root`.
pub(crate) fn print(root: &Path) {
    sys::set_umask(0o022);
    type Rule = fn(&Path);
    let rules: [(&str, Rule); 17] = [
        ("modes", modes),
        ("paths", paths),
        ("renames", renames),
        ("links", links),
        ("owners", owners),
        ("set-ids", set_ids),
        ("access", access),
        ("sticky", sticky),
        ("times", times),
        ("attributes", attributes),
        ("acls", acls),
        ("sparse", sparse),
        ("unnamed", unnamed),
        ("open", open_files),
        ("memory", memory),
        ("locks", locks),
        ("special", special),
    ];
    for (name, rule) in rules {
        println!("# {name}");
        let directory = root.join(name);
        fs::create_dir(&directory).expect("a directory");
        chmod(&directory, 0o777);
        rule(&directory);
    }
}

/// Prints an outcome, errors by name.
fn say<T: Debug>(what: &str, outcome: Outcome<T>) {
    match outcome {
        Ok(value) => println!("{what}: {value:?}"),
        Err(errno) => println!("{what}: {}", name(errno)),
    }
}

/// Prints whether it was done, whatever it returned.
fn done<T>(what: &str, outcome: Outcome<T>) {
    say(what, outcome.map(|_| "done"));
}

fn name(errno: Errno) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno))
}

fn mode(at: &Path) -> Outcome<String> {
    sys::stat(at).map(|stat| format!("{:o}", stat.st_mode))
}

fn owner(at: &Path) -> Outcome<String> {
    sys::stat(at).map(|stat| format!("{}:{} {:o}", stat.st_uid, stat.st_gid, stat.st_mode))
}

fn chmod(at: &Path, mode: u32) {
    sys::chmod(at, mode).expect("a mode is set");
}

fn file(at: &Path, mode: u32) {
    fs::write(at, "contents").expect("a file");
    chmod(at, mode);
}

fn opens(at: &Path, flags: i32) -> Outcome<i64> {
    sys::open(at, flags, 0o666).and_then(sys::close)
}

fn as_user<T>(act: impl FnOnce() -> T) -> T {
    by(USER, GROUP, OTHERS, act)
}

fn modes(at: &Path) {
    done("create", opens(&at.join("file"), RW));
    say("its mode", mode(&at.join("file")));
    done("mkdir", sys::mkdir(&at.join("dir"), 0o777));
    say("its mode", mode(&at.join("dir")));
    sys::set_umask(0o077);
    done("mkfifo", sys::mkfifo(&at.join("fifo"), 0o666));
    say("its mode", mode(&at.join("fifo")));
    done("mkdir with set bits", sys::mkdir(&at.join("bits"), 0o7777));
    say("its mode", mode(&at.join("bits")));
    sys::set_umask(0);
    let wide = sys::open(&at.join("wide"), RW, 0o6777).and_then(sys::close);
    done("create with set bits", wide);
    say("its mode", mode(&at.join("wide")));
    sys::set_umask(0o022);
    done("by a user", as_user(|| opens(&at.join("users"), RW)));
    say("whose", owner(&at.join("users")));
    chmod(&at.join("dir"), 0o2775);
    sys::chown(&at.join("dir"), 0, OTHERS).expect("owned");
    chmod(&at.join("dir"), 0o2775);
    done(
        "file in a set-group dir",
        as_user(|| opens(&at.join("dir/file"), RW)),
    );
    say("whose", owner(&at.join("dir/file")));
    done(
        "dir in a set-group dir",
        as_user(|| sys::mkdir(&at.join("dir/dir"), 0o755)),
    );
    say("whose", owner(&at.join("dir/dir")));
    done(
        "link in a set-group dir",
        as_user(|| sys::symlink(Path::new("x"), &at.join("dir/l"))),
    );
    say("whose", owner(&at.join("dir/l")));
}

fn paths(at: &Path) {
    file(&at.join("file"), 0o644);
    fs::create_dir_all(at.join("dir/inner")).expect("directories");
    sys::symlink(Path::new("loop"), &at.join("loop")).expect("a link");
    sys::symlink(Path::new("file"), &at.join("link")).expect("a link");
    sys::symlink(Path::new("nowhere"), &at.join("dangling")).expect("a link");
    done("exclusive", opens(&at.join("file"), RW | libc::O_EXCL));
    done(
        "exclusive on a dangling link",
        opens(&at.join("dangling"), RW | libc::O_EXCL),
    );
    done("create by a dangling link", opens(&at.join("dangling"), RW));
    say("it is", mode(&at.join("nowhere")));
    done("write a directory", opens(&at.join("dir"), libc::O_WRONLY));
    done("missing", opens(&at.join("missing"), libc::O_RDONLY));
    done("below missing", opens(&at.join("missing/x"), RW));
    done("below a file", opens(&at.join("file/x"), libc::O_RDONLY));
    done(
        "file as directory",
        opens(&at.join("file"), libc::O_DIRECTORY),
    );
    done(
        "link not followed",
        opens(&at.join("link"), libc::O_NOFOLLOW),
    );
    done("a loop", opens(&at.join("loop"), libc::O_RDONLY));
    done("255 bytes", opens(&at.join("n".repeat(255)), RW));
    done("256 bytes", opens(&at.join("n".repeat(256)), RW));
    done("umlauts", opens(&at.join("ä".repeat(127)), RW));
    let bytes: Vec<u8> = (1..=u8::MAX).filter(|byte| *byte != b'/').collect();
    let any = at.join(OsStr::from_bytes(&bytes));
    done("every byte", opens(&any, RW | libc::O_EXCL));
    let names = fs::read_dir(at).expect("a listing").flatten();
    let listed = names.filter(|entry| entry.file_name().as_bytes() == bytes);
    say("listed", Ok(listed.count()));
    let other = at.join(OsStr::from_bytes(b"\xff\xfe\n"));
    done("renamed", sys::rename(&any, &other));
    done("no text", opens(&other, libc::O_RDONLY));
    done("removed", sys::unlink(&other));
    done("unlink a directory", sys::unlink(&at.join("dir")));
    done("rmdir a file", sys::rmdir(&at.join("file")));
    done("rmdir a full one", sys::rmdir(&at.join("dir")));
    done("rmdir .", sys::rmdir(&at.join("dir/.")));
    done("rmdir ..", sys::rmdir(&at.join("dir/inner/..")));
    done("rmdir missing", sys::rmdir(&at.join("missing")));
    done("unlink missing", sys::unlink(&at.join("missing")));
    done("mkdir there is", sys::mkdir(&at.join("file"), 0o755));
    done(
        "file with a slash",
        opens(&at.join("file/"), libc::O_RDONLY),
    );
    done("truncate a directory", sys::truncate(&at.join("dir"), 0));
    done(
        "truncate to less than none",
        sys::truncate(&at.join("file"), -1),
    );
    say("longest name", sys::name_max(at));
    let mut deep = at.to_owned();
    for _ in 0..60 {
        deep.push("deep");
        sys::mkdir(&deep, 0o755).expect("deeper");
    }
    done("deep", opens(&deep.join("file"), RW));
    done(
        "all of it goes",
        fs::remove_dir_all(at.join("deep")).map_err(|_| 0),
    );
}

fn renames(at: &Path) {
    let fresh = || {
        for name in ["file", "other", "dir", "full"] {
            let _ = fs::remove_dir_all(at.join(name)).or_else(|_| fs::remove_file(at.join(name)));
        }
        file(&at.join("file"), 0o600);
        file(&at.join("other"), 0o644);
        fs::create_dir(at.join("dir")).expect("a directory");
        fs::create_dir_all(at.join("full/inner")).expect("directories");
    };
    let rename = |what: &str, from: &str, to: &str| {
        fresh();
        done(what, sys::rename(&at.join(from), &at.join(to)));
        say("then", mode(&at.join(to)));
    };
    rename("over a file", "file", "other");
    rename("file over directory", "file", "dir");
    rename("directory over file", "dir", "file");
    rename("over an empty directory", "full", "dir");
    rename("over a full directory", "dir", "full");
    rename("into itself", "full", "full/inner/x");
    rename("to itself", "file", "file");
    rename("missing", "missing", "file");
    let special = |what: &str, from: &str, to: &str, flags: u32| {
        fresh();
        done(what, sys::rename2(&at.join(from), &at.join(to), flags));
        say("from then", mode(&at.join(from)));
        say("to then", mode(&at.join(to)));
    };
    special("not replacing", "file", "other", libc::RENAME_NOREPLACE);
    special("not replacing none", "file", "new", libc::RENAME_NOREPLACE);
    let _ = fs::remove_file(at.join("new"));
    special("exchange", "file", "full", libc::RENAME_EXCHANGE);
    special(
        "exchange with missing",
        "file",
        "none",
        libc::RENAME_EXCHANGE,
    );
    special("whiteout", "file", "other", libc::RENAME_WHITEOUT);
    fresh();
    sys::link(&at.join("file"), &at.join("same")).expect("a link");
    done(
        "to another name of it",
        sys::rename(&at.join("file"), &at.join("same")),
    );
    say(
        "both are there",
        sys::stat(&at.join("file")).map(|stat| stat.st_nlink),
    );
    let open = sys::open(&at.join("file"), RW, 0).expect("open");
    sys::rename(&at.join("file"), &at.join("full/inner/moved")).expect("moved");
    say(
        "an open file moved",
        sys::fstat(open).map(|stat| stat.st_nlink),
    );
    done("is written", sys::write(open, b"x"));
    done(
        "and has its attributes set",
        sys::chmod(&at.join("full/inner/moved"), 0o640),
    );
    say(
        "is it",
        sys::fstat(open).map(|stat| format!("{:o}", stat.st_mode)),
    );
}

fn links(at: &Path) {
    file(&at.join("a"), 0o644);
    done("link", sys::link(&at.join("a"), &at.join("b")));
    say("names", sys::stat(&at.join("a")).map(|stat| stat.st_nlink));
    let number = |name: &str| sys::stat(&at.join(name)).map(|stat| stat.st_ino);
    say("one file", number("a").and_then(|a| Ok(a == number("b")?)));
    done("first name goes", sys::unlink(&at.join("a")));
    say("names", sys::stat(&at.join("b")).map(|stat| stat.st_nlink));
    done("mode by the second", sys::chmod(&at.join("b"), 0o600));
    done(
        "opened by the second",
        opens(&at.join("b"), libc::O_RDWR | libc::O_TRUNC),
    );
    done("owned by the second", sys::chown(&at.join("b"), 5, 6));
    say("then", owner(&at.join("b")));
    done("there is one", sys::link(&at.join("b"), &at.join("b")));
    done("to a directory", sys::link(at, &at.join("d")));
    done("to missing", sys::link(&at.join("a"), &at.join("c")));
    sys::symlink(Path::new("b"), &at.join("s")).expect("a link");
    done("to a link itself", sys::link(&at.join("s"), &at.join("t")));
    say(
        "it leads",
        sys::read_link(&at.join("t")).map(|to| String::from_utf8_lossy(&to).into_owned()),
    );
    say("not a link", sys::read_link(&at.join("b")));
    let long = "x/".repeat(2047) + "y";
    done(
        "a long target",
        sys::symlink(Path::new(&long), &at.join("long")),
    );
    say(
        "is",
        sys::read_link(&at.join("long")).map(|to| to == long.as_bytes()),
    );
    say(
        "its size",
        sys::stat(&at.join("long")).map(|stat| stat.st_size),
    );
    done(
        "an empty target",
        sys::symlink(Path::new(""), &at.join("empty")),
    );
    done("owner of a link", sys::lchown(&at.join("s"), 7, 8));
    say("then", owner(&at.join("s")));
    say("and of the file", owner(&at.join("b")));
}

fn owners(at: &Path) {
    file(&at.join("file"), 0o644);
    let target = at.join("file");
    done("to a user", sys::chown(&target, USER, GROUP));
    say("then", owner(&target));
    done(
        "away by the owner",
        as_user(|| sys::chown(&target, 0, u32::MAX)),
    );
    done(
        "to a group of the owner's",
        as_user(|| sys::chown(&target, u32::MAX, OTHERS)),
    );
    done(
        "to another group",
        as_user(|| sys::chown(&target, u32::MAX, 3003)),
    );
    say("then", owner(&target));
    done("mode by the owner", as_user(|| sys::chmod(&target, 0o640)));
    done(
        "mode by another",
        by(1002, 1002, 1002, || sys::chmod(&target, 0o777)),
    );
    done(
        "owner by another",
        by(1002, 1002, 1002, || sys::chown(&target, 1002, 1002)),
    );
    sys::chown(&target, USER, 3003).expect("owned");
    done(
        "set-group by one outside",
        as_user(|| sys::chmod(&target, 0o2755)),
    );
    say("then", owner(&target));
    done(
        "huge ids",
        sys::chown(&target, 4_000_000_000, 4_000_000_001),
    );
    say("then", owner(&target));
}

fn set_ids(at: &Path) {
    let target = at.join("file");
    let fresh = |mode: u32, uid: u32| {
        let _ = fs::remove_file(&target);
        fs::write(&target, "contents").expect("a file");
        sys::chown(&target, uid, uid).expect("owned");
        chmod(&target, mode);
    };
    let write = || {
        let fd = sys::open(&target, libc::O_WRONLY, 0)?;
        let written = sys::write(fd, b"x");
        sys::close(fd)?;
        written
    };
    for mode in [0o6777_u32, 0o6766, 0o4711, 0o2770] {
        fresh(mode, USER);
        done("owner writes", as_user(write));
        say("then", owner(&target));
        fresh(mode, USER);
        done("root writes", write());
        say("then", owner(&target));
        fresh(mode, USER);
        done("owner cuts", as_user(|| sys::truncate(&target, 3)));
        say("then", owner(&target));
        fresh(mode, USER);
        done(
            "owner empties",
            as_user(|| opens(&target, libc::O_WRONLY | libc::O_TRUNC)),
        );
        say("then", owner(&target));
        fresh(mode, USER);
        done("root gives away", sys::chown(&target, 5, 5));
        say("then", owner(&target));
        fresh(mode, USER);
        done(
            "owner changes group",
            as_user(|| sys::chown(&target, u32::MAX, OTHERS)),
        );
        say("then", owner(&target));
    }
    fs::create_dir(at.join("dir")).expect("a directory");
    chmod(&at.join("dir"), 0o6755);
    done(
        "root gives a directory away",
        sys::chown(&at.join("dir"), 5, 5),
    );
    say("then", owner(&at.join("dir")));
    fresh(0o755, 0);
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    done(
        "file capability",
        sys::set_xattr(&target, "security.capability", &capability, 0),
    );
    let is = || sys::get_xattr(&target, "security.capability", 64).map(|value| value == capability);
    say("is", is());
    done("a write", write());
    say("takes it", is());
    sys::set_xattr(&target, "security.capability", &capability, 0).expect("again");
    done("a new owner", sys::chown(&target, 9, 9));
    say("takes it", is());
}

fn access(at: &Path) {
    file(&at.join("private"), 0o600);
    file(&at.join("write-only"), 0o222);
    file(&at.join("group"), 0o660);
    sys::chown(&at.join("group"), 0, OTHERS).expect("owned");
    fs::create_dir(at.join("closed")).expect("a directory");
    file(&at.join("closed/file"), 0o666);
    fs::create_dir(at.join("listable")).expect("a directory");
    file(&at.join("listable/file"), 0o666);
    chmod(&at.join("closed"), 0o711);
    chmod(&at.join("listable"), 0o744);
    as_user(|| {
        done("read private", opens(&at.join("private"), libc::O_RDONLY));
        done(
            "read write-only",
            opens(&at.join("write-only"), libc::O_RDONLY),
        );
        done(
            "write write-only",
            opens(&at.join("write-only"), libc::O_WRONLY),
        );
        done(
            "by a supplementary group",
            opens(&at.join("group"), libc::O_RDWR),
        );
        done(
            "through a closed one",
            opens(&at.join("closed/file"), libc::O_RDWR),
        );
        done(
            "list a closed one",
            fs::read_dir(at.join("closed")).map_err(errno),
        );
        done("make in a closed one", opens(&at.join("closed/new"), RW));
        done(
            "remove from a closed one",
            sys::unlink(&at.join("closed/file")),
        );
        done(
            "list a listable one",
            fs::read_dir(at.join("listable")).map_err(errno),
        );
        done(
            "through a listable one",
            sys::stat(&at.join("listable/file")),
        );
        done("cut private", sys::truncate(&at.join("private"), 0));
    });
    fs::create_dir(at.join("by-group")).expect("a directory");
    sys::chown(&at.join("by-group"), 0, OTHERS).expect("owned");
    chmod(&at.join("by-group"), 0o770);
    done(
        "make by supplementary group",
        as_user(|| opens(&at.join("by-group/f"), RW)),
    );
    say("whose", owner(&at.join("by-group/f")));
    done(
        "root reads all",
        opens(&at.join("write-only"), libc::O_RDONLY),
    );
    done(
        "root does not execute all",
        sys::access(&at.join("private"), libc::X_OK),
    );
}

fn errno(error: std::io::Error) -> Errno {
    error.raw_os_error().unwrap_or(0)
}

fn sticky(at: &Path) {
    fs::create_dir(at.join("tmp")).expect("a directory");
    chmod(&at.join("tmp"), 0o1777);
    file(&at.join("tmp/roots"), 0o666);
    done("a user's own", as_user(|| opens(&at.join("tmp/own"), RW)));
    done(
        "remove another's",
        as_user(|| sys::unlink(&at.join("tmp/roots"))),
    );
    let rename = || sys::rename(&at.join("tmp/roots"), &at.join("tmp/x"));
    done("rename another's", as_user(rename));
    let replace = || sys::rename(&at.join("tmp/own"), &at.join("tmp/roots"));
    done("replace another's", as_user(replace));
    done(
        "remove one's own",
        as_user(|| sys::unlink(&at.join("tmp/own"))),
    );
}

fn times(at: &Path) {
    let target = at.join("file");
    file(&target, 0o666);
    done("set", sys::set_times(&target, [(1, 123_456_789), (-5, 5)]));
    let get = || {
        sys::stat(&target).map(|stat| {
            [
                (stat.st_atime, stat.st_atime_nsec),
                (stat.st_mtime, stat.st_mtime_nsec),
            ]
        })
    };
    say("are", get());
    done(
        "one of them",
        sys::set_times(&target, [(0, libc::UTIME_OMIT), (7, 0)]),
    );
    say("are", get());
    done(
        "by another who may write",
        by(1002, 1002, 1002, || {
            sys::set_times(&target, [(0, libc::UTIME_NOW), (0, libc::UTIME_NOW)])
        }),
    );
    done(
        "to a time, by another",
        by(1002, 1002, 1002, || {
            sys::set_times(&target, [(1, 0), (1, 0)])
        }),
    );
    sys::symlink(Path::new("file"), &at.join("link")).expect("a link");
    done(
        "of a link",
        sys::set_times(&at.join("link"), [(11, 0), (12, 0)]),
    );
    say("is", sys::stat(&at.join("link")).map(|stat| stat.st_mtime));
    // Long ago, so that every change shows.
    let old = |of: &Path| sys::set_times(of, [(1000, 0), (1000, 0)]);
    let changed = |of: &Path| sys::stat(of).map(|stat| stat.st_mtime != 1000);
    let directory = at.join("dir");
    fs::create_dir(&directory).expect("a directory");
    let step = |what: &str, outcome: Outcome| {
        done(what, outcome);
        say("changes the directory", changed(&directory));
        old(&directory).expect("old");
    };
    old(&directory).expect("old");
    step("making", opens(&directory.join("a"), RW));
    step(
        "linking",
        sys::link(&directory.join("a"), &directory.join("b")),
    );
    step(
        "moving",
        sys::rename(&directory.join("a"), &directory.join("c")),
    );
    step("removing", sys::unlink(&directory.join("c")));
    step(
        "writing below",
        fs::write(directory.join("b"), "x")
            .map(|()| 0)
            .map_err(errno),
    );
    step(
        "making a directory",
        sys::mkdir(&directory.join("d"), 0o755),
    );
    step("opening", opens(&directory, libc::O_RDONLY));
    old(&target).expect("old");
    done("cut to the same size", sys::truncate(&target, 8));
    say("changes it", changed(&target));
    old(&target).expect("old");
    done("written", fs::write(&target, "new").map_err(errno));
    say("changes it", changed(&target));
    let born = sys::born(&target).map(|born| born.is_none_or(|born| born > 1_600_000_000));
    say("born not long ago", born);
}

fn attributes(at: &Path) {
    let target = at.join("file");
    file(&target, 0o644);
    done("set", sys::set_xattr(&target, "user.one", b"value", 0));
    let text = |value: Vec<u8>| String::from_utf8_lossy(&value).into_owned();
    say("get", sys::get_xattr(&target, "user.one", 64).map(text));
    say(
        "length",
        sys::get_xattr(&target, "user.one", 0).map(|value| value.len()),
    );
    say("too little room", sys::get_xattr(&target, "user.one", 2));
    say("missing", sys::get_xattr(&target, "user.none", 64));
    done(
        "create anew",
        sys::set_xattr(&target, "user.one", b"2", libc::XATTR_CREATE),
    );
    done(
        "replace none",
        sys::set_xattr(&target, "user.two", b"2", libc::XATTR_REPLACE),
    );
    done("empty", sys::set_xattr(&target, "user.empty", b"", 0));
    done(
        "binary",
        sys::set_xattr(&target, "user.bin", &[0, 255, 0, 10], 0),
    );
    say("is", sys::get_xattr(&target, "user.bin", 64));
    done(
        "2000 bytes",
        sys::set_xattr(&target, "user.long", &[7; 2000], 0),
    );
    say("names", sys::list_xattr(&target));
    done("remove", sys::remove_xattr(&target, "user.long"));
    done("remove missing", sys::remove_xattr(&target, "user.long"));
    say("names", sys::list_xattr(&target));
    done("of a directory", sys::set_xattr(at, "user.dir", b"d", 0));
    sys::symlink(Path::new("file"), &at.join("link")).expect("a link");
    done(
        "of a link",
        sys::set_xattr(&at.join("link"), "user.l", b"l", 0),
    );
    done(
        "without a name space",
        sys::set_xattr(&target, "name", b"x", 0),
    );
    done(
        "a name too long",
        sys::set_xattr(&target, &format!("user.{}", "n".repeat(255)), b"x", 0),
    );
    done(
        "set by another",
        as_user(|| sys::set_xattr(&target, "user.one", b"x", 0)),
    );
    say(
        "get by another",
        as_user(|| sys::get_xattr(&target, "user.one", 64).map(text)),
    );
    done("trusted", sys::set_xattr(&target, "trusted.one", b"x", 0));
}

/// An ACL as the kernel takes it: version 2, then a tag, permissions and an id each.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

fn acls(at: &Path) {
    const ACCESS: &str = "system.posix_acl_access";
    const DEFAULT: &str = "system.posix_acl_default";
    const NONE: u32 = u32::MAX;
    let target = at.join("file");
    file(&target, 0o600);
    let for_user = acl(&[
        (1, 6, NONE),
        (2, 4, USER),
        (4, 0, NONE),
        (0x10, 4, NONE),
        (0x20, 0, NONE),
    ]);
    done("none yet", sys::get_xattr(&target, ACCESS, 256));
    done(
        "user cannot read",
        as_user(|| opens(&target, libc::O_RDONLY)),
    );
    done("set", sys::set_xattr(&target, ACCESS, &for_user, 0));
    say(
        "is",
        sys::get_xattr(&target, ACCESS, 256).map(|value| value == for_user),
    );
    say("mode", mode(&target));
    done("user can read", as_user(|| opens(&target, libc::O_RDONLY)));
    done(
        "user cannot write",
        as_user(|| opens(&target, libc::O_WRONLY)),
    );
    done(
        "another cannot",
        by(1002, 1002, 1002, || opens(&target, libc::O_RDONLY)),
    );
    chmod(&target, 0o600);
    done(
        "the mask is gone",
        as_user(|| opens(&target, libc::O_RDONLY)),
    );
    chmod(&target, 0o660);
    done("and is back", as_user(|| opens(&target, libc::O_RDONLY)));
    say("the mask is in it", sys::get_xattr(&target, ACCESS, 256));
    done(
        "set by another",
        as_user(|| sys::set_xattr(&target, ACCESS, &for_user, 0)),
    );
    done(
        "not an acl",
        sys::set_xattr(&target, ACCESS, b"nonsense", 0),
    );
    done(
        "default of a file",
        sys::set_xattr(&target, DEFAULT, &for_user, 0),
    );
    let directory = at.join("dir");
    fs::create_dir(&directory).expect("a directory");
    let default = acl(&[
        (1, 7, NONE),
        (2, 7, USER),
        (4, 5, NONE),
        (0x10, 7, NONE),
        (0x20, 0, NONE),
    ]);
    done(
        "default of a directory",
        sys::set_xattr(&directory, DEFAULT, &default, 0),
    );
    sys::set_umask(0o077);
    done(
        "a file in it",
        sys::open(&directory.join("f"), RW, 0o666).and_then(sys::close),
    );
    say("mode", mode(&directory.join("f")));
    say("acl", sys::get_xattr(&directory.join("f"), ACCESS, 256));
    done("a directory in it", sys::mkdir(&directory.join("d"), 0o777));
    say("mode", mode(&directory.join("d")));
    say(
        "acl",
        sys::get_xattr(&directory.join("d"), DEFAULT, 256).map(|value| value == default),
    );
    done("a pipe in it", sys::mkfifo(&directory.join("p"), 0o666));
    say("mode", mode(&directory.join("p")));
    sys::set_umask(0o022);
    done("away", sys::remove_xattr(&directory, DEFAULT));
    done("a file in it", opens(&directory.join("g"), RW));
    say("mode", mode(&directory.join("g")));
    say("names", sys::list_xattr(&target));
}

fn sparse(at: &Path) {
    let target = at.join("file");
    let fd = sys::open(&target, RW, 0o644).expect("open");
    const BIG: i64 = 5 << 30;
    done("past 4 GiB", sys::write_at(fd, b"far away", BIG));
    say("size", sys::fstat(fd).map(|stat| stat.st_size - BIG));
    say(
        "few blocks",
        sys::fstat(fd).map(|stat| stat.st_blocks < 1000),
    );
    let mut bytes = [0; 8];
    say("read", sys::read_at(fd, &mut bytes, BIG).map(|_| bytes));
    say(
        "a hole reads",
        sys::read_at(fd, &mut bytes, BIG / 2).map(|_| bytes),
    );
    say(
        "data",
        sys::lseek(fd, 0, libc::SEEK_DATA).map(|at| at - BIG),
    );
    say("hole", sys::lseek(fd, 0, libc::SEEK_HOLE));
    say(
        "hole after",
        sys::lseek(fd, BIG, libc::SEEK_HOLE).map(|at| at > BIG),
    );
    say("past the end", sys::lseek(fd, BIG * 2, libc::SEEK_DATA));
    say("end", sys::lseek(fd, 0, libc::SEEK_END).map(|at| at - BIG));
    done("cut", sys::ftruncate(fd, 10_000));
    done("reserve", sys::fallocate(fd, 0, 0, 40_000));
    say("size", sys::fstat(fd).map(|stat| stat.st_size));
    done(
        "reserve beyond",
        sys::fallocate(fd, libc::FALLOC_FL_KEEP_SIZE, 40_000, 40_000),
    );
    say("size", sys::fstat(fd).map(|stat| stat.st_size));
    sys::write_at(fd, &[1; 20_000], 0).expect("written");
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    done("punch", sys::fallocate(fd, punch, 4096, 8192));
    let mut all = [9; 20_000];
    say(
        "around it",
        sys::read_at(fd, &mut all, 0).map(|_| (all[4095], all[4096], all[12_287], all[12_288])),
    );
    done(
        "punch without keeping",
        sys::fallocate(fd, libc::FALLOC_FL_PUNCH_HOLE, 0, 4096),
    );
    done("no length", sys::fallocate(fd, 0, 0, 0));
    let other = sys::open(&at.join("copy"), RW, 0o644).expect("open");
    say("copy", sys::copy_range((fd, 0), (other, 100), 5000));
    say("size", sys::fstat(other).map(|stat| stat.st_size));
    done(
        "read-only is not written",
        sys::open(&target, libc::O_RDONLY, 0).and_then(|fd| sys::write(fd, b"x")),
    );
    done(
        "read-only is not cut",
        sys::open(&target, libc::O_RDONLY, 0).and_then(|fd| sys::ftruncate(fd, 0)),
    );
}

fn unnamed(at: &Path) {
    let open = |flags: i32| sys::open(at, libc::O_TMPFILE | libc::O_RDWR | flags, 0o640);
    let fd = open(0).expect("a file without a name");
    say("names", sys::fstat(fd).map(|stat| stat.st_nlink));
    done("write", sys::write(fd, b"hidden"));
    say(
        "nothing shows",
        fs::read_dir(at).map(Iterator::count).map_err(errno),
    );
    done("link", sys::link_fd(fd, &at.join("shown")));
    say("it is", mode(&at.join("shown")));
    say("has", fs::read(at.join("shown")).map_err(errno));
    done("close", sys::close(fd));
    done("and open again", opens(&at.join("shown"), libc::O_RDWR));
    let fd = open(libc::O_EXCL).expect("one that stays so");
    done("cannot be linked", sys::link_fd(fd, &at.join("never")));
    let fd = as_user(|| open(0));
    say(
        "whose",
        fd.and_then(sys::fstat)
            .map(|stat| (stat.st_uid, stat.st_gid)),
    );
}

fn open_files(at: &Path) {
    let target = at.join("file");
    let fd = sys::open(&target, RW, 0o644).expect("open");
    sys::write(fd, b"0123456789").expect("written");
    let append = sys::open(&target, libc::O_WRONLY | libc::O_APPEND, 0).expect("open");
    done("append", sys::write(append, b"A"));
    done("write at the end", sys::write(fd, b"B"));
    done("append again", sys::write(append, b"C"));
    done("append at an offset", sys::write_at(append, b"D", 0));
    say("contents", fs::read_to_string(&target).map_err(errno));
    done("remove while open", sys::unlink(&target));
    say("names", sys::fstat(fd).map(|stat| stat.st_nlink));
    let mut bytes = [0; 4];
    say("read", sys::read_at(fd, &mut bytes, 2).map(|_| bytes));
    done("write", sys::write_at(fd, b"still", 0));
    done(
        "mode",
        nix::sys::stat::fchmod(sys::borrow(fd), nix::sys::stat::Mode::S_IRUSR)
            .map_err(|errno| errno as i32),
    );
    done(
        "open by its number",
        opens(Path::new(&format!("/proc/self/fd/{fd}")), libc::O_RDONLY),
    );
    done("gone", sys::stat(&target));
    done("fsync", sys::fsync(fd));
    done("fdatasync", sys::fdatasync(fd));
    let directory = sys::open(at, libc::O_RDONLY | libc::O_DIRECTORY, 0).expect("open");
    done("fsync a directory", sys::fsync(directory));
    done("syncfs", sys::syncfs(directory));
    done("read a directory", sys::read(directory, &mut bytes));
    let direct = sys::open(&at.join("direct"), RW | libc::O_DIRECT, 0o644).expect("direct");
    let page = sys::aligned(8192);
    page.fill(3);
    say("direct write", sys::write_at(direct, page, 4096));
    page.fill(0);
    say(
        "direct read",
        sys::read_at(direct, page, 4096).map(|_| page[8191]),
    );
    say("direct read at the end", sys::read_at(direct, page, 8192));
    let lost = at.join("lost");
    fs::create_dir(&lost).expect("a directory");
    sys::chdir(&lost).expect("entered");
    done("remove where one is", sys::rmdir(&lost));
    done("make there", opens(Path::new("file"), RW));
    done("look there", sys::stat(Path::new("file")));
    done("up from there", sys::chdir(Path::new("..")));
    done("rename where it was", sys::stat(Path::new("lost")));
    sys::chdir(Path::new("/")).expect("entered");
    let synced = sys::open(&at.join("synced"), RW | libc::O_SYNC, 0o644).expect("open");
    done("synchronous write", sys::write(synced, b"x"));
}

fn memory(at: &Path) {
    let target = at.join("file");
    let fd = sys::open(&target, RW, 0o644).expect("open");
    sys::write(fd, &[b'.'; 10_000]).expect("written");
    let shared = Mapping::new(fd, 10_000, libc::MAP_SHARED).expect("a mapping");
    let private = Mapping::new(fd, 10_000, libc::MAP_PRIVATE).expect("a mapping");
    shared.write(5000, b"shared");
    let mut bytes = [0; 6];
    say(
        "read what was mapped",
        sys::read_at(fd, &mut bytes, 5000).map(|_| bytes == *b"shared"),
    );
    private.read(5000, &mut bytes);
    say("private sees it", Ok(bytes == *b"shared"));
    private.write(5000, b"secret");
    say(
        "nobody sees private",
        sys::read_at(fd, &mut bytes, 5000).map(|_| bytes == *b"shared"),
    );
    done("msync", shared.sync());
    sys::write_at(fd, b"written", 100).expect("written");
    let mut bytes = [0; 7];
    shared.read(100, &mut bytes);
    say("mapped sees what was written", Ok(bytes == *b"written"));
    drop(shared);
    say(
        "contents",
        fs::read(&target)
            .map(|all| all[5000..5006] == *b"shared")
            .map_err(errno),
    );
    let read_only = sys::open(&target, libc::O_RDONLY, 0).expect("open");
    done(
        "shared from read-only",
        Mapping::new(read_only, 100, libc::MAP_SHARED),
    );
    done(
        "private from read-only",
        Mapping::new(read_only, 100, libc::MAP_PRIVATE),
    );
}

fn locks(at: &Path) {
    let target = at.join("file");
    let open = || sys::open(&target, RW, 0o644).expect("open");
    let (one, two) = (open(), open());
    done("flock", sys::flock(one, libc::LOCK_EX));
    done(
        "flock of another",
        sys::flock(two, libc::LOCK_EX | libc::LOCK_NB),
    );
    done("unlock", sys::flock(one, libc::LOCK_UN));
    done("shared", sys::flock(one, libc::LOCK_SH));
    done(
        "shared of another",
        sys::flock(two, libc::LOCK_SH | libc::LOCK_NB),
    );
    done("process lock", sys::lock(one, libc::F_SETLK, libc::F_WRLCK));
    let child = sys::in_child(|| {
        sys::lock(open(), libc::F_SETLK, libc::F_WRLCK)
            .err()
            .unwrap_or(0)
    });
    say("in a child", Ok(name(child)));
    done("unlock", sys::lock(one, libc::F_SETLK, libc::F_UNLCK));
    done(
        "open file lock",
        sys::lock(one, libc::F_OFD_SETLK, libc::F_WRLCK),
    );
    done(
        "of another",
        sys::lock(two, libc::F_OFD_SETLK, libc::F_WRLCK),
    );
}

fn special(at: &Path) {
    done(
        "whiteout",
        sys::mknod(&at.join("whiteout"), libc::S_IFCHR | 0o600, 0),
    );
    say(
        "it is",
        sys::stat(&at.join("whiteout")).map(|stat| (format!("{:o}", stat.st_mode), stat.st_rdev)),
    );
    done(
        "device node",
        sys::mknod(&at.join("null"), libc::S_IFCHR | 0o666, libc::makedev(1, 3)),
    );
    done(
        "device by a user",
        as_user(|| sys::mknod(&at.join("n"), libc::S_IFCHR | 0o666, libc::makedev(1, 3))),
    );
    done(
        "regular file",
        sys::mknod(&at.join("regular"), libc::S_IFREG | 0o640, 0),
    );
    say("it is", mode(&at.join("regular")));
    sys::chdir(at).expect("entered");
    done("socket", UnixListener::bind("socket").map_err(errno));
    say("it is", mode(&at.join("socket")));
    done(
        "connected",
        std::os::unix::net::UnixStream::connect("socket").map_err(errno),
    );
    sys::chdir(Path::new("/")).expect("entered");
    done("open a socket", opens(&at.join("socket"), libc::O_RDONLY));
    sys::mkfifo(&at.join("fifo"), 0o644).expect("a pipe");
    let both = sys::open(&at.join("fifo"), libc::O_RDWR, 0).expect("a pipe opened");
    done("into a pipe", sys::write(both, b"through"));
    let mut bytes = [0; 7];
    say(
        "and out",
        sys::read(both, &mut bytes).map(|_| bytes == *b"through"),
    );
    done(
        "no reader",
        opens(&at.join("fifo"), libc::O_WRONLY | libc::O_NONBLOCK),
    );
    let events = sys::inotify_init1(libc::IN_NONBLOCK).expect("inotify") as i32;
    done(
        "watch",
        sys::watch(events, at, libc::IN_CREATE | libc::IN_DELETE),
    );
    fs::write(at.join("watched"), "").expect("a file");
    fs::remove_file(at.join("watched")).expect("removed");
    let mut bytes = [0; 512];
    say("events", sys::read(events, &mut bytes));
}
