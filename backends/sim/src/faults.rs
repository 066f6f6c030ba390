//! Faults that a simulated chip injects while it runs ops: flipped bits, and lanes of a unit that are stuck.
//!
//! | place | which bits pass it |
//! |---|---|
//! | `dram` | bits that a load reads from device memory; the memory itself stays right |
//! | `link` | bits that a load or a store moves between device memory and a scratchpad |
//! | `scratchpad` | bits of a slot that a unit or a store reads; a flipped bit stays until the slot is rewritten |
//! | `accumulator` | bits of the results that the matrix unit writes |
//!
//! Random numbers give the gaps between flipped bits, so a low rate costs nothing. Each plan has a stream of
//! its own for each fault, from the seed and the number of plans that the chip prepared before it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::chip::Chip;
use super::tile::{Step, Work};
use halite::backend::driver::or;
use halite::rng::SplitMix64;
use halite::{Error, Result};

/// A place where bits flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// Reads of device memory.
    Dram,
    /// Transfers between device memory and scratchpads.
    Link,
    /// Scratchpads.
    Scratchpad,
    /// Results of the matrix unit.
    Accumulator,
}

impl Place {
    /// All places.
    pub const ALL: [Place; 4] = [Place::Dram, Place::Link, Place::Scratchpad, Place::Accumulator];

    /// Returns the name, as in `where=dram`.
    pub fn name(self) -> &'static str {
        ["dram", "link", "scratchpad", "accumulator"][self as usize]
    }
}

/// A unit with lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unit {
    /// The matrix unit; a lane is a column of its array.
    Matrix,
    /// The vector unit.
    Vector,
}

impl Unit {
    const ALL: [Unit; 2] = [Unit::Matrix, Unit::Vector];

    /// Returns the name, as in `where=vector`.
    pub fn name(self) -> &'static str {
        ["accumulator", "vector"][self as usize]
    }

    fn lanes(self, chip: &Chip) -> u32 {
        match self {
            Unit::Matrix => chip.matrix_lanes().map_or(0, |(lanes, _)| lanes),
            Unit::Vector => chip.vector_lanes(),
        }
    }
}

/// A fault to inject.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Fault {
    /// Bits that flip at random.
    BitFlips {
        /// Probability that a bit is flipped when it passes the place.
        rate: f64,
        /// The place.
        place: Place,
        /// Seed of the random numbers.
        seed: u64,
        /// The first and the last bit of each 32-bit word that can flip. The others do not count.
        bits: (u32, u32),
    },
    /// A lane of a unit, with results that are stuck.
    Stuck {
        /// The lane.
        lane: u32,
        /// The tile; `None`: all of them.
        tile: Option<u32>,
        /// The unit.
        unit: Unit,
        /// The stuck bit; `None`: all bits.
        bit: Option<u32>,
        /// The value of the bit.
        value: bool,
    },
}

impl Fault {
    /// Parses faults separated by semicolons.
    ///
    /// # Errors
    /// [`Error::Argument`] with what is expected.
    pub fn list(text: &str) -> Result<Vec<Fault>> {
        text.split(';').map(|spec| spec.trim().parse()).collect()
    }

