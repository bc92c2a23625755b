//! What the control socket asks of a VM.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use super::{End, Vm};
use crate::{
    config::DeviceConfig,
    control::{
        Commands,
        message::{Counters, Device, DeviceCounters, Reply, Request, State, Status},
    },
    descriptors::Descriptors,
    virtio::build,
};

/// How long a command may wait for a thread that the guest keeps busy: half as long as the client
/// waits for the reply. Meanwhile no other command is answered.
const PATIENCE: Duration = Duration::from_secs(5);

fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

impl Commands for Vm {
    fn carry_out(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Reply {
        let outcome = match request {
            Request::Status {} => return Reply::Status(self.status()),
            // Not by way of the bus, which a guest may hold.
            Request::State {} => return Reply::State { state: self.state },
            Request::Counters {} => return Reply::Counters(self.counters()),
            Request::Pause {} => self.set_state(State::Paused),
            Request::Resume {} => self.set_state(State::Running),
            Request::Stop {} => {
                self.machine.tell_end(End::Stopped);
                Ok(())
            }
            Request::AddDevice { device } => match self.add_while_running(&device, descriptors) {
                Ok(slot) => return Reply::Added { slot },
                Err(message) => Err(message),
            },
            Request::SetLink { slot, link } => match self.machine.bus().set_link(slot, link) {
                true => Ok(()),
                false => Err(format!("there is no network card in slot {slot}")),
            },
            Request::RemoveDevice { slot } => self.remove(slot),
        };
        match outcome {
            Ok(()) => Reply::Done {},
            Err(message) => Reply::Failed { message },
        }
    }
}

impl Vm {
    fn status(&self) -> Status {
        let bus = self.machine.bus();
        let devices = bus.devices().map(|device| Device {
            slot: device.slot(),
            kind: device.kind().name().to_owned(),
            in_use: device.running(),
        });
        Status {
            state: self.state,
            devices: devices.collect(),
        }
    }

    fn counters(&self) -> Counters {
        let exits = &self.machine.exits;
        let exits = [
            ("io_in", &exits.io_in),
            ("io_out", &exits.io_out),
            ("mmio_read", &exits.mmio_read),
            ("mmio_write", &exits.mmio_write),
            ("interrupted", &exits.interrupted),
            ("other", &exits.other),
        ];
        let devices = self.machine.bus().readings().into_iter();
        Counters {
            exits: exits
                .map(|(kind, counter)| (kind.to_owned(), counter.get()))
                .into(),
            kvm: self.machine.kvm_counters(),
            devices: devices
                .map(|(slot, kind, counted)| DeviceCounters {
                    slot,
                    kind: kind.to_owned(),
                    counted,
                })
                .collect(),
            trace: self.trace.marks().to_vec(),
        }
    }

    fn set_state(&mut self, state: State) -> Result<(), String> {
        let vcpus = self.vcpus.as_ref().ok_or("the VM has not started")?;
        match state {
            State::Running => vcpus.resume(),
            State::Paused if vcpus.pause(deadline()) => {}
            State::Paused => return Err("a processor does not stop".to_owned()),
        }
        self.state = state;
        Ok(())
    }

    fn add_while_running(
        &mut self,
        config: &DeviceConfig,
        descriptors: Vec<OwnedFd>,
    ) -> Result<u8, String> {
        if matches!(config, DeviceConfig::Fs { .. }) {
            // The jail lets nobody open files who did not from the start.
            return Err("a directory can only be shared from the VM's start on".to_owned());
        }
        let mut descriptors = Descriptors::received(descriptors);
        let device = build::build(
            "device",
            config,
            &mut descriptors,
            &mut self.images,
            build::Jail::Shut,
        )
        .map_err(|error| with_causes(&error))?;
        let slot = self.add(device).map_err(|error| with_causes(&error))?;
        let started = self.machine.bus().start(slot);
        if let Err(error) = started {
            self.remove(slot)?;
            return Err(format!("cannot start the device's thread: {error}"));
        }
        Ok(slot)
    }

    /// Takes a device out. When this succeeds its thread has ended; until then it may be asked
    /// for again.
    fn remove(&mut self, slot: u8) -> Result<(), String> {
        let removed = self.machine.bus().remove(slot);
        if let Some(device) = removed {
            device.stop();
            self.leaving.push(device);
        }
        let Some(index) = self.leaving.iter().position(|it| it.slot() == slot) else {
            return Err(format!("there is no device in slot {slot}"));
        };
        if !self.leaving[index].ended_by(deadline()) {
            return Err(format!("the device in slot {slot} is still at work"));
        }
        drop(self.leaving.swap_remove(index));
        self.machine.bus().free(slot);
        Ok(())
    }
}

/// An error and what caused it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}
