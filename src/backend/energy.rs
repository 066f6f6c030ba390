//! Energy of steps: of counters that the host can read, shared fairly among those who run at the same time.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::error::{Error, Result};

/// How an energy is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EnergySource {
    /// The RAPL counters of the processor: packages and memory, whoever uses them.
    Rapl,
    /// A sensor of the machine, whoever uses what it measures.
    Hwmon,
    /// The device itself.
    Device,
    /// A model of the device, from its profile.
    Profile,
}

impl EnergySource {
    /// Name, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            EnergySource::Rapl => "rapl",
            EnergySource::Hwmon => "hwmon",
            EnergySource::Device => "device",
            EnergySource::Profile => "profile",
        }
    }
}

/// Energy of some work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Energy {
    /// Joules.
    pub joules: f64,
    /// How they are known.
    pub source: EnergySource,
}

impl Energy {
    /// Energy from a source.
    pub const fn new(joules: f64, source: EnergySource) -> Energy {
        Energy { joules, source }
    }

    /// The sum of what is known.
    pub fn sum(a: Option<Energy>, b: Option<Energy>) -> Option<Energy> {
        match (a, b) {
            (Some(a), Some(b)) => Some(Energy { joules: a.joules + b.joules, ..b }),
            (a, b) => a.or(b),
        }
    }
}

/// Where Linux has the RAPL counters.
const POWERCAP: &str = "/sys/class/powercap";

/// A file that counts microjoules.
#[derive(Debug)]
struct Counter {
    path: PathBuf,
    file: File,
    /// It goes on at 0 after this, if that is known.
    largest: Option<u64>,
    last: u64,
}

fn unreadable(path: &Path, source: std::io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}

/// Reads a whole number, without allocating.
fn number(file: &mut File) -> std::io::Result<u64> {
    let mut text = [0; 32];
    file.rewind()?;
    let len = file.read(&mut text)?;
    let number = std::str::from_utf8(&text[..len]).ok().and_then(|text| text.trim().parse().ok());
    number.ok_or_else(|| std::io::Error::new(ErrorKind::InvalidData, "expected a whole number"))
}

impl Counter {
    fn open(path: PathBuf, largest: Option<u64>) -> Result<Counter> {
        let read = |path: &Path| {
            let mut file = File::open(path)?;
            let last = number(&mut file)?;
            Ok((file, last))
        };
        let (file, last) = read(&path).map_err(|e| unreadable(&path, e))?;
        Ok(Counter { path, file, largest, last })
    }

    /// Microjoules since the last call.
    fn delta(&mut self) -> Result<u64> {
        let now = number(&mut self.file).map_err(|e| unreadable(&self.path, e))?;
        let before = std::mem::replace(&mut self.last, now);
        Ok(match (now.checked_sub(before), self.largest) {
            (Some(delta), _) => delta,
            (None, Some(largest)) => largest.saturating_sub(before).saturating_add(now).saturating_add(1),
            // It was set back.
            (None, None) => now,
        })
    }
}

/// The counters of packages, and of memory beside them.
fn rapl(folder: &Path) -> Result<Vec<Counter>> {
    let entries = std::fs::read_dir(folder).map_err(|e| unreadable(folder, e))?;
    let mut counters = Vec::new();
    for entry in entries {
        let zone = entry.map_err(|e| unreadable(folder, e))?.path();
        let read = |file: &str| std::fs::read_to_string(zone.join(file));
        // Parts of packages, such as cores, are in their package's counter; memory is not.
        let Ok(name) = read("name") else { continue };
        if !(name.starts_with("package") || name.trim() == "dram") {
            continue;
        }
        let largest = read("max_energy_range_uj").ok().and_then(|text| text.trim().parse().ok());
        counters.push(Counter::open(zone.join("energy_uj"), largest)?);
    }
    if counters.is_empty() {
        return Err(unreadable(
            folder,
            std::io::Error::new(ErrorKind::NotFound, "no RAPL counter of a package"),
        ));
    }
    Ok(counters)
}

/// Counters, and who runs by them.
#[derive(Debug)]
struct State {
    counters: Vec<Counter>,
    /// Steps that run.
    running: u32,
    /// Joules of each step that has run all the time.
    share: f64,
}

impl State {
    /// Shares what was used since the last call among the steps that ran.
    fn advance(&mut self) -> Result<()> {
        let mut microjoules = 0u64;
        for counter in &mut self.counters {
            microjoules = microjoules.saturating_add(counter.delta()?);
        }
        if self.running > 0 {
            self.share += microjoules as f64 / 1e6 / f64::from(self.running);
        }
        Ok(())
    }
}

/// Measures the energy of steps. What is used while several run at once is shared equally; what is used while none runs is nobody's.
#[derive(Debug)]
pub(super) struct Meter {
    state: Mutex<State>,
    source: EnergySource,
}

/// The meters of this process: steps on different backends share the same counters.
static METERS: Mutex<Vec<(PathBuf, Weak<Meter>)>> = Mutex::new(Vec::new());

