//! The thread of a virtual processor: runs guest code and answers its exits.
//!
//! ```text
//!   parked --resume--> running --kick--> parked
//!                         \--stop or the guest's end--> gone
//! ```

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    thread,
    time::Instant,
};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

use super::{End, serial::Serial, statistics::Statistics, sys};
use crate::{
    arch::x86_64::{acpi::SLEEP_TYPE_OFF, layout},
    counters::ExitCounters,
    jail::{self, ThreadKind},
    pci::Bus,
};

/// What a virtual processor's exits reach.
pub struct Machine {
    /// The PCI bus.
    pub bus: Mutex<Bus>,
    /// The serial port, if the guest has one.
    pub serial: Option<Mutex<Serial>>,
    /// Exits by kind.
    pub exits: ExitCounters,
    /// What KVM counts of each processor; empty where KVM does not tell.
    pub statistics: Vec<Statistics>,
    /// Whether processors run.
    pub gate: Gate,
    /// Where the guest's end is told.
    pub end: mpsc::SyncSender<End>,
    /// Wakes who waits for the end.
    pub ended: EventFd,
}

impl Machine {
    /// The bus, for one access.
    pub fn bus(&self) -> MutexGuard<'_, Bus> {
        self.bus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What KVM counts, summed over the processors, by KVM's names.
    pub fn kvm_counters(&self) -> BTreeMap<String, u64> {
        let mut sum = BTreeMap::new();
        for statistics in &self.statistics {
            // A number that cannot be read is left out.
            for (name, number) in statistics.read().unwrap_or_default() {
                *sum.entry(name).or_default() += number;
            }
        }
        sum
    }

    /// Tells why the VM ends; the first word counts.
    pub fn tell_end(&self, end: End) {
        let _ = self.end.try_send(end);
        let _ = self.ended.write(1);
    }
}

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// Lets processors run, pause or stop.
#[derive(Default)]
pub struct Gate {
    state: AtomicU8,
    threads: Mutex<Threads>,
    changed: Condvar,
}

/// How many of the processors' threads do not run guest code.
#[derive(Default)]
struct Threads {
    parked: usize,
    ended: usize,
}

impl Gate {
    /// Waits while paused; false when the processor is to end.
    fn pass(&self) -> bool {
        if self.state.load(Ordering::Acquire) == RUN {
            return true;
        }
        let mut threads = self.threads();
        threads.parked += 1;
        self.changed.notify_all();
        while self.state.load(Ordering::Acquire) == PAUSE {
            threads = self
                .changed
                .wait(threads)
                .unwrap_or_else(PoisonError::into_inner);
        }
        threads.parked -= 1;
        self.state.load(Ordering::Acquire) == RUN
    }

    fn set(&self, state: u8) {
        let _threads = self.threads();
        // What is stopped stays so.
        if self.state.load(Ordering::Acquire) != STOP {
            self.state.store(state, Ordering::Release);
        }
        self.changed.notify_all();
    }

    /// A thread is at its end.
    fn leave(&self) {
        self.threads().ended += 1;
        self.changed.notify_all();
    }

