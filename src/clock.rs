//! The time, also where the standard library has none: in a browser, whose module imports `halite.now_ms` (of a clock that
//! never goes back) and `halite.unix_ms`, both as f64.

use std::time::Duration;

#[cfg(not(all(target_arch = "wasm32", target_os = "unknown")))]
mod system {
    use super::Duration;
    pub use std::time::Instant;

    pub fn since_1970() -> Duration {
        std::time::UNIX_EPOCH.elapsed().unwrap_or_default()
    }
}

#[cfg(all(target_arch = "wasm32", target_os = "unknown"))]
#[allow(unsafe_code)]
mod system {
    use super::Duration;

    #[link(wasm_import_module = "halite")]
    unsafe extern "C" {
        safe fn now_ms() -> f64;
        safe fn unix_ms() -> f64;
    }

    fn duration(ms: f64) -> Duration {
        Duration::try_from_secs_f64(ms / 1000.0).unwrap_or_default()
    }

    /// A time of the browser's clock.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Instant(Duration);

    impl Instant {
        /// Now.
        pub fn now() -> Instant {
            Instant(duration(now_ms()))
        }

        /// The time since then.
        pub fn elapsed(self) -> Duration {
            Instant::now().saturating_duration_since(self)
        }

        /// The time from `earlier` to this; zero if that is later.
        pub fn saturating_duration_since(self, earlier: Instant) -> Duration {
            self.0.saturating_sub(earlier.0)
        }

        /// A later time; `None` if that is too late for it.
        pub fn checked_add(self, time: Duration) -> Option<Instant> {
            self.0.checked_add(time).map(Instant)
        }
    }

    impl std::ops::Sub for Instant {
        type Output = Duration;

        fn sub(self, earlier: Instant) -> Duration {
            self.saturating_duration_since(earlier)
        }
    }

    pub fn since_1970() -> Duration {
        duration(unix_ms())
    }
}

pub use system::Instant;

/// The time since the start of 1970 in UTC; zero if the system's clock is earlier.
pub fn since_1970() -> Duration {
    system::since_1970()
}
