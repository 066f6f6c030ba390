//! The time, random numbers and hexadecimal digits.

use std::hash::{BuildHasher, RandomState};

use halite::clock::since_1970;

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    u64::try_from(since_1970().as_millis()).unwrap_or(u64::MAX)
}

/// A number that nobody guesses by chance; not for keys.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(())
}

/// A number in (0, 1].
pub(crate) fn chance() -> f64 {
    ((random() >> 11) + 1) as f64 / (1u64 << 53) as f64
}

/// Bytes in hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
