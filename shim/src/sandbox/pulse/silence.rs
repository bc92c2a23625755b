//! When silence is death: the decision, tick by tick, of what was seen.

use std::time::Duration;

use ::vmm::control::message::State;

use super::Pace;

/// A silence that has begun.
#[derive(Debug)]
pub(super) struct Silence {
    pace: Pace,
    /// For how long the agent could have answered.
    counted: Duration,
}

/// What was seen in a tick in which nothing was heard of the agent.
#[derive(Debug)]
pub(super) struct Tick {
    /// How long it lasted for us.
    pub(super) lasted: Duration,
    /// How much of it the machine waited for processors of the host.
    pub(super) held_up: Duration,
    /// What the VMM said, if it said anything.
    pub(super) state: Option<State>,
    /// Whether the agent may be held up by what it was set to do.
    pub(super) working: bool,
}

/// What is to be thought of a tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It lasted longer than it should: it was us who did not run, so it says nothing.
    Late,
    /// The VMM does not answer: what is stopped is not dead.
    Stopped,
    /// The guest is paused.
    Paused,
    /// The agent could have answered.
    Silent,
    /// It could have answered for so long that it never will.
    Dead(Duration),
}

impl Silence {
    pub(super) fn new(pace: Pace) -> Self {
        Self {
            pace,
            counted: Duration::ZERO,
        }
    }

    /// Takes a further tick into account.
    pub(super) fn judge(&mut self, tick: &Tick) -> Judgement {
        if tick.lasted > self.pace.tick + 2 * self.pace.answer {
            return Judgement::Late;
        }
        match tick.state {
            None => return Judgement::Stopped,
            Some(State::Paused) => return Judgement::Paused,
            Some(State::Running) => {}
        }
        self.counted += self.pace.tick.saturating_sub(tick.held_up);
        let patience = match tick.working {
            true => self.pace.work,
            false => self.pace.silence,
        };
        match self.counted >= patience {
            true => Judgement::Dead(patience),
            false => Judgement::Silent,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tick in which the agent could have answered.
    fn tick() -> Tick {
        Tick {
            lasted: Duration::from_millis(5001),
            held_up: Duration::ZERO,
            state: Some(State::Running),
            working: false,
        }
    }

    /// After how many of such ticks the agent is dead, if it ever is.
    fn ticks_until_death(tick: &Tick) -> Option<usize> {
        let mut silence = Silence::new(Pace::default());
        (1..10_000).find(|_| matches!(silence.judge(tick), Judgement::Dead(_)))
    }

    #[test]
    fn an_agent_is_dead_after_a_minute_in_which_it_could_have_answered() {
        assert_eq!(ticks_until_death(&tick()), Some(12));
    }

    #[test]
    fn an_agent_at_work_has_ten_minutes() {
        let tick = Tick {
            working: true,
            ..tick()
        };
        assert_eq!(ticks_until_death(&tick), Some(120));
    }

    #[test]
    fn time_in_which_we_did_not_run_does_not_count() {
        for lasted in [8, 60, 100_000].map(Duration::from_secs) {
            let tick = Tick { lasted, ..tick() };
            assert_eq!(ticks_until_death(&tick), None, "{lasted:?}");
        }
    }

    #[test]
    fn time_in_which_the_machine_was_paused_or_stopped_does_not_count() {
        for state in [None, Some(State::Paused)] {
            let tick = Tick { state, ..tick() };
            assert_eq!(ticks_until_death(&tick), None, "{state:?}");
        }
    }

    #[test]
    fn time_in_which_the_machine_waited_for_processors_does_not_count() {
        let held_up = |millis| Tick {
            held_up: Duration::from_millis(millis),
            ..tick()
        };
        assert_eq!(ticks_until_death(&held_up(2500)), Some(24));
        assert_eq!(ticks_until_death(&held_up(4900)), Some(600));
        assert_eq!(ticks_until_death(&held_up(7000)), None);
    }

    #[test]
    fn what_was_counted_before_a_pause_is_not_forgotten() {
        let mut silence = Silence::new(Pace::default());
        for _ in 0..11 {
            assert_eq!(silence.judge(&tick()), Judgement::Silent);
        }
        let paused = Tick {
            state: Some(State::Paused),
            ..tick()
        };
        assert_eq!(silence.judge(&paused), Judgement::Paused);
        let minute = Duration::from_secs(60);
        assert_eq!(silence.judge(&tick()), Judgement::Dead(minute));
    }
}
