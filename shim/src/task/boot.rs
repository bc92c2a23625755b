//! From a bundle to a running pod.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::sys::sysinfo::sysinfo;
use ttrpc::Code;

use super::failure::Failure;
use crate::{
    bundle::{self, Bundle, Role},
    id::{ContainerId, Namespace},
    pod::{self, Pod, PodPlan},
    sandbox::{Files, Media, Purpose, Surroundings, Trace},
    text::chain,
};

/// Where the state of all sandboxes is.
pub(super) const STATE_ROOT: &str = "/run/bulkhead";

/// How long a guest may take to boot. Clients have deadlines of their own, and shorter ones.
const DEADLINE: Duration = Duration::from_secs(100);

/// Boots the machine of the pod whose first container's bundle this is.
pub(super) async fn pod(
    namespace: &Namespace,
    id: &ContainerId,
    bundle: &Path,
) -> Result<Arc<Pod>, Failure> {
    let trace = Trace::start();
    let bundle = Bundle::load(bundle).map_err(pod::Error::from)?;
    let host_mib = sysinfo()
        .map_err(|errno| {
            Failure::new(
                Code::INTERNAL,
                format!("cannot read the host's memory: {errno}"),
            )
        })?
        .ram_total()
        >> 20;
    let request = bundle::SizeRequest::default();
    let size = bundle::size(bundle.spec(), bundle.role(), request, host_mib)
        .map_err(|error| Failure::invalid(chain(&error)))?;
    let plan = PodPlan {
        state_root: PathBuf::from(STATE_ROOT),
        namespace: namespace.clone(),
        id: id.clone(),
        files: Files::beside_program(),
        size,
        purpose: Purpose::Containers,
        media: Media::default(),
        surroundings: Surroundings::default(),
        hostname: bundle.spec().hostname().clone().unwrap_or_default(),
        deadline: DEADLINE,
    };
    Ok(Pod::start(plan, &trace).await?)
}

/// Refuses a member of a pod that may use more memory than the pod's machine has.
pub(super) fn fits(bundle: &Bundle, pod: &Pod) -> Result<(), Failure> {
    let limit = bundle::limit_mib(bundle.spec());
    let limit = limit.map_err(|error| Failure::invalid(chain(&error)))?;
    let memory_mib = pod.sandbox().size().memory_mib;
    match (bundle.role(), limit) {
        (Role::Member { .. }, Some(limit)) if limit > memory_mib => Err(Failure::invalid(format!(
            "linux.resources.memory.limit in config.json is {limit} MiB, and the machine of the pod \
                 has {memory_mib} MiB: give the pod itself a limit, which sizes its machine by the \
                 annotation {}",
            bundle::POD_MEMORY
        ))),
        _ => Ok(()),
    }
}
