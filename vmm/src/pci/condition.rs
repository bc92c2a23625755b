//! How a device fares, which its driver and its thread both change: the driver
//! starts and resets it, the thread does so, or breaks down.
//!
//! ```text
//!   Idle --DRIVER_OK--> Working --breaks down--> Broken
//!    ^                     \--reset--> Resetting <--reset--/
//!    \-------- done by the thread -------/
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    common::{DEVICE_STATUS, status},
    config_space::registers::{COMMON, COMMON_LEN},
    pages::Page,
};

/// The condition of a device, and the status register that tells of it.
pub(super) struct Condition {
    registers: Page,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Working,
    Broken,
    Resetting,
}

impl Condition {
    /// A device that nobody uses yet.
    pub(super) fn new(registers: Page) -> Self {
        Self {
            registers,
            state: Mutex::new(State::Idle),
        }
    }

    /// Whether only a reset helps.
    pub(super) fn is_broken(&self) -> bool {
        *self.state() == State::Broken
    }

    /// Whether the thread has not come to a reset yet.
    pub(super) fn is_resetting(&self) -> bool {
        *self.state() == State::Resetting
    }

    /// The thread is given the queues.
    pub(super) fn begin_work(&self) {
        *self.state() = State::Working;
    }

    /// The driver resets the device; whether the thread has to do anything.
    pub(super) fn begin_reset(&self) -> bool {
        let mut state = self.state();
        if *state == State::Idle {
            return false;
        }
        *state = State::Resetting;
        true
    }

    /// The thread has reset the device: now the driver may go on.
    pub(super) fn end_reset(&self) {
        let mut state = self.state();
        if *state == State::Resetting {
            *state = State::Idle;
            self.write_status(0);
        }
    }

    /// The thread gives up.
    pub(super) fn fail(&self) {
        let mut state = self.state();
        if *state == State::Working {
            *state = State::Broken;
            self.write_status(self.status() | status::NEEDS_RESET);
        }
    }

    /// Shows the driver the common configuration; its status only when no reset is under way, and
    /// with what the thread has added.
    pub(super) fn publish(&self, common: &[u8; COMMON_LEN]) {
        let mut common = *common;
        let state = self.state();
        match *state {
            State::Resetting => common[DEVICE_STATUS] = self.status(),
            State::Broken => common[DEVICE_STATUS] |= status::NEEDS_RESET,
            State::Idle | State::Working => {}
        }
        self.registers.write(COMMON, &common);
        drop(state);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.registers.read(COMMON + DEVICE_STATUS, &mut status);
        status[0]
    }

    fn write_status(&self, status: u8) {
        self.registers.write(COMMON + DEVICE_STATUS, &[status]);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::pages::Pages, *};

    const IN_USE: u8 = 15;

    fn condition() -> Condition {
        let pages = Pages::new("test-condition", 0x1000).unwrap();
        Condition::new(Page::new(&pages, 0))
    }

    fn registers(status: u8) -> [u8; COMMON_LEN] {
        let mut bytes = [0; COMMON_LEN];
        bytes[DEVICE_STATUS] = status;
        bytes
    }

    fn in_use() -> Condition {
        let condition = condition();
        condition.begin_work();
        condition.publish(&registers(IN_USE));
        condition
    }

    #[test]
    fn the_status_is_not_0_until_the_thread_has_reset_the_device() {
        let condition = in_use();
        assert!(condition.begin_reset());
        condition.publish(&registers(0));
        assert!(condition.is_resetting());
        assert_eq!(condition.status(), IN_USE);
        condition.end_reset();
        assert!(!condition.is_resetting());
        assert_eq!(condition.status(), 0);
    }

    #[test]
    fn a_thread_that_is_quicker_than_the_registers_has_reset_the_device() {
        let condition = in_use();
        assert!(condition.begin_reset());
        condition.end_reset();
        condition.publish(&registers(0));
        assert_eq!(condition.status(), 0);
    }

    #[test]
    fn a_device_that_nobody_uses_is_reset_at_once() {
        let condition = condition();
        condition.publish(&registers(3));
        assert!(!condition.begin_reset());
        condition.publish(&registers(0));
        assert_eq!(condition.status(), 0);
    }

    #[test]
    fn a_breakdown_is_seen_whatever_the_driver_writes_meanwhile() {
        let condition = in_use();
        condition.fail();
        condition.publish(&registers(IN_USE));
        assert_eq!(condition.status(), IN_USE | status::NEEDS_RESET);
        assert!(condition.begin_reset());
        condition.fail();
        condition.end_reset();
        assert_eq!(condition.status(), 0);
    }
}
