//! Short lines into the kernel's log, where they outlive the guest.

use std::{fmt, io::Write as _};

/// Writes one line, as [`format!`] makes it, to the kernel's log.
#[macro_export]
macro_rules! log {
    ($($argument:tt)*) => { $crate::log::line(format_args!($($argument)*)) };
}
pub use log;

/// The longest line, in bytes.
const MAX: usize = 900;

/// Writes one line to the kernel's log; where there is none, to standard error. Whatever a
/// container may have put into it, it stays one line of printable text.
pub fn line(text: fmt::Arguments<'_>) {
    let line = printable(&format!("bulkhead-agent: {text}"));
    let written = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(line.as_bytes()));
    if written.is_err() {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(MAX));
    for character in text.chars() {
        if line.len() >= MAX {
            break;
        }
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_break_of_a_container_does_not_make_a_second_line() {
        assert_eq!(printable("a\nb\x1b[0m"), "a\\nb\\u{1b}[0m");
    }

    #[test]
    fn a_long_line_is_cut() {
        assert!(printable(&"x".repeat(5000)).len() <= MAX + 8);
    }
}
