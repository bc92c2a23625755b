//! Whether the agent still lives, found without anybody asking.
//!
//! It is asked for a sign of life only when nothing was heard of it for a while, whatever that might
//! have been. From then on its silence counts, but only while it could have answered, see
//! [`silence`](Silence):
//!
//! ```text
//!            something was heard
//!          ┌─────────────────────┐
//!          ▼                     │            counted enough
//!        calm ──── quiet ────► asked ──────────────────────────► dead
//!                                │ ▲
//!                  a tick ended: └─┘ the machine ran, and so did we?
//! ```
//!
//! `docs/decisions/0155-deaths-and-their-deadlines.md` says why it is so careful.

use std::{
    path::PathBuf,
    pin::Pin,
    time::{Duration, Instant},
};

use tokio::time::sleep;

mod inquiry;
mod signs;
mod silence;
mod waits;

pub(crate) use signs::Signs;

use self::{
    inquiry::Inquiry,
    silence::{Judgement, Silence, Tick},
    waits::Waits,
};

/// How long an agent may be silent.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// So long after it was heard it is asked for a sign of life.
    pub quiet: Duration,
    /// While it is silent it is looked once in so long whether it could have answered.
    pub tick: Duration,
    /// A VMM that runs says so within this time.
    pub answer: Duration,
    /// After so much silence, tick by tick, the agent is dead.
    pub silence: Duration,
    /// The same where it was set to work and has not said that it is done.
    pub work: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            // One question in so long is nothing, of a guest that has nothing else to do.
            quiet: Duration::from_secs(20),
            tick: Duration::from_secs(5),
            answer: Duration::from_secs(1),
            // What is between a question and its answer is a few thousand instructions of the guest,
            // and none of them waits for a disk. A single processor with as many busy processes as
            // it may have takes some tenths of a second for them; one that has no memory left, and
            // looks for some with each of them, some seconds. What the host withholds does not
            // count at all.
            silence: Duration::from_secs(60),
            // The agent has one thread. While it unmounts, what is dirty goes to a disk: some
            // gigabytes of it, at some megabytes a second. And a file of the host may be on a server
            // that is being started again.
            work: Duration::from_secs(600),
        }
    }
}

/// The machine whose agent it is.
#[derive(Debug)]
pub(super) struct Machine {
    /// The VMM's pid.
    pub(super) pid: u32,
    /// Where it takes commands.
    pub(super) control: PathBuf,
}

/// Waits until the agent is dead, and tells how long it was silent. `ask` asks for a sign of life
/// and comes back when that is answered or can never be; one question is not asked before the end of
/// the one before it.
pub(super) async fn silence<Asking: Future<Output = ()>>(
    signs: &Signs,
    pace: Pace,
    machine: Machine,
    ask: impl Fn() -> Asking,
) -> Duration {
    let mut question = None;
    loop {
        sleep(pace.quiet).await;
        if !signs.take() {
            question.get_or_insert_with(|| Box::pin(ask()));
            let silent = unanswered(signs, pace, &machine, &mut question).await;
            if let Some(silent) = silent {
                return silent;
            }
        }
    }
}

/// Waits for anything to be heard, or for the end of patience, which is told.
async fn unanswered<Asking: Future<Output = ()>>(
    signs: &Signs,
    pace: Pace,
    machine: &Machine,
    question: &mut Option<Pin<Box<Asking>>>,
) -> Option<Duration> {
    let mut silence = Silence::new(pace);
    let mut vmm = Inquiry::of(&machine.control);
    let mut waits = Waits::of(machine.pid);
    let mut noted = false;
    loop {
        let begin = Instant::now();
        with(question, sleep(pace.tick)).await;
        if signs.take() {
            break;
        }
        let state = with(question, vmm.state(pace.answer)).await;
        if signs.take() {
            break;
        }
        let tick = Tick {
            lasted: begin.elapsed(),
            held_up: waits.since_last(),
            state,
            working: signs.working(),
        };
        match silence.judge(&tick) {
            Judgement::Dead(silent) => return Some(silent),
            Judgement::Stopped if !noted => {
                noted = true;
                tracing::warn!(
                    "neither the guest's agent nor the VMM answers: the virtual machine is taken for stopped and left alone"
                );
            }
            judgement => tracing::debug!(?judgement, ?tick, "the guest's agent does not answer"),
        }
    }
    if noted {
        tracing::info!("the guest's agent is heard again");
    }
    None
}

/// Waits for `other` while the question is under way.
async fn with<Asking: Future<Output = ()>, T>(
    question: &mut Option<Pin<Box<Asking>>>,
    other: impl Future<Output = T>,
) -> T {
    let mut other = std::pin::pin!(other);
    if let Some(asking) = question {
        tokio::select! {
            biased;
            () = asking.as_mut() => {}
            done = &mut other => return done,
        }
        *question = None;
    }
    other.await
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::time::timeout;

    use super::*;

    fn nobody() -> Machine {
        Machine {
            pid: 0,
            control: PathBuf::from("/nowhere"),
        }
    }

    const SHORT: Pace = Pace {
        quiet: Duration::from_millis(20),
        tick: Duration::from_millis(5),
        answer: Duration::from_millis(50),
        silence: Duration::from_millis(50),
        work: Duration::from_millis(50),
    };

    /// Waits in vain for the death of an agent that `ask` asks for a sign of life.
    async fn not_dead<Asking: Future<Output = ()>>(signs: &Signs, ask: impl Fn() -> Asking) {
        let dead = silence(signs, SHORT, nobody(), ask);
        let dead = timeout(Duration::from_millis(500), dead).await;
        assert!(dead.is_err(), "without a VMM that runs nobody is dead");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_agent_that_is_heard_anyway_is_not_asked() {
        let signs = Signs::default();
        // Each time that anything at all happens here it has spoken before.
        let talking = async {
            loop {
                signs.heard();
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            () = talking => {}
            () = not_dead(&signs, async || panic!("it was asked")) => {}
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_agent_that_says_nothing_else_is_asked_again_and_again() {
        let signs = Signs::default();
        let asked = AtomicUsize::new(0);
        let (enough, mut told) = tokio::sync::mpsc::unbounded_channel();
        let ask = async || {
            signs.heard();
            if asked.fetch_add(1, Ordering::Relaxed) == 3 {
                enough.send(()).expect("heard");
            }
        };
        tokio::select! {
            _ = silence(&signs, SHORT, nobody(), ask) => panic!("it is not dead"),
            told = timeout(Duration::from_secs(60), told.recv()) => assert!(told.is_ok()),
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_question_that_is_not_answered_is_not_repeated() {
        let asked = AtomicUsize::new(0);
        let ask = async || {
            asked.fetch_add(1, Ordering::Relaxed);
            std::future::pending().await
        };
        not_dead(&Signs::default(), ask).await;
        assert_eq!(asked.into_inner(), 1);
    }
}
