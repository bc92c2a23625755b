//! What is done with containers that run.

use protocol::agent::{
    CloseStdinRequest, ContainerStatsRequest, ContainerStatsResponse, ListProcessesRequest,
    ListProcessesResponse, PauseContainerRequest, ResizeTerminalRequest, UpdateContainerRequest,
};
use serde_json::Value;

use super::{
    Pod,
    entries::{Container, ExecSlot, Slot},
    error::Error,
    event::Event,
    process::{ProcessId, Status},
};
use crate::{bundle, id::ContainerId, sandbox::no_limit};

impl Pod {
    /// Freezes all processes of a container.
    ///
    /// # Errors
    /// When it does not run, or the agent refuses.
    pub async fn pause(&self, container: &ContainerId) -> Result<(), Error> {
        self.freeze(container, true).await
    }

    /// Thaws all processes of a container.
    ///
    /// # Errors
    /// When it is not frozen, or the agent refuses.
    pub async fn resume(&self, container: &ContainerId) -> Result<(), Error> {
        self.freeze(container, false).await
    }

    /// Waits until a container is not frozen.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn thawed(&self, container: &ContainerId) -> Result<(), Error> {
        let process = self.process(&ProcessId::first(container.clone()))?;
        process.thawed().await;
        Ok(())
    }

    async fn freeze(&self, container: &ContainerId, paused: bool) -> Result<(), Error> {
        let process = self.process(&ProcessId::first(container.clone()))?;
        let _turn = process.freezing.lock().await;
        match (process.status(), paused) {
            (Status::Running, true) | (Status::Paused, false) => {}
            (_, true) => return Err(Error::state("container not running")),
            (_, false) => return Err(Error::state("container not paused")),
        }
        let request = PauseContainerRequest {
            container_id: container.to_string(),
            paused,
            ..Default::default()
        };
        let frozen = self.sandbox.ask("freezing the container", async |agent| {
            agent.pause_container(no_limit(), &request).await
        });
        frozen.await?;
        let container = container.clone();
        let (status, event) = match paused {
            true => (Status::Paused, Event::Paused { container }),
            false => (Status::Running, Event::Resumed { container }),
        };
        if process.becomes(status) {
            self.tell(event);
        }
        Ok(())
    }

    /// Sets limits of a container anew: `resources` is the specification's object as JSON.
    ///
    /// # Errors
    /// When it has ended, is to have more memory than the machine, or the agent refuses.
    pub async fn update(&self, container: &ContainerId, resources: &Value) -> Result<(), Error> {
        self.alive(container)?;
        bundle::limit_fits(resources, self.sandbox.size().memory_mib)?;
        let mut of_guest = resources.clone();
        bundle::resources_for_guest(&mut of_guest);
        let request = UpdateContainerRequest {
            container_id: container.to_string(),
            resources: of_guest.to_string().into_bytes(),
            ..Default::default()
        };
        let updated = self.sandbox.call("updating the container", async |agent| {
            agent.update_container(no_limit(), &request).await
        });
        updated.await?;
        match self.containers().get(container) {
            Some(Slot::Made(Container {
                cgroup: Some(cgroup),
                ..
            })) => cgroup.limit(resources),
            _ if self.grouped.as_ref() == Some(container) => self.sandbox.limit(resources),
            _ => {}
        }
        Ok(())
    }

    /// The counters of a container.
    ///
    /// # Errors
    /// When it has ended, or the agent refuses.
    pub async fn stats(&self, container: &ContainerId) -> Result<ContainerStatsResponse, Error> {
        self.alive(container)?;
        let request = ContainerStatsRequest {
            container_id: container.to_string(),
            ..Default::default()
        };
        let stats = self.sandbox.ask("reading counters", async |agent| {
            agent.container_stats(no_limit(), &request).await
        });
        Ok(stats.await?)
    }

    /// The processes of a container, as the guest knows them.
    ///
    /// # Errors
    /// When it has ended, or the agent refuses.
    pub async fn processes(&self, container: &ContainerId) -> Result<ListProcessesResponse, Error> {
        self.alive(container)?;
        let request = ListProcessesRequest {
            container_id: container.to_string(),
            details: true,
            ..Default::default()
        };
        let processes = self.sandbox.ask("listing processes", async |agent| {
            agent.list_processes(no_limit(), &request).await
        });
        Ok(processes.await?)
    }

    /// The host's processes that stand for a container and its execs which have not ended.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn pids(&self, container: &ContainerId) -> Result<Vec<u32>, Error> {
        let containers = self.containers();
        let Some(Slot::Made(container)) = containers.get(container) else {
            return Err(Error::no_container());
        };
        let execs = container.execs.values().filter_map(|exec| match exec {
            ExecSlot::Made(process) => Some(process),
            ExecSlot::Reserved => None,
        });
        let alive = std::iter::once(&container.first)
            .chain(execs)
            .filter(|process| !matches!(process.status(), Status::Stopped(_)));
        let mut pids: Vec<u32> = alive.map(|process| process.pid).collect();
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Tells a process's terminal its size in columns and rows.
    ///
    /// # Errors
    /// When the process has ended, or the agent refuses.
    pub async fn resize(&self, which: &ProcessId, size: (u16, u16)) -> Result<(), Error> {
        if let Status::Stopped(_) = self.process(which)?.status() {
            return Err(Error::state("container not running"));
        }
        let request = ResizeTerminalRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            width: size.0.into(),
            height: size.1.into(),
            ..Default::default()
        };
        let resized = self.sandbox.ask("resizing the terminal", async |agent| {
            agent.resize_terminal(no_limit(), &request).await
        });
        Ok(resized.await.map(drop)?)
    }

    /// Ends a process's input.
    ///
    /// # Errors
    /// When the agent refuses.
    pub async fn close_stdin(&self, which: &ProcessId) -> Result<(), Error> {
        let process = self.process(which)?;
        process.close_stdin();
        if let Status::Stopped(_) = process.status() {
            return Ok(());
        }
        let request = CloseStdinRequest {
            container_id: which.container.to_string(),
            exec_id: which.exec_name(),
            ..Default::default()
        };
        let closed = self.sandbox.ask("closing an input", async |agent| {
            agent.close_stdin(no_limit(), &request).await
        });
        Ok(closed.await.map(drop)?)
    }
}
