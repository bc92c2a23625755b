//! Text of strangers, made fit for a terminal or a log.
//!
//! What a guest, a container or a file says is printed on one line, without
//! control characters, and never longer than a bound.

/// `text` as one line of printable characters, at most about `max` bytes.
///
/// ```
/// assert_eq!(shim::text::printable("a\nb\x1b[2J", 80), "a\\nb\\u{1b}[2J");
/// assert_eq!(shim::text::printable("abcdef", 3), "abc…");
/// ```
pub fn printable(text: &str, max: usize) -> String {
    let mut line = String::with_capacity(text.len().min(max));
    for character in text.chars() {
        if line.len() >= max {
            line.push('…');
            break;
        }
        // Format characters can reorder or hide what is on a terminal.
        let hidden = matches!(character,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        if character.is_control() || hidden {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

/// An error and its causes on one line, each said once.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_printed_is_one_bounded_line(text in ".*", max in 0usize..100) {
            let line = printable(&text, max);
            prop_assert!(!line.chars().any(char::is_control));
            prop_assert!(line.len() <= max + 16);
        }
    }

    #[test]
    fn a_cause_that_was_said_is_not_said_again() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open x: no such file")]
        struct Outer(#[source] Inner);
        #[derive(Debug, thiserror::Error)]
        #[error("no such file")]
        struct Inner;
        assert_eq!(chain(&Outer(Inner)), "cannot open x: no such file");
    }
}
