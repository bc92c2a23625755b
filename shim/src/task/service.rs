//! The Task service: each call is decoded, done by [`Tasks`], and answered.
//!
//! What a call has begun it finishes, even if the client leaves meanwhile: ttrpc drops the handler
//! of a connection that ends, and a container half made would be nobody's.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use protobuf::{Message, MessageField, well_known_types::any::Any};
use ttrpc::{
    Code,
    r#async::{Service as Methods, TtrpcContext},
};

use super::{
    failure::Failure,
    proto::{
        task::{
            CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse,
            CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
            ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
            ProcessDetails, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest,
            StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
            Status as TaskStatus, UpdateTaskRequest, WaitRequest, WaitResponse,
        },
        task_ttrpc::{Task, create_task},
        timestamp,
    },
    tasks::Tasks,
};
use crate::{
    id::ContainerId,
    pod::{ExecId, ProcessId, Status},
};

/// The service as it is generated, and its older name: the messages are the same.
const NAMES: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];

/// The handlers of both versions of the service.
pub(super) fn methods(tasks: &Arc<Tasks>) -> HashMap<String, Methods> {
    let version = |name: &str| {
        let service = Arc::new(Service(tasks.clone()));
        let mut one = create_task(service);
        let methods = one.remove(NAMES[0])?;
        Some((name.to_owned(), methods))
    };
    NAMES.into_iter().filter_map(version).collect()
}

struct Service(Arc<Tasks>);

impl Service {
    /// Does something to its end.
    async fn whole<T: Send + 'static>(
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        match tokio::spawn(work).await {
            Ok(done) => Ok(done?),
            Err(error) => Err(Failure::new(Code::INTERNAL, error.to_string()).into()),
        }
    }
}

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let tasks = self.0.clone();
        let pid = Self::whole(async move { tasks.create(request).await }).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let which = process(&request.id, &request.exec_id)?;
        let tasks = self.0.clone();
        let pid = Self::whole(async move { tasks.start(&which).await }).await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let tasks = self.0.clone();
        Self::whole(async move { tasks.exec(request).await }).await?;
        Ok(Empty::default())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let which = process(&request.id, &request.exec_id)?;
        let pid = self.0.pid();
        let tasks = self.0.clone();
        let exit = Self::whole(async move { tasks.delete(&which).await }).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(Some(exit.at)),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let which = process(&request.id, &request.exec_id)?;
        let told = self.0.told(&which)?;
        let (status, exit) = match told.state.status {
            Status::Created => (TaskStatus::CREATED, None),
            Status::Running => (TaskStatus::RUNNING, None),
            Status::Paused => (TaskStatus::PAUSED, None),
            Status::Stopped(exit) => (TaskStatus::STOPPED, Some(exit)),
        };
        // An exec has a pid when it runs.
        let has_pid = which.exec.is_none() || status != TaskStatus::CREATED;
        let id = which.exec.unwrap_or(which.container);
        Ok(StateResponse {
            id: id.to_string(),
            bundle: told.entry.bundle,
            pid: if has_pid { told.state.pid } else { 0 },
            status: status.into(),
            stdin: told.entry.names.stdin,
            stdout: told.entry.names.stdout,
            stderr: told.entry.names.stderr,
            terminal: told.entry.names.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: timestamp(exit.map(|exit| exit.at)),
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let which = process(&request.id, &request.exec_id)?;
        let exit = self.0.wait(&which).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(Some(exit.at)),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let which = process(&request.id, &request.exec_id)?;
        let tasks = self.0.clone();
        let (signal, all) = (request.signal, request.all);
        Self::whole(async move { tasks.kill(&which, signal, all).await }).await?;
        Ok(Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.0.pids(&container(&request.id)?)?;
        let processes = pids.into_iter().map(|(pid, exec)| ProcessInfo {
            pid,
            info: exec.map(details).into(),
            ..Default::default()
        });
        Ok(PidsResponse {
            processes: processes.collect(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let id = container(&request.id)?;
        let tasks = self.0.clone();
        Self::whole(async move { tasks.pause(&id).await }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let id = container(&request.id)?;
        let tasks = self.0.clone();
        Self::whole(async move { tasks.resume(&id).await }).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let message = "a container in a virtual machine cannot be checkpointed";
        Err(Failure::new(Code::UNIMPLEMENTED, message).into())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let which = process(&request.id, &request.exec_id)?;
        self.0
            .resize(&which, (request.width, request.height))
            .await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let which = process(&request.id, &request.exec_id)?;
        if request.stdin {
            self.0.close_stdin(&which)?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let tasks = self.0.clone();
        Self::whole(async move { tasks.update(request).await }).await?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.0.stats(&container(&request.id)?).await?;
        Ok(StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.0.pid(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.0.shut_down(request.now).await;
        Ok(Empty::default())
    }
}

fn container(id: &str) -> Result<ContainerId, Failure> {
    Ok(ContainerId::parse(id)?)
}

fn process(id: &str, exec: &str) -> Result<ProcessId, Failure> {
    let exec = match exec {
        "" => None,
        exec => Some(ExecId::parse(exec)?),
    };
    Ok(ProcessId {
        container: container(id)?,
        exec,
    })
}

fn details(exec: ExecId) -> Any {
    let details = ProcessDetails {
        exec_id: exec.to_string(),
        ..Default::default()
    };
    Any {
        type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
        value: details
            .write_to_bytes()
            .expect("a message of plain fields can be written"),
        ..Default::default()
    }
}
