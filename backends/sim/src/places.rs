//! Where data lie outside of the tiles, and how long their memories take.
//!
//! Activations, weights and the KV cache, in this order, fill the memories that software manages, the nearest first; the last one holds
//! the rest. What does not fit a memory as a whole is spread over several, so that all of them deliver at the same time.

use halite_profiles::profile::{Dma, Memory, Profile};

/// What bytes are: each kind has a place of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Data {
    /// Weights.
    Weights,
    /// The KV cache: in a possibly narrower format on the chip.
    Cache,
    /// States of recurrent layers, which lie where the KV cache does.
    States,
    /// Activations: 32-bit floats here, in a possibly narrower format on the chip.
    Activations,
    /// Unfinished sums and other temporary values, which lie where activations do and have all their bits.
    Partial,
}

impl Data {
    const fn place(self) -> usize {
        match self {
            Data::Weights => 0,
            Data::Cache | Data::States => 1,
            Data::Activations | Data::Partial => 2,
        }
    }
}

/// The kinds of data by [`Data::place`], in the order in which they take their places.
const FIRST_PLACED: [usize; 3] = [Data::Activations.place(), Data::Weights.place(), Data::Cache.place()];

/// Bytes of each kind of data.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Amounts([f64; 3]);

impl Amounts {
    /// Returns these, and `bytes` of a kind more.
    pub fn with(mut self, data: Data, bytes: f64) -> Amounts {
        self.0[data.place()] += bytes;
        self
    }

    /// Bytes of a kind.
    pub fn of(self, data: Data) -> f64 {
        self.0[data.place()]
    }

    fn sum(self, each: [f64; 3]) -> f64 {
        self.0.into_iter().zip(each).map(|(bytes, each)| bytes * each).sum()
    }
}

/// Bytes that are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Traffic {
    /// Those that are read.
    pub read: Amounts,
    /// Those that are written.
    pub written: Amounts,
}

/// A memory outside of the tiles, or engines that all its bytes pass.
#[derive(Debug, Clone)]
pub struct Tier {
    /// The share of each kind of data that lies here.
    shares: [f64; 3],
    /// Bytes per second that all tiles together read.
    pub bytes_per_s: f64,
    /// How many times as long a byte takes to write.
    pub write_cost: f64,
    latency_s: f64,
    /// Picojoules of a byte; `None` if the profile does not say.
    pj_per_byte: Option<f64>,
}

impl Tier {
    /// Returns the share of a kind of data.
    pub fn share(&self, data: Data) -> f64 {
        self.shares[data.place()]
    }
}

/// The memories that hold data.
#[derive(Debug, Clone)]
pub struct Places {
    /// The nearest first.
    pub tiers: Vec<Tier>,
    /// By [`Data::place`]; those of tiers, so that nothing has to be searched for a command.
    latency_s: [f64; 3],
    pj_per_byte: Option<[f64; 3]>,
}

/// Bytes per second of all engines of a kind.
pub fn dma_bytes_per_s(profile: &Profile, dma: &Dma) -> f64 {
    dma.bytes_per_s.value * dma.engines.value * profile.instances(dma.scope)
}

impl Places {
    /// Places data in a chip's memories. `engines_bytes_per_s` bounds the bytes that all tiles together move, where they share engines.
    pub fn new(profile: &Profile, engines_bytes_per_s: Option<f64>, amounts: Amounts) -> Places {
        let mut left = amounts.0;
        let mut unplaced = [1.0; 3];
        let mut tiers = Vec::new();
        let holding: Vec<&Memory> = profile.holding().collect();
        for (i, memory) in holding.iter().enumerate() {
            let instances = profile.instances(memory.scope);
            let mut room = memory.capacity_bytes.value * instances;
            let mut shares = [0.0; 3];
            if i + 1 == holding.len() {
                shares = unplaced;
            } else {
                for kind in FIRST_PLACED {
                    let taken = left[kind].min(room);
                    if taken > 0.0 {
                        shares[kind] =
                            if taken < left[kind] { taken / amounts.0[kind] } else { unplaced[kind] };
                        unplaced[kind] -= shares[kind];
                        left[kind] -= taken;
                        room -= taken;
                    }
                }
            }
            if shares == [0.0; 3] {
                continue;
            }
            let reached = memory.achievable_fraction.as_ref().map_or(1.0, |fraction| fraction.value);
            let serving = profile.dma.iter().filter(|dma| dma.serves.as_ref() == Some(&memory.name));
            let engines = serving.clone().map(|dma| dma_bytes_per_s(profile, dma));
            let engines = engines.chain(engines_bytes_per_s).fold(f64::INFINITY, f64::min);
            let rate = |bytes_per_s: f64| (bytes_per_s * instances * reached).min(engines);
            let starts_ns =
                |dma: &Dma| dma.setup_ns.value + dma.descriptor_ns.as_ref().map_or(0.0, |ns| ns.value);
            let latency_ns = memory.latency_ns.value + serving.map(starts_ns).sum::<f64>();
            let bytes_per_s = rate(memory.read_bytes_per_s.value);
            tiers.push(Tier {
                shares,
                bytes_per_s,
                write_cost: memory.write_bytes_per_s.as_ref().map_or(1.0, |w| bytes_per_s / rate(w.value)),
                latency_s: 1e-9 * latency_ns,
                pj_per_byte: memory.pj_per_byte.as_ref().map(|pj| pj.value),
            });
        }
        if let Some(bytes_per_s) = engines_bytes_per_s.filter(|_| tiers.len() > 1) {
            // The engines bound each memory already; this bounds them together.
            let engines = Tier {
                shares: [1.0; 3],
                bytes_per_s,
                write_cost: 1.0,
                latency_s: 0.0,
                pj_per_byte: Some(0.0),
            };
            tiers.push(engines);
        }
        let of_kinds = |of: &dyn Fn(usize) -> f64| std::array::from_fn(of);
        let latency_s = |kind: usize| {
            let used = tiers.iter().filter(|tier| tier.shares[kind] > 0.0);
            used.map(|tier| tier.latency_s).fold(0.0, f64::max)
        };
        let pj: Option<Vec<f64>> = tiers.iter().map(|tier| tier.pj_per_byte).collect();
        let pj_of = |pj: Vec<f64>| {
            of_kinds(&|kind| tiers.iter().zip(&pj).map(|(tier, pj)| tier.shares[kind] * pj).sum())
        };
        Places { latency_s: of_kinds(&latency_s), pj_per_byte: pj.map(pj_of), tiers }
    }

    /// Returns the seconds that the memories need for some bytes: those of the slowest one.
    pub fn seconds(&self, traffic: &Traffic) -> f64 {
        let of = |tier: &Tier| {
            (traffic.read.sum(tier.shares) + tier.write_cost * traffic.written.sum(tier.shares))
                / tier.bytes_per_s
        };
        self.tiers.iter().map(of).fold(0.0, f64::max)
    }

    /// Returns the seconds from a request of a kind of data to its first byte.
    pub fn latency_s(&self, data: Data) -> f64 {
        self.latency_s[data.place()]
    }

    /// Returns the picojoules of some bytes, if the profile has them.
    pub fn pj(&self, traffic: &Traffic) -> Option<f64> {
        self.pj_per_byte.map(|pj| traffic.read.sum(pj) + traffic.written.sum(pj))
    }
}
