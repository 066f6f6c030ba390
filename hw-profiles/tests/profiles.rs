//! Profiles of chips: the shipped ones hold together, and what cannot be is refused by name, value, unit and range.

#[path = "common/exercise.rs"]
mod exercise;

use halite::Error;
use halite_profiles::profile::{Basis, Profile, Quantity, SHIPPED};

const TEACHING: &str = include_str!("../teaching-16x16.toml");

fn shipped(name: &str) -> Profile {
    Profile::open(name).unwrap_or_else(|e| panic!("{e}"))
}

/// What is said of the teaching chip with `from` replaced by `to`.
fn faults(from: &str, to: &str) -> String {
    assert!(TEACHING.contains(from), "{from}");
    let text = TEACHING.replacen(from, to, 1);
    match Profile::parse("changed", &text) {
        Err(Error::Profile { faults, .. }) => faults.join("\n"),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("`{to}` was accepted"),
    }
}

#[test]
fn every_file_is_shipped_and_holds_together() {
    let folder = std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).unwrap();
    let files = folder.map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<_> = files.filter_map(|file| file.strip_suffix(".toml").map(str::to_owned)).collect();
    files.retain(|file| file != "Cargo");
    files.sort();
    let names: Vec<_> = SHIPPED.iter().map(|(name, _)| *name).collect();
    assert_eq!(files, names);
    for name in names {
        let profile = shipped(name);
        assert_eq!(profile.name, name);
        assert!(!profile.peaks().is_empty() && profile.quantities.len() > 10, "{name}");
        let cites = |source: &str| profile.quantities.iter().any(|(_, quantity)| quantity.source == source);
        let unused: Vec<_> = profile.sources.keys().filter(|source| !cites(source)).collect();
        assert!(unused.is_empty(), "{name}: cited by no number: {unused:?}");
    }
}

#[test]
fn the_schema_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/schema.json");
    let schema = halite_profiles::profile::schema();
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    // By value: the order of keys depends on what else is built.
    let committed: serde_json::Value = serde_json::from_str(&committed).unwrap_or_default();
    assert!(*schema.as_value() == committed, "run `halite profile --schema > hw-profiles/schema.json`");
}

/// The schema's keys with numbers all have a unit, so that the loader checks their range.
#[test]
fn every_number_has_a_unit_and_a_range() {
    let schema = halite_profiles::profile::schema();
    let mut numbers = 0;
    for (table, definition) in schema.as_value()["$defs"].as_object().unwrap() {
        for (key, property) in definition["properties"].as_object().into_iter().flatten() {
            if property.to_string().contains("#/$defs/Quantity") {
                let description = property["description"].as_str().unwrap();
                assert!(description.contains(", from ") && description.ends_with(']'), "{table}.{key}");
                numbers += 1;
            }
        }
    }
    assert!(numbers > 60, "{numbers}");
}

#[test]
fn peaks_and_rates_follow_from_geometry() {
    let peak = |profile: &Profile, name: &str| {
        profile.peaks().into_iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{name}")).1
    };
    let teaching = shipped("teaching-16x16");
    assert_eq!(peak(&teaching, "int8 x int8"), 512e9);
    assert_eq!(peak(&teaching, "bf16 x bf16"), 256e9);
    assert_eq!(peak(&teaching, "fp32"), 16e9);
    let maia = shipped("maia-100");
    assert_eq!((maia.tiles(), maia.read_bytes_per_s(&maia.memory[0])), (64.0, 64.0 * 1.5e12));
    // The published peaks, printed with one or two digits.
    for (name, stated) in [("mx6 x mx6", 3e15), ("mx9 x mx9", 1.5e15), ("bf16 x bf16", 0.75e15)] {
        assert!((peak(&maia, name) / stated - 1.0).abs() < 0.001, "{name}");
    }
}

#[test]
fn numbers_have_the_nearest_provenance() {
    let maia = shipped("maia-100");
    let of = |path: &str| {
        let found = maia.quantities.iter().find(|(p, _)| p == path).unwrap_or_else(|| panic!("{path}"));
        (found.1.value, found.1.basis, found.1.source.as_str())
    };
    assert_eq!(of("memory.hbm.read_bytes_per_s"), (1.8e12, Basis::Datasheet, "hotchips"));
    // The file's.
    assert_eq!(of("memory.tsram.latency_ns"), (20.0, Basis::Guess, "not published"));
    // The table's source, the file's basis.
    assert_eq!((of("vector.open_cycles").1, &of("vector.open_cycles").2[..6]), (Basis::Guess, "as AWS"));
    assert_eq!(maia.chip.clusters.basis, Basis::Datasheet);
}

