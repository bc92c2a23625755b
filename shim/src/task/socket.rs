//! The socket of a shim: one for a pod, found again by the names of its containerd, namespace and
//! sandbox.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::{
        fs::DirBuilderExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use super::arguments::Invocation;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}", path.display())]
pub struct Error {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Whose socket a path is.
#[derive(Debug)]
pub enum Claim {
    /// Ours, from now on.
    Ours(Socket),
    /// Of a shim that serves it.
    Served,
}

/// A listening socket. [`Socket::remove`] ends it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

/// Where the shim of `group`, a sandbox or a container of its own, listens in `directory`.
pub fn path(directory: &Path, invocation: &Invocation, group: &str) -> PathBuf {
    let containerd = invocation.address.trim_end_matches('/');
    let names = format!("{containerd}/{}/{group}", invocation.namespace);
    let digest = Sha256::digest(names.as_bytes());
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    directory.join(name)
}

/// The address as containerd writes it.
pub fn address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// Makes the socket, unless a shim serves it already. What a killed shim left is replaced.
///
/// # Errors
/// When it cannot be made.
pub fn claim(path: &Path) -> Result<Claim, Error> {
    let directory = path.parent().unwrap_or(path);
    DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(directory)
        .map_err(failed("make the directory", directory))?;
    let _turn = turn(directory)?;
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if serves(path) {
                return Ok(Claim::Served);
            }
            fs::remove_file(path).map_err(failed("remove the abandoned socket", path))?;
            UnixListener::bind(path)
        }
        listener => listener,
    };
    Ok(Claim::Ours(Socket {
        listener: listener.map_err(failed("listen on", path))?,
        path: path.to_owned(),
    }))
}

/// Removes the socket of a shim that was killed.
///
/// # Errors
/// When it cannot be removed.
pub fn abandon(path: &Path) -> Result<(), Error> {
    if !path.exists() {
        return Ok(());
    }
    let _turn = turn(path.parent().unwrap_or(path))?;
    if serves(path) {
        return Ok(());
    }
    match fs::remove_file(path) {
        // Whoever was first has removed it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(failed("remove the abandoned socket", path)),
    }
}

/// The right to make and remove sockets in a directory. One that is bound and does not listen yet
/// looks like one that a killed shim left.
fn turn(directory: &Path) -> Result<Flock<File>, Error> {
    let file = File::open(directory).map_err(failed("open", directory))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| failed("lock", directory)(errno.into()))
}

/// Whether a shim serves this socket.
pub fn serves(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

impl Socket {
    /// The listener, for its own process's runtime.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn listener(&self) -> io::Result<UnixListener> {
        let listener = self.listener.try_clone()?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Takes it away.
    pub fn remove(self) {
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "the shim's socket stays behind");
        }
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error {
        doing,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        id::{ContainerId, Namespace},
        testing::soon,
    };

    fn invocation(namespace: &str) -> Invocation {
        Invocation {
            namespace: Namespace::parse(namespace).expect("a name"),
            id: ContainerId::parse("t1").expect("a name"),
            address: "/run/containerd/containerd.sock".to_owned(),
            bundle: None,
            debug: false,
        }
    }

    #[test]
    fn the_name_is_the_digest_of_containerd_namespace_and_group() {
        let directory = Path::new("/run/containerd/s");
        let path = path(directory, &invocation("default"), "t1");
        // printf /run/containerd/containerd.sock/default/t1 | sha256sum
        assert_eq!(
            path,
            directory.join("df6a0c5cd2e9a1a16d9a3f2447365d9fc6021bc1d3d9a4caa2f5b2c4f773758f")
        );
    }

    #[test]
    fn namespaces_and_groups_have_sockets_of_their_own() {
        let directory = Path::new("/run/s");
        let one = path(directory, &invocation("default"), "t1");
        assert_ne!(one, path(directory, &invocation("k8s.io"), "t1"));
        assert_ne!(one, path(directory, &invocation("default"), "t2"));
    }

    #[test]
    fn a_served_socket_is_left_alone_and_an_abandoned_one_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("s/1");
        let Ok(Claim::Ours(first)) = claim(&path) else {
            panic!("not ours");
        };
        assert!(matches!(claim(&path), Ok(Claim::Served)));
        drop(first);
        assert!(path.exists());
        let second = soon(|| match claim(&path) {
            Ok(Claim::Ours(second)) => Some(second),
            _ => None,
        });
        second.remove();
        assert!(!path.exists());
    }

    #[test]
    fn only_an_abandoned_socket_is_removed_for_its_owner() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("1");
        abandon(&path).expect("there is none");
        let served = claim(&path).expect("made");
        abandon(&path).expect("looked at");
        assert!(path.exists());
        drop(served);
        soon(|| {
            abandon(&path).expect("removed");
            (!path.exists()).then_some(())
        });
    }
}
