//! A few connections to a pod's loopback, whole or known to be broken; `long_loopback.rs` has more.

use anyhow::Result;
use system_tests::loopback::{Load, below_bulkhead};

#[test]
fn bulkhead_leads_the_pods_loopback_to_the_guest() -> Result<()> {
    let load = Load {
        clients: 3,
        times: 2,
    };
    let local_server = env!("CARGO_BIN_EXE_local-server");
    below_bulkhead(local_server, |pod, _| pod.is_reached(load))
}
