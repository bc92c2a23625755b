//! A token bucket for bytes and one for packets, for one direction.
//!
//! A packet may pass while both have something left, and takes its whole price
//! even if that leaves a debt: nothing needs to be known of a packet before
//! it is there.

use std::time::{Duration, Instant};

use super::config::{Bucket, Rate};

/// Tokens are counted in parts of this many, so that no time is lost by rounding.
const PARTS: i128 = 1_000_000_000;

/// Both buckets of a direction.
#[derive(Debug)]
pub struct Limiter {
    bytes: Option<Level>,
    packets: Option<Level>,
}

/// How full a bucket is.
#[derive(Debug)]
struct Level {
    bucket: Bucket,
    parts: i128,
    at: Instant,
}

impl Limiter {
    /// Full buckets at `now`; nothing where there is no limit.
    pub fn new(rate: Rate, now: Instant) -> Option<Self> {
        let level = |bucket: Bucket| Level {
            bucket,
            parts: i128::from(bucket.burst) * PARTS,
            at: now,
        };
        (!rate.is_unlimited()).then(|| Self {
            bytes: rate.bytes.map(level),
            packets: rate.packets.map(level),
        })
    }

    /// Whether a packet may pass at `now`.
    ///
    /// # Errors
    /// When it may not: how long it has to wait.
    pub fn admit(&mut self, now: Instant) -> Result<(), Duration> {
        let levels = self.bytes.iter_mut().chain(&mut self.packets);
        let wait = levels.map(|level| level.wait(now)).max();
        match wait {
            None | Some(Duration::ZERO) => Ok(()),
            Some(wait) => Err(wait),
        }
    }

    /// A packet of so many bytes has passed.
    pub fn spend(&mut self, bytes: usize) {
        if let Some(level) = &mut self.bytes {
            level.parts -= bytes as i128 * PARTS;
        }
        if let Some(level) = &mut self.packets {
            level.parts -= PARTS;
        }
    }
}

impl Level {
    /// Fills the bucket and tells how long until it has something.
    fn wait(&mut self, now: Instant) -> Duration {
        let passed_ns = now.saturating_duration_since(self.at).as_nanos() as i128;
        let per_second = i128::from(self.bucket.per_second);
        self.at = self.at.max(now);
        self.parts = (self.parts + passed_ns.saturating_mul(per_second))
            .min(i128::from(self.bucket.burst) * PARTS);
        if self.parts > 0 {
            return Duration::ZERO;
        }
        let missing = 1 - self.parts;
        let nanos = (missing + per_second - 1) / per_second.max(1);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limiter(per_second: u64, burst: u64, now: Instant) -> Limiter {
        let bytes = Some(Bucket { per_second, burst });
        let rate = Rate {
            bytes,
            packets: None,
        };
        Limiter::new(rate, now).unwrap()
    }

    #[test]
    fn a_debt_is_waited_for() {
        let start = Instant::now();
        let mut limiter = limiter(1000, 100, start);
        assert_eq!(limiter.admit(start), Ok(()));
        limiter.spend(600);
        let wait = limiter.admit(start).unwrap_err();
        assert!(wait > Duration::from_millis(500) && wait < Duration::from_millis(501));
        assert_eq!(limiter.admit(start + wait), Ok(()));
    }

    #[test]
    fn packets_are_limited_beside_bytes() {
        let start = Instant::now();
        let rate = Rate {
            bytes: None,
            packets: Some(Bucket {
                per_second: 10,
                burst: 2,
            }),
        };
        let mut limiter = Limiter::new(rate, start).unwrap();
        for _ in 0..2 {
            assert_eq!(limiter.admit(start), Ok(()));
            limiter.spend(1);
        }
        assert!(limiter.admit(start).is_err());
    }

    proptest! {
        #[test]
        fn no_more_passes_than_rate_and_burst_and_one_packet(
            per_second in 1..1_000_000_u64,
            burst in 1..100_000_u64,
            steps in proptest::collection::vec((0..50_000_000_u64, 1..70_000_usize), 1..60),
        ) {
            let start = Instant::now();
            let mut limiter = limiter(per_second, burst, start);
            let (mut now, mut spent) = (start, 0_u128);
            for (nanos, bytes) in steps {
                now += Duration::from_nanos(nanos);
                match limiter.admit(now) {
                    Ok(()) => {
                        limiter.spend(bytes);
                        spent += bytes as u128;
                    }
                    Err(wait) => prop_assert!(wait > Duration::ZERO),
                }
                let filled = u128::from(per_second) * (now - start).as_nanos() / 1_000_000_000;
                prop_assert!(spent <= u128::from(burst) + filled + 70_000);
            }
        }
    }
}
