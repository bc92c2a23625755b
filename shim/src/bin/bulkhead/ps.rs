//! `bulkhead ps`: the processes of a container.

use std::fmt::Write as _;

use serde::Deserialize;
use shim::{id::ContainerId, oci::Request};

use super::{
    cli::{Format, Global, PsArgs},
    home,
    say::say,
};

/// A process in the guest.
#[derive(Debug, Deserialize)]
struct Process {
    pid: u32,
    ppid: u32,
    uid: u32,
    cpu_us: u64,
    tty: String,
    command: String,
}

/// Prints them.
pub(crate) fn ps(global: &Global, args: &PsArgs) -> anyhow::Result<u8> {
    let id = ContainerId::parse(&args.id)?;
    let home = home(global)?;
    let request = |id: &ContainerId| Request::Pids { id: id.to_string() };
    if args.format == Format::Json {
        say(home.ask(&id, &request(&id))?)?;
        return Ok(0);
    }
    let plain = ["-ef", "ef", "aux", "-aux"];
    anyhow::ensure!(
        args.options
            .iter()
            .all(|option| plain.contains(&option.as_str())),
        "options of the host's ps ({}) cannot be had: the processes are in the guest; leave them out",
        args.options.join(" ")
    );
    let request = Request::Processes { id: id.to_string() };
    let processes: Vec<Process> = serde_json::from_value(home.ask(&id, &request)?)?;
    say(table(&processes))?;
    Ok(0)
}

fn table(processes: &[Process]) -> String {
    let mut table = "UID        PID  PPID TTY          TIME CMD\n".to_owned();
    for process in processes {
        let tty = match process.tty.as_str() {
            "" => "?",
            tty => tty,
        };
        let seconds = process.cpu_us / 1_000_000;
        let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let _ = writeln!(
            table,
            "{:<8} {:>5} {:>5} {tty:<8} {hours:02}:{minutes:02}:{seconds:02} {}",
            process.uid, process.pid, process.ppid, process.command
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_columns_that_people_know() {
        let process = Process {
            pid: 71,
            ppid: 1,
            uid: 0,
            cpu_us: 3_661_000_000,
            tty: String::new(),
            command: "sleep 100".to_owned(),
        };
        assert_eq!(
            table(&[process]),
            "UID        PID  PPID TTY          TIME CMD\n\
             0           71     1 ?        01:01:01 sleep 100\n"
        );
    }
}
