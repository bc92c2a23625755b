//! Interrupts without exits: an eventfd that KVM turns into a message (irqfd),
//! and kicks that KVM turns into an eventfd (ioeventfd).

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::pci::msix::Message;

/// Below this lie the lines of interrupt controllers that the guest does not have.
const FIRST_GSI: u32 = 24;

/// The message-signalled interrupts of a VM.
pub struct Interrupts {
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u32,
    free: Vec<u32>,
    routes: BTreeMap<u32, Message>,
}

impl Interrupts {
    /// No interrupts yet.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        // vCPU threads ask for it, and may make no eventfd.
        Self::nowhere();
        Arc::new(Self {
            vm,
            state: Mutex::new(State {
                next: FIRST_GSI,
                ..Default::default()
            }),
        })
    }

    /// A new line, not connected.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn line(self: &Arc<Self>) -> io::Result<Line> {
        let mut state = self.state();
        let gsi = state.free.pop().unwrap_or_else(|| {
            state.next += 1;
            state.next - 1
        });
        Ok(Line {
            interrupts: Arc::clone(self),
            gsi,
            event: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    /// An eventfd that is signalled when the guest writes anything to `address`.
    ///
    /// # Errors
    /// When KVM refuses, or the process has no descriptor left.
    pub fn kick(self: &Arc<Self>, address: u64) -> io::Result<Kick> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        self.vm
            .register_ioevent(&event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(io::Error::from)?;
        Ok(Kick {
            interrupts: Arc::clone(self),
            address,
            event,
        })
    }

    /// An eventfd that interrupts nobody.
    pub fn nowhere() -> Arc<EventFd> {
        static NOWHERE: std::sync::OnceLock<Arc<EventFd>> = std::sync::OnceLock::new();
        Arc::clone(NOWHERE.get_or_init(|| {
            Arc::new(EventFd::new(EFD_NONBLOCK).expect("a process has a descriptor to spare"))
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells KVM all routes; it knows no smaller change.
    fn publish(&self, state: &State) -> io::Result<()> {
        let entries: Vec<_> = state
            .routes
            .iter()
            .map(|(gsi, message)| {
                let mut entry = kvm_irq_routing_entry {
                    gsi: *gsi,
                    type_: KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                entry.u.msi = kvm_irq_routing_msi {
                    address_lo: message.address as u32,
                    address_hi: (message.address >> 32) as u32,
                    data: message.data,
                    ..Default::default()
                };
                entry
            })
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("too many interrupt routes"))?;
        self.vm.set_gsi_routing(&routing).map_err(io::Error::from)
    }
}

/// An address that the guest writes to, connected until this is dropped: another device may get
/// the address then.
pub struct Kick {
    interrupts: Arc<Interrupts>,
    address: u64,
    event: Arc<EventFd>,
}

impl Kick {
    /// Signalled by the guest.
    pub fn event(&self) -> Arc<EventFd> {
        Arc::clone(&self.event)
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        let address = IoEventAddress::Mmio(self.address);
        // It fails only when it was not connected.
        let _ = self
            .interrupts
            .vm
            .unregister_ioevent(&self.event, &address, NoDatamatch);
    }
}

/// One interrupt vector of a device.
pub struct Line {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    event: Arc<EventFd>,
}

impl Line {
    /// Writing to it interrupts the guest once the line is connected; until then it waits.
    pub fn event(&self) -> Arc<EventFd> {
        Arc::clone(&self.event)
    }

    /// Interrupts with `message` from now on.
    pub fn connect(&self, message: Message) {
        let mut state = self.interrupts.state();
        if state.routes.insert(self.gsi, message) != Some(message) {
            // KVM refuses a route only when the host is out of memory.
            if self.interrupts.publish(&state).is_err() {
                return;
            }
        }
        let _ = self.interrupts.vm.register_irqfd(&self.event, self.gsi);
    }

    /// Interrupts wait from now on: the eventfd keeps them.
    pub fn disconnect(&self) {
        let _ = self.interrupts.vm.unregister_irqfd(&self.event, self.gsi);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.disconnect();
        let mut state = self.interrupts.state();
        state.routes.remove(&self.gsi);
        state.free.push(self.gsi);
    }
}
