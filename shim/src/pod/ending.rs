//! The ends of processes, of containers and of the pod.

use std::{sync::atomic::Ordering, time::Duration};

use protocol::agent::{DeleteContainerRequest, SignalProcessRequest};

use super::{
    Pod,
    entries::{Forgotten, Slot},
    error::{Error, Kind},
    event::Event,
    process::{Exit, Process, ProcessId, Status},
};
use crate::{
    hooks::Moment,
    id::ContainerId,
    sandbox::{self, no_limit},
};

/// How long a SIGKILL may take to be taken by the agent, before the machine is ended instead.
const KILL: Duration = Duration::from_secs(10);

/// SIGKILL.
pub(super) const SIGKILL: i32 = 9;

impl Pod {
    /// Sends a signal to a process, or to `all` processes of a container.
    ///
    /// # Errors
    /// When the process has ended, or the agent refuses.
    pub async fn kill(&self, which: &ProcessId, signal: i32, all: bool) -> Result<(), Error> {
        let process = self.process(which)?;
        if let Status::Stopped(_) = process.status() {
            return Err(Error::state("container not running"));
        }
        if process.draining.load(Ordering::Relaxed) {
            process.killed.notify_one();
            return Ok(());
        }
        let request = SignalProcessRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            signal: signal.unsigned_abs(),
            all,
            ..Default::default()
        };
        if signal != SIGKILL {
            let sent = self.sandbox.ask("signalling the container", async |agent| {
                agent.signal_process(no_limit(), &request).await
            });
            return match sent.await {
                Ok(_) => Ok(()),
                // The machine ends with the last process in it, and all processes with it.
                Err(sandbox::Error::Death { .. }) => Err(Error::state("container not running")),
                Err(error) => Err(unsignalled(error)),
            };
        }
        process.killed.notify_one();
        let sent = self
            .sandbox
            .ask_within(KILL, "killing the container", async |agent| {
                agent.signal_process(no_limit(), &request).await
            });
        match sent.await {
            Ok(_) => Ok(()),
            // It has ended in the meantime.
            Err(sandbox::Error::Death { .. }) => Ok(()),
            Err(error @ sandbox::Error::Refused { .. }) => Err(unsignalled(error)),
            // Whatever is wrong with the guest, this ends it.
            Err(error) => {
                tracing::warn!(%error, "the guest does not take a SIGKILL: its machine is ended");
                self.sandbox.kill();
                Ok(())
            }
        }
    }

    /// Removes a container or exec that does not run; with `force` what still runs is killed.
    ///
    /// # Errors
    /// When it runs, or the agent refuses.
    pub async fn delete(&self, which: &ProcessId, force: bool) -> Result<Exit, Error> {
        let exit = self.stopped(which, force).await?;
        let request = DeleteContainerRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            force: true,
            ..Default::default()
        };
        let deleted = self.sandbox.call("removing the container", async |agent| {
            agent.delete_container(no_limit(), &request).await
        });
        if let Err(error) = deleted.await {
            // What is left of it in the guest goes with the guest.
            tracing::debug!(process = %which, %error, "the guest did not remove a process");
        }
        if let Ok(process) = self.process(which) {
            process.written().await;
        }
        if which.exec.is_none()
            && let Some(disks) = self.disks(&which.container)
        {
            self.unplug(&disks).await;
        }
        self.remove(which, exit).await;
        Ok(exit)
    }

    /// Removes the last container together with the pod: the guest is not told, it is ended.
    ///
    /// # Errors
    /// When the container runs and is not to be killed.
    pub async fn delete_last(&self, container: &ContainerId, force: bool) -> Result<Exit, Error> {
        let which = ProcessId::first(container.clone());
        let exit = self.stopped(&which, force).await?;
        self.let_go_of_disks().await;
        self.remove(&which, exit).await;
        self.shutdown().await;
        Ok(exit)
    }

    /// Whether no process of the pod is alive.
    pub fn is_idle(&self) -> bool {
        self.containers().values().all(|slot| match slot {
            Slot::Reserved => false,
            Slot::Made(container) => matches!(container.first.status(), Status::Stopped(_)),
        })
    }

    /// How the process ended; with `force` it is made to.
    async fn stopped(&self, which: &ProcessId, force: bool) -> Result<Exit, Error> {
        let process = self.process(which)?;
        match process.status() {
            Status::Stopped(exit) => Ok(exit),
            Status::Running | Status::Paused if !force => Err(Error::state(format!(
                "cannot delete container {} that is not stopped: {}",
                which.container,
                process.status().word()
            ))),
            _ => self.killed(which, &process).await,
        }
    }

    /// Kills a process and waits for its end.
    async fn killed(&self, which: &ProcessId, process: &Process) -> Result<Exit, Error> {
        let all = which.exec.is_none();
        // One that has ended in the guest is about to be known of.
        if let (Err(error), Status::Created | Status::Running | Status::Paused) =
            (self.kill(which, SIGKILL, all).await, process.status())
            && error.kind() != Kind::State
        {
            tracing::debug!(process = %which, %error, "a process cannot be killed");
            if all {
                // It is to be removed, whatever the guest thinks of it.
                self.sandbox.kill();
            }
        }
        let ended = tokio::time::timeout(KILL, process.ended());
        match ended.await {
            Ok(exit) => Ok(exit),
            Err(_) if all => {
                tracing::warn!(process = %which, "a killed container does not end: its machine is ended");
                self.sandbox.kill();
                Ok(process.ended().await)
            }
            Err(_) => Err(Error::state(format!("{which} does not end"))),
        }
    }

    async fn remove(&self, which: &ProcessId, exit: Exit) {
        if let Ok(process) = self.process(which) {
            process.close();
        }
        let hooks = match which.exec {
            None => self.hooks(&which.container),
            Some(_) => None,
        };
        match self.forget(which) {
            Some(Forgotten::Container(slot)) => slot.end().await,
            Some(Forgotten::Exec) => {}
            None => return,
        }
        self.tell(Event::Delete {
            process: which.clone(),
            exit,
        });
        if let Some(hooks) = hooks
            && let Err(error) = hooks.run(Moment::Stopped).await
        {
            // As the specification demands: it is told, and everything goes on.
            tracing::warn!(container = %which, error = crate::text::chain(&error), "a poststop hook failed");
        }
    }

    /// Has the file systems on disks of the host written back: the guest's power failing would be
    /// the end of them.
    pub async fn let_go_of_disks(&self) {
        let with_disks = |(id, slot): (&ContainerId, &Slot)| match slot {
            Slot::Made(container) if !container.disks.slots().is_empty() => {
                Some((id.clone(), container.disks.clone()))
            }
            _ => None,
        };
        let all: Vec<_> = self.containers().iter().filter_map(with_disks).collect();
        for (id, disks) in all {
            let request = DeleteContainerRequest {
                container_id: id.to_string(),
                force: true,
                ..Default::default()
            };
            let deleted = self.sandbox.call("removing the container", async |agent| {
                agent.delete_container(no_limit(), &request).await
            });
            // One that is gone already is as good.
            let _ = deleted.await;
            self.unplug(&disks).await;
        }
    }

    /// Ends the machine and removes what was made for the pod. All waits end.
    pub async fn shutdown(&self) {
        self.let_go_of_disks().await;
        self.sandbox.dismiss();
        self.sandbox.leave_loopback();
        self.sandbox.ended().await;
        let mut tasks = std::mem::take(&mut *self.tasks());
        while tasks.join_next().await.is_some() {}
        let containers = std::mem::take(&mut *self.containers());
        for slot in containers.into_values() {
            slot.end().await;
        }
        self.sandbox.leave_networks().await;
        self.sandbox.leave_cgroup().await;
        self.sandbox.end();
    }
}

/// Why the agent does not send a signal: mostly, since the process has ended in this moment.
fn unsignalled(error: sandbox::Error) -> Error {
    match error {
        sandbox::Error::Refused {
            code: ttrpc::Code::FAILED_PRECONDITION,
            ..
        } => Error::state("container not running"),
        error => error.into(),
    }
}
