//! A serial port for the kernel's earliest words: a 16550A (National
//! Semiconductor PC16550D, section 8) that sends and never receives, without an
//! interrupt. Each byte costs two exits, so a guest has it on request only.

use std::{fs::File, io::Write};

const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const INTERRUPT_ID: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const MODEM_STATUS: u16 = 6;
const SCRATCH: u16 = 7;

const DIVISOR_ACCESS: u8 = 0x80;
const LOOPBACK: u8 = 0x10;
/// FIFOs enabled, no interrupt pending.
const NO_INTERRUPT: u8 = 0xc1;
const TRANSMITTER_EMPTY: u8 = 0x60;
/// Carrier, ready and clear to send.
const CONNECTED: u8 = 0xb0;

/// The port's registers.
pub struct Serial {
    output: File,
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: [u8; 2],
}

impl Serial {
    /// A port whose output goes to `output`.
    pub fn new(output: File) -> Self {
        Self {
            output,
            interrupt_enable: 0,
            line_control: 0,
            modem_control: 0,
            scratch: 0,
            divisor: [1, 0],
        }
    }

    /// The guest writes register 0 to 7.
    pub fn write(&mut self, register: u16, value: u8) {
        let divisor = self.line_control & DIVISOR_ACCESS != 0;
        match register {
            DATA | INTERRUPT_ENABLE if divisor => self.divisor[usize::from(register)] = value,
            // What cannot be written is lost, as on a cable that nobody reads.
            DATA if self.modem_control & LOOPBACK == 0 => drop(self.output.write(&[value])),
            INTERRUPT_ENABLE => self.interrupt_enable = value & 0xf,
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => self.modem_control = value & 0x1f,
            SCRATCH => self.scratch = value,
            _ => {}
        }
    }

    /// The guest reads register 0 to 7.
    pub fn read(&self, register: u16) -> u8 {
        let divisor = self.line_control & DIVISOR_ACCESS != 0;
        match register {
            DATA | INTERRUPT_ENABLE if divisor => self.divisor[usize::from(register)],
            INTERRUPT_ENABLE => self.interrupt_enable,
            INTERRUPT_ID => NO_INTERRUPT,
            LINE_CONTROL => self.line_control,
            MODEM_CONTROL => self.modem_control,
            LINE_STATUS => TRANSMITTER_EMPTY,
            MODEM_STATUS if self.modem_control & LOOPBACK != 0 => self.looped_back(),
            MODEM_STATUS => CONNECTED,
            SCRATCH => self.scratch,
            _ => 0,
        }
    }

    /// In loopback the control lines come back as status lines.
    fn looped_back(&self) -> u8 {
        let control = self.modem_control;
        (control & 2) << 3 | (control & 1) << 5 | (control & 4) << 4 | (control & 8) << 4
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn bytes_written_come_out() {
        let mut file = tempfile::tempfile().unwrap();
        let mut serial = Serial::new(file.try_clone().unwrap());
        for byte in b"hi" {
            serial.write(DATA, *byte);
        }
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hi");
    }

    #[test]
    fn the_loopback_test_of_linux_passes() {
        let mut serial = Serial::new(tempfile::tempfile().unwrap());
        serial.write(MODEM_CONTROL, LOOPBACK | 0x0a);
        assert_eq!(serial.read(MODEM_STATUS) & 0xf0, 0x90);
    }
}
