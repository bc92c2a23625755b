//! `bulkhead events`: the counters of a container, once or again and again.

use std::{thread, time::Duration};

use anyhow::Context as _;
use serde_json::{Value, json};
use shim::{
    id::ContainerId,
    oci::{Home, HomeError, Request},
};

use super::{
    cli::{EventsArgs, Global},
    home,
    say::say,
};

/// Prints them.
pub(crate) fn events(global: &Global, args: &EventsArgs) -> anyhow::Result<u8> {
    let id = ContainerId::parse(&args.id)?;
    let home = home(global)?;
    let interval = duration(&args.interval)
        .with_context(|| format!("{:?} is no time such as 5s or 500ms", args.interval))?;
    let mut kills = told(&id, &counters(&home, &id)?, None)?;
    if args.stats {
        return Ok(0);
    }
    loop {
        thread::sleep(interval);
        let counters = match counters(&home, &id) {
            Ok(counters) => counters,
            // Its end is the end of its events.
            Err(HomeError::NotFound | HomeError::NotRunning) => return Ok(0),
            Err(error) if home.state(&id).is_ok_and(|state| state.status != "stopped") => {
                return Err(error.into());
            }
            Err(_) => return Ok(0),
        };
        kills = told(&id, &counters, Some(kills))?;
    }
}

/// What a container has used, and how often it was short of memory.
struct Counters {
    stats: Value,
    oom_kills: u64,
}

fn counters(home: &Home, id: &ContainerId) -> Result<Counters, HomeError> {
    let request = Request::Stats { id: id.to_string() };
    let mut stats = home.ask(id, &request)?;
    let kills = stats
        .as_object_mut()
        .and_then(|stats| stats.remove("oom_kills"));
    Ok(Counters {
        oom_kills: kills.as_ref().and_then(Value::as_u64).unwrap_or_default(),
        stats,
    })
}

/// Prints counters, and before them whether processes were killed for want of memory since there
/// were `before` such kills. Returns how many there are now.
fn told(id: &ContainerId, counters: &Counters, before: Option<u64>) -> anyhow::Result<u64> {
    let Counters { stats, oom_kills } = counters;
    if before.is_some_and(|before| *oom_kills > before) {
        say(json!({"type": "oom", "id": id.as_str()}))?;
    }
    say(json!({"type": "stats", "id": id.as_str(), "data": stats}))?;
    Ok(*oom_kills)
}

/// Reads a time as Go writes it.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
    let number: f64 = text[..digits].parse().ok()?;
    let seconds = match &text[digits..] {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| !duration.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_other_runtimes_read_them() {
        assert_eq!(duration("5s"), Some(Duration::from_secs(5)));
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration("1.5m"), Some(Duration::from_secs(90)));
        for text in ["", "5", "s", "0s", "-1s", "1d"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }
}
