//! What tests of this process share it with: other tests, whose children have copies of all its
//! descriptors from their fork until they execute a program.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// Tries until there is something, for what holds once the last copy of a descriptor is closed.
#[track_caller]
pub(crate) fn soon<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        if let Some(outcome) = attempt() {
            return outcome;
        }
        assert!(Instant::now() < deadline, "in vain for five seconds");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Makes an executable script.
pub(crate) fn executable(path: &Path, script: &str) {
    let text = path.with_extension("text");
    fs::write(&text, script).expect("written");
    fs::set_permissions(&text, Permissions::from_mode(0o755)).expect("changed");
    // By another process: what is open for writing, in a copy too, nobody executes.
    let copied = Command::new("cp").args([&text, path]).status();
    assert!(copied.expect("started").success());
    fs::remove_file(text).expect("removed");
}
