//! A client of containerd's CRI socket, as a kubelet is one.
//!
//! The calls are gRPC's: a message of protobuf, with five bytes before it, posted over HTTP/2. Curl
//! does the posting; the fields' numbers are those of Kubernetes' `runtime/v1/api.proto`.

mod wire;

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail, ensure};
pub use wire::{Fields, Message};

use super::{command::run, images::BUSYBOX};

/// A client.
pub struct Cri {
    socket: PathBuf,
}

/// A sandbox, and what it was made from, which each of its containers is made with.
pub struct Sandbox {
    /// Its id.
    pub id: String,
    config: Message,
}

/// What a container is made from.
#[derive(Default)]
pub struct Container<'a> {
    /// Its name in the pod.
    pub name: &'a str,
    /// What runs in it.
    pub command: &'a [&'a str],
    /// Variables.
    pub env: &'a [(&'a str, &'a str)],
    /// Directories of the host, and where they are in it.
    pub mounts: &'a [(&'a str, &'a str)],
    /// Memory that it may use; 0 for any amount.
    pub memory_bytes: u64,
}

/// What became of a command in a container.
#[derive(Debug, PartialEq, Eq)]
pub struct Executed {
    /// What it printed.
    pub stdout: String,
    /// What it printed there.
    pub stderr: String,
    /// Its exit status.
    pub status: u64,
}

/// How a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Made, not started.
    Created,
    /// Started, not ended.
    Running,
    /// Ended with this status.
    Exited(u64),
}

/// Namespaces as a kubelet has them: each container has a pid namespace of its own.
fn own_processes() -> Message {
    const CONTAINER: u64 = 1;
    Message::default().number(2, CONTAINER)
}

impl Cri {
    /// One of the socket.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Makes a call.
    ///
    /// # Errors
    /// When there is no answer, or it is an error.
    pub fn call(&self, name: &str, request: &Message) -> Result<Fields> {
        self.try_call(name, request)
            .with_context(|| format!("the CRI call {name} failed"))
    }

    fn try_call(&self, name: &str, request: &Message) -> Result<Fields> {
        let directory = tempfile::tempdir()?;
        let file = |name: &str| directory.path().join(name);
        let length = u32::try_from(request.bytes().len())?;
        let frame = [&[0][..], &length.to_be_bytes(), request.bytes()].concat();
        fs::write(file("request"), frame)?;
        let curl = run(Command::new("curl")
            .current_dir(directory.path())
            .args(["--silent", "--show-error", "--http2-prior-knowledge"])
            .arg("--unix-socket")
            .arg(&self.socket)
            .args(["--header", "content-type: application/grpc"])
            .args(["--header", "te: trailers", "--data-binary", "@request"])
            .args(["--dump-header", "headers", "--output", "response"])
            .arg(format!("http://localhost/runtime.v1.RuntimeService/{name}")))?;
        curl.text()?;

        let headers = fs::read_to_string(file("headers"))?;
        let header = |name: &str| {
            let mut lines = headers.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            value.unwrap_or_default().trim().to_owned()
        };
        let status = header("grpc-status");
        ensure!(status == "0", "status {status}: {}", header("grpc-message"));
        let response = fs::read(file("response"))?;
        match &response[..] {
            [0, _, _, _, _, message @ ..] => Fields::parse(message),
            _ => bail!("no message: {response:?}"),
        }
    }

    /// Makes a sandbox with a handler of containerd's.
    ///
    /// # Errors
    /// When containerd refuses.
    pub fn run_sandbox(&self, name: &str, handler: &str, logs: &str) -> Result<Sandbox> {
        let metadata = Message::default()
            .text(1, name)
            .text(2, &format!("uid-{name}"))
            .text(3, "default");
        let config = Message::default()
            .message(1, &metadata)
            .text(2, name)
            .text(3, logs)
            .entry(6, "app", name)
            .message(
                8,
                &Message::default()
                    .text(1, "/kubepods")
                    .message(2, &Message::default().message(1, &own_processes())),
            );
        let request = Message::default().message(1, &config).text(2, handler);
        let id = self.call("RunPodSandbox", &request)?.text(1)?;
        Ok(Sandbox { id, config })
    }

    /// Makes a container in a sandbox and returns its id.
    ///
    /// # Errors
    /// When containerd refuses.
    pub fn create(&self, sandbox: &Sandbox, container: &Container<'_>) -> Result<String> {
        let metadata = Message::default().text(1, container.name);
        let image = Message::default().text(1, BUSYBOX);
        let mut config = Message::default().message(1, &metadata).message(2, &image);
        for word in container.command {
            config = config.text(3, word);
        }
        for (name, value) in container.env {
            config = config.entry(6, name, value);
        }
        for (host, place) in container.mounts {
            config = config.message(7, &Message::default().text(1, place).text(2, host));
        }
        let resources = Message::default().number(4, container.memory_bytes);
        let config = config.text(11, &format!("{}.log", container.name)).message(
            15,
            &Message::default()
                .message(1, &resources)
                .message(2, &Message::default().message(3, &own_processes())),
        );
        let request = Message::default()
            .text(1, &sandbox.id)
            .message(2, &config)
            .message(3, &sandbox.config);
        self.call("CreateContainer", &request)?.text(1)
    }

    /// Makes a call about one sandbox or container and nothing else.
    ///
    /// # Errors
    /// As [`Cri::call`].
    pub fn tell(&self, name: &str, id: &str) -> Result<Fields> {
        self.call(name, &Message::default().text(1, id))
    }

    /// Stops a container, with a second's patience.
    ///
    /// # Errors
    /// As [`Cri::call`].
    pub fn stop(&self, id: &str) -> Result<()> {
        self.call(
            "StopContainer",
            &Message::default().text(1, id).number(2, 1),
        )?;
        Ok(())
    }

    /// Runs a command in a container.
    ///
    /// # Errors
    /// As [`Cri::call`].
    pub fn exec(&self, id: &str, command: &[&str]) -> Result<Executed> {
        let mut request = Message::default().text(1, id).number(3, 60);
        for word in command {
            request = request.text(2, word);
        }
        let response = self.call("ExecSync", &request)?;
        Ok(Executed {
            stdout: response.text(1)?,
            stderr: response.text(2)?,
            status: response.number(3)?,
        })
    }

    /// How a container is.
    ///
    /// # Errors
    /// As [`Cri::call`].
    pub fn state(&self, id: &str) -> Result<State> {
        let status = self.tell("ContainerStatus", id)?.message(1)?;
        match status.number(3)? {
            0 => Ok(State::Created),
            1 => Ok(State::Running),
            2 => Ok(State::Exited(status.number(7)?)),
            other => bail!("container {id} is in state {other}"),
        }
    }
}