#[test]
fn single_numbers_out_of_range_are_named() {
    let fault = faults("clock_hz = 1e9", "clock_hz = 1.43");
    assert_eq!(fault, "line 13: chip.clock_hz = 1.43 Hz: expected from 1000000.0 to 10000000000.0 Hz");
    assert!(
        faults("rows = 16", "rows = 16.5").contains(": matrix.rows = 16.5 rows: expected a whole number")
    );
    assert!(faults("rows = 16", "rows = nan").contains("matrix.rows = NaN rows: expected from"));
    // One fault a number, whatever else follows from it.
    for number in ["-1", "-1e9", "nan", "-inf", "0", "{ value = -4 }"] {
        let fault = faults("clock_hz = 1e9", &format!("clock_hz = {number}"));
        assert!(fault.starts_with("line 13: chip.clock_hz = ") && fault.lines().count() == 1, "{fault}");
    }
    let fault = faults("read_bytes_per_s = 8e9", "read_bytes_per_s = 8");
    assert!(fault.contains(": memory.dram.read_bytes_per_s = 8.0 bytes/s: expected from"), "{fault}");
}

#[test]
fn keys_that_are_unknown_or_missing_are_named() {
    for (from, to, expected) in [
        ("latency_ns = 2\n", "latency_us = 2\n", "latency_us"),
        ("name = \"teaching-16x16\"", "name = \"teaching-16x16\"\nflops = 7", "flops"),
        ("latency_ns = 2\n", "", "latency_ns"),
        ("activations = \"int8\"", "activations = \"int9\"", "int9"),
        ("rows = 16", "rows = \"16\"", "rows"),
        ("[chip]", "[chip", "expected"),
    ] {
        let fault = faults(from, to);
        assert!(fault.contains(expected), "{to}: {fault}");
    }
}

#[test]
fn numbers_without_a_source_are_refused() {
    let fault = faults("basis = \"derived\"\n", "");
    assert!(fault.contains("chip.clock_hz = 1000000000.0: `basis` is missing"), "{fault}");
    let fault = faults("source = \"chosen; there is no such chip\"\n", "");
    assert!(fault.contains("sync.semaphore_ns = 10.0: `source` is missing"), "{fault}");
    let fault =
        faults("clock_hz = 1e9", "clock_hz = { value = 1e9, basis = \"datasheet\", source = \"web\" }");
    assert_eq!(fault, "line 13: chip.clock_hz: source `web` is not in [sources], which has []");
    let fault = faults("clock_hz = 1e9", "clock_hz = { value = 1e9, source = \"\" }");
    assert_eq!(fault, "line 13: chip.clock_hz: source is empty");
    assert!(faults("basis = \"derived\"", "basis = \"sure\"").contains("sure"));
}

#[test]
fn peaks_that_contradict_the_geometry_are_refused() {
    let stated = |rate: &str| faults("depth_per_cycle = 1\n", &format!("depth_per_cycle = 1\n{rate}\n"));
    let fault = stated("dense_ops_per_s = 700e9");
    let expected =
        "matrix.rate.0 (int8 x int8).dense_ops_per_s = 700000000000.0 operations/s: expected 512000000000.0";
    assert!(fault.starts_with(expected) && !fault.contains("sparse"), "{fault}");
    assert!(stated("dense_ops_per_s = 1024e9").contains("sparse_ops_per_s"));
    assert!(stated("sparse_ops_per_s = 512e9").contains("expected more than the dense"));
    let slow = "dense_ops_per_s = 500e9\nsparse_ops_per_s = 1e12\nachievable_fraction = 0.6";
    let within = TEACHING.replacen("depth_per_cycle = 1\n", &format!("depth_per_cycle = 1\n{slow}\n"), 1);
    assert!(Profile::parse("within", &within).is_ok());
}

