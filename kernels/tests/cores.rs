//! How many cores count on machines of several kinds.

// The file itself: the whole library is compiled no second time for its tests.
#[path = "../src/cores.rs"]
mod cores;

use cores::{numbers, strong_cores, usable};

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
