//! A virtio device on PCI: joins the configuration space, the common
//! configuration, the MSI-X table and the device's worker.
//!
//! Nothing here waits for the worker, since the bus is locked meanwhile: a driver that resets its
//! device reads a status that is not 0 until the worker has come to it
//! (virtio 1.2, section 4.1.4.3.1).

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex},
    time::Instant,
};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{
    common::{Action, CONFIG_GENERATION, CommonConfig, NO_VECTOR, QueueSetup, status},
    condition::Condition,
    config_space::{self, ConfigSpace, registers},
    msix::{self, Msix},
    pages::Page,
};
use crate::{
    counters::DeviceCounters,
    jail::ThreadKind,
    virtio::{
        self, ActiveQueue, ConfigChange, Kind, Link, Memory, VirtioDevice,
        worker::{Activation, Worker},
    },
    vm::interrupts::{Interrupts, Kick, Line},
};

/// A device in its slot.
pub struct VirtioPci {
    kind: Kind,
    slot: u8,
    config_space: ConfigSpace,
    registers: Page,
    common: CommonConfig,
    msix: Msix,
    lines: Vec<Line>,
    // The thread goes before what kicks it.
    worker: Worker,
    _kicks: Vec<Kick>,
    condition: Arc<Condition>,
    /// The device's configuration; the worker may publish a new one.
    config_len: usize,
    /// What of it the driver may write.
    driver_fields: Range<usize>,
    memory: Memory,
    counters: Arc<DeviceCounters>,
}

/// Where a device is put.
pub struct Place {
    /// The slot's number on bus 0.
    pub slot: u8,
    /// The slot's page of configuration space.
    pub config_page: Page,
    /// The slot's register page.
    pub register_page: Page,
}

