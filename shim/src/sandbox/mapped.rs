//! The files that the guest has as memory. One that is cut off while it is mapped has its pages
//! taken away from under the guest, which no errno can tell: the machine ends, and which file it
//! was is found here.

use std::{
    fmt,
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::PathBuf,
};

use crate::text::printable;

/// The files, as they were when the machine was made.
#[derive(Debug, Default)]
pub(super) struct Mapped(Vec<Whole>);

/// A file and its length then.
#[derive(Debug)]
struct Whole {
    file: File,
    path: PathBuf,
    bytes: u64,
}

/// A file that is shorter now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cut {
    path: PathBuf,
    left: u64,
    bytes: u64,
}

impl Mapped {
    /// Keeps an eye on these files.
    pub(super) fn of<'a>(files: impl IntoIterator<Item = &'a OwnedFd>) -> io::Result<Self> {
        let whole = |file: &OwnedFd| {
            let file = File::from(file.as_fd().try_clone_to_owned()?);
            let name = format!("/proc/self/fd/{}", file.as_raw_fd());
            Ok(Whole {
                // Only for people: it may have been renamed since it was opened.
                path: fs::read_link(name).unwrap_or_default(),
                bytes: file.metadata()?.len(),
                file,
            })
        };
        files
            .into_iter()
            .map(whole)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// The first file that has become shorter.
    pub(super) fn cut(&self) -> Option<Cut> {
        self.0.iter().find_map(|whole| {
            let left = whole.file.metadata().ok()?.len();
            (left < whole.bytes).then(|| Cut {
                path: whole.path.clone(),
                left,
                bytes: whole.bytes,
            })
        })
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, left, bytes } = self;
        let path = printable(&path.display().to_string(), 300);
        write!(
            f,
            "{path} was cut off while it was the guest's memory, {left} bytes of {bytes} are left; \
             make it again: an image by `bulkhead rmi` and `bulkhead pull`, the guest's own by `make`"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_became_shorter_is_told_with_both_lengths() {
        let files = [
            tempfile::NamedTempFile::new(),
            tempfile::NamedTempFile::new(),
        ];
        let [whole, cut] = files.map(|file| file.expect("a file"));
        for file in [&whole, &cut] {
            file.as_file().set_len(8192).expect("a length");
        }
        let opened = [&whole, &cut].map(|file| OwnedFd::from(file.reopen().expect("opened")));
        let mapped = Mapped::of(&opened).expect("looked at");
        assert_eq!(mapped.cut(), None);
        whole.as_file().set_len(9000).expect("longer");
        assert_eq!(mapped.cut(), None);
        cut.as_file().set_len(4096).expect("shorter");
        let told = mapped.cut().expect("cut off").to_string();
        let path = cut.path().display().to_string();
        assert!(told.starts_with(&path), "{told}");
        assert!(told.contains("4096 bytes of 8192 are left"), "{told}");
        assert!(told.contains("bulkhead rmi"), "{told}");
    }
}
