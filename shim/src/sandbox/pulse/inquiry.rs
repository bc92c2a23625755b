//! Whether the VMM runs: it is asked on its control socket, whose server waits for no guest.
//!
//! One that is stopped takes any number of questions and answers none, so there is one at a time.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use ::vmm::control::message::{Reply, Request, State};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

/// The longest answer.
const ANSWER_MAX: usize = 4096;

/// A VMM to be asked.
#[derive(Debug)]
pub(super) struct Inquiry {
    path: PathBuf,
    /// The question under way.
    asked: Option<Asked>,
}

#[derive(Debug)]
struct Asked {
    stream: UnixStream,
    /// What came of the answer.
    answer: Vec<u8>,
}

impl Inquiry {
    /// The one that takes commands at `path`.
    pub(super) fn of(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            asked: None,
        }
    }

    /// What it says within this time, if it says anything; else it may still say it the next time.
    pub(super) async fn state(&mut self, patience: Duration) -> Option<State> {
        let answered = timeout(patience, self.answer()).await.ok()?;
        self.asked = None;
        answered
            .inspect_err(|error| tracing::debug!(%error, "the VMM cannot be asked whether it runs"))
            .ok()
    }

    async fn answer(&mut self) -> io::Result<State> {
        let asked = match &mut self.asked {
            Some(asked) => asked,
            none => none.insert(ask(&self.path).await?),
        };
        while !asked.answer.ends_with(b"\n") {
            let got = asked.stream.read_buf(&mut asked.answer).await?;
            if got == 0 || asked.answer.len() > ANSWER_MAX {
                return Err(io::Error::other("its answer has no end"));
            }
        }
        match serde_json::from_slice(&asked.answer)? {
            Reply::State { state } => Ok(state),
            other => Err(io::Error::other(format!("it answers {other:?}"))),
        }
    }
}

async fn ask(path: &Path) -> io::Result<Asked> {
    let mut stream = UnixStream::connect(path).await?;
    let mut line = serde_json::to_vec(&Request::State {})?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    Ok(Asked {
        stream,
        answer: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn vmm() -> (tempfile::TempDir, UnixListener, Inquiry) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("vmm.sock");
        let listener = UnixListener::bind(&path).expect("bound");
        (directory, listener, Inquiry::of(&path))
    }

    /// Takes a question and answers it so.
    async fn answer(listener: &UnixListener, words: &[u8]) {
        let (mut stream, _) = listener.accept().await.expect("accepted");
        let mut question = [0; 20];
        stream.read_exact(&mut question).await.expect("asked");
        assert_eq!(&question, b"{\"request\":\"state\"}\n");
        stream.write_all(words).await.expect("answered");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_vmm_says_whether_its_guest_runs() {
        let (_directory, listener, mut inquiry) = vmm();
        for (word, state) in [("running", State::Running), ("paused", State::Paused)] {
            let words = format!("{{\"reply\":\"state\",\"state\":\"{word}\"}}\n");
            let (said, ()) = tokio::join!(inquiry.state(LONG), answer(&listener, words.as_bytes()));
            assert_eq!(said, Some(state));
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_vmm_that_does_not_answer_is_asked_once_and_may_answer_late() {
        let (_directory, listener, mut inquiry) = vmm();
        for _ in 0..300 {
            assert_eq!(inquiry.state(Duration::from_millis(1)).await, None);
        }
        let words = b"{\"reply\":\"state\",\"state\":\"running\"}\n";
        let (said, ()) = tokio::join!(inquiry.state(LONG), answer(&listener, words));
        assert_eq!(said, Some(State::Running));
        let another = timeout(Duration::from_millis(10), listener.accept()).await;
        assert!(another.is_err(), "it was asked more than once");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn whatever_else_a_vmm_says_is_no_answer() {
        let (_directory, listener, mut inquiry) = vmm();
        let endless = [b'x'; 2 * ANSWER_MAX];
        for words in [&b"{\"reply\":\"done\"}\n"[..], b"\n", b"", &endless] {
            let (said, ()) = tokio::join!(inquiry.state(LONG), answer(&listener, words));
            assert_eq!(said, None);
        }
        drop(listener);
        assert_eq!(inquiry.state(LONG).await, None);
    }
}
