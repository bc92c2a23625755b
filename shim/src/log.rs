//! Log lines, in the two forms that callers of container runtimes read.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Write},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use serde_json::{Map, Value};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    subscriber::SetGlobalDefaultError,
};
use tracing_subscriber::{
    layer::{Context, Layer, SubscriberExt},
    registry,
};

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// key=value
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends this process's log lines of `level` and above to `file`, else to stderr.
///
/// # Errors
/// When the log was started already.
pub fn start(
    file: Option<File>,
    format: Format,
    level: LevelFilter,
) -> Result<(), SetGlobalDefaultError> {
    let lines = Lines { format };
    set_output(match file {
        Some(file) => Output::File(file),
        None => Output::Stderr,
    });
    let subscriber = registry().with(lines.with_filter(level));
    tracing::subscriber::set_global_default(subscriber)
}

/// Sends the lines to `file` from now on, or nowhere.
pub fn redirect(file: Option<File>) {
    set_output(match file {
        Some(file) => Output::File(file),
        None => Output::Nowhere,
    });
}

/// Where lines go.
enum Output {
    /// The error that ends the command is printed there anyway.
    Stderr,
    File(File),
    Nowhere,
}

static OUTPUT: Mutex<Output> = Mutex::new(Output::Stderr);

fn set_output(output: Output) {
    *OUTPUT.lock().unwrap_or_else(PoisonError::into_inner) = output;
}

struct Lines {
    format: Format,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let level = *event.metadata().level();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let line = match self.format {
            Format::Text => fields.text(level, &now()),
            Format::Json => fields.json(level, &now()),
        };
        // There is nowhere left to tell that the log cannot be written.
        let _ = match &*OUTPUT.lock().unwrap_or_else(PoisonError::into_inner) {
            Output::File(file) => (&*file).write_all(line.as_bytes()),
            Output::Stderr if level == Level::ERROR => Ok(()),
            Output::Stderr => io::stderr().write_all(line.as_bytes()),
            Output::Nowhere => Ok(()),
        };
    }
}

/// An event's fields, as text.
#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl Fields {
    fn text(&self, level: Level, time: &str) -> String {
        let mut line = format!("time={time:?} level={} msg={:?}", name(level), self.message);
        for (key, value) in &self.others {
            let _ = write!(line, " {key}={value:?}");
        }
        line + "\n"
    }

    fn json(&self, level: Level, time: &str) -> String {
        let others = self.others.iter();
        let mut record: Map<String, Value> = others
            .map(|(key, value)| ((*key).to_owned(), value.as_str().into()))
            .collect();
        record.insert("level".to_owned(), name(level).into());
        record.insert("msg".to_owned(), self.message.as_str().into());
        record.insert("time".to_owned(), time.into());
        Value::Object(record).to_string() + "\n"
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            key => self.others.push((key, value.to_owned())),
        }
    }
}

fn name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    rfc3339(since.map_or(0, |since| since.as_secs()))
}

/// A moment as RFC 3339 writes it, in UTC, with nanoseconds.
pub fn timestamp(time: SystemTime) -> String {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let whole = rfc3339(since.as_secs());
    let whole = whole.trim_end_matches('Z');
    format!("{whole}.{:09}Z", since.subsec_nanos())
}

/// The second as RFC 3339 writes it, in UTC.
fn rfc3339(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days: years begin in March, so that the leap day is a year's last.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields() -> Fields {
        Fields {
            message: "it said \"no\"\n".to_owned(),
            others: vec![("container", "web".to_owned())],
        }
    }

    #[test]
    fn a_line_of_text_is_one_line() {
        assert_eq!(
            fields().text(Level::ERROR, "t"),
            "time=\"t\" level=error msg=\"it said \\\"no\\\"\\n\" container=\"web\"\n"
        );
    }

    #[test]
    fn a_json_record_has_the_keys_that_callers_read() {
        let record: Value = serde_json::from_str(&fields().json(Level::WARN, "t")).expect("json");
        assert_eq!(record["level"], "warning");
        assert_eq!(record["msg"], "it said \"no\"\n");
        assert_eq!(record["time"], "t");
        assert_eq!(record["container"], "web");
    }

    #[test]
    fn days_become_dates() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(4_102_444_799), "2099-12-31T23:59:59Z");
    }
}
