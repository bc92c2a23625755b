//! Holds `docs/compatibility.md` to what it says of itself: each row names a test, and there is
//! such a test.

use std::{fs, path::Path};

use crate::project::Project;

/// Tables whose rows are all shown by one test, which the text above them names.
const WITHOUT_TESTS: &str = "| command | what happens |";

/// What stands for the test of the row above, or for all tests of a module.
const OTHERS: [&str; 4] = ["same", "the same", "T", "::tests`"];

#[test]
fn every_row_names_a_test_and_every_test_is_there() {
    let project = Project::find().unwrap();
    let document = fs::read_to_string(project.root.join("docs/compatibility.md")).unwrap();
    let mut sources = String::new();
    for part in [
        "agent",
        "protocol",
        "rootfs-builder",
        "shim",
        "tests",
        "vmm",
    ] {
        read(&project.root.join(part), &mut sources);
    }
    // Of the table that a line is in, if it is in one: whether its rows name tests.
    let mut table = None;
    for line in document.lines() {
        match table {
            _ if !line.starts_with('|') => table = None,
            None => table = Some(!line.starts_with(WITHOUT_TESTS)),
            Some(true) if !line.starts_with("| ---") => row(line, &sources),
            Some(_) => {}
        }
    }
}

fn row(line: &str, sources: &str) {
    let Some((_, last)) = line.trim_end_matches(" |").rsplit_once('|') else {
        return;
    };
    let tests: Vec<&str> = last.split('`').skip(1).step_by(2).collect();
    let named = |text: &&str| text.contains('_') && !text.contains(['/', '.', ' ']);
    let shown = tests
        .iter()
        .any(|text| named(text) || text.ends_with(".rs"))
        || OTHERS.iter().any(|other| last.contains(other));
    assert!(shown, "no test: {line}");
    for name in tests.into_iter().filter(|text| named(text)) {
        // An ellipsis stands for the rest of a name that was given before.
        let found = match name.strip_suffix('…') {
            Some(begin) => sources.contains(&format!("fn {begin}")),
            None => sources.contains(&format!("fn {name}(")),
        };
        assert!(found, "there is no test {name}: {line}");
    }
}

/// Adds all sources below a directory.
fn read(directory: &Path, sources: &mut String) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            *sources += &fs::read_to_string(&path).unwrap();
        }
    }
}
