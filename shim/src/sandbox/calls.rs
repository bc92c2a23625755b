//! What is asked of the agent. No call waits on a dead guest: the VMM's death ends each.

use std::{future::Future, io, time::Duration};

use protocol::{StreamId, agent::Empty, agent_ttrpc::AgentClient};
use tokio::{net::UnixStream, time::timeout};

use super::{
    CONTROL, Console, ConsoleTail, Error, Sandbox, VSOCK, agent, pulse,
    vmm::{Verdict, Vmm},
};
use crate::{sys, text::printable};

/// How long one call to a running agent may take.
pub(super) const CALL: Duration = Duration::from_secs(30);

/// How much longer for each CPU: the guest brings them online one by one, each with all others
/// halted for a moment, and whatever comes meanwhile waits for that.
const CALL_FOR_CPU: Duration = Duration::from_secs(2);

/// How long after the end of a connection the end of the VMM is waited for.
pub(super) const DEATH: Duration = Duration::from_secs(5);

/// The lines of the guest's console in an error.
pub(super) const CONSOLE_LINES: usize = 8;

/// Deadlines are kept here, where the death of the VMM is seen too.
pub(crate) fn no_limit() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(0)
}

impl Sandbox {
    /// Lets the agent do something, which must be done soon. The death of the VMM ends the call at
    /// once.
    ///
    /// # Errors
    /// When the agent refuses or is silent, or the machine ends.
    pub async fn call<T>(
        &self,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        self.call_within(self.soon(), doing, call).await
    }

    /// As [`Sandbox::call`], for what a start waits for: who lets a guest boot for longer lets it do
    /// this for longer, too.
    ///
    /// # Errors
    /// As [`Sandbox::call`].
    pub async fn call_at_start<T>(
        &self,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        let deadline = (CALL + CALL_FOR_CPU * u32::from(self.size.cpus)).max(self.boot_deadline);
        self.call_within(deadline, doing, call).await
    }

    /// As [`Sandbox::call`], with a deadline of its own.
    ///
    /// # Errors
    /// As [`Sandbox::call`].
    pub async fn call_within<T>(
        &self,
        deadline: Duration,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        let work = self.signs.work();
        let done = self.ask_within(deadline, doing, call).await;
        if let Ok(_) | Err(Error::Refused { .. }) = done {
            work.done();
        }
        done
    }

    /// As [`Sandbox::call`], for what an agent answers at once: nothing of it waits for a disk, or
    /// for files of the host.
    ///
    /// # Errors
    /// As [`Sandbox::call`].
    pub async fn ask<T>(
        &self,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        self.ask_within(self.soon(), doing, call).await
    }

    /// As [`Sandbox::ask`], with a deadline of its own.
    ///
    /// # Errors
    /// As [`Sandbox::call`].
    pub async fn ask_within<T>(
        &self,
        deadline: Duration,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        let seconds = deadline.as_secs();
        timeout(deadline, self.wait(doing, call))
            .await
            .unwrap_or(Err(Error::CallDeadline { doing, seconds }))
    }

    fn soon(&self) -> Duration {
        CALL + CALL_FOR_CPU * u32::from(self.size.cpus)
    }

    /// Calls the agent for something that may take for ever. The death of the VMM ends the call
    /// at once.
    ///
    /// # Errors
    /// When the agent refuses or the machine ends.
    pub async fn wait<T>(
        &self,
        doing: &'static str,
        call: impl AsyncFnOnce(&AgentClient) -> ttrpc::Result<T>,
    ) -> Result<T, Error> {
        let answer = tokio::select! {
            biased;
            answer = call(&self.agent) => answer,
            () = self.vmm.ended() => return Err(death(doing, &self.vmm, &self.console)),
        };
        if let Ok(_) | Err(ttrpc::Error::RpcStatus(_)) = answer {
            self.signs.heard();
        }
        match answer {
            Ok(answer) => Ok(answer),
            Err(ttrpc::Error::RpcStatus(status)) => Err(Error::Refused {
                doing,
                code: status.code(),
                message: printable(&status.message, 1000),
            }),
            Err(error) => {
                Err(broken(doing, &self.vmm, &self.console, io::Error::other(error)).await)
            }
        }
    }

    /// Looks after the agent until the machine ends, which is what becomes of it when the agent
    /// says nothing for too long.
    pub async fn look_after_agent(&self) {
        let asking = async || {
            let ping = self.wait("asking for a sign of life", async |agent| {
                agent.ping(no_limit(), &Empty::default()).await
            });
            if let Err(error) = ping.await {
                tracing::debug!(%error, "the agent does not answer");
            }
            // Nothing else happens, or it would not have been asked.
            sys::give_back();
        };
        let machine = pulse::Machine {
            pid: self.vmm.pid(),
            control: self.state.short_path(CONTROL),
        };
        tokio::select! {
            biased;
            () = self.vmm.ended() => {}
            silent = pulse::silence(&self.signs, self.pace, machine, asking) => {
                let seconds = silent.as_secs();
                self.vmm.condemn(Verdict::Silent { seconds });
            }
        }
    }

    /// Opens a standard stream by its name.
    ///
    /// # Errors
    /// When the agent does not take it.
    pub async fn stream(&self, id: StreamId) -> Result<UnixStream, Error> {
        let path = self.state.short_path(VSOCK);
        let doing = "opening a standard stream";
        let machine = (&self.vmm, &self.console);
        connected(machine, doing, CALL, agent::stream(&path, id)).await
    }
}

/// Waits for a connection with a deadline; the VMM's death ends it.
pub(super) async fn connected<T>(
    (vmm, console): (&Vmm, &Console),
    doing: &'static str,
    patience: Duration,
    connection: impl Future<Output = io::Result<T>>,
) -> Result<T, Error> {
    tokio::select! {
        biased;
        result = timeout(patience, connection) => match result {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(source)) => Err(broken(doing, vmm, console, source).await),
            Err(_) => Err(Error::CallDeadline {
                doing,
                seconds: patience.as_secs(),
            }),
        },
        () = vmm.ended() => Err(death(doing, vmm, console)),
    }
}

/// Why a connection broke: mostly because the VMM died, which is then told.
async fn broken(doing: &'static str, vmm: &Vmm, console: &Console, source: io::Error) -> Error {
    match timeout(DEATH, vmm.ended()).await {
        Ok(()) => death(doing, vmm, console),
        Err(_) => Error::Connection { doing, source },
    }
}

pub(super) fn death(doing: &'static str, vmm: &Vmm, console: &Console) -> Error {
    let death = vmm.death();
    let lines = (!death.is_dismissal()).then(|| console.last_lines(CONSOLE_LINES));
    Error::Death {
        doing,
        death,
        console: ConsoleTail(lines),
    }
}
