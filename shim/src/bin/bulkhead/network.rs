//! The network of `bulkhead run IMAGE`: what the flags say, and the files about names and
//! addresses that the container finds.

use std::{
    fmt::Write as _,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use shim::cni::{Network, Plan, Port};

use super::cli::ImageRunArgs;

/// The host's name servers; where the file names a server on the host alone, systemd keeps the
/// real ones in the other.
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// What the flags say of the network.
#[derive(Debug)]
pub(crate) enum Asked {
    /// A loopback interface alone.
    None,
    /// A namespace that others made.
    Namespace(PathBuf),
    /// Networks.
    Attach(Plan),
}

impl Asked {
    /// Reads the flags. Ports are kept from others from here on.
    pub(crate) fn of(flags: &ImageRunArgs) -> anyhow::Result<Self> {
        let mut ports = Vec::new();
        for text in &flags.publish {
            ports.extend(Port::parse(text)?);
        }
        let asked = match flags.network.as_str() {
            "none" => Self::None,
            "host" => bail!(
                "--network host is not possible: the container has a kernel of its own, whose network is \
                 another; publish ports of the host by --publish, or leave --network out"
            ),
            text if text.starts_with("container:") || text.starts_with("pod:") => bail!(
                "--network {text:?} is not possible with an image; containers that share a network are \
                 members of a pod, which clients such as podman and containerd make"
            ),
            text => match text.strip_prefix("ns:") {
                Some(path) => Self::Namespace(std::path::absolute(path)?),
                None => Self::Attach(plan(text)?),
            },
        };
        match asked {
            Self::Attach(mut plan) => {
                if !ports.is_empty() {
                    plan.networks.first().context("no network")?.publishes()?;
                }
                for port in &ports {
                    plan.reserved.extend(port.reserve()?);
                }
                plan.ports = ports;
                Ok(Self::Attach(plan))
            }
            other => {
                ensure!(
                    ports.is_empty(),
                    "--publish is not possible with --network {:?}: no port of the host can lead there",
                    flags.network
                );
                Ok(other)
            }
        }
    }

    /// The namespace that is joined.
    pub(crate) fn namespace(&self) -> Option<String> {
        match self {
            Self::Namespace(path) => Some(path.display().to_string()),
            Self::None | Self::Attach(_) => None,
        }
    }

    /// The plan, if something is to be attached; `hosts` is the container's file of that name.
    pub(crate) fn plan(self, hosts: &Path, hostname: &str) -> Option<Plan> {
        let Self::Attach(mut plan) = self else {
            return None;
        };
        plan.hosts = Some((hosts.to_owned(), hostname.to_owned()));
        Some(plan)
    }
}

fn plan(names: &str) -> anyhow::Result<Plan> {
    let networks = names.split(',').map(Network::find);
    Ok(Plan {
        networks: networks.collect::<Result<_, _>>()?,
        ..Plan::default()
    })
}

/// The container's `/etc/hosts`, before it has addresses.
pub(crate) fn hosts(hostname: &str) -> String {
    format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n")
}

/// The container's `/etc/resolv.conf`: the host's, but for servers that only the host reaches, or
/// with those that were asked for.
pub(crate) fn resolv_conf(asked: &[IpAddr]) -> String {
    let hosts = RESOLV_CONF.map(|path| fs::read_to_string(path).unwrap_or_default());
    let [first, second] = hosts.map(|text| reachable(&text, asked));
    match first.contains("nameserver ") {
        true => first,
        false => second,
    }
}

/// What of a resolv.conf is of use in a container.
fn reachable(text: &str, asked: &[IpAddr]) -> String {
    let mut kept = String::new();
    for line in text.lines().map(str::trim) {
        let mut words = line.split_whitespace();
        let use_of = match words.next() {
            Some("nameserver") => {
                // Addresses with a zone belong to the host's interfaces.
                let address: Option<IpAddr> = words.next().and_then(|word| word.parse().ok());
                asked.is_empty() && address.is_some_and(|address| !address.is_loopback())
            }
            Some("search" | "domain" | "options" | "sortlist") => true,
            _ => false,
        };
        if use_of {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    for address in asked {
        let _ = writeln!(kept, "nameserver {address}");
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_the_hosts_loopback_are_left_out() {
        let host = "# by something\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver ::1\n\
                    nameserver fe80::1%eth0\nnameserver 2001:db8::1\noptions edns0\nsearch example.org\n";
        assert_eq!(
            reachable(host, &[]),
            "nameserver 192.0.2.1\nnameserver 2001:db8::1\noptions edns0\nsearch example.org\n"
        );
        assert_eq!(
            reachable(host, &["198.51.100.7".parse().unwrap()]),
            "options edns0\nsearch example.org\nnameserver 198.51.100.7\n"
        );
        assert_eq!(reachable("nameserver\nnonsense\n", &[]), "");
    }
}
