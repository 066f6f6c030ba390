//! The time of exchanges between chips.
//!
//! A message takes a start, a step for each chip that it passes, and its bytes over the bandwidth (Hockney 1994). The
//! algorithm is the quickest that the topology has, as in Thakur et al. 2005: rings, which move the fewest bytes; and
//! where any two chips are joined, direct exchanges, which take the fewest steps. Groups beyond the first level of links
//! exchange within it first, so that the slower level moves the fewest bytes.

use halite::backend::sharded::Link;
use halite::shard::ExchangeKind;
use halite::{Error, Result};
use halite_profiles::profile::{CollectiveFit, Interconnect, Profile, Topology};

/// What chips exchange. Bytes are those of the whole tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Collective {
    /// Every chip gets the sum of all chips' tensors.
    AllReduce,
    /// Every chip gets the parts of all.
    AllGather,
    /// Every chip gets its part of the sum of all chips' tensors.
    ReduceScatter,
    /// Every chip gets a part of each chip's tensor.
    AllToAll,
}

impl Collective {
    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Collective::AllReduce => "all-reduce",
            Collective::AllGather => "all-gather",
            Collective::ReduceScatter => "reduce-scatter",
            Collective::AllToAll => "all-to-all",
        }
    }

    /// Rounds of a ring, and bytes that each chip sends, of a tensor of one byte.
    fn ring(self, chips: f64) -> (f64, f64) {
        let once = (chips - 1.0) / chips;
        match self {
            Collective::AllReduce => (2.0 * (chips - 1.0), 2.0 * once),
            Collective::AllGather | Collective::ReduceScatter => (chips - 1.0, once),
            Collective::AllToAll => (1.0, once),
        }
    }
}

/// Fraction of a link's rate that exchanges reach where it was not measured: the fits of the H100 and the A100 reach 0.67
/// and 0.63 with all overheads of their library, and their largest messages 0.75.
const RATE_FRACTION: f64 = 0.7;

/// Constants of the first level of links, or what stands for them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Constants {
    overhead_s: f64,
    hop_s: f64,
    fraction: f64,
    /// Where rings have two ways to send: the fraction of the slow one, and the additional start of the quick one.
    small: Option<(f64, f64)>,
    /// Start and fraction of direct sums.
    direct: Option<(f64, f64)>,
    /// Whether all exchanges may be direct: nothing says that they are not.
    is_free: bool,
}

impl Constants {
    /// A library of rings.
    pub fn ring(overhead_s: f64, hop_s: f64, small: (f64, f64), fraction: f64) -> Constants {
        Constants { overhead_s, hop_s, fraction, small: Some(small), direct: None, is_free: false }
    }

    /// The same with direct sums.
    pub fn or_direct(self, start_s: f64, fraction: f64) -> Constants {
        Constants { direct: Some((start_s, fraction)), ..self }
    }

    fn measured(fit: &CollectiveFit) -> Constants {
        let s = |ns: f64| 1e-9 * ns;
        let direct = fit.direct_ns.as_ref().zip(fit.direct_fraction.as_ref());
        let small = (fit.small_fraction.value, s(fit.bulk_ns.value));
        let ring =
            Constants::ring(s(fit.overhead_ns.value), s(fit.hop_ns.value), small, fit.bulk_fraction.value);
        Constants { direct: direct.map(|(ns, fraction)| (s(ns.value), fraction.value)), ..ring }
    }

    fn of(level: &Interconnect, launch_s: f64) -> Constants {
        let hop_s = 1e-9 * level.latency_ns.value;
        Constants {
            overhead_s: launch_s,
            hop_s,
            fraction: RATE_FRACTION,
            small: None,
            direct: Some((launch_s + hop_s, RATE_FRACTION)),
            is_free: true,
        }
    }
}

/// Chips that are joined by links.
#[derive(Debug, Clone)]
pub struct Fabric {
    levels: Vec<(Interconnect, Constants)>,
    /// Mean relative error of exchanges over the first level, if they were measured.
    pub error: Option<f64>,
}

