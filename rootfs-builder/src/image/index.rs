//! Which image of an index is taken: indexes list one image for each kind of machine, and beside
//! them what is said about these.

use super::json::{Descriptor, Platform};
use super::{Error, printable};

/// As many documents are followed from a name to a manifest: an index may lead to an index.
pub const DOCUMENTS_MAX: usize = 4;

/// The annotation of an entry that is no image but says something about one.
const ABOUT: &str = "vnd.docker.reference.type";

/// As many kinds of machines are named in an error.
const NAMED_MAX: usize = 20;

/// The image of an index that runs on machines of ours; of several the one for the oldest
/// processors, which runs on every machine.
///
/// # Errors
///
/// When there is none, or more than one that does not say for what it is.
pub fn for_our_machines(manifests: &[Descriptor]) -> Result<Descriptor, Error> {
    let images: Vec<&Descriptor> = manifests.iter().filter(|entry| is_image(entry)).collect();
    let ours = images.iter().filter_map(|entry| {
        let platform = entry.platform.as_ref()?;
        platform.is_ours().then(|| (level(platform), entry))
    });
    if let Some((_, entry)) = ours.min_by_key(|(level, _)| *level) {
        return Ok((*entry).clone());
    }
    match images[..] {
        [] => Err(Error::NoImage),
        [only] if only.platform.is_none() => Ok(only.clone()),
        _ => Err(Error::NotForUs {
            platforms: (images.iter().take(NAMED_MAX))
                .map(|entry| named(entry.platform.as_ref()))
                .collect(),
        }),
    }
}

/// Builders put attestations beside the images, for machines that there are not.
fn is_image(entry: &Descriptor) -> bool {
    let unknown = |platform: &Platform| platform.os == "unknown";
    let about = entry
        .annotations
        .as_ref()
        .is_some_and(|all| all.contains_key(ABOUT));
    !about && !entry.platform.as_ref().is_some_and(unknown)
}

/// How new a processor must be.
fn level(platform: &Platform) -> usize {
    let levels = ["v1", "v2", "v3", "v4"];
    let variant = platform.variant.as_deref().unwrap_or_default();
    match variant {
        "" => 0,
        variant => levels
            .iter()
            .position(|level| *level == variant)
            .unwrap_or(levels.len()),
    }
}

/// Whether an image whose configuration names this kind of machine runs on ours.
///
/// # Errors
///
/// When it does not.
pub(super) fn for_our_machine(platform: &Platform) -> Result<(), Error> {
    match platform.is_ours() {
        true => Ok(()),
        false => Err(Error::NotForUs {
            platforms: vec![named(Some(platform))],
        }),
    }
}

/// A kind of machine as people write it.
fn named(platform: Option<&Platform>) -> String {
    let Some(platform) = platform else {
        return "unknown".to_owned();
    };
    let parts = [Some(&platform.os), Some(&platform.architecture)];
    let parts = parts.into_iter().chain([platform.variant.as_ref()]);
    let parts: Vec<_> = parts.flatten().map(|part| printable(part)).collect();
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::digest::Digest;

    /// An entry for a kind of machine, `os/architecture/variant`; none for an empty one.
    fn entry(platform: &str) -> Descriptor {
        let mut parts = platform.split('/');
        let mut entry = json!({"digest": Digest::of(platform.as_bytes()), "size": 7});
        if let (Some(os), Some(architecture)) = (parts.next(), parts.next()) {
            entry["platform"] = json!({"os": os, "architecture": architecture});
            if let Some(variant) = parts.next() {
                entry["platform"]["variant"] = json!(variant);
            }
        }
        serde_json::from_value(entry).unwrap()
    }

    fn entries(platforms: &[&str]) -> Vec<Descriptor> {
        platforms.iter().map(|platform| entry(platform)).collect()
    }

    #[test]
    fn of_several_for_our_machines_the_one_for_the_oldest_processors_is_taken() {
        for (platforms, taken) in [
            (&["linux/arm64/v8", "linux/amd64"][..], "linux/amd64"),
            (&["linux/amd64/v3", "linux/amd64"], "linux/amd64"),
            (&["linux/amd64/v3", "linux/amd64/v1"], "linux/amd64/v1"),
            (&["linux/amd64/v9", "linux/amd64/v3"], "linux/amd64/v3"),
            (&["windows/amd64", "linux/amd64/v2"], "linux/amd64/v2"),
            (&["", "linux/amd64"], "linux/amd64"),
            (&[""], ""),
        ] {
            let found = for_our_machines(&entries(platforms)).unwrap();
            assert_eq!(found, entry(taken), "{platforms:?}");
        }
    }

    #[test]
    fn what_is_said_about_images_is_none() {
        let mut about = entry("linux/amd64");
        about.digest = Digest::of(b"about");
        about.annotations = Some([(ABOUT.to_owned(), "attestation-manifest".to_owned())].into());
        let found = for_our_machines(&[about.clone(), entry("linux/amd64")]).unwrap();
        assert_eq!(found, entry("linux/amd64"));
        let found = for_our_machines(&[entry("unknown/unknown"), entry("")]).unwrap();
        assert_eq!(found, entry(""));
        for none in [vec![], vec![about], entries(&["unknown/unknown"])] {
            assert!(matches!(for_our_machines(&none), Err(Error::NoImage)));
        }
    }

    #[test]
    fn the_kinds_of_machines_that_there_are_images_for_are_named() {
        let others = ["linux/arm/v7", "linux/arm64", "", "unknown/unknown"];
        let error = for_our_machines(&entries(&others)).unwrap_err().to_string();
        let wanted = "the image is not for linux/amd64 but for linux/arm/v7, linux/arm64, unknown";
        assert_eq!(error, wanted);
        // Whatever it names, it fits on a line.
        let hostile = format!("linux/{}/\x1b[2J\n", "x".repeat(1 << 20));
        let error = for_our_machines(&entries(&[&*hostile; 100])).unwrap_err();
        let error = error.to_string();
        assert!(error.len() < 8000, "{}", error.len());
        assert!(!error.chars().any(char::is_control), "{error}");
    }
}