    /// Waits until `enough`, but not beyond `deadline`; whether it is.
    fn wait_until(&self, deadline: Instant, enough: impl Fn(&Threads) -> bool) -> bool {
        let patience = deadline.saturating_duration_since(Instant::now());
        let waited = self
            .changed
            .wait_timeout_while(self.threads(), patience, |threads| !enough(threads));
        let (threads, _) = waited.unwrap_or_else(PoisonError::into_inner);
        enough(&threads)
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All processors of a VM.
pub struct Vcpus {
    machine: Arc<Machine>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each processor.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn start(vcpus: Vec<VcpuFd>, machine: &Arc<Machine>) -> io::Result<Self> {
        sys::handle_kicks()?;
        let mut started = Self {
            machine: Arc::clone(machine),
            threads: Vec::new(),
        };
        for (number, vcpu) in vcpus.into_iter().enumerate() {
            let machine = Arc::clone(machine);
            let thread = thread::Builder::new()
                .name(format!("vcpu-{number}"))
                .stack_size(128 * 1024)
                .spawn(move || {
                    run(vcpu, &machine);
                    machine.gate.leave();
                })?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// Stops guest code. Where a processor does not stop by `deadline`, because its thread waits
    /// for something of the host's, this is false and guest code runs on.
    pub fn pause(&self, deadline: Instant) -> bool {
        self.machine.gate.set(PAUSE);
        self.kick();
        let all = self.threads.len();
        let parked = |threads: &Threads| threads.parked + threads.ended >= all;
        let paused = self.machine.gate.wait_until(deadline, parked);
        if !paused {
            self.resume();
        }
        paused
    }

    /// Lets guest code run again.
    pub fn resume(&self) {
        self.machine.gate.set(RUN);
    }

    /// Ends all threads. Does not wait for them.
    pub fn stop(&self) {
        self.machine.gate.set(STOP);
        self.kick();
    }

    /// Waits for the end of all threads, but not beyond `deadline`; whether it came.
    pub fn ended_by(&self, deadline: Instant) -> bool {
        let all = self.threads.len();
        let ended = |threads: &Threads| threads.ended >= all;
        self.machine.gate.wait_until(deadline, ended)
    }

    fn kick(&self) {
        for thread in &self.threads {
            sys::kick(thread);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn run(mut vcpu: VcpuFd, machine: &Machine) {
    if let Err(error) = jail::confine(ThreadKind::Vcpu) {
        machine.tell_end(End::Failed(format!(
            "cannot confine a vcpu's thread: {error}"
        )));
        return;
    }
    sys::with_kicks(&mut vcpu, |vcpu| {
        while machine.gate.pass() {
            if let Some(end) = run_once(vcpu, machine) {
                machine.tell_end(end);
                // The other processors go on until the VM is dropped.
                machine.gate.set(PAUSE);
            }
        }
    });
}

/// Runs guest code up to its next exit and answers that.
fn run_once(vcpu: &mut VcpuFd, machine: &Machine) -> Option<End> {
    let exits = &machine.exits;
    match vcpu.run() {
        Ok(VcpuExit::MmioWrite(address, data)) => {
            exits.mmio_write.add(1);
            machine.bus().write(address, data);
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            exits.mmio_read.add(1);
            machine.bus().read(address, data);
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            exits.io_out.add(1);
            return io_out(machine, port, data);
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            exits.io_in.add(1);
            io_in(machine, port, data);
        }
        Ok(VcpuExit::Shutdown) => return Some(End::TripleFault),
        Ok(VcpuExit::Intr) => exits.interrupted.add(1),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return Some(End::Failed(format!(
                "the processor refuses to enter the guest on host cpu {cpu}, hardware reason {reason:#x}"
            )));
        }
        Ok(VcpuExit::InternalError) => {
            return Some(End::Failed(
                "kvm cannot run the guest's code (internal error, mostly an instruction it cannot emulate)".into(),
            ));
        }
        Ok(other) => {
            exits.other.add(1);
            return Some(End::Failed(format!(
                "kvm ended the guest's run for {other:?}"
            )));
        }
        Err(error) if error.errno() == libc::EINTR => {
            exits.interrupted.add(1);
            vcpu.set_kvm_immediate_exit(0);
        }
        Err(error) if error.errno() == libc::EAGAIN => {}
        // The kernel has no page for what the guest touched, which is memory.
        Err(error) if error.errno() == libc::EFAULT => {
            return Some(End::Failed(
                "the guest's memory cannot be read: the file of an image was cut off, or the disk that it is on fails".into(),
            ));
        }
        Err(error) => return Some(End::Failed(format!("kvm cannot run a vcpu: {error}"))),
    }
    None
}

fn io_out(machine: &Machine, port: u16, data: &[u8]) -> Option<End> {
    const SLEEP_ENABLE: u8 = 1 << 5;
    const POWER_OFF: u8 = SLEEP_ENABLE | SLEEP_TYPE_OFF << 2;
    const PULSE_RESET: u8 = 0xfe;
    match (port, data.first().copied()?) {
        (layout::SLEEP_CONTROL_PORT, POWER_OFF) => Some(End::PowerOff),
        (layout::RESET_PORT, 1) | (layout::KEYBOARD_PORT, PULSE_RESET) => Some(End::Reset),
        (port, _) => {
            let register = serial_register(port);
            if let (Some(register), Some(serial)) = (register, &machine.serial) {
                let mut serial = serial.lock().unwrap_or_else(PoisonError::into_inner);
                // A string instruction brings several bytes for one register.
                for value in data {
                    serial.write(register, *value);
                }
            }
            None
        }
    }
}

fn io_in(machine: &Machine, port: u16, data: &mut [u8]) {
    data.fill(match (port, serial_register(port), &machine.serial) {
        (layout::SLEEP_STATUS_PORT, ..) => 0,
        (_, Some(register), Some(serial)) => serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(register),
        _ => 0xff,
    });
}

fn serial_register(port: u16) -> Option<u16> {
    port.checked_sub(layout::SERIAL_PORT)
        .filter(|register| *register < 8)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_processor_that_does_not_stop_is_awaited_for_a_while_only() {
        let gate = Gate::default();
        gate.set(PAUSE);
        let soon = Instant::now() + Duration::from_millis(10);
        assert!(!gate.wait_until(soon, |threads| threads.parked == 1));
        gate.leave();
        assert!(gate.wait_until(soon, |threads| threads.ended == 1));
    }
}