    /// Checks that the chip has the lane and the tile.
    ///
    /// # Errors
    /// [`Error::Argument`] with the number of lanes or tiles.
    pub(crate) fn check(&self, chip: &Chip) -> Result<()> {
        match *self {
            Fault::BitFlips { rate, bits: (low, high), .. } => {
                check_rate(rate, &rate)?;
                check_bits(low, high, &format!("{low}-{high}"))
            }
            Fault::Stuck { lane, tile, unit, bit, value } => {
                let lanes = unit.lanes(chip);
                let of = format!("(`{}` of `{}`)", unit.name(), chip.profile.name);
                if lanes == 0 {
                    return Err(wrong("where=vector, for this chip has no matrix unit", unit.name()));
                }
                if lane >= lanes {
                    return Err(wrong(format!("a lane below {lanes} {of}"), format!("lane={lane}")));
                }
                if let Some(tile) = tile.filter(|&tile| tile >= chip.tiles) {
                    return Err(wrong(format!("a tile below {} {of}", chip.tiles), format!("tile={tile}")));
                }
                match bit {
                    Some(bit) if bit > 31 => Err(wrong("a bit from 0 to 31", format!("bit={bit}"))),
                    None if value => Err(wrong("bit=N with value=1", "value=1 alone")),
                    _ => Ok(()),
                }
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::BitFlips { rate, place, bits, .. } => {
                write!(f, "bit flips in {} at rate {rate:e}", place.name())?;
                if *bits == ALL_BITS { Ok(()) } else { write!(f, " in bits {}-{}", bits.0, bits.1) }
            }
            Fault::Stuck { lane, tile, unit, bit, value } => {
                match tile {
                    Some(tile) => write!(f, "lane {lane} of {} in tile {tile}", unit.name())?,
                    None => write!(f, "lane {lane} of {} in all tiles", unit.name())?,
                }
                match bit {
                    Some(bit) => write!(f, ", bit {bit} stuck at {}", u8::from(*value)),
                    None => write!(f, ", stuck at zero"),
                }
            }
        }
    }
}

const ALL_BITS: (u32, u32) = (0, 31);
const BIT_FLIP: &str = "bitflip:rate=R,where=PLACE[,seed=N][,bits=LOW-HIGH]";
const STUCK: &str = "stuck:lane=N,where=UNIT[,tile=N|all][,value=0|1,bit=N]";

fn wrong(expected: impl fmt::Display, got: impl fmt::Display) -> Error {
    Error::argument("injected fault", expected, format!("`{got}`"))
}

fn check_rate(rate: f64, text: &dyn fmt::Display) -> Result<()> {
    if (0.0..=1.0).contains(&rate) { Ok(()) } else { Err(wrong("rate=R from 0 to 1", text)) }
}

fn check_bits(low: u32, high: u32, text: &str) -> Result<()> {
    if low <= high && high <= 31 { Ok(()) } else { Err(wrong("bits=LOW-HIGH from 0-0 to 31-31", text)) }
}

/// The keys of a fault's text.
struct Keys<'a> {
    usage: &'static str,
    given: Vec<(&'a str, &'a str)>,
}

impl<'a> Keys<'a> {
    fn parse(text: &'a str, usage: &'static str, known: &[&str]) -> Result<Keys<'a>> {
        let mut given: Vec<(&str, &str)> = Vec::new();
        for pair in text.split(',') {
            let Some((key, value)) = pair.split_once('=') else { return Err(wrong(usage, pair)) };
            let (key, value) = (key.trim(), value.trim());
            if !known.contains(&key) {
                return Err(wrong(usage, format!("{key}={value}")));
            }
            if given.iter().any(|(other, _)| *other == key) {
                return Err(wrong(format!("{key} once"), text));
            }
            given.push((key, value));
        }
        Ok(Keys { usage, given })
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        self.given.iter().find(|(given, _)| *given == key).map(|(_, value)| *value)
    }

    fn number<T: FromStr>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.text(key) else { return Ok(None) };
        let number = text.parse().map_err(|_| wrong(format!("a number for {key}"), text))?;
        Ok(Some(number))
    }

    /// One of `all`, by name.
    fn one_of<T: Copy>(&self, key: &str, all: &[T], name: impl Fn(T) -> &'static str) -> Result<T> {
        let text = self.text(key).ok_or_else(|| self.lacks(key))?;
        let found = all.iter().copied().find(|&one| name(one) == text);
        let names = || or(all.iter().map(|&one| format!("{key}={}", name(one))));
        found.ok_or_else(|| wrong(names(), text))
    }

    fn lacks(&self, key: &str) -> Error {
        wrong(self.usage, format!("no {key}"))
    }
}

impl FromStr for Fault {
    type Err = Error;

