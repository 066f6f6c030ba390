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
fn strong_cores(status: &str, cpus: &Path) -> Option<usize> {
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
fn numbers(list: &str) -> Option<Vec<u32>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a folder of CPUs: for each its siblings and its capacity.
    fn machine(name: &str, cpus: &[(&str, Option<u32>)]) -> std::path::PathBuf {
        let root = std::env::temp_dir().join(format!("halite-cores-{name}-{}", std::process::id()));
        for (i, (siblings, capacity)) in cpus.iter().enumerate() {
            let folder = root.join(format!("cpu{i}"));
            std::fs::create_dir_all(folder.join("topology")).unwrap();
            std::fs::write(folder.join("topology/thread_siblings_list"), format!("{siblings}\n")).unwrap();
            if let Some(capacity) = capacity {
                std::fs::write(folder.join("cpu_capacity"), format!("{capacity}\n")).unwrap();
            }
        }
        root
    }

    #[test]
    fn hardware_threads_of_a_core_count_once() {
        let root = machine("smt", &[("0,2", None), ("1,3", None), ("0,2", None), ("1,3", None)]);
        let cores = |list: &str| strong_cores(&format!("Name:\tx\nCpus_allowed_list:\t{list}\n"), &root);
        assert_eq!(cores("0-3"), Some(2));
        assert_eq!(cores("0,2"), Some(1), "two threads of one core");
        assert_eq!(cores("1"), Some(1));
        assert_eq!(cores("0-4"), None, "no such CPU");
        assert_eq!(cores("x"), None);
        assert_eq!(strong_cores("Name:\tx\n", &root), None);
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn small_cores_do_not_count() {
        let small = |i| (i, Some(400));
        let cpus = [small("0"), small("1"), ("2", Some(800)), ("3", Some(1024))];
        let root = machine("big-little", &cpus);
        let cores = |list: &str| strong_cores(&format!("Cpus_allowed_list:\t{list}\n"), &root);
        assert_eq!(cores("0-3"), Some(2));
        assert_eq!(cores("0-1"), Some(2), "there is nothing stronger");
        assert_eq!(cores("0-2"), Some(3), "half as strong or more");
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn lists_of_cpus() {
        assert_eq!(numbers("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(numbers("7"), Some(vec![7]));
        assert_eq!(numbers("0-4294967295"), None);
        assert_eq!(numbers(""), None);
    }

    #[test]
    fn this_machine_has_a_core() {
        assert!(usable() >= 1);
    }
}
