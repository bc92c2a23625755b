//! How much the layers of one image may ask for, all together.

/// Bounds of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all layers, unpacked.
    pub unpacked_bytes: u64,
    /// Members of all layers, and directories that they imply.
    pub entries: u64,
    /// Bytes of names, targets and extended attributes, which are kept in memory.
    pub metadata_bytes: u64,
    /// Steps on the way through directories.
    pub steps: u64,
}

impl Default for Limits {
    /// More than any image has that people use, and nothing that a machine would die of.
    fn default() -> Self {
        Self {
            unpacked_bytes: 64 << 30,
            entries: 4 << 20,
            metadata_bytes: 1 << 30,
            steps: 1 << 30,
        }
    }
}

/// Which bound was met.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the image has more than {limit} {what}")]
pub struct Exceeded {
    what: &'static str,
    limit: u64,
}

/// What is left of the limits.
#[derive(Debug)]
pub struct Budget {
    limits: Limits,
    left: Limits,
}

impl Budget {
    /// All of it.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            left: limits,
        }
    }

    /// How many more bytes may be unpacked.
    #[must_use]
    pub fn unpacked_bytes_left(&self) -> u64 {
        self.left.unpacked_bytes
    }

    /// Whether as many bytes may be unpacked.
    pub(super) fn allow_unpacked(&self, count: u64) -> Result<(), Exceeded> {
        let limit = self.limits.unpacked_bytes;
        let mut left = self.left.unpacked_bytes;
        spend(&mut left, count, "bytes unpacked", limit)
    }

    /// Spends bytes of unpacked layers.
    ///
    /// # Errors
    ///
    /// When there are not as many left.
    pub fn unpacked_bytes(&mut self, count: u64) -> Result<(), Exceeded> {
        let limit = self.limits.unpacked_bytes;
        spend(
            &mut self.left.unpacked_bytes,
            count,
            "bytes unpacked",
            limit,
        )
    }

    pub(super) fn entry(&mut self) -> Result<(), Exceeded> {
        spend(&mut self.left.entries, 1, "entries", self.limits.entries)
    }

    pub(super) fn metadata(&mut self, count: usize) -> Result<(), Exceeded> {
        let limit = self.limits.metadata_bytes;
        let what = "bytes of names and attributes";
        spend(&mut self.left.metadata_bytes, count as u64, what, limit)
    }

    pub(super) fn step(&mut self) -> Result<(), Exceeded> {
        let what = "steps through its directories";
        spend(&mut self.left.steps, 1, what, self.limits.steps)
    }
}

fn spend(left: &mut u64, count: u64, what: &'static str, limit: u64) -> Result<(), Exceeded> {
    *left = left.checked_sub(count).ok_or(Exceeded { what, limit })?;
    Ok(())
}
