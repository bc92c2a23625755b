//! Finding a program as a shell does, and executing it.

use std::{
    convert::Infallible,
    ffi::{CString, OsStr},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    unistd::{AccessFlags, execve, faccessat},
};

/// Why a program does not run. The texts are those that container tools look for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum Error {
    /// No directory of `$PATH` has it.
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotInPath(String),
    /// It was named with its path, and is not there.
    #[error("exec: {0:?}: stat {0}: no such file or directory")]
    Missing(String),
    /// It is there.
    #[error("exec: {name:?}: {reason}")]
    Refused {
        /// The program.
        name: String,
        /// What the kernel says.
        reason: &'static str,
    },
}

/// The path of the program `name`, by the `PATH` of `environment`.
pub(super) fn find(name: &str, environment: &[String]) -> Result<PathBuf, Error> {
    if name.contains('/') {
        return match runnable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(error) => Err(refusal(name, error)),
        };
    }
    candidates(name, environment)
        .find(|path| runnable(path).is_ok())
        .ok_or_else(|| Error::NotInPath(name.to_owned()))
}

/// Executes `path` in the place of this process.
pub(super) fn execute(
    path: &Path,
    arguments: &[CString],
    environment: &[CString],
) -> Result<Infallible, Error> {
    let name = path.to_string_lossy();
    let c_path =
        CString::new(path.as_os_str().as_bytes()).map_err(|_| refusal(&name, Errno::EINVAL))?;
    execve(&c_path, arguments, environment).map_err(|error| refusal(&name, error))
}

fn refusal(name: &str, error: Errno) -> Error {
    let name = name.to_owned();
    match error {
        Errno::ENOENT | Errno::ENOTDIR => Error::Missing(name),
        Errno::EACCES | Errno::EPERM => Error::Refused {
            name,
            reason: "permission denied",
        },
        Errno::EISDIR => Error::Refused {
            name,
            reason: "is a directory: permission denied",
        },
        Errno::ENOEXEC => Error::Refused {
            name,
            reason: "exec format error",
        },
        other => Error::Refused {
            name,
            reason: other.desc(),
        },
    }
}

/// Where `name` may be, in order. An empty directory in the path is the current one.
fn candidates<'a>(name: &'a str, environment: &'a [String]) -> impl Iterator<Item = PathBuf> + 'a {
    environment
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .into_iter()
        .flat_map(|path| path.split(':'))
        .filter(move |_| !name.is_empty())
        .map(move |directory| {
            let directory = if directory.is_empty() { "." } else { directory };
            Path::new(directory).join(name)
        })
}

fn runnable(path: &Path) -> nix::Result<()> {
    faccessat(
        nix::fcntl::AT_FDCWD,
        path,
        AccessFlags::X_OK,
        AtFlags::AT_EACCESS,
    )?;
    if path.is_dir() {
        return Err(Errno::EISDIR);
    }
    Ok(())
}

/// `text` for the kernel.
pub(super) fn c_string(text: impl AsRef<OsStr>) -> Option<CString> {
    CString::new(text.as_ref().as_bytes()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn environment(path: &str) -> Vec<String> {
        vec![format!("PATH={path}")]
    }

    #[test]
    fn a_name_is_looked_up_in_the_path_in_order() {
        let environment = environment("/nowhere:/bin");
        let all: Vec<_> = candidates("sh", &environment).collect();
        assert_eq!(all, [Path::new("/nowhere/sh"), Path::new("/bin/sh")]);
        assert_eq!(find("sh", &environment).unwrap(), Path::new("/bin/sh"));
    }

    #[test]
    fn a_missing_program_is_told_as_container_tools_expect() {
        assert_eq!(
            find("nope", &environment("/bin")).unwrap_err().to_string(),
            "exec: \"nope\": executable file not found in $PATH"
        );
        assert_eq!(
            find("/nope", &[]).unwrap_err().to_string(),
            "exec: \"/nope\": stat /nope: no such file or directory"
        );
    }

    #[test]
    fn without_a_path_only_a_full_name_is_found() {
        assert!(find("sh", &[]).is_err());
        assert!(find("/bin/sh", &[]).is_ok());
    }

    #[test]
    fn a_directory_is_no_program() {
        assert!(
            find("/etc", &[])
                .unwrap_err()
                .to_string()
                .contains("permission denied")
        );
        assert!(find("bin", &environment("/usr")).is_err());
    }

    #[test]
    fn a_file_that_is_no_program_is_refused() {
        let error = find("/etc/passwd", &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "exec: \"/etc/passwd\": permission denied"
        );
    }

    #[test]
    fn an_empty_directory_in_the_path_is_the_current_one() {
        let environment = environment(":/bin");
        assert_eq!(
            candidates("x", &environment).next().unwrap(),
            Path::new("./x")
        );
    }

    proptest! {
        #[test]
        fn any_name_and_path_are_found_or_not(name in "[^\0]*", path in "[^\0]*") {
            let _ = find(&name, &environment(&path));
        }
    }
}
