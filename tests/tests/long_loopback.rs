//! A pod's loopback at its limits, by either face: many connections, more than there is room for, and
//! ends that take nothing.

use anyhow::{Context, Result};
use system_tests::loopback::{Exec, Load, Pod, below_bulkhead, below_containerd};

const LOCAL_SERVER: &str = env!("CARGO_BIN_EXE_local-server");

const LOAD: Load = Load {
    clients: 12,
    times: 6,
};

/// Servers that do not read, and clients, at each address.
const ENDS: u32 = 24;

fn is_borne(pod: &Pod, exec: &Exec<'_>) -> Result<()> {
    pod.is_reached(LOAD)?;
    let told = pod.bears_ends_that_take_nothing(ENDS);
    let memory = exec(&[
        "/bin/cat",
        "/proc/net/sockstat",
        "/proc/sys/net/ipv4/tcp_mem",
    ])?;
    println!("{memory}");
    told.context(memory)?;
    pod.has_more_clients_than_room(|| exec(&["/bin/true"]).map(drop))
}

#[test]
fn bulkhead_leads_the_pods_loopback_to_the_guest_at_its_limits() -> Result<()> {
    below_bulkhead(LOCAL_SERVER, is_borne)
}

#[test]
fn containerds_shim_leads_the_pods_loopback_to_the_guest_at_its_limits() -> Result<()> {
    below_containerd(LOCAL_SERVER, is_borne)
}
