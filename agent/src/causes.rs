//! Errors as the host reads them: one line, with their causes, in the words
//! that container tools look for.

use std::{error::Error, io};

/// An error and its causes in one line. What the kernel says comes without its number and in
/// small letters, as `no such file or directory`: that is what engines classify failures by.
pub(crate) fn line(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    let mut cause = Some(error);
    while let Some(error) = cause {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&one(error));
        cause = error.source();
    }
    text
}

fn one(error: &(dyn Error + 'static)) -> String {
    let text = error.to_string();
    let number = error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::raw_os_error);
    match number {
        Some(number) => plain(&text, number),
        None => text,
    }
}

fn plain(text: &str, number: i32) -> String {
    let text = text
        .strip_suffix(&format!(" (os error {number})"))
        .unwrap_or(text);
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| {
        first.to_lowercase().chain(characters).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open {0}")]
    struct Opening(&'static str, #[source] io::Error);

    #[test]
    fn the_kernels_words_come_as_engines_look_for_them() {
        for (number, words) in [
            (libc::ENOENT, "no such file or directory"),
            (libc::EACCES, "permission denied"),
            (libc::EPERM, "operation not permitted"),
            (libc::ENOTDIR, "not a directory"),
        ] {
            let error = Opening("/x", io::Error::from_raw_os_error(number));
            assert_eq!(line(&error), format!("cannot open /x: {words}"));
        }
    }

    #[test]
    fn other_errors_are_left_as_they_are() {
        let error = Opening("/x", io::Error::other("The disk said NO"));
        assert_eq!(line(&error), "cannot open /x: The disk said NO");
    }
}
