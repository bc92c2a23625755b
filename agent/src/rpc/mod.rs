//! The service of `protocol/proto/agent.proto`: each handler decodes, calls
//! one function and encodes.

mod convert;

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use protocol::{
    agent as message,
    agent_ttrpc::{Agent, create_agent},
};
use ttrpc::{
    Code,
    r#async::{Server, TtrpcContext, transport::Listener},
};

use crate::{
    boot::Power,
    causes,
    container::{self, Containers, Create, First},
    disks,
    guest::{self, Guest},
    id::{self, ContainerId, ExecId},
    network::{self, Network},
    port::Port,
    rootfs::Error as RootfsError,
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
    /// What it asks of the network.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// A disk that it names.
    #[error(transparent)]
    Disk(#[from] disks::Error),
    /// What it asks of a container.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// A signal for all names one exec.
    #[error("a signal for all processes names no exec; leave exec_id empty")]
    AllOfOne,
    /// A container without a root.
    #[error("the request names no root file system; set path, block or layers")]
    NoRoot,
}

/// What the service works with.
pub struct Service {
    /// The guest.
    pub guest: Guest,
    /// Its containers.
    pub containers: Arc<Containers>,
    /// The network that the host wanted last.
    pub network: Mutex<Network>,
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
            guest::Error::Disk(error) => disk(error),
            guest::Error::Again | guest::Error::Version(_) => Code::FAILED_PRECONDITION,
            _ => Code::INVALID_ARGUMENT,
        },
        Error::Disk(error) => disk(error),
        Error::Network(error) => match error {
            network::Error::Bad(_) => Code::INVALID_ARGUMENT,
            network::Error::NoCard { .. } => Code::NOT_FOUND,
            network::Error::Step { .. } => Code::INTERNAL,
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
            | C::Paused(_)
            | C::Placeholder(_)
            | C::Cgroup(crate::cgroup::Error::InUse { .. })
            | C::Stream(_) => Code::FAILED_PRECONDITION,
            C::Signal(_)
            | C::TerminalSize { .. }
            | C::Spec(_)
            | C::Namespaces(_)
            | C::DeviceRules
            | C::Pod(_)
            | C::Seccomp(_)
            | C::Launch(crate::launch::Error::Value { .. })
            | C::Rootfs(RootfsError::Option { .. } | RootfsError::Value { .. })
            | C::Cgroup(crate::cgroup::Error::Value { .. } | crate::cgroup::Error::Path(_)) => {
                Code::INVALID_ARGUMENT
            }
            C::ProgramRefused(_) => Code::PERMISSION_DENIED,
            C::Launch(_) | C::Rootfs(_) | C::Cgroup(_) | C::Process(_) | C::Step { .. } => {
                Code::INTERNAL
            }
        },
    }
}

fn disk(error: &disks::Error) -> Code {
    match error {
        disks::Error::None { .. } => Code::NOT_FOUND,
        disks::Error::Slot(_) => Code::INVALID_ARGUMENT,
        disks::Error::Busy { .. } => Code::FAILED_PRECONDITION,
        disks::Error::Step { .. } => Code::INTERNAL,
    }
}

/// A failure as the host reads it: the code, and the error with its causes.
fn status(error: &Error) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code(error), causes::line(error)))
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
            self.containers.pod.set_shm_bytes(request.shm_bytes);
            self.guest.configure(&guest::Configuration {
                version: request.version,
                time_ns: request.time_ns,
                entropy: request.entropy,
                hostname: request.hostname,
                online_cpus: request.online_cpus,
                shared_directories: convert::shared_directories(request.shared_directories),
            })?;
            guest::switch_loopback_on()?;
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
            let id = ContainerId::parse(&request.container_id)?;
            let devices = convert::devices(&request.devices)?;
            let mut create = if request.placeholder {
                Create {
                    id,
                    bundle: request.bundle,
                    spec: Spec::parse_placeholder(&request.spec)?,
                    first: None,
                }
            } else {
                Create {
                    id,
                    bundle: request.bundle,
                    spec: Spec::parse(&request.spec)?,
                    first: Some(First {
                        source: convert::source(request.root.into_option())?,
                        streams: convert::streams(request.streams.as_ref()),
                    }),
                }
            };
            let source = create.first.as_mut().map(|first| &mut first.source);
            disks::settle(&mut create.spec, source, &devices)?;
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
            let streams = convert::streams(request.streams.as_ref());
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

    async fn process_state(
        &self,
        _: &TtrpcContext,
        request: message::ProcessStateRequest,
    ) -> ttrpc::Result<message::ProcessStateResponse> {
        answer(async {
            let (id, exec) = names(&request.container_id, &request.exec_id)?;
            Ok(convert::state(self.containers.state(&id, exec.as_ref())?))
        })
        .await
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: message::UpdateContainerRequest,
    ) -> ttrpc::Result<message::Empty> {
        answer(async {
            let id = ContainerId::parse(&request.container_id)?;
            let resources = spec::Resources::parse(&request.resources)?;
            self.containers.update(&id, &resources)?;
            Ok(message::Empty::default())
        })
        .await
    }

    async fn next_events(
        &self,
        _: &TtrpcContext,
        request: message::NextEventsRequest,
    ) -> ttrpc::Result<message::NextEventsResponse> {
        let (events, lost) = self.containers.events.after(request.after).await;
        Ok(message::NextEventsResponse {
            events: events.into_iter().map(convert::event).collect(),
            lost,
            ..Default::default()
        })
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: message::ContainerStatsRequest,
    ) -> ttrpc::Result<message::ContainerStatsResponse> {
        answer(async {
            let id = ContainerId::parse(&request.container_id)?;
            Ok(convert::stats(self.containers.stats(&id)?))
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
            let pids = self.containers.processes(&id)?;
            let processes = if request.details {
                Containers::details(&pids)
            } else {
                Vec::new()
            };
            Ok(message::ListProcessesResponse {
                pids,
                processes: processes.into_iter().map(convert::details).collect(),
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

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: message::ConfigureNetworkRequest,
    ) -> ttrpc::Result<message::Empty> {
        answer(async {
            let wanted = Network::try_from(request).map_err(network::Error::from)?;
            let mut network = self.network.lock().unwrap_or_else(PoisonError::into_inner);
            wanted.configure(&network)?;
            *network = wanted;
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
            guest::rescan_devices(&request.removed).await?;
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

    async fn ping(&self, _: &TtrpcContext, _: message::Empty) -> ttrpc::Result<message::Empty> {
        Ok(message::Empty::default())
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