impl Fabric {
    /// The links of a chip.
    ///
    /// # Errors
    /// [`Error::Argument`] if the profile has none.
    pub fn new(profile: &Profile) -> Result<Fabric> {
        if profile.interconnect.is_empty() {
            let found = format!("profile {} without one", profile.name);
            return Err(Error::argument("profile", "an [[interconnect]] for several chips", found));
        }
        let launch = profile.launch.graph_kernel_ns.as_ref().unwrap_or(&profile.launch.kernel_ns);
        let launch_s = 1e-9 * launch.value;
        let fit = profile.calibration.as_ref().and_then(|c| c.collective.as_ref());
        let levels = profile.interconnect.iter().enumerate().map(|(n, level)| {
            let constants = match fit.filter(|_| n == 0) {
                Some(fit) => Constants::measured(fit),
                None => Constants::of(level, launch_s),
            };
            (level.clone(), constants)
        });
        let error = fit.map(|fit| fit.errors.mean_error_fraction.value);
        Ok(Fabric { levels: levels.collect(), error })
    }

    /// Returns the most chips that are joined, if there is a limit.
    pub fn most_chips(&self) -> Option<u32> {
        self.levels.last().and_then(|(level, _)| level.chips.as_ref()).map(|chips| chips.value as u32)
    }

    /// Returns the chips of a group at each level of links, from the nearest.
    fn groups(&self, chips: u32) -> Vec<u32> {
        let mut rest = chips;
        let mut joined = 1;
        let mut groups = Vec::new();
        for (level, _) in &self.levels {
            let most = level.chips.as_ref().map_or(u32::MAX, |chips| chips.value as u32) / joined;
            let group = (1..=rest.min(most.max(1))).rev().find(|n| rest.is_multiple_of(*n)).unwrap_or(1);
            groups.push(group);
            joined *= group;
            rest /= group;
        }
        // What no level joins goes over the last one.
        if let Some(last) = groups.last_mut() {
            *last *= rest;
        }
        groups
    }

    /// Returns the seconds in which `chips` neighbours exchange a tensor of `bytes` bytes.
    pub fn seconds(&self, collective: Collective, bytes: f64, chips: u32) -> f64 {
        self.seconds_apart(collective, bytes, chips, 1)
    }

    /// As [`Fabric::seconds`], for chips of which each is the same one of `apart` neighbours.
    pub fn seconds_apart(&self, collective: Collective, bytes: f64, chips: u32, apart: u32) -> f64 {
        self.sum(collective, bytes, chips, apart, level_s)
    }

    /// Returns the joules of one of `chips` neighbours that exchange a tensor of `bytes` bytes. Each sends what it would in a ring, which is
    /// the least.
    pub fn joules(&self, collective: Collective, bytes: f64, chips: u32) -> f64 {
        self.joules_apart(collective, bytes, chips, 1)
    }

    /// As [`Fabric::joules`], for chips of which each is the same one of `apart` neighbours.
    pub fn joules_apart(&self, collective: Collective, bytes: f64, chips: u32, apart: u32) -> f64 {
        self.sum(collective, bytes, chips, apart, |level, _, collective, bytes, chips| {
            level.joules(collective.ring(chips).1 * bytes)
        })
    }

    /// Sums up what an exchange takes at each level of links: `of` gets the level, the bytes of the tensor there and the chips.
    fn sum(
        &self,
        collective: Collective,
        bytes: f64,
        chips: u32,
        apart: u32,
        of: impl Fn(&Interconnect, &Constants, Collective, f64, f64) -> f64,
    ) -> f64 {
        // What the neighbours take of each level does not join these chips.
        let near = self.groups(apart);
        let groups = self
            .groups(chips.saturating_mul(apart))
            .into_iter()
            .zip(near)
            .map(|(all, near)| all / near.max(1));
        let mut sum = 0.0;
        // Bytes of the tensor that one chip exchanges with its counterparts of other groups.
        let mut share = bytes;
        let mut rest = f64::from(chips);
        for ((level, constants), group) in self.levels.iter().zip(groups) {
            if group > 1 {
                let there = match collective {
                    // What goes to other groups goes over their links only.
                    Collective::AllToAll => bytes * f64::from(group) / rest,
                    _ => share,
                };
                sum += of(level, constants, collective, there, f64::from(group));
            }
            if collective != Collective::AllToAll {
                share /= f64::from(group);
            }
            rest /= f64::from(group);
            if collective == Collective::AllToAll && rest <= 1.0 {
                break;
            }
        }
        sum
    }

    /// The level of links that joins chips so far apart.
    fn joining(&self, apart: u32) -> Option<&(Interconnect, Constants)> {
        let joins =
            |level: &Interconnect| level.chips.as_ref().is_none_or(|chips| chips.value > f64::from(apart));
        self.levels.iter().find(|(level, _)| joins(level)).or(self.levels.last())
    }

