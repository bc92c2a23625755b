//! What the fragments ask of Kconfig, and which of it a final configuration does not hold.
//!
//! `allnoconfig` takes a fragment's line as a wish: an option whose dependency is off, or that
//! was renamed, vanishes without a word. So each line is looked up in the result.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, bail};

/// The options of all fragments.
#[derive(Default)]
pub(super) struct Fragments {
    /// Name to value, as they stand in the fragment; `n` means absent.
    options: BTreeMap<String, String>,
}

impl Fragments {
    /// Adds one fragment: lines `CONFIG_NAME=value`, comments, and empty lines.
    pub(super) fn add(&mut self, text: &str) -> Result<()> {
        for (number, line) in text.lines().enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let Some((name, value)) = option(line) else {
                bail!("line {} is not CONFIG_NAME=value: {line}", number + 1);
            };
            if self
                .options
                .insert(name.to_owned(), value.to_owned())
                .is_some()
            {
                bail!("line {} sets {name} a second time", number + 1);
            }
        }
        Ok(())
    }

    /// The requests that `config` (a final `.config`) does not honour, each as a sentence.
    pub(super) fn lost(&self, config: &str) -> Vec<String> {
        let set: BTreeMap<&str, &str> = config.lines().filter_map(option).collect();
        let mut lost = Vec::new();
        for (name, want) in &self.options {
            match set.get(name.as_str()) {
                None if want == "n" => (),
                Some(have) if have == want => (),
                None => lost.push(format!("{name}={want} is absent")),
                Some(have) => lost.push(format!("{name}={want} is {have}")),
            }
        }
        lost
    }
}

/// The options, one a line, sorted: all of the fragments that matters to the kernel.
impl fmt::Display for Fragments {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options
            .iter()
            .try_for_each(|(name, value)| writeln!(out, "{name}={value}"))
    }
}

/// Splits `CONFIG_NAME=value`.
fn option(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.split_once('=')?;
    (name.starts_with("CONFIG_") && !value.is_empty()).then_some((name, value))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    const FINAL: &str = "CONFIG_SMP=y\nCONFIG_NR_CPUS=64\n# CONFIG_MODULES is not set\n";

    fn lost(fragment: &str) -> Vec<String> {
        let mut fragments = Fragments::default();
        fragments.add(fragment).unwrap();
        fragments.lost(FINAL)
    }

    #[test]
    fn an_honoured_fragment_loses_nothing() {
        let fragment = "# why\nCONFIG_SMP=y\nCONFIG_NR_CPUS=64\n\nCONFIG_MODULES=n\nCONFIG_USB=n\n";
        assert_eq!(lost(fragment), [""; 0]);
    }

    #[test]
    fn an_option_that_vanished_is_named() {
        assert_eq!(lost("CONFIG_VIRTIO=y\n"), ["CONFIG_VIRTIO=y is absent"]);
    }

    #[test]
    fn an_option_with_another_value_is_named_with_it() {
        assert_eq!(lost("CONFIG_NR_CPUS=8\n"), ["CONFIG_NR_CPUS=8 is 64"]);
    }

    #[test]
    fn an_option_that_should_be_off_and_is_on_is_named() {
        assert_eq!(lost("CONFIG_SMP=n\n"), ["CONFIG_SMP=n is y"]);
    }

    #[test]
    fn a_line_that_is_no_option_is_an_error() {
        let error = Fragments::default().add("CONFIG_SMP y\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "line 1 is not CONFIG_NAME=value: CONFIG_SMP y"
        );
    }

    #[test]
    fn an_option_that_is_set_twice_is_an_error() {
        let error = Fragments::default()
            .add("CONFIG_A=y\nCONFIG_A=n\n")
            .unwrap_err();
        assert_eq!(error.to_string(), "line 2 sets CONFIG_A a second time");
    }

    #[test]
    fn comments_and_order_do_not_change_what_is_asked_for() {
        let (mut one, mut other) = (Fragments::default(), Fragments::default());
        one.add("# a\nCONFIG_A=y\n\n# b\nCONFIG_B=n\n").unwrap();
        other.add("# all\nCONFIG_B=n\nCONFIG_A=y\n").unwrap();
        assert_eq!(one.to_string(), other.to_string());
    }

    #[test]
    fn every_option_of_every_fragment_stands_under_a_reason() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel/fragments");
        let mut all = Fragments::default();
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let text = fs::read_to_string(&path).unwrap();
            all.add(&text).unwrap();
            for group in text.split("\n\n") {
                assert!(
                    group.starts_with("# "),
                    "no reason in {}: {group}",
                    path.display()
                );
            }
        }
        assert!(all.options.len() > 400);
    }
}
