//! The machine that a measurement ran on, as far as the operating system tells.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A machine. What is not known is null.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct Machine {
    /// The processor's name.
    pub cpu: Option<String>,
    /// The instruction set.
    pub architecture: String,
    /// Threads that can run at the same time.
    pub cores: Option<usize>,
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// Bytes of the largest cache of a core.
    pub cache_bytes: Option<u64>,
    /// The operating system.
    pub os: String,
}

/// Describes this machine.
pub fn machine() -> Machine {
    Machine {
        cpu: processor(),
        architecture: std::env::consts::ARCH.into(),
        cores: std::thread::available_parallelism().ok().map(std::num::NonZero::get),
        memory_bytes: memory_bytes(),
        cache_bytes: cache_bytes(),
        os: os(),
    }
}

/// The value of a line `name : value` of a file of Linux.
fn line_of(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let value = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    });
    value.filter(|value| !value.is_empty())
}

fn processor() -> Option<String> {
    line_of("/proc/cpuinfo", "model name").or_else(|| line_of("/proc/cpuinfo", "Model"))
}

fn memory_bytes() -> Option<u64> {
    let total = line_of("/proc/meminfo", "MemTotal")?;
    Some(1024 * total.split_whitespace().next()?.parse::<u64>().ok()?)
}

/// Returns the size of the largest cache of the first core.
fn cache_bytes() -> Option<u64> {
    let size = |index: u32| {
        let file = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(file).ok()?;
        Some(1024 * text.trim().strip_suffix('K')?.parse::<u64>().ok()?)
    };
    (0..8).filter_map(size).max()
}

fn os() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{} {}", std::env::consts::OS, release.trim()).trim_end().to_owned()
}

/// Returns today's date in UTC, as in 2026-08-31.
pub fn today() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d").to_string()
}
