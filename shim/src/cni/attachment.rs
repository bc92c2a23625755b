//! A namespace attached to a network.
//!
//! Everything that detaching needs is in the value, which is written down before anything is
//! made: who comes later and finds it can undo what a killed process left.

use std::{
    io,
    net::IpAddr,
    panic,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{runtime, time::timeout};

use super::{
    network::{self, Network},
    plugin::{self, Call, Plugins},
    port::Port,
};

/// Why a container is not attached, or not detached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There was no more time for it.
    #[error("the CNI plug-ins did not undo the container's networks within {seconds} s")]
    Hurry {
        /// The time.
        seconds: u64,
    },
    /// They cannot be waited for.
    #[error("cannot wait for CNI plug-ins")]
    Wait(#[source] io::Error),
    /// A plug-in.
    #[error(
        "cannot {doing} the container's {interface} {} the network {network:?}",
        preposition(doing)
    )]
    Plugin {
        /// What was being done.
        doing: &'static str,
        /// Its interface.
        interface: String,
        /// The network's name.
        network: String,
        /// Why.
        #[source]
        source: Box<plugin::Error>,
    },
}

fn preposition(doing: &str) -> &'static str {
    match doing {
        "attach" => "to",
        _ => "from",
    }
}

/// An interface of a namespace, and the network that it belongs to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attached {
    network: Network,
    container: String,
    namespace: PathBuf,
    interface: String,
    ports: Vec<Port>,
    plugins: Plugins,
    /// What the plug-ins answered.
    result: Option<Value>,
}

impl Attached {
    /// The attachment of the namespace at `namespace`, which is known to plug-ins as `container`,
    /// to `network`, before it is made.
    pub fn new(network: Network, (container, namespace): (&str, &Path), interface: String) -> Self {
        Self {
            network,
            container: container.to_owned(),
            namespace: namespace.to_owned(),
            interface,
            ports: Vec::new(),
            plugins: Plugins::default(),
            result: None,
        }
    }

    /// It, with ports that lead to it, and the place of its plug-ins.
    #[must_use]
    pub fn with(mut self, ports: Vec<Port>, plugins: Plugins) -> Self {
        self.ports = ports;
        self.plugins = plugins;
        self
    }

    /// The interface's name.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Looks whether all plug-ins are there, so that nothing is begun that cannot be ended.
    ///
    /// # Errors
    /// When one is missing.
    pub fn check(&self) -> Result<(), Error> {
        for plugin in &self.network.plugins {
            let name = plugin.get("type").and_then(Value::as_str).unwrap_or("");
            let found = self.plugins.find(name);
            found.map_err(|source| self.failed("attach", source))?;
        }
        Ok(())
    }

    /// Makes it.
    ///
    /// # Errors
    /// When a plug-in fails. What the ones before it made stays until it is undone, and so does
    /// what there is when nobody waits for this any more.
    pub async fn add(&mut self) -> Result<(), Error> {
        for plugin in &self.network.plugins {
            let config = self.config(plugin, self.result.as_ref());
            let result = self.call("ADD", plugin, &config).await;
            self.result = Some(result.map_err(|source| self.failed("attach", source))?);
        }
        Ok(())
    }

    /// Undoes it, as far as it was made. Twice is as good as once.
    ///
    /// # Errors
    /// When a plug-in fails; the others are called all the same.
    pub async fn remove(&self) -> Result<(), Error> {
        let mut failure = None;
        for plugin in self.network.plugins.iter().rev() {
            let config = self.config(plugin, self.result.as_ref());
            if let Err(source) = self.call("DEL", plugin, &config).await {
                failure.get_or_insert(source);
            }
        }
        match failure {
            Some(source) => Err(self.failed("detach", source)),
            None => Ok(()),
        }
    }

    /// The addresses that the container got, and those of its routers.
    pub fn addresses(&self) -> Vec<(IpAddr, Option<IpAddr>)> {
        let all = self
            .result
            .as_ref()
            .and_then(|result| result["ips"].as_array());
        let one = |ip: &Value| {
            let address = ip["address"].as_str()?.split('/').next()?.parse().ok()?;
            let gateway = ip["gateway"].as_str().and_then(|text| text.parse().ok());
            Some((address, gateway))
        };
        all.into_iter().flatten().filter_map(one).collect()
    }

    fn config(&self, plugin: &serde_json::Map<String, Value>, before: Option<&Value>) -> Value {
        let mut config = plugin.clone();
        config.remove("capabilities");
        config.insert("name".to_owned(), json!(self.network.name));
        config.insert("cniVersion".to_owned(), json!(self.network.version));
        if network::forwards_ports(plugin) && !self.ports.is_empty() {
            config.insert(
                "runtimeConfig".to_owned(),
                json!({"portMappings": self.ports}),
            );
        }
        if let Some(before) = before {
            config.insert("prevResult".to_owned(), before.clone());
        }
        config.into()
    }

    async fn call(
        &self,
        command: &'static str,
        plugin: &serde_json::Map<String, Value>,
        config: &Value,
    ) -> Result<Value, plugin::Error> {
        let call = Call {
            command,
            container: &self.container,
            namespace: &self.namespace,
            interface: &self.interface,
        };
        let name = plugin.get("type").and_then(Value::as_str).unwrap_or("");
        self.plugins.call(name, &call, config).await
    }

