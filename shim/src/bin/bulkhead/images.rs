//! `bulkhead images`: what is kept.

use std::fmt::Write as _;

use anyhow::Context as _;
use rootfs_builder::image::Listed;
use serde_json::json;
use shim::text::printable;

use super::{
    cli::{Format, ImagesArgs},
    say::say,
};

/// Prints the images, those that were added last first.
pub(crate) fn images(args: &ImagesArgs) -> anyhow::Result<u8> {
    let list = args.store.open()?.list()?;
    match args.format {
        _ if args.quiet => list.iter().try_for_each(|image| say(image.id.hex()))?,
        Format::Table => say(table(&list))?,
        Format::Json => {
            let list: Vec<_> = list.iter().map(as_json).collect();
            let text = serde_json::to_string_pretty(&list).context("cannot write the list")?;
            say(text)?;
        }
    }
    Ok(0)
}

fn as_json(image: &Listed) -> serde_json::Value {
    let digests = image.names.iter().filter_map(|(_, digest)| *digest);
    json!({
        "id": image.id.hex(),
        "names": image.names.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        "digests": digests.collect::<Vec<_>>(),
        "created": image.created,
        "added": image.record.added,
        "size": image.record.length,
        "used": image.used_bytes,
        "disk": image.record.disk,
        "verity": image.record.verity,
    })
}

/// A line for every name, and one for an image without.
fn table(list: &[Listed]) -> String {
    let mut rows = vec![["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"].map(str::to_owned)];
    for image in list {
        let names = image.names.iter().map(|(name, _)| parts(name));
        let mut names: Vec<(String, String)> = names.collect();
        if names.is_empty() {
            names.push(("<none>".to_owned(), "<none>".to_owned()));
        }
        // What its maker says; the day is enough.
        let created = image.created.as_deref().unwrap_or("unknown");
        let created = created.split('T').next().unwrap_or_default();
        for (repository, tag) in names {
            rows.push([
                printable(&repository, 200),
                printable(&tag, 130),
                image.id.hex()[..12].to_owned(),
                printable(created, 20),
                size(image.used_bytes),
            ]);
        }
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; 5] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in &rows {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// A name's repository and its tag or digest.
fn parts(name: &str) -> (String, String) {
    if let Some((repository, digest)) = name.split_once('@') {
        return (repository.to_owned(), digest.to_owned());
    }
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository.to_owned(), tag.to_owned()),
        _ => (name.to_owned(), "<none>".to_owned()),
    }
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_shown_in_parts() {
        let shown = |name| {
            let (repository, tag) = parts(name);
            format!("{repository} {tag}")
        };
        assert_eq!(shown("localhost:5000/a/b:1"), "localhost:5000/a/b 1");
        assert_eq!(shown("localhost:5000/a"), "localhost:5000/a <none>");
        assert_eq!(shown("docker.io/a@sha256:00"), "docker.io/a sha256:00");
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(1500), "1.5 kB");
        assert_eq!(size(163_844 << 10), "167.8 MB");
        assert_eq!(size(12_345_678_901), "12.35 GB");
    }

    #[test]
    fn an_empty_table_has_its_head() {
        assert_eq!(table(&[]), "REPOSITORY  TAG  IMAGE ID  CREATED  SIZE\n");
    }
}
