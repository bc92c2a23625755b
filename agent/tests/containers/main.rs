//! The agent with real containers, in namespaces of this machine: no virtual
//! machine, but every system call that a guest would see. Needs root.

mod guest;
/// Lists stories by name: `stories! { a_sentence, another, }`.
macro_rules! stories {
    ($($name:ident,)*) => {
        /// All of them by name.
        pub(crate) const ALL: &[(&str, crate::Story)] =
            &[$((stringify!($name), |guest| Box::pin($name(guest)))),*];
    };
}

mod limits;
mod pods;
mod specification;
mod stories;

use std::{future::Future, pin::Pin, process::ExitCode};

/// What a container does, one sentence.
type Story = for<'a> fn(&'a guest::Guest) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, verb, directory] = &arguments[..]
        && verb == "serve"
    {
        guest::serve(directory.as_ref());
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: the agent's containers need root; run these tests as root");
        return ExitCode::SUCCESS;
    }
    let filter = arguments.get(1).filter(|word| !word.starts_with('-'));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let mut failed = 0;
    let mut all: Vec<_> = [stories::ALL, specification::ALL, pods::ALL].concat();
    if !limits::can_run() {
        eprintln!(
            "NOT RUN: {} stories of limits need the controllers of cgroup v2; the lab has them",
            limits::ALL.len()
        );
    } else if std::env::var_os("LAB").is_some() && filter.is_none() {
        // The lab is slow, and the other stories are the same everywhere.
        all = limits::ALL.to_vec();
    } else {
        all.extend(limits::ALL);
    }
    for (name, story) in all {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        let guest = guest::Guest::start();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            runtime.block_on(async {
                let limit = std::time::Duration::from_secs(60);
                tokio::time::timeout(limit, story(&guest))
                    .await
                    .expect("within a minute");
            });
        }));
        println!(
            "test {name} ... {}",
            if outcome.is_ok() { "ok" } else { "FAILED" }
        );
        failed += usize::from(outcome.is_err());
    }
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
