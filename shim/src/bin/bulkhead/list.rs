//! `bulkhead list`: the containers of this root and namespace.

use std::collections::HashMap;

use nix::unistd::{Uid, User};
use shim::{
    oci::{HomeError, State},
    text::chain,
};

use super::{
    cli::{Format, Global, ListArgs},
    home,
    say::{complain, say},
};

/// Prints them.
pub(crate) fn list(global: &Global, args: &ListArgs) -> anyhow::Result<u8> {
    let home = home(global)?;
    let mut states = Vec::new();
    let mut users = Users::default();
    for id in home.names() {
        match home.state(&id) {
            Ok(mut state) => {
                state.owner = users.name(home.owner(&id));
                states.push(state);
            }
            // It is being made, or removed.
            Err(HomeError::NotFound) => {}
            // The others are told of all the same.
            Err(error) => complain(format_args!("bulkhead: {id}: {}\n", chain(&error))),
        }
    }
    match (args.quiet, args.format) {
        (true, _) => states.iter().try_for_each(|state| say(&state.id))?,
        (false, Format::Json) if states.is_empty() => say("null")?,
        (false, Format::Json) => say(serde_json::to_string(&states)?)?,
        (false, Format::Table) => say(table(&states))?,
    }
    Ok(0)
}

/// Columns as wide as their widest cell and three spaces, at least twelve.
fn table(states: &[State]) -> String {
    let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let mut rows = vec![head];
    rows.extend(states.iter().map(|state| {
        [
            state.id.clone(),
            state.pid.to_string(),
            state.status.clone(),
            state.bundle.display().to_string(),
            state.created.clone(),
            state.owner.clone(),
        ]
    }));
    let widths: [usize; 6] = std::array::from_fn(|column| {
        let widest = rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        (widest + 3).max(12)
    });
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        line.trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// Names of users, each looked up once.
#[derive(Default)]
struct Users(HashMap<u32, String>);

impl Users {
    fn name(&mut self, uid: u32) -> String {
        let name = self.0.entry(uid).or_insert_with(|| {
            let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
            user.map_or_else(|| format!("#{uid}"), |user| user.name)
        });
        name.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_laid_out_as_that_of_other_runtimes() {
        let state = State {
            oci_version: "1.0.2".to_owned(),
            id: "t1".to_owned(),
            pid: 3955,
            status: "created".to_owned(),
            bundle: "/tmp/runcprobe/b".into(),
            rootfs: "/tmp/runcprobe/b/rootfs".into(),
            created: "2026-11-26T07:52:20.925081169Z".to_owned(),
            annotations: HashMap::new(),
            owner: "root".to_owned(),
        };
        assert_eq!(
            table(&[state]),
            "ID          PID         STATUS      BUNDLE             CREATED                          OWNER\n\
             t1          3955        created     /tmp/runcprobe/b   2026-11-26T07:52:20.925081169Z   root\n"
        );
    }
}
