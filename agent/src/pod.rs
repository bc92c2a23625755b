//! What the containers of the pod share besides the guest itself: a pid
//! namespace and a /dev/shm, each made when the first container asks for it.
//!
//! Network, ipc and uts namespaces of the pod are the guest's own.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::sched::CloneFlags as Namespaces;
use tokio::sync::watch;

use crate::{
    launch::{self, PodError},
    reaper::{Exit, Reaper},
    spec::Spec,
    sys::{self, CloneFlags, Forked, FsContext},
};

/// The size of /dev/shm unless the host says another.
const SHM_BYTES: u64 = 64 << 20;

/// The pod.
#[derive(Debug)]
pub struct Pod {
    reaper: Arc<Reaper>,
    init: Mutex<Option<Init>>,
    shm: PathBuf,
    shm_bytes: AtomicU64,
}

/// The first process of the pod's pid namespace. It does nothing, and its orphans' ends are
/// collected by the kernel.
#[derive(Debug)]
struct Init {
    pidfd: OwnedFd,
    namespace: OwnedFd,
    exit: watch::Receiver<Option<Exit>>,
}

impl Pod {
    /// A pod that has nothing yet.
    pub fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            init: Mutex::default(),
            shm: PathBuf::from(protocol::POD_SHM),
            shm_bytes: AtomicU64::new(SHM_BYTES),
        }
    }

    /// The size that /dev/shm will have; 0 leaves it.
    pub fn set_shm_bytes(&self, bytes: u64) {
        if bytes != 0 {
            self.shm_bytes.store(bytes, Ordering::Relaxed);
        }
    }

    /// The pod's pid namespace, with a first process that lives.
    pub(crate) fn pid_namespace(&self) -> io::Result<OwnedFd> {
        let mut init = self.lock();
        if let Some(init) = init.as_ref().filter(|init| init.exit.borrow().is_none()) {
            return init.namespace.try_clone();
        }
        let made = Init::make(&self.reaper)?;
        let namespace = made.namespace.try_clone()?;
        *init = Some(made);
        Ok(namespace)
    }

    /// Ends the pod's pid namespace and all in it.
    pub(crate) fn end(&self) {
        if let Some(init) = self.lock().take() {
            // It may have ended already.
            let _ = sys::pidfd_send_signal(init.pidfd.as_fd(), libc::SIGKILL);
        }
    }

    /// Makes the pod's /dev/shm if `spec` mounts it and it is not there.
    pub(crate) fn provide_shm(&self, spec: &Spec) -> io::Result<()> {
        let wanted = spec
            .mounts
            .iter()
            .any(|mount| mount.source.as_deref() == Some(protocol::POD_SHM));
        if !wanted || self.shm.exists() {
            return Ok(());
        }
        let tmpfs = FsContext::open("tmpfs")?;
        let bytes = self.shm_bytes.load(Ordering::Relaxed).to_string();
        for (key, value) in [("source", "shm"), ("mode", "1777"), ("size", &bytes)] {
            tmpfs.set(key, Some(value))?;
        }
        let safe = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
        let tree = tmpfs.mount(safe)?;
        fs::create_dir_all(&self.shm)?;
        let attached =
            File::open(&self.shm).and_then(|target| sys::move_mount(tree.as_fd(), target.as_fd()));
        if attached.is_err() {
            // Its being there says that it is mounted.
            let _ = fs::remove_dir(&self.shm);
        }
        attached
    }

    /// Gives the pod the host name, domain name and kernel parameters of `spec`.
    pub(crate) fn configure(&self, spec: &Spec) -> Result<(), PodError> {
        launch::configure_pod(spec)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Init>> {
        self.init.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Init {
    fn make(reaper: &Reaper) -> io::Result<Self> {
        let flags = CloneFlags {
            namespaces: Namespaces::CLONE_NEWPID,
            cgroup: None,
        };
        match sys::clone3(&flags)? {
            Forked::Child => sys::be_first_process(),
            Forked::Parent { pid, pidfd } => {
                let exit = reaper.watch(pid);
                let namespace = File::open(format!("/proc/{pid}/ns/pid"))?.into();
                Ok(Self {
                    pidfd,
                    namespace,
                    exit,
                })
            }
        }
    }
}
