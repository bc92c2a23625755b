//! `bulkhead exec`: a further program in a container.
//!
//! In the foreground this process stands for the program; detached, a relay does.

use std::{fs, os::fd::AsFd, path::Path};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Map, Value, json};
use shim::{
    container::Terminal,
    id::ContainerId,
    oci::{Exec, Found, Request, Stand, StandIn, State},
};

use super::{
    cli::{ExecArgs, Global},
    home,
    new::{Streams, send, write_pid},
};

/// Runs it and, unless it is detached, returns its exit status.
pub(crate) fn exec(global: &Global, args: &ExecArgs) -> anyhow::Result<u8> {
    let id = ContainerId::parse(&args.id)?;
    possible(args)?;
    let home = home(global)?;
    let state = home.state(&id)?;
    match state.status.as_str() {
        "stopped" => bail!("cannot exec in a stopped container"),
        "paused" if !args.ignore_paused => {
            bail!("cannot exec in a paused container (use --ignore-paused to override)")
        }
        "paused" => {
            // As with other runtimes, whose program would be frozen, too.
            home.ask(&id, &Request::Thawed { id: id.to_string() })?;
        }
        _ => {}
    }
    let process = process(args, &state)?;
    let terminal = process.get("terminal").and_then(Value::as_bool) == Some(true);
    let Found::Living(client) = home.find(&id)? else {
        bail!("cannot exec in a stopped container");
    };
    let request = |pid| {
        Request::Exec(Exec {
            id: id.to_string(),
            exec: format!("exec-{}-{:x}", std::process::id(), shim::oci::random()),
            process: process.clone(),
            pid,
        })
    };
    if args.detach {
        let streams = Streams::of(terminal, args.console_socket.as_deref())?;
        let words = words(&process);
        let relay = Stand::beside(state.pid)?.called(words, streams.stdio()?, terminal);
        let relay = relay.spawn()?;
        let made = send(client, &request(relay.pid), relay.socket.as_fd(), &streams)
            .and_then(|()| write_pid(args.pid_file.as_deref(), relay.pid));
        return match made {
            Ok(()) => Ok(0),
            Err(error) => {
                relay.discard();
                Err(error.context("exec failed"))
            }
        };
    }

    let own = match (terminal, &args.console_socket) {
        (true, None) => Some(Terminal::find()?),
        _ => None,
    };
    let streams = match &own {
        Some(terminal) => Streams::terminal(terminal.try_clone()?),
        None => Streams::of(terminal, args.console_socket.as_deref())?,
    };
    let stand_in = StandIn::new().context("cannot stand in for the program")?;
    let raw = own.as_ref().map(Terminal::raw).transpose();
    let raw = raw.context("cannot change the mode of the terminal")?;
    let pid = std::process::id();
    send(client, &request(pid), stand_in.theirs(), &streams)
        .map_err(|error| error.context("exec failed"))?;
    drop(streams);
    write_pid(args.pid_file.as_deref(), pid)?;
    let status = stand_in
        .stand(|| own.as_ref().and_then(Terminal::size))
        .context("cannot stand in for the program")?;
    drop(raw);
    Ok(status)
}

/// What the program's command line consists of.
fn words(process: &Map<String, Value>) -> Vec<String> {
    let words = process.get("args").and_then(Value::as_array);
    let words = words.into_iter().flatten().filter_map(Value::as_str);
    words.map(str::to_owned).collect()
}

/// Refuses what cannot be had in a virtual machine.
fn possible(args: &ExecArgs) -> anyhow::Result<()> {
    ensure!(
        args.preserve_fds == 0,
        "--preserve-fds {} is not possible: a virtual machine cannot be given descriptors; leave it out",
        args.preserve_fds
    );
    ensure!(
        args.cgroup.is_empty(),
        "--cgroup {} is not supported: the program joins the container's cgroup; leave it out",
        args.cgroup.join(" ")
    );
    ensure!(
        args.process.is_some() || !args.command.is_empty(),
        "process args cannot be empty: name a program, or a file with --process"
    );
    Ok(())
}

