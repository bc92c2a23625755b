//! From a bundle to a running pod.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::sys::sysinfo::sysinfo;
use ttrpc::Code;

use super::failure::Failure;
use crate::{
    bundle::{self, Bundle, Role},
    cgroup::{CgroupPlan, Layout},
    id::{ContainerId, Namespace},
    pod::{self, Pod, PodPlan},
    sandbox::{Files, Media, Pace, Purpose, Surroundings, Trace},
    text::chain,
};

/// Where the state of containerd's pods is: beside that of other runtimes' shims, and not where the
/// command line has its containers, who may have the same names.
pub const STATE_ROOT: &str = "/run/containerd/bulkhead";

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
        surroundings: surroundings(id, &bundle)?,
        hostname: bundle.spec().hostname().clone().unwrap_or_default(),
        deadline: DEADLINE,
        pace: Pace::default(),
    };
    Ok(Pod::start(plan, &trace).await?)
}

/// What of the host the pod is put into. Hooks run when containerd makes the container: by then
/// the machine is there to be named to them.
fn surroundings(id: &ContainerId, bundle: &Bundle) -> Result<Surroundings, Failure> {
    let open = |path: &Path| {
        let problem = |error| {
            let path = path.display();
            let message = format!(
                "cannot open the network namespace {path} of linux.namespaces in config.json: {error}"
            );
            Failure::invalid(message)
        };
        File::open(path).map_err(problem)
    };
    let network = bundle.network_path().map(open).transpose()?;
    let spec = bundle.spec();
    let cgroup = CgroupPlan::of(spec, id, Layout::seen_in(spec));
    let cgroup = match bundle.role() {
        // The little that it allows is meant for a process that does nothing.
        Role::Sandbox => cgroup.unlimited(),
        Role::First | Role::Member { .. } => cgroup,
    };
    Ok(Surroundings {
        network: network.map(Into::into),
        cgroup: Some(cgroup),
        ..Surroundings::default()
    })
}
