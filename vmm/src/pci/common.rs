//! The common configuration of a virtio device on PCI (virtio 1.2, section
//! 4.1.4.3), as a state machine without side effects: the driver's writes go
//! in, the page's new contents and what is to be done come out.

use super::config_space::registers::COMMON_LEN;

/// `ACKNOWLEDGE` to `FAILED`: the device status bits (virtio 1.2, section 2.1).
pub mod status {
    /// The driver knows the device and how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The features are agreed on.
    pub const FEATURES_OK: u8 = 8;
    /// The device broke down.
    pub const NEEDS_RESET: u8 = 0x40;
}

/// No interrupt vector.
pub const NO_VECTOR: u16 = 0xffff;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
/// Where the device status stands.
pub const DEVICE_STATUS: usize = 0x14;
/// Where the generation of the device's configuration stands.
pub const CONFIG_GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFF: usize = 0x1e;
const QUEUE_DESC: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;

/// What follows from a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing but new contents of the page.
    Nothing,
    /// The driver is ready: the device starts.
    Activate,
    /// The driver wants a fresh device.
    Reset,
}

/// One queue as the driver sets it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSetup {
    /// The largest size, a power of two.
    pub max_size: u16,
    /// The size in use.
    pub size: u16,
    /// The interrupt vector or [`NO_VECTOR`].
    pub vector: u16,
    /// Whether the driver uses the queue.
    pub enabled: bool,
    /// Guest address of the descriptor table.
    pub desc: u64,
    /// Guest address of the available ring.
    pub driver: u64,
    /// Guest address of the used ring.
    pub device: u64,
}

/// The state behind the registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommonConfig {
    device_features: u64,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    /// Interrupt vectors of the device.
    vectors: u16,
    config_vector: u16,
    status: u8,
    generation: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

impl CommonConfig {
    /// A device that was just reset.
    pub fn new(features: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        let queue = |max_size: &u16| QueueSetup {
            max_size: *max_size,
            size: *max_size,
            vector: NO_VECTOR,
            enabled: false,
            desc: 0,
            driver: 0,
            device: 0,
        };
        Self {
            device_features: features,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            vectors,
            config_vector: NO_VECTOR,
            status: 0,
            generation: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(queue).collect(),
        }
    }