    fn failed(&self, doing: &'static str, source: plugin::Error) -> Error {
        Error::Plugin {
            doing,
            interface: self.interface.clone(),
            network: self.network.name.clone(),
            source: Box::new(source),
        }
    }
}

/// Undoes these, one after the other, while nothing else is done here; if `patience` is given, in
/// that time.
///
/// # Errors
/// As [`Attached::remove`], or when time is over. Those that follow stay.
pub fn remove_now<'a>(
    all: impl Iterator<Item = &'a Attached> + Send,
    patience: Option<Duration>,
) -> Result<(), Error> {
    let removing = async {
        for attached in all {
            attached.remove().await?;
        }
        Ok(())
    };
    let removed = async {
        match patience {
            None => removing.await,
            Some(patience) => timeout(patience, removing)
                .await
                .unwrap_or(Err(Error::Hurry {
                    seconds: patience.as_secs(),
                })),
        }
    };
    // The calling thread may serve a runtime, in which nothing can be waited for like this.
    let run = || {
        let mut runtime = runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().map_err(Error::Wait)?;
        runtime.block_on(removed)
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, run);
        let ended = thread.map_err(Error::Wait)?.join();
        ended.unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::plugin::tests::scripts, *};

    fn network(plugins: Value) -> Network {
        let value = json!({"name": "n", "cniVersion": "1.0.0", "plugins": plugins});
        serde_json::from_value(value).unwrap()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn plug_ins_are_called_in_order_and_back_with_what_was_answered() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let note = format!("echo $CNI_COMMAND $0 $(cat) >> {}", log.display());
        let first = format!(
            r#"{note}; echo '{{"ips": [{{"address": "10.0.0.2/8", "gateway": "10.0.0.1"}}, {{"address": "fd00::2/64"}}]}}'"#
        );
        let second = format!(
            "{note}; [ $CNI_COMMAND = DEL ] || echo '{{\"ips\": [{{\"address\": \"10.0.0.9/8\"}}]}}'"
        );
        let plugins = scripts(directory.path(), &[("one", &first), ("two", &second)]);
        let network = network(json!([
            {"type": "one"}, {"type": "two", "capabilities": {"portMappings": true}}
        ]));
        let ports = Port::parse("80:8080").unwrap();
        let place = ("c", Path::new("/n"));
        let mut attached = Attached::new(network, place, "eth0".to_owned()).with(ports, plugins);
        attached.check().unwrap();
        attached.add().await.unwrap();
        assert_eq!(attached.addresses(), [("10.0.0.9".parse().unwrap(), None)]);
        // as the next process finds it
        let text = serde_json::to_string(&attached).unwrap();
        let attached: Attached = serde_json::from_str(&text).unwrap();
        attached.remove().await.unwrap();

        let log = fs::read_to_string(log).unwrap();
        let lines: Vec<_> = log.lines().collect();
        let wanted = [
            ("ADD", "one"),
            ("ADD", "two"),
            ("DEL", "two"),
            ("DEL", "one"),
        ];
        assert_eq!(lines.len(), 4);
        for (line, (command, name)) in lines.iter().zip(wanted) {
            assert!(
                line.starts_with(command) && line.contains(&format!("/{name} ")),
                "{line}"
            );
            assert_eq!(line.contains("\"hostPort\":80"), name == "two", "{line}");
            assert!(!line.contains("capabilities"), "{line}");
        }
        assert!(!lines[0].contains("prevResult"));
        assert!(lines[1].contains("10.0.0.2/8"));
        assert!(lines[3].contains("10.0.0.9/8"));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn all_plug_ins_are_called_to_detach_whoever_fails() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let first = format!("echo first >> {}", log.display());
        let plugins = scripts(directory.path(), &[("one", &first), ("two", "exit 1")]);
        let network = network(json!([{"type": "one"}, {"type": "two"}]));
        let place = ("c", Path::new("/n"));
        let attached = Attached::new(network, place, "eth0".to_owned()).with(Vec::new(), plugins);
        assert!(attached.check().is_ok());
        fs::rename(directory.path().join("one"), directory.path().join("three")).unwrap();
        assert!(attached.check().is_err());
        fs::rename(directory.path().join("three"), directory.path().join("one")).unwrap();
        let error = attached.remove().await.unwrap_err().to_string();
        assert!(
            error.contains("detach") && error.contains("\"n\""),
            "{error}"
        );
        assert_eq!(fs::read_to_string(log).unwrap(), "first\n");
    }
    #[tokio::test(flavor = "current_thread")]
    async fn what_must_be_undone_at_once_is_given_up_after_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let plugins = scripts(directory.path(), &[("one", "true"), ("two", "sleep 1000")]);
        let attached = |plugin: &str| {
            let network = network(json!([{"type": plugin}]));
            let place = ("c", Path::new("/n"));
            Attached::new(network, place, "eth0".to_owned()).with(Vec::new(), plugins.clone())
        };
        let patience = Some(Duration::from_secs(1));
        let (one, two) = (attached("one"), attached("two"));
        remove_now([&one].into_iter(), Some(Duration::from_secs(50))).unwrap();
        let error = remove_now([&one, &two].into_iter(), patience).unwrap_err();
        assert!(matches!(error, Error::Hurry { seconds: 1 }), "{error}");
    }
}
