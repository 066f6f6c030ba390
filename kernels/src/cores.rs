//! How many threads are worth starting on this machine.

use std::collections::BTreeSet;
use std::path::Path;

/// Capacity of a core whose capacity the system does not state: that of the strongest.
const FULL_CAPACITY: u32 = 1024;

/// Returns the number of cores to compute on: at least 1, and no more than the process's CPU time allows (its
/// affinity and, in a container, its quota).
///
/// On Linux, two hardware threads of a core count once, because they share its vector units and its path to
/// memory. Cores with less than half of the strongest core's capacity (the small ones of an Arm big.LITTLE
/// system) do not count: the others would wait for them after each op.
pub fn usable() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let cores = strong_cores(&status, Path::new("/sys/devices/system/cpu"));
    cores.map_or(allowed, |cores| cores.clamp(1, allowed))
}

/// The cores that count, from `/proc/self/status` and the folder of CPUs; `None` where the system has no such
/// files.
pub(super) fn strong_cores(status: &str, cpus: &Path) -> Option<usize> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = BTreeSet::new();
    for cpu in numbers(list.trim())? {
        let folder = cpus.join(format!("cpu{cpu}"));
        let siblings = std::fs::read_to_string(folder.join("topology/thread_siblings_list")).ok()?;
        let first = numbers(siblings.trim())?.first().copied()?;
        let capacity = std::fs::read_to_string(folder.join("cpu_capacity"));
        let capacity = capacity.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(FULL_CAPACITY);
        cores.insert((capacity, first));
    }
    let (strongest, _) = *cores.last()?;
    Some(cores.iter().filter(|(capacity, _)| 2 * u64::from(*capacity) >= u64::from(strongest)).count())
}

/// The numbers of a list such as `0-3,8`; `None` if it is no such list, or has more numbers than machines
/// have CPUs.
pub(super) fn numbers(list: &str) -> Option<Vec<u32>> {
    const MOST_CPUS: usize = 1 << 16;
    let mut all = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = first.trim().parse().ok()?..=last.trim().parse::<u32>().ok()?;
        if range.size_hint().0.saturating_add(all.len()) > MOST_CPUS {
            return None;
        }
        all.extend(range);
    }
    Some(all)
}