#[test]
fn scratchpads_need_engines() {
    let (before, rest) = TEACHING.split_once("[[dma]]").unwrap();
    let (_, after) = rest.split_once("[sync]").unwrap();
    let error = Profile::parse("changed", &format!("{before}[sync]{after}")).unwrap_err().to_string();
    assert!(error.contains("dma: missing; memory.scratchpad is managed by software"), "{error}");
}

#[test]
fn what_contradicts_physics_or_formats_is_refused() {
    for (from, to, expected) in [
        (
            "read_bytes_per_s = 8e9",
            "read_bytes_per_s = 80e9",
            "memory.dram.read_bytes_per_s (all) = 80000000000.0",
        ),
        (
            "latency_ns = 100\n",
            "latency_ns = 1\n",
            "memory.dram.latency_ns = 1.0 ns: expected at least the 2.0 ns",
        ),
        ("scope = \"tile\"", "scope = \"host\"", "from inside to outside"),
        ("name = \"copy\"", "name = \"dram\"", "name = dram"),
        ("accumulator = \"int32\"", "accumulator = \"int4\"", "accumulator = int4"),
        ("accumulator = \"fp32\"", "accumulator = \"mx9\"", "accumulator = mx9"),
        (
            "[launch]",
            "[power]\ntdp_w = 5\nidle_w = 6\n[launch]",
            "power.idle_w = 6.0 W: expected at most tdp_w",
        ),
    ] {
        let fault = faults(from, to);
        assert!(fault.contains(expected), "{to}: {fault}");
    }
    let fault = faults(
        "activations = \"bf16\"\nweights = \"bf16\"\naccumulator = \"fp32\"\ndepth_per_cycle = 0.5",
        "activations = \"mx9\"\nweights = \"mx9\"\naccumulator = \"fp32\"\ndepth_per_cycle = 24",
    );
    assert!(fault.contains("a divisor or a multiple of the 16.0 values of a block of mx9"), "{fault}");
    let fault =
        faults("depth_per_cycle = 0.5\n", "depth_per_cycle = 0.5\npj_per_op = 100\n[power]\ntdp_w = 5\n");
    assert!(fault.contains("at its peak 25.600 W, expected at most the 5.0 W"), "{fault}");
}

/// Files that would take far more memory than they have bytes, or a terminal that does what they say.
#[test]
fn large_and_rude_files_are_refused() {
    let refused = |text: &str| match Profile::parse("changed", text) {
        Err(Error::Profile { faults, .. }) => faults,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("accepted"),
    };
    let says = |text: &str, expected: &str| {
        let faults = refused(text);
        assert!(faults.len() == 1 && faults[0].contains(expected), "{faults:?}");
    };
    says(&format!("a = [{}]", "1,".repeat(100_000)), "expected at most 4096 values in all");
    says(&format!("a = [{}]", "1,".repeat(200_000)), "expected at most 262144 bytes, got 400006");
    says(&format!("source = \"{}\"", "x".repeat(1025)), "source: expected at most 1024 bytes, got 1025");
    says(&format!("[[memory]]\nname = \"{}\"", "x".repeat(65)), "name: expected at most 64 bytes, got 65");
    says(&format!("{} = 1", "k".repeat(65)), "a key: expected at most 64 bytes, got 65");
    says("basis = [[1, 2], [3]]", "basis: expected a text");
    says(&"[a]\n".repeat(2).replace('a', &"a.".repeat(30_000)), "");

    let many = refused(&format!("a = [{}]", "1,".repeat(4000)));
    assert!(many.len() <= 33 && many.iter().map(String::len).sum::<usize>() < 10_000, "{}", many.len());
    for rude in ["name = \"\u{1b}[2J\"x", "\"\u{1b}]0;\" = 1\u{9b}", "[sources]\n\"\\u001b[2J\" = 1\n"] {
        let faults = refused(rude).concat();
        assert!(!faults.chars().any(|c| c.is_control() && c != '\n'), "{faults:?}");
    }
    // A text of the file in a fault.
    let sourced = TEACHING.replacen("basis = \"derived\"", "basis = \"datasheet\"", 1);
    let rude = refused(&sourced.replacen("source = \"chosen", "source = \"\\u001b[2J", 1)).concat();
    assert!(rude.contains("source: expected printable characters, got \\u{1b}"), "{rude}");
    for name in ["a\\nb", "a\\tb", "a\u{202e}b", "a\\u0007", "\u{feff}a"] {
        let named = TEACHING.replacen("name = \"teaching-16x16\"", &format!("name = \"{name}\""), 1);
        says(&named, "name: expected printable characters");
    }
}

