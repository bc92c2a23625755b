//! MSI-X (PCI 3.0, section 6.8): the table lies in the register page, where
//! the guest reads it; its writes come here and say which vectors to connect.

use super::{
    config_space::{MsixControl, registers::MSIX_TABLE},
    pages::Page,
};

const ENTRY: usize = 16;
const MASKED: u32 = 1;

/// A message: what the interrupt of a vector writes where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Message {
    /// The address.
    pub address: u64,
    /// The data.
    pub data: u32,
}

/// What becomes of a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It interrupts with this message from now on.
    Connect(u16, Message),
    /// Its interrupts wait.
    Disconnect(u16),
}

/// The vectors of a device.
pub struct Msix {
    page: Page,
    control: MsixControl,
    connected: Vec<Option<Message>>,
}

impl Msix {
    /// A table of `vectors` masked entries in the register page.
    pub fn new(page: Page, vectors: u16) -> Self {
        let msix = Self {
            page,
            control: MsixControl::default(),
            connected: vec![None; usize::from(vectors)],
        };
        for vector in 0..usize::from(vectors) {
            msix.page
                .write(MSIX_TABLE + ENTRY * vector + 12, &MASKED.to_le_bytes());
        }
        msix
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.connected.len() as u16
    }

    /// The guest wrote the control register.
    pub fn set_control(&mut self, control: MsixControl) -> Vec<Change> {
        self.control = control;
        (0..self.vectors())
            .filter_map(|vector| self.update(vector))
            .collect()
    }

    /// The guest writes `data` at `offset` of the table. Only whole, aligned words count
    /// (PCI 3.0, section 6.8.2).
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Vec<Change> {
        let vector = offset / ENTRY;
        let aligned = offset.is_multiple_of(data.len()) && matches!(data.len(), 4 | 8);
        if !aligned || vector >= self.connected.len() {
            return Vec::new();
        }
        self.page.write(MSIX_TABLE + offset, data);
        self.update(vector as u16).into_iter().collect()
    }

    fn update(&mut self, vector: u16) -> Option<Change> {
        let at = MSIX_TABLE + ENTRY * usize::from(vector);
        let masked = self.page.u32_at(at + 12) & MASKED != 0;
        let wanted = (self.control.enabled && !self.control.masked && !masked).then(|| Message {
            address: u64::from(self.page.u32_at(at)) | u64::from(self.page.u32_at(at + 4)) << 32,
            data: self.page.u32_at(at + 8),
        });
        let connected = &mut self.connected[usize::from(vector)];
        if *connected == wanted {
            return None;
        }
        *connected = wanted;
        Some(match wanted {
            Some(message) => Change::Connect(vector, message),
            None => Change::Disconnect(vector),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::pages::Pages, *};

    fn msix() -> Msix {
        let pages = Pages::new("test-msix", 0x1000).unwrap();
        Msix::new(Page::new(&pages, 0), 2)
    }

    const ENABLED: MsixControl = MsixControl {
        enabled: true,
        masked: false,
    };

    #[test]
    fn a_vector_is_connected_when_it_is_unmasked() {
        let mut msix = msix();
        assert_eq!(msix.set_control(ENABLED), []);
        msix.write(16, &0xfee0_0000u32.to_le_bytes());
        msix.write(24, &0x31u32.to_le_bytes());
        let message = Message {
            address: 0xfee0_0000,
            data: 0x31,
        };
        assert_eq!(
            msix.write(28, &0u32.to_le_bytes()),
            [Change::Connect(1, message)]
        );
        assert_eq!(msix.write(28, &1u32.to_le_bytes()), [Change::Disconnect(1)]);
    }

    #[test]
    fn masking_the_function_disconnects_every_vector() {
        let mut msix = msix();
        msix.set_control(ENABLED);
        msix.write(12, &0u32.to_le_bytes());
        let masked = MsixControl {
            enabled: true,
            masked: true,
        };
        assert_eq!(msix.set_control(masked), [Change::Disconnect(0)]);
    }

    proptest! {
        #[test]
        fn a_write_anywhere_touches_only_vectors_that_exist(
            offset in 0usize..0x500,
            data in proptest::collection::vec(any::<u8>(), 1..9),
        ) {
            let mut msix = msix();
            msix.set_control(ENABLED);
            for change in msix.write(offset, &data) {
                let (Change::Connect(vector, _) | Change::Disconnect(vector)) = change;
                prop_assert!(vector < 2);
            }
        }
    }
}