    fn from_str(text: &str) -> Result<Fault> {
        let fault = match text.split_once(':') {
            Some(("bitflip", rest)) => {
                let keys = Keys::parse(rest, BIT_FLIP, &["rate", "where", "seed", "bits"])?;
                let rate: f64 = keys.number("rate")?.ok_or_else(|| keys.lacks("rate"))?;
                check_rate(rate, &keys.text("rate").unwrap_or_default())?;
                let bits = match keys.text("bits") {
                    None => ALL_BITS,
                    Some(text) => {
                        let ends = text.split_once('-').and_then(|(a, b)| a.parse().ok().zip(b.parse().ok()));
                        let (low, high) = ends.unwrap_or((1, 0));
                        check_bits(low, high, text)?;
                        (low, high)
                    }
                };
                let place = keys.one_of("where", &Place::ALL, Place::name)?;
                Fault::BitFlips { rate, place, seed: keys.number("seed")?.unwrap_or(0), bits }
            }
            Some(("stuck", rest)) => {
                let keys = Keys::parse(rest, STUCK, &["lane", "tile", "where", "value", "bit"])?;
                let tile = if keys.text("tile") == Some("all") { None } else { keys.number("tile")? };
                let bit: Option<u32> = keys.number("bit")?;
                let value = match keys.text("value") {
                    None | Some("0") => false,
                    Some("1") if bit.is_some() => true,
                    Some("1") => return Err(wrong("bit=N with value=1", text)),
                    Some(other) => return Err(wrong("value=0 or value=1", other)),
                };
                if bit.is_some_and(|bit| bit > 31) {
                    return Err(wrong("bit=N from 0 to 31", keys.text("bit").unwrap_or_default()));
                }
                let lane = keys.number("lane")?.ok_or_else(|| keys.lacks("lane"))?;
                Fault::Stuck { lane, tile, unit: keys.one_of("where", &Unit::ALL, Unit::name)?, bit, value }
            }
            _ => return Err(wrong(format!("{BIT_FLIP} or {STUCK}"), text)),
        };
        Ok(fault)
    }
}

/// The faults of a chip, and how often each was injected. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Vec<Counter>>);

#[derive(Debug)]
struct Counter {
    fault: Fault,
    injected: AtomicU64,
    passed: AtomicU64,
}

/// How often a fault was injected.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct FaultCount {
    /// The fault.
    pub fault: Fault,
    /// Flipped bits, or results that a stuck lane changed.
    pub injected: u64,
    /// Bits that passed the place and could flip, or results of the lane.
    pub passed: u64,
}

impl fmt::Display for FaultCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FaultCount { fault, injected, passed } = self;
        match fault {
            Fault::BitFlips { .. } => {
                let passed = *passed as f64;
                write!(f, "injected: {fault}: {injected} of {passed:.1e} bits flipped")
            }
            Fault::Stuck { .. } => write!(f, "injected: {fault}: {injected} of {passed} results changed"),
        }
    }
}

impl Faults {
    pub(crate) fn new(faults: &[Fault]) -> Faults {
        let counter =
            |&fault: &Fault| Counter { fault, injected: AtomicU64::new(0), passed: AtomicU64::new(0) };
        Faults(Arc::new(faults.iter().map(counter).collect()))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns how often each fault was injected since the chip was opened.
    pub fn counts(&self) -> Vec<FaultCount> {
        let count = |c: &Counter| FaultCount {
            fault: c.fault,
            injected: c.injected.load(Ordering::Relaxed),
            passed: c.passed.load(Ordering::Relaxed),
        };
        self.0.iter().map(count).collect()
    }
}

impl Counter {
    fn add(&self, injected: u64, passed: u64) {
        self.injected.fetch_add(injected, Ordering::Relaxed);
        self.passed.fetch_add(passed, Ordering::Relaxed);
    }
}

/// Gaps between the flipped bits of a fault.
#[derive(Debug)]
struct Stream {
    rng: SplitMix64,
    /// The logarithm of the probability that a bit stays.
    log_stays: f64,
    /// Bits that pass before the next one flips.
    gap: u64,
}

impl Stream {
    fn new(rate: f64, place: Place, seed: u64, plan: u64) -> Stream {
        let of_plan = SplitMix64::new(4 * plan + place as u64).next();
        let rng = SplitMix64::new(seed ^ of_plan);
        let mut stream = Stream { rng, log_stays: (-rate).ln_1p(), gap: 0 };
        stream.draw();
        stream
    }

