//! Signals by the names and numbers that people and tools give them.

use std::str::FromStr as _;

use nix::sys::signal::Signal;

/// The last real-time signal.
const LAST: i32 = 64;

/// The signal of `text`: a number, a name, or a name with `SIG` before it; in any case of letters.
///
/// ```
/// use shim::oci::signal::parse;
/// assert_eq!(parse("9"), Some(9));
/// assert_eq!(parse("term"), Some(15));
/// assert_eq!(parse("SIGRTMIN+1"), Some(35));
/// assert_eq!(parse("FOO"), None);
/// ```
pub fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse() {
        return (1..=LAST).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Ok(signal) = Signal::from_str(&format!("SIG{name}")) {
        return Some(signal as i32);
    }
    let (base, sign, rest) = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => (34, '+', rest),
        (_, Some(rest)) => (LAST, '-', rest),
        _ => return None,
    };
    let offset = match rest {
        "" => 0,
        rest => rest
            .strip_prefix(sign)?
            .parse()
            .ok()
            .filter(|n| (0..=30).contains(n))?,
    };
    Some(if sign == '+' {
        base + offset
    } else {
        base - offset
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_names_and_sig_names_mean_the_same() {
        for text in ["10", "USR1", "SIGUSR1", "sigusr1"] {
            assert_eq!(parse(text), Some(10), "{text}");
        }
        assert_eq!(parse("RTMAX-2"), Some(62));
    }

    #[test]
    fn what_is_no_signal_is_none() {
        for text in ["", "0", "65", "-9", "SIG", "KILL9", "RTMIN+31", "RTMIN-1"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_taken_is_a_signal(text in ".{0,12}") {
            prop_assert!(parse(&text).is_none_or(|number| (1..=LAST).contains(&number)));
        }
    }
}