    /// Returns the joules to send a message of `bytes` bytes to the chip that is `apart` chips further.
    pub fn send_j(&self, bytes: f64, apart: u32) -> f64 {
        self.joining(apart).map_or(0.0, |(level, _)| level.joules(bytes))
    }

    /// Returns the seconds to send a message of `bytes` bytes to the chip that is `apart` chips further.
    pub fn send_s(&self, bytes: f64, apart: u32) -> f64 {
        let Some((level, constants)) = self.joining(apart) else { return 0.0 };
        let share = match level.topology {
            Topology::Switch => 1.0,
            Topology::Full => 1.0 / (level.chips.as_ref().map_or(2.0, |chips| chips.value) - 1.0),
            Topology::Ring => 0.5,
            Topology::Torus => 0.25,
        };
        let rate = share * level.bytes_per_s();
        let bulk_s = constants.small.map_or(0.0, |(_, bulk_s)| bulk_s);
        let start_s = constants.overhead_s + constants.hop_s;
        let bulk = start_s + bulk_s + bytes / (constants.fraction * rate);
        constants.small.map_or(bulk, |(fraction, _)| bulk.min(start_s + bytes / (fraction * rate)))
    }
}

/// Returns the seconds of an exchange over one level of links.
pub(super) fn level_s(
    level: &Interconnect,
    c: &Constants,
    collective: Collective,
    bytes: f64,
    chips: f64,
) -> f64 {
    let all = level.bytes_per_s();
    let rate = match level.topology {
        Topology::Switch | Topology::Ring => all,
        // Links to chips outside of the group are idle.
        Topology::Full => {
            let others = level.chips.as_ref().map_or(chips, |chips| chips.value) - 1.0;
            all * ((chips - 1.0) / others.max(1.0)).min(1.0)
        }
        Topology::Torus => all,
    };
    let (mut steps, mut sent) = collective.ring(chips);
    match (level.topology, collective) {
        // A message to a chip passes those between: a quarter of the ring on average.
        (Topology::Ring, Collective::AllToAll) => (steps, sent) = (chips / 2.0, chips / 4.0),
        (Topology::Torus, _) => {
            let (a, b) = sides(chips);
            match collective {
                Collective::AllToAll => (steps, sent) = ((a + b) / 2.0, a.max(b) / 4.0),
                // Half of the tensor goes along one side first, half along the other.
                _ => steps = collective.ring(a).0 + collective.ring(b).0,
            }
        }
        _ => {}
    }
    let start_s = c.overhead_s + steps * c.hop_s;
    let moved = bytes * sent;
    let bulk_s = c.small.map_or(0.0, |(_, bulk_s)| bulk_s);
    let mut seconds = start_s + bulk_s + moved / (c.fraction * rate);
    if let Some((fraction, _)) = c.small {
        seconds = seconds.min(start_s + moved / (fraction * rate));
    }
    let is_joined = matches!(level.topology, Topology::Switch | Topology::Full);
    if let Some((direct_s, fraction)) = c.direct.filter(|_| is_joined) {
        let over = |bytes: f64| bytes / (fraction * rate);
        if collective == Collective::AllReduce {
            // Every chip sends everything to all others; or its parts, and then the sums of its part.
            seconds = seconds.min(direct_s + over((chips - 1.0) * bytes));
            if c.is_free {
                seconds = seconds.min(direct_s + c.hop_s + over(moved));
            }
        } else if c.is_free {
            seconds = seconds.min(direct_s + over(moved));
        }
    }
    seconds
}

/// Returns the sides of the torus of so many chips that is nearest to a square.
fn sides(chips: f64) -> (f64, f64) {
    let chips = chips as u32;
    let a = (1..=chips.isqrt()).rev().find(|a| chips.is_multiple_of(*a)).unwrap_or(1);
    (f64::from(a), f64::from(chips / a))
}

impl Link for Fabric {
    fn exchange_s(&self, kind: ExchangeKind, bytes: u64, devices: u32) -> f64 {
        match collective(kind) {
            Some(collective) => self.seconds(collective, bytes as f64, devices),
            None => 0.0,
        }
    }
}

/// Returns the collective of an exchange; none if nothing is sent.
pub fn collective(kind: ExchangeKind) -> Option<Collective> {
    match kind {
        ExchangeKind::Gather => Some(Collective::AllGather),
        ExchangeKind::Sum => Some(Collective::AllReduce),
        _ => None,
    }
}