impl VirtioPci {
    /// Puts `device` into a slot: fills its pages, connects its notify
    /// addresses and makes its interrupt lines. [`VirtioPci::start`] lets it work.
    ///
    /// # Errors
    /// When the kernel refuses a descriptor, an ioeventfd or a thread.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        place: Place,
        memory: Memory,
        interrupts: &Arc<Interrupts>,
    ) -> io::Result<Self> {
        let Place {
            slot,
            config_page,
            register_page,
        } = place;
        let kind = device.kind();
        let queues = device.queue_sizes().len();
        let vectors = if device.vector_per_queue() {
            queues as u16 + 1
        } else {
            2
        }
        .min(registers::MSIX_MAX as u16);
        let features =
            device.features() | virtio::F_VERSION_1 | virtio::F_EVENT_IDX | virtio::F_INDIRECT_DESC;
        register_page.clear();
        let common = CommonConfig::new(features, device.queue_sizes(), vectors);
        register_page.write(registers::COMMON, &common.bytes());
        let mut config = device.config_space();
        config.truncate(registers::DEVICE_LEN);
        register_page.write(registers::DEVICE, &config);
        let driver_fields = device.driver_fields();
        let kicks = (0..queues)
            .map(|queue| {
                let address = config_space::notify_address(slot)
                    + queue as u64 * u64::from(config_space::NOTIFY_MULTIPLIER);
                interrupts.kick(address)
            })
            .collect::<io::Result<Vec<_>>>()?;
        let lines = (0..vectors)
            .map(|_| interrupts.line())
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            kind,
            slot,
            config_space: ConfigSpace::new(config_page, slot, kind, vectors),
            msix: Msix::new(register_page.clone(), vectors),
            condition: Arc::new(Condition::new(register_page.clone())),
            registers: register_page,
            common,
            lines,
            worker: Worker::new(device, kicks.iter().map(Kick::event).collect())?,
            _kicks: kicks,
            config_len: config.len(),
            driver_fields,
            memory,
            counters: Arc::new(DeviceCounters::default()),
        })
    }

    /// Starts the device's thread.
    ///
    /// # Errors
    /// When the kernel refuses a thread.
    pub fn start(&mut self) -> io::Result<()> {
        self.worker.start(ThreadKind::of(self.kind))
    }

    /// Tells the device's thread to end. Does not wait for it.
    pub fn stop(&self) {
        self.worker.stop();
    }

    /// Waits for the end of a thread that was told to, but not beyond `deadline`; whether it came.
    pub fn ended_by(&self, deadline: Instant) -> bool {
        self.worker.ended_by(deadline)
    }

    /// What the device is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its slot on bus 0.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// Whether the driver uses it.
    pub fn running(&self) -> bool {
        self.common.status() & status::DRIVER_OK != 0
    }

    /// Changes the link of a network card.
    pub fn set_link(&self, link: Link) {
        self.worker.set_link(link);
    }

    /// Its counters.
    pub fn counters(&self) -> &DeviceCounters {
        &self.counters
    }

    /// The guest writes to the configuration space.
    pub fn write_config_space(&mut self, offset: usize, data: &[u8]) {
        if let config_space::Change::Msix(control) = self.config_space.write(offset, data) {
            let changes = self.msix.set_control(control);
            self.connect(&changes);
        }
    }

    /// The guest reads the configuration space where no memslot serves it.
    pub fn read_config_space(&self, offset: usize, data: &mut [u8]) {
        self.config_space.read(offset, data);
    }

    /// The guest reads the register page where no memslot serves it.
    pub fn read_registers(&self, offset: usize, data: &mut [u8]) {
        self.registers.read(offset, data);
    }

    /// The guest writes to the register page.
    pub fn write_registers(&mut self, offset: usize, data: &[u8]) {
        match offset {
            0..registers::COMMON_LEN => self.write_common(offset, data),
            registers::DEVICE..registers::MSIX_TABLE => {
                self.write_device(offset - registers::DEVICE, data);
            }
            registers::MSIX_TABLE..registers::MSIX_PENDING => {
                let changes = self.msix.write(offset - registers::MSIX_TABLE, data);
                self.connect(&changes);
            }
            _ => {}
        }
    }

    fn write_common(&mut self, offset: usize, data: &[u8]) {
        if self.condition.is_resetting() {
            // The driver must wait.
            return;
        }
        if self.condition.is_broken() {
            self.common.fail();
        }
        match self.common.write(offset, data) {
            Action::Nothing => {}
            Action::Activate => self.activate(),
            Action::Reset => self.reset(),
        }
        self.condition.publish(&self.common.bytes());
    }

    fn reset(&self) {
        if self.condition.begin_reset() {
            let condition = Arc::clone(&self.condition);
            self.worker.reset(Box::new(move || condition.end_reset()));
        }
    }

    fn write_device(&mut self, offset: usize, data: &[u8]) {
        let fields = self.driver_fields.clone();
        if offset < fields.start || offset + data.len() > fields.end {
            return;
        }
        self.registers.write(registers::DEVICE + offset, data);
        let mut written = vec![0; fields.len()];
        self.registers
            .read(registers::DEVICE + fields.start, &mut written);
        self.worker.write_config(written);
    }

    fn activate(&mut self) {
        let mut queues = Vec::new();
        for (index, setup) in self.common.queues().iter().enumerate() {
            match ring(setup, &self.memory, self.common.features()) {
                Ok(ring) => queues.push(ActiveQueue::new(
                    index,
                    ring,
                    self.line(setup.vector),
                    Arc::clone(&self.counters),
                )),
                Err(_) => {
                    self.common.fail();
                    return;
                }
            }
        }
        let condition = Arc::clone(&self.condition);
        let interrupt = self.line(self.common.config_vector());
        condition.begin_work();
        self.worker.activate(Activation {
            memory: self.memory.clone(),
            queues,
            features: self.common.features(),
            counters: Arc::clone(&self.counters),
            config: self.config_change(),
            on_failure: Box::new(move |_| {
                condition.fail();
                let _ = interrupt.write(1);
            }),
        });
    }

    /// How the worker publishes a new configuration.
    fn config_change(&self) -> ConfigChange {
        let registers = self.registers.clone();
        let interrupt = self.line(self.common.config_vector());
        let len = self.config_len;
        let generation = Mutex::new(0u8);
        ConfigChange::new(move |config| {
            registers.write(registers::DEVICE, &config[..config.len().min(len)]);
            let mut generation = generation
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            *generation = generation.wrapping_add(1);
            registers.write(registers::COMMON + CONFIG_GENERATION, &[*generation]);
            let _ = interrupt.write(1);
        })
    }

    /// The eventfd of a vector; one that leads nowhere for [`NO_VECTOR`].
    fn line(&self, vector: u16) -> Arc<EventFd> {
        match self.lines.get(usize::from(vector)) {
            Some(line) if vector != NO_VECTOR => line.event(),
            _ => Interrupts::nowhere(),
        }
    }

    fn connect(&self, changes: &[msix::Change]) {
        for change in changes {
            match *change {
                msix::Change::Connect(vector, message) => {
                    self.lines[usize::from(vector)].connect(message);
                }
                msix::Change::Disconnect(vector) => self.lines[usize::from(vector)].disconnect(),
            }
        }
    }
}

/// The ring that the driver set up, checked against the guest's memory.
fn ring(setup: &QueueSetup, memory: &Memory, features: u64) -> Result<Queue, virtio_queue::Error> {
    let mut ring = Queue::new(setup.max_size)?;
    if !setup.enabled {
        return Ok(ring);
    }
    ring.try_set_size(setup.size)?;
    ring.try_set_desc_table_address(GuestAddress(setup.desc))?;
    ring.try_set_avail_ring_address(GuestAddress(setup.driver))?;
    ring.try_set_used_ring_address(GuestAddress(setup.device))?;
    ring.set_event_idx(features & virtio::F_EVENT_IDX != 0);
    ring.set_ready(true);
    if ring.is_valid(memory) {
        Ok(ring)
    } else {
        Err(virtio_queue::Error::QueueNotReady)
    }
}
