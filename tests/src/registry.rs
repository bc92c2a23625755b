//! Debian's registry of images, on this host.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rootfs_builder::digest::Digest;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{image::Layout, scratch};

/// Debian's registry on this host.
pub struct Registry {
    process: Child,
    directory: TempDir,
    /// Host and port, with which names begin.
    pub address: String,
}

/// User and password, and the latter as the registry has it, hashed as cheaply as possible.
pub const CREDENTIALS: &str = "me:secret";
const HASHED: &str = "me:$2b$04$IR4as4xPAKgUCW8BZvcnkeJo5GRMklUVDB67WbTrnRwmxezLuutbq\n";

/// What a name can lead to.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// The same, as Docker has it.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

const MANIFESTS: [&str; 4] = [
    OCI_INDEX,
    DOCKER_LIST,
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// How a registry is spoken to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Speech {
    /// By HTTP, by everyone.
    Open,
    /// By HTTP, by one user.
    Plain,
    /// By TLS, with a certificate of an authority that nobody knows, and by one user.
    Encrypted,
}

impl Registry {
    /// Starts one.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn start(speech: Speech) -> Result<Self> {
        let directory = scratch::directory()?;
        // A port that is free now.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let path = |name: &str| directory.path().join(name);
        fs::write(path("users"), HASHED)?;
        let mut config = json!({
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": path("store")}},
            "http": {"addr": address.to_string()},
        });
        if speech != Speech::Open {
            config["auth"] = json!({"htpasswd": {"realm": "test", "path": path("users")}});
        }
        if speech == Speech::Encrypted {
            certify(directory.path())?;
            config["http"]["tls"] = json!({"certificate": path("own.pem"), "key": path("own.key")});
        }
        // JSON is YAML.
        fs::write(path("config.yml"), config.to_string())?;
        let log = fs::File::create(path("log"))?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(path("config.yml"))
            .stdout(log.try_clone()?)
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot run docker-registry; is it installed?")?;
        let registry = Self {
            process,
            directory,
            address: address.to_string(),
        };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(address).is_err() {
            ensure!(
                Instant::now() < deadline,
                "the registry does not listen: {}",
                registry.log()?
            );
            thread::sleep(Duration::from_millis(50));
        }
        Ok(registry)
    }

    /// What it logged.
    ///
    /// # Errors
    /// When that cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.directory.path().join("log"))?)
    }

    /// Pushes an image and returns its name.
    ///
    /// # Errors
    /// When skopeo fails.
    pub fn push(&self, layout: &Layout, name: &str) -> Result<String> {
        self.push_as("oci", layout, name)
    }

    /// As [`Registry::push`], in the form `oci` or Docker's, `v2s2`.
    ///
    /// # Errors
    /// When skopeo fails.
    pub fn push_as(&self, form: &str, layout: &Layout, name: &str) -> Result<String> {
        let name = format!("{}/{name}", self.address);
        let pushed = Command::new("skopeo")
            .args([
                "copy",
                "--quiet",
                "--insecure-policy",
                "--dest-tls-verify=false",
            ])
            .args(["--dest-creds", CREDENTIALS, "--format", form])
            .arg(layout.location())
            .arg(format!("docker://{name}"))
            .output()
            .context("cannot run skopeo; is it installed?")?;
        let said = String::from_utf8_lossy(&pushed.stderr);
        ensure!(pushed.status.success(), "skopeo fails: {said}");
        Ok(name)
    }

    /// The manifest that a tag or digest of a repository leads to, as an index would list it.
    ///
    /// # Errors
    /// When the registry does not have it.
    pub fn manifest(&self, repository: &str, tag: &str) -> Result<Value> {
        let accept = MANIFESTS.map(|kind| format!("Accept: {kind}"));
        let accept = accept.iter().flat_map(|header| ["-H", header]);
        let bytes = self.curl(repository, tag, &accept.collect::<Vec<_>>())?;
        let manifest: Value = serde_json::from_slice(&bytes)?;
        let (digest, size) = (Digest::of(&bytes), bytes.len());
        Ok(json!({"mediaType": manifest["mediaType"], "digest": digest, "size": size}))
    }

    /// Puts an index into a repository; returns what another index would list it as.
    ///
    /// # Errors
    /// When the registry does not take it.
    pub fn put(&self, repository: &str, tag: &str, index: &Value) -> Result<Value> {
        let kind = index["mediaType"].as_str().context("no type")?;
        let kind = format!("Content-Type: {kind}");
        let index = index.to_string();
        let args = ["-X", "PUT", "-H", &kind, "--data-binary", &index];
        self.curl(repository, tag, &args)?;
        self.manifest(repository, tag)
    }

    fn curl(&self, repository: &str, tag: &str, args: &[&str]) -> Result<Vec<u8>> {
        let address = &self.address;
        let asked = Command::new("curl")
            .args(["-sS", "--fail-with-body", "-u", CREDENTIALS])
            .args(args)
            .arg(format!("http://{address}/v2/{repository}/manifests/{tag}"))
            .output()
            .context("cannot run curl; is it installed?")?;
        let said = String::from_utf8_lossy(&asked.stdout);
        ensure!(asked.status.success(), "{repository}:{tag}: {said}");
        Ok(asked.stdout)
    }

    /// Where its files are, among them those of its certificate.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The file in which the registry has a blob.
    pub fn file(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        let blobs = "store/docker/registry/v2/blobs/sha256";
        let place = self.directory.path().join(blobs).join(&hex[..2]);
        place.join(hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Makes an authority and a certificate of it for this host in a directory.
///
/// # Errors
/// When openssl fails.
pub fn certify(directory: &Path) -> Result<()> {
    let script = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
         -keyout ca.key -out ca.crt -days 2 -subj /CN=authority; \
         openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout own.key \
         -out own.csr -subj /CN=registry; \
         printf 'subjectAltName=IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' > own.cnf; \
         openssl x509 -req -in own.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 \
         -extfile own.cnf -out own.pem";
    let made = Command::new("sh")
        .args(["-ec", script])
        .current_dir(directory)
        .output()?;
    let said = String::from_utf8_lossy(&made.stderr);
    ensure!(made.status.success(), "openssl fails: {said}");
    Ok(())
}
