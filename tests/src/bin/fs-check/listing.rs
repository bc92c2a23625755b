//! A directory with many names: each leads to its own file, and all are listed once, also when it
//! is left and entered in the middle and while names go.
//!
//! In steps, each of which tells how long it took: a file system that is slow is then told from
//! one that is stuck.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt, path::Path, time::Instant};

use nix::{dir::Dir, fcntl::OFlag, sys::stat::Mode};

/// What is done to the directory.
type Step = fn(&Path, usize);

/// In the order in which they are done.
const STEPS: [(&str, Step); 6] = [
    ("make", make),
    ("list", list),
    ("list-with-attributes", list_with_attributes),
    ("list-in-turns", list_in_turns),
    ("look-up", look_up),
    ("remove", remove),
];

/// So many at most are looked up, or removed while the rest is listed: each costs a message or two,
/// and a listing goes on as far as it would with more.
const MOST: usize = 2000;

/// Does all steps with `count` files in `many` below `directory`, or the one of that name. Files
/// that are there already need not be made.
pub(crate) fn run(directory: &Path, count: usize, wanted: Option<&str>) {
    let many = directory.join("many");
    let mut done = 0;
    for (name, step) in STEPS {
        if wanted.is_none_or(|wanted| wanted == name) {
            let begun = Instant::now();
            step(&many, count);
            println!("{name}: {count} names agree, {:.1?}", begun.elapsed());
            done += 1;
        }
    }
    assert!(done > 0, "there is no step {wanted:?}");
    if wanted.is_none() {
        fs::remove_dir_all(many).expect("removed");
    }
}

fn name(i: usize) -> String {
    format!("name-{i:06}")
}

fn expected(count: usize) -> BTreeSet<String> {
    (0..count).map(name).collect()
}

fn make(many: &Path, count: usize) {
    fs::create_dir_all(many).expect("a directory");
    let there = match fs::read_dir(many).expect("a listing").next() {
        Some(_) => names(many),
        None => BTreeSet::new(),
    };
    for name in (0..count).map(name).filter(|name| !there.contains(name)) {
        fs::write(many.join(name), "").expect("a file");
    }
}

fn list(many: &Path, count: usize) {
    assert!(names(many) == expected(count), "a listing has all names");
}

/// As `ls -l` does.
fn list_with_attributes(many: &Path, count: usize) {
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(many).expect("a listing") {
        let entry = entry.expect("an entry");
        let file = entry.metadata().expect("a file");
        assert!(file.is_file() && file.len() == 0, "{entry:?}");
        numbers.insert(file.ino());
    }
    assert_eq!(numbers.len(), count, "each name is another file");
}

fn look_up(many: &Path, count: usize) {
    // An odd step, so that names of all makers are among them.
    for i in (0..count).step_by(count.div_ceil(MOST) | 1) {
        let file = fs::metadata(many.join(name(i))).expect("a file");
        assert!(file.is_file() && file.len() == 0, "{}", name(i));
        let missing = many.join(format!("{}-not", name(i)));
        assert!(!missing.exists(), "{missing:?}");
    }
}

/// Two listings of one directory, in turns.
fn list_in_turns(many: &Path, count: usize) {
    let (mut one, mut two) = (open(many), open(many));
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
    let expected = expected(count);
    assert!(by_one == expected && by_two == expected, "in turns too");
}

/// What goes while it is listed: the rest is seen once, and nothing twice.
fn remove(many: &Path, count: usize) {
    let each = (count / MOST).max(2);
    let (mut listed, mut removed) = (BTreeSet::new(), 0);
    for (i, entry) in fs::read_dir(many).expect("a listing").enumerate() {
        let name = entry
            .expect("an entry")
            .file_name()
            .into_string()
            .expect("text");
        assert!(listed.insert(name.clone()), "{name} is listed twice");
        if i % each == 0 {
            fs::remove_file(many.join(&name)).expect("removed");
            removed += 1;
        }
    }
    assert!(listed == expected(count), "each was seen while others went");
    assert_eq!(names(many).len(), count - removed);
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