/// The specification's `process`, from its file or from the container's own with changes.
fn process(args: &ExecArgs, state: &State) -> anyhow::Result<Map<String, Value>> {
    let mut process = match &args.process {
        Some(file) => object(&read(file)?, file)?,
        None => {
            let file = state.bundle.join("config.json");
            let config = read(&file)?;
            let mut process = object(&config["process"], &file)?;
            process.insert("args".to_owned(), json!(args.command));
            process.insert("terminal".to_owned(), json!(args.tty));
            process
        }
    };
    if args.tty {
        process.insert("terminal".to_owned(), json!(true));
    }
    if let Some(cwd) = &args.cwd {
        process.insert("cwd".to_owned(), json!(cwd));
    }
    if args.no_new_privs {
        process.insert("noNewPrivileges".to_owned(), json!(true));
    }
    append(
        &mut process,
        "env",
        args.env.iter().map(|value| json!(value)),
    );
    user(&mut process, args)?;
    if !args.cap.is_empty() {
        let mut sets = process
            .get("capabilities")
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        for set in ["bounding", "effective", "permitted"] {
            append(&mut sets, set, args.cap.iter().map(|name| json!(name)));
        }
        process.insert("capabilities".to_owned(), Value::Object(sets));
    }
    Ok(process)
}

fn user(process: &mut Map<String, Value>, args: &ExecArgs) -> anyhow::Result<()> {
    let mut user = process
        .get("user")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default();
    if let Some(text) = &args.user {
        let (uid, gid) = match text.split_once(':') {
            Some((uid, gid)) => (uid, Some(gid)),
            None => (text.as_str(), None),
        };
        let number = |text: &str| {
            text.parse::<u32>()
                .with_context(|| format!("--user {text:?} is no UID[:GID] in numbers"))
        };
        user.insert("uid".to_owned(), json!(number(uid)?));
        if let Some(gid) = gid {
            user.insert("gid".to_owned(), json!(number(gid)?));
        }
    }
    append(
        &mut user,
        "additionalGids",
        args.additional_gids.iter().map(|gid| json!(gid)),
    );
    process.insert("user".to_owned(), Value::Object(user));
    Ok(())
}

fn append(object: &mut Map<String, Value>, key: &str, values: impl Iterator<Item = Value>) {
    let mut all = object
        .get(key)
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    all.extend(values);
    if !all.is_empty() {
        object.insert(key.to_owned(), Value::Array(all));
    }
}

fn read(path: &Path) -> anyhow::Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is not a valid description of a process", path.display()))
}

fn object(value: &Value, file: &Path) -> anyhow::Result<Map<String, Value>> {
    let object = value.as_object().cloned();
    object.with_context(|| format!("{} describes no process", file.display()))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parsed(flags: &[&str]) -> Box<ExecArgs> {
        let words = [&["bulkhead", "exec"], flags].concat();
        match Cli::try_parse_from(words).expect("parsed").command {
            Some(Command::Exec(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_change_the_containers_own_process() {
        let directory = tempfile::tempdir().expect("a directory");
        let config = json!({"process": {
            "args": ["sh"], "cwd": "/", "env": ["A=1"], "user": {"uid": 0, "gid": 0},
            "terminal": true, "capabilities": {"bounding": ["CAP_KILL"]}
        }});
        fs::write(directory.path().join("config.json"), config.to_string()).expect("written");
        let state = State {
            oci_version: "1.0.2".to_owned(),
            id: "web".to_owned(),
            pid: 1,
            status: "running".to_owned(),
            bundle: directory.path().to_owned(),
            rootfs: "/".into(),
            created: String::new(),
            annotations: std::collections::HashMap::new(),
            owner: String::new(),
        };
        let args = parsed(&[
            "-u",
            "65534:5",
            "-g",
            "7",
            "-e",
            "B=2",
            "-c",
            "CAP_CHOWN",
            "web",
            "ls",
            "-u",
        ]);
        let process = process(&args, &state).expect("described");
        assert_eq!(
            Value::Object(process),
            json!({
                "args": ["ls", "-u"], "cwd": "/", "env": ["A=1", "B=2"], "terminal": false,
                "user": {"uid": 65534, "gid": 5, "additionalGids": [7]},
                "capabilities": {
                    "bounding": ["CAP_KILL", "CAP_CHOWN"],
                    "effective": ["CAP_CHOWN"],
                    "permitted": ["CAP_CHOWN"]
                }
            })
        );
    }

    #[test]
    fn a_program_without_a_name_is_refused() {
        let error = possible(&parsed(&["web"])).expect_err("refused");
        assert!(error.to_string().contains("cannot be empty"), "{error}");
    }
}
