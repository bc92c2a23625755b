//! The service of `protocol/proto/agent.proto`: each handler decodes, calls
//! one function and encodes.

use std::sync::Arc;

use async_trait::async_trait;
use protocol::{
    StreamId,
    agent::{self as message, root_filesystem},
    agent_ttrpc::{Agent, create_agent},
};
use ttrpc::{
    Code,
    r#async::{Server, TtrpcContext, transport::Listener},
};

use crate::{
    boot::Power,
    container::{self, Containers, Create, Source, StreamIds},
    guest::{self, Guest},
    id::{self, ContainerId, ExecId},
    port::Port,
    spec::{self, Spec},
};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name in it.
    #[error(transparent)]
    Id(#[from] id::Error),
    /// A configuration in it.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// What it asks of the guest.
    #[error(transparent)]
    Guest(#[from] guest::Error),
    /// What it asks of a container.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// A signal for all names one exec.
    #[error("a signal for all processes names no exec; leave exec_id empty")]
    AllOfOne,
    /// A container without a root.
    #[error("the request names no root file system; set path or block")]
    NoRoot,
}

/// What the service works with.
pub struct Service {
    /// The guest.
    pub guest: Guest,
    /// Its containers.
    pub containers: Arc<Containers>,
    /// Its end.
    pub power: Power,
    /// When the agent started, in nanoseconds since boot.
    pub started_ns: u64,
}

/// Serves `port` for as long as the answer lives.
///
/// # Errors
/// When the server does not start.
pub async fn serve(service: Service, port: Port) -> ttrpc::Result<Server> {
    let mut server = Server::new()
        .add_listener(Listener::new(port))
        .register_service(create_agent(Arc::new(service)));
    server.start().await?;
    Ok(server)
}

/// The one place where a failure becomes a code.
fn code(error: &Error) -> Code {
    use container::Error as C;
    match error {
        Error::Id(_) | Error::Spec(_) | Error::AllOfOne | Error::NoRoot => Code::INVALID_ARGUMENT,
        Error::Guest(error) => match error {
            guest::Error::Step { .. } => Code::INTERNAL,
            guest::Error::Again | guest::Error::Version(_) => Code::FAILED_PRECONDITION,
            _ => Code::INVALID_ARGUMENT,
        },
        Error::Container(error) => match error {
            C::NoContainer(_) | C::NoExec { .. } | C::ProgramMissing(_) => Code::NOT_FOUND,
            C::ContainerExists(_) | C::ExecExists { .. } => Code::ALREADY_EXISTS,
            C::TooMany(_) => Code::RESOURCE_EXHAUSTED,
            C::Ended(_)
            | C::StartedBefore
            | C::Running
            | C::NotRunning(_)
            | C::NoTerminal
            | C::Stream(_) => Code::FAILED_PRECONDITION,
            C::Signal(_)
            | C::TerminalSize { .. }
            | C::Spec(_)
            | C::Namespaces(_)
            | C::Seccomp(_)
            | C::Launch(crate::launch::Error::Value { .. })
            | C::Cgroup(crate::cgroup::Error::Value { .. } | crate::cgroup::Error::Path(_)) => {
                Code::INVALID_ARGUMENT
            }
            C::ProgramRefused(_) => Code::PERMISSION_DENIED,
            C::Launch(_) | C::Cgroup(_) | C::Process(_) | C::Step { .. } => Code::INTERNAL,
        },
    }
}

/// A failure as the host reads it: the code, and the error with its causes.
fn status(error: &Error) -> ttrpc::Error {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    ttrpc::Error::RpcStatus(ttrpc::get_status(code(error), text))
}

/// Runs a handler's body and turns its failure into a status.
async fn answer<T>(body: impl Future<Output = Result<T, Error>>) -> ttrpc::Result<T> {
    body.await.map_err(|error| status(&error))
}

#[async_trait]
impl Agent for Service {
    async fn configure_guest(
        &self,
        _: &TtrpcContext,
        request: message::ConfigureGuestRequest,
    ) -> ttrpc::Result<message::ConfigureGuestResponse> {
        answer(async {
            self.guest.configure(&guest::Configuration {
                version: request.version,
                time_ns: request.time_ns,
                entropy: request.entropy,
                hostname: request.hostname,
                online_cpus: request.online_cpus,
                shared_directories: request.shared_directories.into_iter().map(shared).collect(),
            })?;
            Ok(message::ConfigureGuestResponse {
                version: protocol::VERSION,
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
                kernel_release: guest::kernel_release(),
                ..Default::default()
            })
        })
        .await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: message::CreateContainerRequest,
    ) -> ttrpc::Result<message::CreateContainerResponse> {
        answer(async {
            let create = Create {
                id: ContainerId::parse(&request.container_id)?,
                spec: Spec::parse(&request.spec)?,
                source: source(request.root.into_option())?,
                streams: streams(request.streams.as_ref()),
            };
            let pid = self.containers.create(create).await?;
            Ok(message::CreateContainerResponse {
                pid,
                ..Default::default()
            })
        })
        .await
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: message::StartProcessRequest,
    ) -> ttrpc::Result<message::StartProcessResponse> {
        answer(async {
            let (id, exec) = names(&request.container_id, &request.exec_id)?;
            let started = self.containers.start(&id, exec.as_ref()).await?;
            Ok(message::StartProcessResponse {
                exec_ns: started.exec_ns,
                boot_ns: started.boot_ns,
                ..Default::default()
            })
        })
        .await
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: message::ExecProcessRequest,
    ) -> ttrpc::Result<message::ExecProcessResponse> {
        answer(async {
            let id = ContainerId::parse(&request.container_id)?;
            let exec = ExecId::parse(&request.exec_id)?;
            let process = spec::Process::parse(&request.process)?;
            let streams = streams(request.streams.as_ref());
            let pid = self.containers.exec(&id, exec, &process, &streams).await?;
            Ok(message::ExecProcessResponse {
                pid,
                ..Default::default()
            })
        })
        .await
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: message::SignalProcessRequest,
    ) -> ttrpc::Result<message::Empty> {
        answer(async {
            let (id, exec) = names(&request.container_id, &request.exec_id)?;
            match (request.all, exec) {
                (true, Some(_)) => return Err(Error::AllOfOne),
                (true, None) => self.containers.signal_all(&id, request.signal)?,
                (false, exec) => self.containers.signal(&id, exec.as_ref(), request.signal)?,
            }
            Ok(message::Empty::default())
        })
        .await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: message::WaitProcessRequest,
    ) -> ttrpc::Result<message::WaitProcessResponse> {
        answer(async {
            let (id, exec) = names(&request.container_id, &request.exec_id)?;
            let (exit, oom_killed) = self.containers.wait(&id, exec.as_ref()).await?;
            Ok(message::WaitProcessResponse {
                exit_status: exit.status,
                exited_at_ns: exit.at_ns,
                oom_killed,
                ..Default::default()
            })
        })
        .await
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: message::ResizeTerminalRequest,
    ) -> ttrpc::Result<message::Empty> {
        answer(async {
            let (id, exec) = names(&request.container_id, &request.exec_id)?;
            self.containers
                .resize(&id, exec.as_ref(), request.width, request.height)?;
            Ok(message::Empty::default())
        })
        .await
    }

    async fn close_stdin(
        &self,
        _: &TtrpcContext,
        request: message::CloseStdinRequest,
    ) -> ttrpc::Result<message::Empty> {
        answer(async {
            let (id, exec) = names(&request.container_id, &request.exec_id)?;
            self.containers.close_stdin(&id, exec.as_ref())?;
            Ok(message::Empty::default())
        })
        .await
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: message::DeleteContainerRequest,
    ) -> ttrpc::Result<message::Empty> {
        answer(async {
            let (id, exec) = names(&request.container_id, &request.exec_id)?;
            match exec {
                Some(exec) => {
                    self.containers
                        .delete_exec(&id, &exec, request.force)
                        .await?;
                }
                None => self.containers.delete(&id, request.force).await?,
            }
            Ok(message::Empty::default())
        })
        .await
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: message::ContainerStatsRequest,
    ) -> ttrpc::Result<message::ContainerStatsResponse> {
        answer(async {
            let id = ContainerId::parse(&request.container_id)?;
            let stats = self.containers.stats(&id)?;
            Ok(message::ContainerStatsResponse {
                memory_current_bytes: stats.memory_current_bytes,
                memory_peak_bytes: stats.memory_peak_bytes,
                memory_max_bytes: stats.memory_max_bytes,
                cpu_usage_us: stats.cpu_usage_us,
                cpu_user_us: stats.cpu_user_us,
                cpu_system_us: stats.cpu_system_us,
                cpu_throttled_us: stats.cpu_throttled_us,
                pids_current: stats.pids_current,
                io_read_bytes: stats.io_read_bytes,
                io_written_bytes: stats.io_written_bytes,
                oom_kills: stats.oom_kills,
                ..Default::default()
            })
        })
        .await
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: message::ListProcessesRequest,
    ) -> ttrpc::Result<message::ListProcessesResponse> {
        answer(async {
            let id = ContainerId::parse(&request.container_id)?;
            Ok(message::ListProcessesResponse {
                pids: self.containers.processes(&id)?,
                ..Default::default()
            })
        })
        .await
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: message::PauseContainerRequest,
    ) -> ttrpc::Result<message::Empty> {
        answer(async {
            let id = ContainerId::parse(&request.container_id)?;
            self.containers.pause(&id, request.paused).await?;
            Ok(message::Empty::default())
        })
        .await
    }

    async fn rescan_devices(
        &self,
        _: &TtrpcContext,
        request: message::RescanDevicesRequest,
    ) -> ttrpc::Result<message::Empty> {
        answer(async {
            guest::rescan_devices(&request.removed)?;
            Ok(message::Empty::default())
        })
        .await
    }

    async fn guest_stats(
        &self,
        _: &TtrpcContext,
        _: message::Empty,
    ) -> ttrpc::Result<message::GuestStatsResponse> {
        answer(async {
            let memory = guest::memory()?;
            Ok(message::GuestStatsResponse {
                memory_total_kib: memory.total_kib,
                memory_free_kib: memory.free_kib,
                memory_available_kib: memory.available_kib,
                agent_rss_kib: memory.agent_rss_kib,
                agent_started_ns: self.started_ns,
                ..Default::default()
            })
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: message::Empty) -> ttrpc::Result<message::Empty> {
        self.containers.end_all().await;
        self.power.off();
        Ok(message::Empty::default())
    }
}

/// A container's name and, where there is one, an exec's.
fn names(container: &str, exec: &str) -> Result<(ContainerId, Option<ExecId>), Error> {
    Ok((
        ContainerId::parse(container)?,
        ExecId::parse_optional(exec)?,
    ))
}

fn streams(streams: Option<&message::Streams>) -> StreamIds {
    let id = |number: u64| StreamId::from_bytes(number.to_le_bytes());
    streams.map_or_else(StreamIds::default, |streams| StreamIds {
        stdin: id(streams.stdin),
        stdout: id(streams.stdout),
        stderr: id(streams.stderr),
    })
}

fn source(root: Option<message::RootFilesystem>) -> Result<Source, Error> {
    match root.and_then(|root| root.source) {
        Some(root_filesystem::Source::Path(path)) => Ok(Source::Directory(path)),
        Some(root_filesystem::Source::Block(block)) => Ok(Source::Block {
            device: block.device,
            filesystem: block.filesystem,
            overlay: block.overlay,
        }),
        Some(_) | None => Err(Error::NoRoot),
    }
}

fn shared(shared: message::SharedDirectory) -> guest::SharedDirectory {
    guest::SharedDirectory {
        tag: shared.tag,
        mount_point: shared.mount_point,
        read_only: shared.read_only,
    }
}
