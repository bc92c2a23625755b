//! Checks what a file system does, from within the guest.
//!
//!     fs-check rules DIR            what each call gives, a line each
//!     fs-check random DIR SEED N    N random operations on a file, compared with memory
//!     fs-check listing DIR N [STEP] N names in a directory, listed in every way; or one step of it
//!
//! `rules` judges nothing: its output on one file system is compared with that
//! on another. The other two fail when something is wrong.

mod listing;
mod random;
mod rules;
mod sys;

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse().expect("a number");
    match arguments[..] {
        ["rules", directory] => rules::print(Path::new(directory)),
        ["random", directory, seed, count] => {
            random::run(Path::new(directory), number(seed), number(count));
        }
        ["listing", directory, count] => {
            listing::run(Path::new(directory), number(count) as usize, None);
        }
        ["listing", directory, count, step] => {
            listing::run(Path::new(directory), number(count) as usize, Some(step));
        }
        _ => {
            eprintln!("usage: fs-check rules DIR | random DIR SEED N | listing DIR N [STEP]");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