/// Profiles with single bytes changed, left out or added: refused, or whole.
#[test]
fn mutants_of_profiles() {
    let mut random = halite_testing::SplitMix(5);
    for (_, text) in SHIPPED {
        exercise::profile(text);
        for _ in 0..30 {
            let mut mutant: Vec<char> = text.chars().collect();
            let place = random.below(mutant.len());
            let other = ['0', '9', '"', '=', '[', ']', '\n', '.', '-', 'e', '\u{1b}'][random.below(11)];
            match random.below(3) {
                0 => mutant[place] = other,
                1 => drop(mutant.remove(place)),
                _ => mutant.insert(place, other),
            }
            exercise::profile(&mutant.iter().collect::<String>());
        }
    }
}

/// Every wrong key and value of a file is told with its line, not the first alone.
#[test]
fn all_wrong_keys_and_values_are_told() {
    let text = SHIPPED.iter().find(|(name, _)| *name == "maia-100").unwrap().1;
    let line = |of: &str, text: &str| 1 + text.lines().position(|line| line.starts_with(of)).unwrap();
    let wrong = text
        .replace("latency_ns = 20\n", "latncy_ns = 20\n")
        .replace("fill_cycles =", "fil_cycles =")
        .replace("topology = \"full\"", "topology = \"star\"")
        .replace("broadcast = true", "broadcast = \"yes\"")
        .replace("banks = 32", "banks = \"many\"")
        .replace("[launch]", "[lunch]");
    let error = Profile::parse("wrong", &wrong).unwrap_err().to_string();
    for fault in [
        format!(
            "line {}: matrix.fil_cycles: unknown key, did you mean `fill_cycles`?",
            line("fil_cycles", &wrong)
        ),
        format!(
            "line {}: memory.tsram.latncy_ns: unknown key, did you mean `latency_ns`?",
            line("latncy_ns", &wrong)
        ),
        "memory.tsram.latency_ns: missing".into(),
        format!(
            "line {}: memory.tsram.banks: expected a number or a table, got \"many\"",
            line("banks = \"many\"", &wrong)
        ),
        format!("line {}: noc.broadcast: expected true or false, got \"yes\"", line("broadcast", &wrong)),
        "interconnect.host.topology: expected one of switch, full, ring, torus, got `star`".into(),
        format!("line {}: lunch: unknown key, did you mean `launch`?", line("[lunch]", &wrong)),
        "line 1: launch: missing".into(),
    ] {
        assert!(error.contains(&fault), "{fault}\n\n{error}");
    }
}

/// What the loader accepts, the schema does, so that a fault is never made up.
#[test]
fn shipped_profiles_are_what_the_schema_says() {
    for (name, text) in SHIPPED {
        // One unknown key, so that the keys are looked at.
        let error = Profile::parse(name, &format!("unknown = 1\n{text}")).unwrap_err().to_string();
        assert!(error.contains("line 1: unknown: unknown key"), "{error}");
        assert_eq!(error.lines().count(), 2, "{error}");
    }
}

#[test]
fn every_number_can_be_changed_alone() {
    for (name, _) in SHIPPED {
        let profile = shipped(name);
        for (path, quantity) in &profile.quantities {
            let changed = profile.with(path, 2.0 * quantity.value + 1.0).unwrap();
            let differ = |(new, old): &(&(String, Quantity), &(String, Quantity))| new.1 != old.1;
            let listed = changed.quantities.iter().zip(&profile.quantities).filter(differ);
            assert_eq!(listed.map(|(new, _)| &new.0).collect::<Vec<_>>(), [path], "{name}");
            // Not only in the list.
            let mut same_list = changed.clone();
            same_list.quantities = profile.quantities.clone();
            assert_ne!(same_list, profile, "{name} {path}");
            assert_eq!(changed.with(path, quantity.value).unwrap(), profile, "{name} {path}");
        }
    }
    let error = shipped("maia-100").with("memory.hbm.read_bytes", 1.0).unwrap_err().to_string();
    assert!(error.contains("memory.hbm.read_bytes_per_s"), "{error}");
}
