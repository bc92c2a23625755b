//! Certificates of authorities that a registry's own may be signed by, besides the host's: in
//! podman's and docker's directories, one for each registry.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where other programs keep them.
const DIRECTORIES: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// Longer ones are none.
const LENGTH_MAX: u64 = 1 << 20;

/// What cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the certificates in {}", path.display())]
pub struct Error {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The certificates for `registry`, a host with its port, in PEM: those in `directory`, or where
/// other programs keep them.
///
/// # Errors
/// When a directory that is there cannot be read, or `directory` is not there.
pub fn find(registry: &str, directory: Option<&Path>) -> Result<Vec<Vec<u8>>, Error> {
    if let Some(directory) = directory {
        return read(directory);
    }
    let mut all = Vec::new();
    for parent in DIRECTORIES {
        match read(&Path::new(parent).join(registry)) {
            Ok(certificates) => all.extend(certificates),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// The files of a directory that hold authorities' certificates. Clients' are called `.cert` and
/// `.key`, and are not for us.
fn read(directory: &Path) -> Result<Vec<Vec<u8>>, Error> {
    let failed = |path: &Path, source| Error {
        path: path.to_owned(),
        source,
    };
    let mut certificates = Vec::new();
    let entries = fs::read_dir(directory).map_err(|error| failed(directory, error))?;
    for entry in entries {
        let path = entry.map_err(|error| failed(directory, error))?.path();
        if path.extension().is_none_or(|extension| extension != "crt") {
            continue;
        }
        let length = fs::metadata(&path)
            .map_err(|error| failed(&path, error))?
            .len();
        if length > LENGTH_MAX {
            let error = io::Error::other("a file is too long for a certificate");
            return Err(failed(&path, error));
        }
        certificates.push(fs::read(&path).map_err(|error| failed(&path, error))?);
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_read_and_clients_keys_are_not() {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in [("ca.crt", "ca"), ("client.cert", "x"), ("client.key", "y")] {
            fs::write(directory.path().join(name), content).unwrap();
        }
        let found = find("registry:5000", Some(directory.path())).unwrap();
        assert_eq!(found, [b"ca"]);
        assert!(find("no.such.registry:5000", None).unwrap().is_empty());
        let missing = directory.path().join("none");
        let error = find("x", Some(&missing)).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }
}
