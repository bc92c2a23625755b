//! Credentials for registries, where podman, skopeo and docker keep them.

use std::{
    collections::HashMap,
    env, fs, io,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;

/// What is docker's registry called in files of credentials.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// Why there are no credentials where there should be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read the credentials in {}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A file of another form.
    #[error("the credentials in {} are not valid", path.display())]
    Parse {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// An entry of another form.
    #[error("the credentials for {registry} in {} are not user:password in base64", path.display())]
    Entry {
        /// Where.
        path: PathBuf,
        /// For what.
        registry: String,
    },
    /// A helper that does not help.
    #[error("docker-credential-{helper} gives no credentials for {registry}: {reason}")]
    Helper {
        /// Its name.
        helper: String,
        /// For what.
        registry: String,
        /// What it says.
        reason: String,
    },
    /// Flags of another form.
    #[error("--creds is USER:PASSWORD")]
    Flag,
}

/// A user and a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user.
    pub user: String,
    /// The password, or a token.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// A file of credentials.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Stored {
    auths: HashMap<String, Entry>,
    cred_helpers: HashMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
}

impl Credentials {
    /// Those of a flag, `user:password`.
    ///
    /// # Errors
    /// When it has no colon.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let (user, password) = text.split_once(':').ok_or(Error::Flag)?;
        Ok(Self {
            user: user.to_owned(),
            password: password.to_owned(),
        })
    }

    /// Those for `repository` at `registry` in the file that was named, or in the files of podman
    /// and docker; none where no file has any.
    ///
    /// # Errors
    /// When a file is of another form, or a helper fails.
    pub fn find(
        registry: &str,
        repository: &str,
        named: Option<&Path>,
    ) -> Result<Option<Self>, Error> {
        let files = named.map_or_else(usual_files, |path| vec![path.to_owned()]);
        for path in files {
            let text = match fs::read(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => {
                    continue;
                }
                Err(source) => return Err(Error::Read { path, source }),
            };
            let stored = serde_json::from_slice(&text).map_err(|source| Error::Parse {
                path: path.clone(),
                source,
            })?;
            if let Some(found) = in_file(&stored, registry, repository, &path)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// The files in which podman and docker look, in podman's order.
fn usual_files() -> Vec<PathBuf> {
    let directory = |name| env::var_os(name).map(PathBuf::from);
    let home = |below: &str| directory("HOME").map(|home| home.join(below));
    [
        directory("REGISTRY_AUTH_FILE"),
        directory("XDG_RUNTIME_DIR").map(|path| path.join("containers/auth.json")),
        home(".config/containers/auth.json"),
        directory("DOCKER_CONFIG").map(|path| path.join("config.json")),
        home(".docker/config.json"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn in_file(
    stored: &Stored,
    registry: &str,
    repository: &str,
    path: &Path,
) -> Result<Option<Credentials>, Error> {
    let keys = keys(registry, repository);
    for key in &keys {
        if let Some(text) = stored.auths.get(key).and_then(|entry| entry.auth.as_ref()) {
            let found = decode(text).ok_or_else(|| Error::Entry {
                path: path.to_owned(),
                registry: key.clone(),
            })?;
            return Ok(Some(found));
        }
    }
    for key in &keys {
        if let Some(helper) = stored.cred_helpers.get(key) {
            return ask(helper, key).map(Some);
        }
    }
    // A store for all has an entry, without content, for each that it knows.
    let known = keys.iter().find(|key| stored.auths.contains_key(*key));
    match (&stored.creds_store, known) {
        (Some(store), Some(key)) => ask(store, key).map(Some),
        _ => Ok(None),
    }
}

/// Under what an entry may lie, the most special first.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = format!("{registry}/{repository}");
    while let Some((shorter, _)) = path.rsplit_once('/') {
        keys.push(path.clone());
        path = shorter.to_owned();
    }
    keys.push(registry.to_owned());
    keys.push(format!("https://{registry}"));
    if registry == "docker.io" {
        keys.extend([DOCKER_HUB.to_owned(), "index.docker.io".to_owned()]);
    }
    keys
}

fn decode(text: &str) -> Option<Credentials> {
    let text = String::from_utf8(STANDARD.decode(text.trim()).ok()?).ok()?;
    Credentials::parse(text.trim_end_matches('\0')).ok()
}

/// Asks a helper program of docker's kind.
fn ask(helper: &str, registry: &str) -> Result<Credentials, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let failed = |reason: String| Error::Helper {
        helper: helper.chars().take(60).collect(),
        registry: registry.to_owned(),
        reason,
    };
    if helper.contains('/') {
        return Err(failed("its name has a slash".to_owned()));
    }
    let asked = || {
        let mut child = Command::new(format!("docker-credential-{helper}"))
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(registry.as_bytes())?;
        }
        child.wait_with_output()
    };
    let output = asked().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(output.status.to_string()));
    }
    let answer: Answer =
        serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))?;
    if answer.username == "<token>" {
        return Err(failed(
            "it has an identity token, which is not supported".to_owned(),
        ));
    }
    Ok(Credentials {
        user: answer.username,
        password: answer.secret,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, registry: &str, repository: &str) -> Result<Option<Credentials>, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Credentials::find(registry, repository, Some(file.path()))
    }

    fn user(text: &str, registry: &str, repository: &str) -> Option<String> {
        find(text, registry, repository)
            .unwrap()
            .map(|found| found.user)
    }

    #[test]
    fn the_most_special_entry_counts() {
        // a:1, b:2, c:3 in base64
        let text = r#"{"auths": {
            "example.org": {"auth": "YTox"}, "example.org/team": {"auth": "Yjoy"},
            "https://index.docker.io/v1/": {"auth": "Yzoz"}
        }}"#;
        assert_eq!(user(text, "example.org", "app").as_deref(), Some("a"));
        assert_eq!(user(text, "example.org", "team/app").as_deref(), Some("b"));
        assert_eq!(user(text, "docker.io", "library/x").as_deref(), Some("c"));
        assert_eq!(user(text, "example.com", "team/app"), None);
    }

    #[test]
    fn an_entry_of_another_form_is_an_error_that_does_not_show_it() {
        let error = find(r#"{"auths": {"h": {"auth": "c2VjcmV0"}}}"#, "h", "x").unwrap_err();
        assert!(matches!(error, Error::Entry { .. }));
        assert!(!error.to_string().contains("c2VjcmV0"));
        assert!(matches!(find("{", "h", "x"), Err(Error::Parse { .. })));
    }

    #[test]
    fn a_helper_that_is_not_there_is_named() {
        let text = r#"{"credHelpers": {"h": "no-such-helper"}}"#;
        let error = find(text, "h", "x").unwrap_err().to_string();
        assert!(
            error.contains("docker-credential-no-such-helper"),
            "{error}"
        );
    }

    #[test]
    fn a_password_may_have_colons_and_is_not_shown() {
        let credentials = Credentials::parse("me:a:b").unwrap();
        assert_eq!(credentials.password, "a:b");
        assert!(!format!("{credentials:?}").contains("a:b"));
        assert!(Credentials::parse("me").is_err());
    }
}
