//! A network's configuration, as the CNI specification has it.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Where a host keeps its networks.
const DIRECTORY: &str = "/etc/cni/net.d";

/// The name of Bulkhead's own network.
pub const OWN: &str = "bulkhead";

/// The capability of plug-ins that forward ports.
const PORTS: &str = "portMappings";

/// Why there is no such network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Of another name.
    #[error(
        "there is no network {name:?} in {}{}; there is {OWN}, and none for a loopback interface alone",
        directory.display(),
        known(others)
    )]
    Unknown {
        /// The name.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
        /// What there is.
        others: Vec<String>,
    },
    /// The directory.
    #[error("cannot read the networks in {}", directory.display())]
    Directory {
        /// Which.
        directory: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No configuration.
    #[error("{} is no configuration of a CNI network: {problem}", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// No plug-in of it can forward ports.
    #[error(
        "the network {0:?} cannot publish ports: no plug-in of it has the capability portMappings; add portmap to it, or leave --publish out"
    )]
    NoPorts(String),
}

fn known(others: &[String]) -> String {
    match others {
        [] => String::new(),
        names => format!(", which has {}", names.join(", ")),
    }
}

/// A network: a list of plug-ins that are called one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// The version of the protocol.
    #[serde(rename = "cniVersion")]
    pub version: String,
    /// The plug-ins.
    pub plugins: Vec<Map<String, Value>>,
}

impl Network {
    /// Bulkhead's own: a bridge whose containers reach the world by the host's address.
    ///
    /// Leases are kept in memory, as the containers are: none outlives the host's restart.
    pub fn own() -> Self {
        let plugins = json!([
            {
                "type": "bridge",
                "bridge": "bulkhead0",
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": "/run/cni/networks",
                    "ranges": [[{"subnet": "10.86.0.0/16"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {PORTS: true}},
            {"type": "firewall"},
        ]);
        Self {
            name: OWN.to_owned(),
            version: "0.4.0".to_owned(),
            plugins: serde_json::from_value(plugins).unwrap_or_default(),
        }
    }

    /// The network of this name: one of the host's, or our own, which `bridge` is a name for, too.
    /// The host's are those in `/etc/cni/net.d`, or where the variable `NETCONFPATH` says.
    ///
    /// # Errors
    /// When there is none, or it is of no use.
    pub fn find(name: &str) -> Result<Self, Error> {
        let directory = env::var_os("NETCONFPATH").unwrap_or_else(|| DIRECTORY.into());
        Self::find_in(name, Path::new(&directory))
    }

    fn find_in(name: &str, directory: &Path) -> Result<Self, Error> {
        let mut others = Vec::new();
        for path in files(directory)? {
            let named = fs::read(&path)
                .ok()
                .and_then(|text| Some((own_name(&text)?, text)));
            match named {
                Some((found, text)) if found == name => {
                    return Self::parse(&text).map_err(|problem| Error::Form { path, problem });
                }
                Some((found, _)) => others.push(found),
                None => {}
            }
        }
        match name {
            OWN | "bridge" => Ok(Self::own()),
            _ => Err(Error::Unknown {
                name: name.to_owned(),
                directory: directory.to_owned(),
                others,
            }),
        }
    }

    /// Reads a list of plug-ins, or a single one.
    fn parse(text: &[u8]) -> Result<Self, String> {
        let mut value: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if !value.contains_key("plugins") {
            let mut plugin = value.clone();
            plugin.remove("name");
            plugin.remove("cniVersion");
            value.insert("plugins".to_owned(), json!([plugin]));
        }
        value.entry("cniVersion").or_insert_with(|| json!("0.2.0"));
        let network: Self =
            serde_json::from_value(value.into()).map_err(|error| error.to_string())?;
        let fit = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let first = network.name.bytes().next();
        if !first.is_some_and(|byte| byte.is_ascii_alphanumeric()) || !network.name.bytes().all(fit)
        {
            return Err(format!("{:?} is no name of a network", network.name));
        }
        if network.plugins.is_empty() {
            return Err("it has no plug-ins".to_owned());
        }
        for plugin in &network.plugins {
            let kind = plugin.get("type").and_then(Value::as_str).unwrap_or("");
            // It becomes the name of a file.
            if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
                return Err(format!("{kind:?} is no name of a plug-in"));
            }
        }
        Ok(network)
    }

    /// Whether it can forward ports of the host.
    ///
    /// # Errors
    /// When it cannot.
    pub fn publishes(&self) -> Result<(), Error> {
        match self.plugins.iter().any(forwards_ports) {
            true => Ok(()),
            false => Err(Error::NoPorts(self.name.clone())),
        }
    }
}

/// Whether a plug-in wants to know which ports are forwarded.
pub(super) fn forwards_ports(plugin: &Map<String, Value>) -> bool {
    let capabilities = plugin.get("capabilities");
    capabilities.and_then(|all| all.get(PORTS)) == Some(&Value::Bool(true))
}

/// The configurations in a directory, in order.
fn files(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Directory {
        directory: directory.to_owned(),
        source,
    };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().unwrap_or_default();
        if ["conflist", "conf", "json"]
            .iter()
            .any(|own| extension == *own)
        {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn own_name(text: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(text).ok()?;
    Some(value.get("name")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_networks_are_found_by_the_names_in_their_files() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        write(
            "10-a.conflist",
            r#"{"name": "a", "cniVersion": "1.0.0", "plugins": [{"type": "ptp"}]}"#,
        );
        write(
            "20-b.conf",
            r#"{"name": "b", "cniVersion": "0.3.1", "type": "macvlan", "master": "eth0"}"#,
        );
        write("30-bad.conf", "no JSON");
        write("readme", r#"{"name": "c"}"#);
        let find = |name: &str| Network::find_in(name, directory.path());
        assert_eq!(find("a").unwrap().plugins[0]["type"], "ptp");
        let single = find("b").unwrap();
        assert_eq!(single.version, "0.3.1");
        assert_eq!(single.plugins[0]["master"], "eth0");
        assert!(!single.plugins[0].contains_key("name"));
        let error = find("c").unwrap_err().to_string();
        assert!(
            error.contains("\"c\"") && error.contains("has a, b"),
            "{error}"
        );
        // the host may have another one of our name
        assert_eq!(find("bridge").unwrap(), Network::own());
        write("40-own.conf", r#"{"name": "bulkhead", "type": "ptp"}"#);
        assert_eq!(find("bulkhead").unwrap().plugins[0]["type"], "ptp");
        assert!(Network::find_in("x", Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn configurations_of_no_use_are_refused_with_the_reason() {
        for (text, why) in [
            (r#"{"name": "../x", "type": "ptp"}"#, "name of a network"),
            (
                r#"{"name": "x", "type": "../../bin/sh"}"#,
                "name of a plug-in",
            ),
            (r#"{"name": "x", "plugins": []}"#, "no plug-ins"),
            (r#"{"name": "x", "plugins": 7}"#, "invalid type"),
        ] {
            let error = Network::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn our_own_network_publishes_ports_and_not_every_other_does() {
        let own = Network::own();
        assert_eq!(own.plugins.len(), 3);
        assert!(own.publishes().is_ok());
        let other = Network::parse(br#"{"name": "x", "type": "macvlan"}"#).unwrap();
        assert!(other.publishes().is_err());
    }
}
