//! A directory with many names: all are listed once, also when it is left and
//! entered in the middle and while names go.

use std::{collections::BTreeSet, fs, path::Path};

use nix::{dir::Dir, fcntl::OFlag, sys::stat::Mode};

/// Makes `count` files below `directory` and lists them.
pub(crate) fn run(directory: &Path, count: usize) {
    let many = directory.join("many");
    fs::create_dir(&many).expect("a directory");
    let name = |i: usize| format!("name-{i:06}");
    for i in 0..count {
        fs::write(many.join(name(i)), "").expect("a file");
    }
    let expected: BTreeSet<String> = (0..count).map(name).collect();
    assert!(names(&many) == expected, "a listing has all names");

    // Two listings of one directory, in turns.
    let (mut one, mut two) = (open(&many), open(&many));
    let (mut by_one, mut by_two) = (BTreeSet::new(), BTreeSet::new());
    let (mut one, mut two) = (one.iter(), two.iter());
    loop {
        let (first, second) = (
            take(&mut one, 7, &mut by_one),
            take(&mut two, 11, &mut by_two),
        );
        if first == 0 && second == 0 {
            break;
        }
    }
    assert!(by_one == expected && by_two == expected, "in turns too");

    // What goes while it is listed: the rest is seen once, and nothing twice.
    let mut listed = BTreeSet::new();
    for (i, entry) in fs::read_dir(&many).expect("a listing").enumerate() {
        let name = entry
            .expect("an entry")
            .file_name()
            .into_string()
            .expect("text");
        assert!(listed.insert(name.clone()), "{name} is listed twice");
        if i % 2 == 0 {
            fs::remove_file(many.join(&name)).expect("removed");
        }
    }
    assert!(listed == expected, "each was seen while half of them went");
    assert_eq!(names(&many).len(), count / 2);
    fs::remove_dir_all(&many).expect("removed");
    println!("{count} names agree");
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).expect("a listing");
    let mut names = BTreeSet::new();
    for entry in entries {
        let name = entry.expect("an entry").file_name();
        let name = name.into_string().expect("text");
        assert!(names.insert(name.clone()), "{name} is listed twice");
    }
    names
}

fn open(directory: &Path) -> Dir {
    Dir::open(directory, OFlag::O_RDONLY, Mode::empty()).expect("a directory")
}

fn take(entries: &mut nix::dir::Iter<'_>, count: usize, into: &mut BTreeSet<String>) -> usize {
    let mut taken = 0;
    for entry in entries.take(count) {
        let entry = entry.expect("an entry");
        let name = entry.file_name().to_str().expect("text");
        if name != "." && name != ".." {
            assert!(into.insert(name.to_owned()), "{name} is listed twice");
        }
        taken += 1;
    }
    taken
}