    /// Draws the next gap from the geometric distribution.
    fn draw(&mut self) {
        // From 2^-53 to 1.
        let uniform = ((self.rng.next() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        // Without faults the logarithm is zero.
        let never = self.log_stays == 0.0;
        self.gap = if never { u64::MAX } else { (uniform.ln() / self.log_stays) as u64 };
    }

    /// Passes `bits` bits, calls `flip` with each that flips, and returns their number.
    fn pass(&mut self, bits: u64, mut flip: impl FnMut(u64)) -> u64 {
        let (mut at, mut flipped) = (0, 0);
        while self.gap < bits - at {
            at += self.gap;
            flip(at);
            at += 1;
            flipped += 1;
            self.draw();
        }
        if self.log_stays != 0.0 {
            self.gap -= bits - at;
        }
        flipped
    }
}

/// Injects the faults of a chip into the ops of a plan.
#[derive(Debug)]
pub struct Injector {
    faults: Faults,
    /// One per fault; those of stuck lanes are not used.
    streams: Vec<Stream>,
    /// Lanes of the matrix unit, and whether they are rows of results instead of columns.
    matrix: Option<(u32, bool)>,
    vector_lanes: u32,
    /// The tile whose program runs.
    pub tile: u32,
}

impl Injector {
    /// The injector of plan number `plan`, or `None` without faults.
    pub fn new(faults: &Faults, chip: &Chip, plan: u64) -> Option<Injector> {
        if faults.is_empty() {
            return None;
        }
        let stream = |counter: &Counter| match counter.fault {
            Fault::BitFlips { rate, place, seed, .. } => Stream::new(rate, place, seed, plan),
            Fault::Stuck { .. } => Stream::new(0.0, Place::Dram, 0, 0),
        };
        Some(Injector {
            faults: faults.clone(),
            streams: faults.0.iter().map(stream).collect(),
            matrix: chip.matrix_lanes(),
            vector_lanes: chip.vector_lanes(),
            tile: 0,
        })
    }

    /// Passes `bytes` bytes through a place, and calls `flip` with the byte and the mask of each flipped bit.
    pub fn pass(&mut self, at: Place, bytes: usize, flip: &mut dyn FnMut(usize, u8)) {
        for (counter, stream) in self.faults.0.iter().zip(&mut self.streams) {
            let Fault::BitFlips { place, bits: (low, high), .. } = counter.fault else { continue };
            if place != at {
                continue;
            }
            let width = u64::from(high - low + 1);
            // The last word may be short.
            let short = (8 * (bytes as u64 % 4)).min(u64::from(high) + 1).saturating_sub(low.into());
            let passed = bytes as u64 / 4 * width + short;
            let flipped = stream.pass(passed, |i| {
                let bit = u64::from(low) + i % width;
                flip((i / width * 4 + bit / 8) as usize, 1 << (bit % 8));
            });
            counter.add(flipped, passed);
        }
    }

    /// Passes a slice through a place.
    pub fn pass_slice(&mut self, at: Place, bytes: &mut [u8]) {
        let len = bytes.len();
        self.pass(at, len, &mut |byte, mask| {
            if let Some(byte) = bytes.get_mut(byte) {
                *byte ^= mask;
            }
        });
    }

    /// Changes the results that a command wrote to a slot.
    pub fn results(&mut self, work: &Work, step: &Step, bytes: &mut [u8]) {
        // The columns of a row of results, and how many of them are the matrix unit's.
        let (columns, products) = match step {
            Step::Product { columns, .. } => (*columns as usize, *columns as usize),
            // The vector unit computes the maximum and the sum of a row's probabilities.
            Step::Pages { rows, chunks } => {
                let results = rows.tokens * rows.heads * chunks.len() as u32;
                let columns = bytes.len() / 4 / results.max(1) as usize;
                (columns, columns.saturating_sub(2))
            }
            _ => (bytes.len() / 4, bytes.len() / 4),
        };
        let columns = columns.max(1);
        if matches!(work, Work::Matrix { .. }) {
            for row in bytes.chunks_mut(4 * columns) {
                self.pass_slice(Place::Accumulator, row.get_mut(..4 * products).unwrap_or(&mut []));
            }
        }
        // The results of conversions are not words of 32 bits.
        if matches!(step, Step::Convert { .. } | Step::Unpack { .. }) {
            return;
        }
        let (used, lanes, rows) = match (work, self.matrix) {
            (Work::Matrix { .. }, Some((lanes, rows))) => (Unit::Matrix, lanes, rows),
            _ => (Unit::Vector, self.vector_lanes, false),
        };
        let lane_of = |word: usize| {
            let at = match (used, rows) {
                (Unit::Vector, _) => word,
                (Unit::Matrix, _) if word % columns >= products => return None,
                (Unit::Matrix, false) => word % columns,
                (Unit::Matrix, true) => word / columns,
            };
            Some((at % lanes.max(1) as usize) as u32)
        };
        for counter in self.faults.0.iter() {
            let Fault::Stuck { lane, tile, unit, bit, value } = counter.fault else { continue };
            if unit != used || tile.is_some_and(|tile| tile != self.tile) {
                continue;
            }
            let (clear, set) = match bit {
                None => (u32::MAX, 0),
                Some(bit) => (1 << bit, u32::from(value) << bit),
            };
            let (mut changed, mut passed) = (0, 0);
            for (i, word) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                if lane_of(i) == Some(lane) {
                    let old = u32::from_le_bytes(*word);
                    let new = old & !clear | set;
                    *word = new.to_le_bytes();
                    changed += u64::from(new != old);
                    passed += 1;
                }
            }
            counter.add(changed, passed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tile::QueryRows;
    use super::*;

    fn injector(specs: &str, plan: u64) -> (Injector, Faults) {
        let profile = halite_profiles::profile::Profile::open("teaching-16x16").unwrap();
        let chip = Chip::new(profile, Default::default(), None).unwrap();
        let faults = Faults::new(&Fault::list(specs).unwrap());
        (Injector::new(&faults, &chip, plan).unwrap(), faults)
    }

    /// What becomes of zeroed bytes that pass in pieces.
    fn passed(specs: &str, plan: u64, pieces: &[usize]) -> (Vec<u8>, Vec<FaultCount>) {
        let (mut injector, faults) = injector(specs, plan);
        let mut bytes = vec![0; pieces.iter().sum()];
        let mut rest = bytes.as_mut_slice();
        for &piece in pieces {
            let (now, later) = rest.split_at_mut(piece);
            injector.pass_slice(Place::Dram, now);
            injector.pass_slice(Place::Link, &mut []);
            rest = later;
        }
        (bytes, faults.counts())
    }

    fn ones(bytes: &[u8]) -> u64 {
        bytes.iter().map(|b| u64::from(b.count_ones())).sum()
    }

    #[test]
    fn one_bit_in_a_thousand_of_a_million() {
        let (bytes, counts) = passed("bitflip:rate=1e-3,where=dram,seed=7", 0, &[125_000]);
        assert_eq!(counts[0].passed, 1_000_000);
        assert_eq!(counts[0].injected, ones(&bytes));
        // Four standard deviations.
        assert!(counts[0].injected.abs_diff(1000) < 127, "{}", counts[0].injected);
        let (all, counts) = passed("bitflip:rate=1,where=dram", 0, &[100]);
        assert!(all.iter().all(|&b| b == 255) && counts[0].injected == 800);
        let (none, counts) = passed("bitflip:rate=0,where=dram", 0, &[100]);
        assert!(ones(&none) == 0 && (counts[0].injected, counts[0].passed) == (0, 800));
        // Other places do not count.
        let (none, counts) = passed("bitflip:rate=1,where=link", 0, &[100]);
        assert!(ones(&none) == 0 && counts[0].passed == 0);
    }

    #[test]
    fn seeds_and_plans_choose_the_bits_and_pieces_do_not() {
        let spec = |seed| format!("bitflip:rate=1e-2,where=dram,seed={seed}");
        let whole = passed(&spec(1), 0, &[4000]);
        assert_eq!(passed(&spec(1), 0, &[4000]), whole);
        assert_eq!(passed(&spec(1), 0, &[4, 1996, 8, 1992]), whole);
        assert_ne!(passed(&spec(2), 0, &[4000]).0, whole.0);
        assert_ne!(passed(&spec(1), 1, &[4000]).0, whole.0);
    }

    #[test]
    fn only_the_chosen_bits_of_a_word_flip() {
        let (bytes, counts) = passed("bitflip:rate=1,where=dram,bits=7-9", 0, &[8]);
        assert_eq!(bytes, [128, 3, 0, 0, 128, 3, 0, 0]);
        assert_eq!(counts[0].passed, 6);
        let (bytes, counts) = passed("bitflip:rate=1,where=dram,bits=7-9", 0, &[5]);
        assert_eq!(bytes, [128, 3, 0, 0, 128]);
        assert_eq!(counts[0].passed, 4);
    }

    #[test]
    fn a_stuck_lane_changes_its_column_alone() {
        let work = Work::Matrix { rate: 0, m: 3, n: 32, k: 1, sums_bytes: 0, sparse: false };
        let form = super::super::tile::Form::F32;
        let product = Step::Product { rows: 3, columns: 32, k: 0..1, last: true, sums: 0, x: form, w: form };
        let run = |spec: &str, work: &Work, step: &Step| {
            let (mut injector, faults) = injector(spec, 0);
            let mut words = [1.0f32; 96];
            injector.results(work, step, bytemuck::cast_slice_mut(&mut words));
            let changed: Vec<usize> = (0..96).filter(|&i| words[i] != 1.0).collect();
            (changed, faults.counts()[0].injected, faults.counts()[0].passed)
        };
        let lane = (0..3).flat_map(|row| [32 * row + 5, 32 * row + 21]).collect::<Vec<_>>();
        assert_eq!(run("stuck:lane=5,tile=all,where=accumulator", &work, &product), (lane.clone(), 6, 6));
        assert_eq!(run("stuck:lane=5,where=accumulator,bit=31,value=1", &work, &product), (lane, 6, 6));
        // The bit already has that value.
        assert_eq!(run("stuck:lane=5,where=accumulator,bit=31", &work, &product), (Vec::new(), 0, 6));
        assert_eq!(run("stuck:lane=5,where=vector", &work, &product), (Vec::new(), 0, 0));
        assert_eq!(run("stuck:lane=5,tile=1,where=accumulator", &work, &product), (Vec::new(), 0, 0));
        // Rows of 30 values, a maximum and a sum.
        let rows = QueryRows { token: 0, tokens: 1, position: 0, end: 1, head: 0, heads: 3 };
        let page = Step::Pages { rows, chunks: 0..1 };
        let fourteen = (0..3).flat_map(|row| [32 * row + 13, 32 * row + 29]).collect::<Vec<_>>();
        assert_eq!(run("stuck:lane=13,where=accumulator", &work, &page), (fourteen, 6, 6));
        assert_eq!(run("stuck:lane=14,where=accumulator", &work, &page).1, 3);
        let all = run("bitflip:rate=1,where=accumulator", &work, &page);
        assert_eq!((all.0.len(), all.1), (90, 90 * 32));
        let units = Step::Units { stage: 0, first: 0, count: 1 };
        let work = Work::Vector(Default::default());
        let (changed, injected, passed) = run("stuck:lane=5,where=vector", &work, &units);
        assert!(changed[0] == 5 && changed.len() as u64 == injected && injected == passed, "{changed:?}");
    }

    #[test]
    fn wrong_specs_say_what_is_expected() {
        let expected = [
            ("", "expected bitflip:rate=R"),
            ("flip:rate=1", "or stuck:lane=N,where=UNIT"),
            ("bitflip:rate=1", "no where"),
            ("bitflip:where=dram", "no rate"),
            ("bitflip:rate=2,where=dram", "expected rate=R from 0 to 1, got `2`"),
            ("bitflip:rate=NaN,where=dram", "expected rate=R from 0 to 1, got `NaN`"),
            ("bitflip:rate=x,where=dram", "expected a number for rate, got `x`"),
            ("bitflip:rate=0,rate=1,where=dram", "expected rate once"),
            (
                "bitflip:rate=0,where=disk",
                "expected where=dram, where=link, where=scratchpad or where=accumulator, got `disk`",
            ),
            ("bitflip:rate=0,where=dram,lane=1", "expected bitflip:rate=R,where=PLACE[,seed=N]"),
            ("bitflip:rate=0,where=dram,bits=9", "expected bits=LOW-HIGH"),
            ("bitflip:rate=0,where=dram,bits=9-8", "expected bits=LOW-HIGH"),
            ("bitflip:rate=0,where=dram,bits=0-32", "expected bits=LOW-HIGH"),
            ("bitflip:rate=0,where=dram,seed=-1", "expected a number for seed, got `-1`"),
            ("bitflip:rate=0,where=dram;", "expected bitflip"),
            ("stuck:where=vector", "no lane"),
            ("stuck:lane=0,where=dram", "expected where=accumulator or where=vector, got `dram`"),
            ("stuck:lane=0,where=vector,value=1", "expected bit=N with value=1"),
            ("stuck:lane=0,where=vector,value=2,bit=1", "expected value=0 or value=1, got `2`"),
            ("stuck:lane=0,where=vector,bit=32", "expected bit=N from 0 to 31, got `32`"),
            ("stuck:lane=0,where=vector,tile=some", "expected a number for tile, got `some`"),
        ];
        for (spec, message) in expected {
            let error = Fault::list(spec).unwrap_err().to_string();
            assert!(error.contains(message), "{spec}: {error}");
        }
        let profile = halite_profiles::profile::Profile::open("teaching-16x16").unwrap();
        let chip = Chip::new(profile, Default::default(), None).unwrap();
        for (spec, message) in [
            ("stuck:lane=16,where=accumulator", "a lane below 16"),
            ("stuck:lane=0,where=vector,tile=1", "a tile below 1"),
        ] {
            let error = Fault::list(spec).unwrap()[0].check(&chip).unwrap_err().to_string();
            assert!(error.contains(message), "{spec}: {error}");
        }
    }
}