impl Meter {
    /// Opens `rapl`, or a file that counts microjoules.
    pub fn open(name: &Path) -> Result<Arc<Meter>> {
        let is_rapl = name == Path::new("rapl");
        let path =
            if is_rapl { PathBuf::from(POWERCAP) } else { std::path::absolute(name).unwrap_or(name.into()) };
        let mut meters = METERS.lock().unwrap_or_else(PoisonError::into_inner);
        meters.retain(|(_, meter)| meter.strong_count() > 0);
        if let Some(meter) = meters.iter().find(|(of, _)| *of == path).and_then(|(_, meter)| meter.upgrade())
        {
            return Ok(meter);
        }
        let (counters, source) = match is_rapl {
            true => (rapl(&path)?, EnergySource::Rapl),
            false => (vec![Counter::open(path.clone(), None)?], EnergySource::Hwmon),
        };
        let meter = Arc::new(Meter::new(counters, source));
        meters.push((path, Arc::downgrade(&meter)));
        Ok(meter)
    }

    fn new(counters: Vec<Counter>, source: EnergySource) -> Meter {
        Meter { state: Mutex::new(State { counters, running: 0, share: 0.0 }), source }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step begins. Returns what [`Meter::end`] needs; `None` if the counters cannot be read.
    pub fn begin(&self) -> Option<f64> {
        let mut state = self.state();
        let began = state.advance().is_ok().then_some(state.share);
        state.running += 1;
        began
    }

    /// The step ended.
    pub fn end(&self, began: Option<f64>) -> Option<Energy> {
        let mut state = self.state();
        let is_read = state.advance().is_ok();
        state.running = state.running.saturating_sub(1);
        let joules = state.share - began.filter(|_| is_read)?;
        Some(Energy::new(joules, self.source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(folder: &Path, zone: &str, name: &str, microjoules: u64) -> PathBuf {
        let zone = folder.join(zone);
        std::fs::create_dir(&zone).unwrap();
        std::fs::write(zone.join("name"), format!("{name}\n")).unwrap();
        std::fs::write(zone.join("max_energy_range_uj"), "999999\n").unwrap();
        std::fs::write(zone.join("energy_uj"), format!("{microjoules}\n")).unwrap();
        zone.join("energy_uj")
    }

    fn joules(energy: Option<Energy>) -> f64 {
        energy.unwrap().joules
    }

    #[test]
    fn packages_and_memory_count_and_their_parts_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let package = zone(folder.path(), "intel-rapl:0", "package-0", 900_000);
        let cores = zone(folder.path(), "intel-rapl:0:0", "core", 5);
        let memory = zone(folder.path(), "intel-rapl:0:1", "dram", 100);
        zone(folder.path(), "intel-rapl:1", "psys", 100);
        std::fs::create_dir(folder.path().join("intel-rapl")).unwrap();
        let meter = Meter::new(rapl(folder.path()).unwrap(), EnergySource::Rapl);
        let began = meter.begin();
        std::fs::write(cores, "90000").unwrap();
        std::fs::write(memory, "300").unwrap();
        // Beyond its largest number.
        std::fs::write(package, "400000").unwrap();
        let energy = meter.end(began).unwrap();
        assert_eq!(energy.source, EnergySource::Rapl);
        assert!((energy.joules - 0.5002).abs() < 1e-9, "{energy:?}");
    }

    #[test]
    fn steps_at_the_same_time_share_and_idle_time_is_nobodys() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("energy1_input");
        let count = |joules: u64| std::fs::write(&file, (joules * 1_000_000).to_string()).unwrap();
        count(10);
        let meter = Meter::open(&file).unwrap();
        assert!(Arc::ptr_eq(&meter, &Meter::open(&file).unwrap()));
        count(12);
        let a = meter.begin();
        count(15);
        let b = meter.begin();
        count(25);
        let a = joules(meter.end(a));
        count(26);
        let b = joules(meter.end(b));
        count(40);
        let c = meter.begin();
        count(41);
        assert_eq!((a, b, joules(meter.end(c))), (8.0, 6.0, 1.0));
    }

    #[test]
    fn counters_that_cannot_be_read_are_errors_or_no_energy() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Meter::open(&folder.path().join("none")).unwrap_err().to_string().contains("none"));
        let error = rapl(folder.path()).unwrap_err().to_string();
        assert!(error.contains("no RAPL counter"), "{error}");
        let file = folder.path().join("energy1_input");
        std::fs::write(&file, "many").unwrap();
        assert!(Meter::open(&file).unwrap_err().to_string().contains("a whole number"));
        std::fs::write(&file, "5").unwrap();
        let meter = Meter::open(&file).unwrap();
        let began = meter.begin();
        std::fs::write(&file, "").unwrap();
        assert_eq!(meter.end(began), None);
        // The next one starts anew.
        std::fs::write(&file, "7000000").unwrap();
        let began = meter.begin();
        std::fs::write(&file, "8000000").unwrap();
        assert_eq!(joules(meter.end(began)), 1.0);
    }
}