    /// The driver writes `data` at `offset`. Writes of a size or at a place that no register has
    /// are ignored.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Action {
        match (offset, data.len()) {
            (DEVICE_STATUS, 1) => return self.write_status(data[0]),
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = u32_of(data),
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = u32_of(data),
            (DRIVER_FEATURE, 4) => self.write_features(u32_of(data)),
            (CONFIG_VECTOR, 2) => self.config_vector = self.checked_vector(u16_of(data)),
            (QUEUE_SELECT, 2) => self.queue_select = u16_of(data),
            _ => self.write_queue(offset, data),
        }
        Action::Nothing
    }

    /// The registers as the driver reads them.
    pub fn bytes(&self) -> [u8; COMMON_LEN] {
        let mut bytes = [0; COMMON_LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(
            DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(
            DEVICE_FEATURE,
            &half(self.device_features, self.device_feature_select).to_le_bytes(),
        );
        put(
            DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(
            DRIVER_FEATURE,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(DEVICE_STATUS, &[self.status]);
        put(CONFIG_GENERATION, &[self.generation]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that is not there has size 0.
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(QUEUE_DESC, &queue.desc.to_le_bytes());
            put(QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        bytes
    }

    /// The features that both sides agreed on.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    /// The queues as the driver set them up.
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// The vector for configuration changes or [`NO_VECTOR`].
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The device broke down; only a reset helps.
    pub fn fail(&mut self) {
        self.status |= status::NEEDS_RESET;
    }

    /// The device's configuration changed.
    pub fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    fn write_status(&mut self, value: u8) -> Action {
        if value == 0 {
            let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
            *self = Self::new(self.device_features, &sizes, self.vectors);
            return Action::Reset;
        }
        let set = value & !self.status;
        self.status |= value & !status::NEEDS_RESET;
        let agreed = self.driver_features & !self.device_features == 0
            && self.driver_features & crate::virtio::F_VERSION_1 != 0;
        if set & status::FEATURES_OK != 0 && !agreed {
            self.status &= !status::FEATURES_OK;
        }
        let ready = self.status & status::FEATURES_OK != 0;
        if set & status::DRIVER_OK != 0 && ready {
            Action::Activate
        } else {
            Action::Nothing
        }
    }

    fn write_features(&mut self, value: u32) {
        // After FEATURES_OK the driver must not change them (virtio 1.2, section 3.1.1).
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => set_half(&mut self.driver_features, 0, value),
            1 => set_half(&mut self.driver_features, 1, value),
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: usize, data: &[u8]) {
        let running = self.status & status::DRIVER_OK != 0;
        let vectors = self.vectors;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        // A queue in use is changed by a reset only; late enabling is a rule the driver must keep.
        if running || (queue.enabled && offset != QUEUE_VECTOR) {
            return;
        }
        match (offset, data.len()) {
            (QUEUE_SIZE, 2) => {
                let size = u16_of(data);
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.size = size;
                }
            }
            (QUEUE_VECTOR, 2) => {
                let vector = u16_of(data);
                queue.vector = if vector < vectors { vector } else { NO_VECTOR };
            }
            (QUEUE_ENABLE, 2) => queue.enabled = u16_of(data) == 1,
            _ => {
                for (start, register) in [
                    (QUEUE_DESC, &mut queue.desc),
                    (QUEUE_DRIVER, &mut queue.driver),
                    (QUEUE_DEVICE, &mut queue.device),
                ] {
                    match (offset.wrapping_sub(start), data.len()) {
                        (0, 8) => {
                            *register =
                                u64::from(u32_of(data)) | u64::from(u32_of(&data[4..])) << 32;
                        }
                        (0, 4) => set_half(register, 0, u32_of(data)),
                        (4, 4) => set_half(register, 1, u32_of(data)),
                        _ => {}
                    }
                }
            }
        }
    }

    fn checked_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors {
            vector
        } else {
            NO_VECTOR
        }
    }
}

fn u16_of(data: &[u8]) -> u16 {
    u16::from_le_bytes([data[0], data[1]])
}

fn u32_of(data: &[u8]) -> u32 {
    u32::from_le_bytes([data[0], data[1], data[2], data[3]])
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(register: &mut u64, which: u32, value: u32) {
    let shift = 32 * which;
    *register = *register & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::F_VERSION_1;

    fn config() -> CommonConfig {
        CommonConfig::new(F_VERSION_1 | 5, &[256, 64], 2)
    }

    fn negotiate(config: &mut CommonConfig, features: u64) {
        for (select, value) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            config.write(DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            config.write(DRIVER_FEATURE, &value.to_le_bytes());
        }
        config.write(DEVICE_STATUS, &[3]);
        config.write(DEVICE_STATUS, &[3 | status::FEATURES_OK]);
    }

    #[test]
    fn a_driver_that_agrees_starts_the_device() {
        let mut config = config();
        negotiate(&mut config, F_VERSION_1 | 1);
        assert_eq!(config.write(DEVICE_STATUS, &[15]), Action::Activate);
        assert_eq!(config.features(), F_VERSION_1 | 1);
    }

    #[test]
    fn features_that_were_not_on_offer_are_refused() {
        let mut config = config();
        negotiate(&mut config, F_VERSION_1 | 2);
        assert_eq!(config.status() & status::FEATURES_OK, 0);
        assert_eq!(config.write(DEVICE_STATUS, &[15]), Action::Nothing);
    }

    #[test]
    fn a_driver_without_version_1_is_refused() {
        let mut config = config();
        negotiate(&mut config, 1);
        assert_eq!(config.status() & status::FEATURES_OK, 0);
    }

    #[test]
    fn a_queue_that_is_not_there_has_size_0() {
        let mut config = config();
        config.write(QUEUE_SELECT, &2u16.to_le_bytes());
        assert_eq!(config.bytes()[QUEUE_SIZE..QUEUE_SIZE + 2], [0, 0]);
    }

    #[test]
    fn a_vector_that_is_not_there_reads_back_as_none() {
        let mut config = config();
        config.write(QUEUE_VECTOR, &2u16.to_le_bytes());
        assert_eq!(config.bytes()[QUEUE_VECTOR..QUEUE_VECTOR + 2], [0xff, 0xff]);
    }

    #[test]
    fn writing_zero_to_the_status_resets_everything() {
        let mut config = config();
        negotiate(&mut config, F_VERSION_1);
        config.write(QUEUE_DESC, &7u64.to_le_bytes());
        assert_eq!(config.write(DEVICE_STATUS, &[0]), Action::Reset);
        assert_eq!(config, self::config());
    }

    proptest! {
        #[test]
        fn any_sequence_of_writes_keeps_sizes_and_vectors_in_bounds(
            writes in proptest::collection::vec(
                (0usize..0x48, proptest::collection::vec(any::<u8>(), 1..9)), 0..64)
        ) {
            let mut config = config();
            for (offset, data) in writes {
                config.write(offset, &data);
                let _ = config.bytes();
            }
            for queue in config.queues() {
                prop_assert!(queue.size.is_power_of_two() && queue.size <= queue.max_size);
                prop_assert!(queue.vector < 2 || queue.vector == NO_VECTOR);
            }
        }
    }
}
