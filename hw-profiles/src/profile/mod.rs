//! A chip as data: `hw-profiles/*.toml`.
//!
//! Each number has a source and a degree of certainty ([`Quantity`]); each key has its unit in its name.
//! Unknown keys, and numbers that contradict each other or physics, are errors (`check.rs`).

mod check;
mod keys;
mod numbers;
mod quantity;

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::numerics::{Dtype, Format, Rounding, Rules, ScaleRule};
use halite::error::escaped;
use halite::map;
use halite::{Error, Result};
use numbers::Numbers;

pub use quantity::{Basis, Key, Quantity, schema};

/// The profile of a chip.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Profile {
    /// Name on the command line.
    pub name: String,
    /// Maker.
    pub vendor: String,
    /// One sentence on the chip and on what is known about it.
    pub summary: String,
    /// The backend that runs programs.
    pub driver: Driver,
    /// Documents, by the short names in `source` keys.
    #[serde(default)]
    pub sources: BTreeMap<String, String>,
    /// Clock and unit counts.
    pub chip: Chip,
    /// The matrix unit, if there is one.
    pub matrix: Option<Matrix>,
    /// The vector unit.
    pub vector: Vector,
    /// Memory levels, from the nearest to the arithmetic units to the farthest. The last one holds the
    /// weights.
    pub memory: Vec<Memory>,
    /// Engines that copy between levels.
    #[serde(default)]
    pub dma: Vec<Dma>,
    /// The network on the chip.
    pub noc: Option<Noc>,
    /// Synchronisation costs.
    pub sync: Option<Sync>,
    /// Launch costs.
    pub launch: Launch,
    /// Links to other chips: those of a host first, then those of a rack and beyond.
    #[serde(default)]
    pub interconnect: Vec<Interconnect>,
    /// Power.
    pub power: Option<Power>,
    /// Price.
    pub price: Option<Price>,
    /// The chip's choices where formats leave them open.
    #[serde(default)]
    pub rounding: RoundingRules,
    /// Constants fitted to measured kernels.
    pub calibration: Option<Calibration>,
    /// All numbers with their paths, such as `memory.hbm.latency_ns`.
    #[serde(skip)]
    pub quantities: Vec<(String, Quantity)>,
}

/// The backend that runs programs for a chip.
// Exhaustive: whoever reads a profile must tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// The backend `cpu`; the profile is for predictions.
    Cpu,
    /// The backend `gpu`; the profile is for predictions.
    Gpu,
    /// The simulator.
    Sim,
}

impl Driver {
    /// Name in profiles.
    pub fn name(self) -> &'static str {
        match self {
            Driver::Cpu => "cpu",
            Driver::Gpu => "gpu",
            Driver::Sim => "sim",
        }
    }
}

/// Clock and unit counts. A tile has arithmetic units and their nearest memory: a core, an SM, a NeuronCore.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Chip {
    /// The clock of all units without their own.
    pub clock_hz: Quantity,
    /// Enabled clusters.
    pub clusters: Quantity,
    /// Enabled tiles per cluster.
    pub tiles_per_cluster: Quantity,
}

/// A matrix unit: it computes `depth_per_cycle` products of each of `rows x columns` results per cycle.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Matrix {
    /// Units per tile.
    pub units_per_tile: Quantity,
    /// Rows of the array.
    pub rows: Quantity,
    /// Columns of the array.
    pub columns: Quantity,
    /// Dataflow: the operand that stays in the array.
    pub dataflow: Dataflow,
    /// Whether a product starts before the previous one has left the array.
    pub pipelined: bool,
    /// The clock of this unit, if not the chip's.
    pub clock_hz: Option<Quantity>,
    /// Cycles from the first operand to the first result.
    pub fill_cycles: Option<Quantity>,
    /// Minimum cycles between two instructions.
    pub min_issue_cycles: Option<Quantity>,
    /// Bytes of a unit's accumulators.
    pub accumulator_bytes: Option<Quantity>,
    /// Formats and rates of products.
    pub rate: Vec<MatrixRate>,
}

/// The operand that stays in a systolic array while the others stream through.
// Exhaustive: a timing model needs the formula of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dataflow {
    /// Output stationary: sums stay.
    OutputStationary,
    /// Weight stationary.
    WeightStationary,
    /// Input stationary: activations stay.
    InputStationary,
}

/// Products of two formats in a matrix unit.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct MatrixRate {
    /// Format of the activations.
    pub activations: Dtype,
    /// Format of the weights.
    pub weights: Dtype,
    /// Format of the sums.
    pub accumulator: Dtype,
    /// Products added to each result per cycle; 0.5 means two cycles per product.
    pub depth_per_cycle: Quantity,
    /// Stated peak of the whole chip without sparsity; a multiply-add is two.
    pub dense_ops_per_s: Option<Quantity>,
    /// Stated peak with structured sparsity, which no computation uses.
    pub sparse_ops_per_s: Option<Quantity>,
    /// Fraction of the peak that long work reaches [default: 1].
    pub achievable_fraction: Option<Quantity>,
    /// Energy per operation in the unit, without memory; a multiply-add is two.
    pub pj_per_op: Option<Quantity>,
}

/// A vector unit, for elementwise work.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Vector {
    /// Units per tile.
    pub units_per_tile: Quantity,
    /// The clock of this unit, if not the chip's.
    pub clock_hz: Option<Quantity>,
    /// Cycles before the first result of an instruction.
    pub open_cycles: Option<Quantity>,
    /// Extra cycles if an instruction needs the previous result.
    pub dependent_cycles: Option<Quantity>,
    /// Cycles of an exponential, relative to an addition.
    pub exp_cycles: Option<Quantity>,
    /// Cycles of a reciprocal square root, relative to an addition.
    pub rsqrt_cycles: Option<Quantity>,
    /// Cycles of a division, relative to an addition.
    pub divide_cycles: Option<Quantity>,
    /// Cycles of rounding to a block format, relative to an addition.
    pub quantize_cycles: Option<Quantity>,
    /// Formats and rates of operations.
    pub rate: Vec<VectorRate>,
}

/// Operations of one format in a vector unit.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct VectorRate {
    /// Format of the operands.
    pub dtype: Dtype,
    /// Operations per cycle of a unit; a fused multiply-add is two.
    pub ops_per_cycle: Quantity,
    /// Stated peak of the whole chip.
    pub dense_ops_per_s: Option<Quantity>,
    /// Fraction of the peak that long work reaches [default: 1].
    pub achievable_fraction: Option<Quantity>,
    /// Energy per operation in the unit, without memory.
    pub pj_per_op: Option<Quantity>,
}

/// A memory level. All numbers are per instance.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Memory {
    /// Name, unique in the profile.
    pub name: String,
    /// The part of the chip that shares an instance.
    pub scope: Scope,
    /// Who manages its content.
    pub managed: Managed,
    /// Capacity in bytes.
    pub capacity_bytes: Quantity,
    /// Bytes read per second.
    pub read_bytes_per_s: Quantity,
    /// Bytes written per second [default: the read rate].
    pub write_bytes_per_s: Option<Quantity>,
    /// Time to the first byte.
    pub latency_ns: Quantity,
    /// Parallel banks.
    pub banks: Option<Quantity>,
    /// Minimum bytes of a transfer.
    pub line_bytes: Option<Quantity>,
    /// Fraction of the bandwidth that long transfers reach [default: 1].
    pub achievable_fraction: Option<Quantity>,
    /// Energy per byte read or written.
    pub pj_per_byte: Option<Quantity>,
}

/// The scope of an instance, from inside to outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scope {
    /// One per tile.
    Tile,
    /// One per cluster.
    Cluster,
    /// One per chip.
    Chip,
    /// The host's memory, over its bus.
    Host,
}

/// Who manages a memory's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Managed {
    /// The program: a scratchpad, or main memory.
    Software,
    /// The hardware: a cache.
    Hardware,
}

/// DMA engines of one kind. All numbers are per engine.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Dma {
    /// Name, unique in the profile.
    pub name: String,
    /// The scope of each group of engines.
    pub scope: Scope,
    /// Engines per group.
    pub engines: Quantity,
    /// Bytes per second.
    pub bytes_per_s: Quantity,
    /// Time from the request to the first byte.
    pub setup_ns: Quantity,
    /// Extra time per descriptor.
    pub descriptor_ns: Option<Quantity>,
    /// Length of contiguous runs at which the bandwidth is half.
    pub half_rate_run_bytes: Option<Quantity>,
    /// Strided dimensions per descriptor.
    pub max_dimensions: Option<Quantity>,
    /// Descriptors that the queue holds.
    pub queue_entries: Option<Quantity>,
    /// Name of a memory whose bytes all pass these engines, besides the engines nearest to the tiles.
    pub serves: Option<String>,
    /// Whether the engines nearest to the tiles convert weights to the matrix unit's formats while they load them [default: no].
    #[serde(default)]
    pub unpacks: bool,
}

/// The network on the chip.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Noc {
    /// Bytes per cycle of a link.
    pub link_bytes_per_cycle: Quantity,
    /// Cycles per hop.
    pub hop_cycles: Quantity,
    /// Whether one read can be multicast to many tiles.
    pub broadcast: bool,
}

/// Synchronisation costs.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Sync {
    /// Time from a signal to the end of the wait, within a tile.
    pub semaphore_ns: Quantity,
    /// Time of a barrier of all tiles.
    pub barrier_ns: Option<Quantity>,
}

/// Launch costs.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Launch {
    /// Launch of a single kernel.
    pub kernel_ns: Quantity,
    /// Launch of a kernel in a recorded graph.
    pub graph_kernel_ns: Option<Quantity>,
    /// Whether the first weights of an op are loaded while the op before it runs [default: no].
    #[serde(default)]
    pub loads_ahead: bool,
    /// Time of the host for each step, during which the chip waits [default: 0].
    pub step_ns: Option<Quantity>,
    /// Bytes per second to and from the host.
    pub host_bytes_per_s: Option<Quantity>,
}

/// A level of links to other chips.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Interconnect {
    /// Name.
    pub name: String,
    /// How links join chips.
    pub topology: Topology,
    /// Number of chips that this level joins, those of the levels before included; absent in the last level: any.
    pub chips: Option<Quantity>,
    /// Number of a chip's links.
    pub links: Quantity,
    /// Bytes per second of a link, in one direction.
    pub link_bytes_per_s: Quantity,
    /// Time of a small message to the next chip.
    pub latency_ns: Quantity,
    /// Energy per byte that a chip sends [default: 0].
    pub pj_per_byte: Option<Quantity>,
}

/// How links join chips.
// Exhaustive: a timing model needs the formula of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Topology {
    /// Every chip has all its links to switches, and sends to any other at their full rate.
    Switch,
    /// Every chip has the same number of links to each other chip.
    Full,
    /// Half of the links go to the chip before, half to the one behind; the last is joined to the first.
    Ring,
    /// A ring in each of two dimensions, with half of the links each.
    Torus,
}

impl Interconnect {
    /// Returns the bytes per second that a chip sends over all its links.
    pub fn bytes_per_s(&self) -> f64 {
        self.links.value * self.link_bytes_per_s.value
    }

    /// Returns the joules of so many bytes that a chip sends.
    pub fn joules(&self, bytes: f64) -> f64 {
        self.pj_per_byte.as_ref().map_or(0.0, |pj| 1e-12 * pj.value * bytes)
    }
}

/// Power of the whole chip.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Power {
    /// Design limit (TDP).
    pub tdp_w: Quantity,
    /// Provisioned power, if less.
    pub provisioned_w: Option<Quantity>,
    /// Idle power.
    pub idle_w: Option<Quantity>,
}

/// Price, rented or bought.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Price {
    /// Rent of one chip, power included.
    pub usd_per_hour: Option<Quantity>,
    /// Price of one chip.
    pub chip_usd: Option<Quantity>,
    /// Years of depreciation.
    pub lifetime_years: Option<Quantity>,
    /// Price of energy.
    pub usd_per_kwh: Option<Quantity>,
    /// Fraction of its life in use.
    pub utilisation_fraction: Option<Quantity>,
}

/// The chip's choices where formats leave them open.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct RoundingRules {
    /// Rule for the scale of a block.
    pub block_scale: ScaleRule,
    /// Rounding of numbers.
    pub elements: Rounding,
    /// Whether subnormal numbers are flushed to zero.
    pub flush_subnormals: bool,
}

impl RoundingRules {
    /// Returns the options for [`crate::numerics::BlockFormat::quantize`].
    pub fn rules(&self) -> Rules {
        Rules { scale: self.block_scale, rounding: self.elements }
    }
}

/// Constants of `halite-sim`'s formulas, fitted to measured kernels.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct Calibration {
    /// Products, by pair of formats.
    pub matmul: Vec<MatMulFit>,
    /// Decode attention, by pair of formats.
    pub attention: Vec<AttentionFit>,
    /// Prefill attention, by pair of formats.
    pub prefill: Vec<PrefillFit>,
    /// Feed-forward blocks of experts, by pair of formats.
    pub experts: Vec<MatMulFit>,
    /// Kernels of the backend `cpu`, by number of threads.
    pub host: Vec<HostRates>,
    /// Exchanges between chips.
    pub collective: Option<CollectiveFit>,
}

/// Rates of the kernels of the backend `cpu` with `threads` threads, measured by `halite calibrate`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct HostRates {
    /// Number of threads.
    pub threads: Quantity,
    /// The instruction set.
    pub isa: String,
    /// Time of an empty op, its barrier included.
    pub op_ns: Quantity,
    /// Peak of integer dot products; a multiply-add is two.
    pub integer_ops_per_s: Quantity,
    /// Peak of fused multiply-adds; each is two.
    pub float_ops_per_s: Quantity,
    /// Bytes of tensors per second of norms, rotations and additions.
    pub row_bytes_per_s: Quantity,
    /// Bytes of the KV cache per second, in attention of one token.
    pub attend_bytes_per_s: Quantity,
    /// Operations per second of attention of many tokens.
    pub attend_ops_per_s: Quantity,
    /// Memory levels.
    #[serde(default)]
    pub level: Vec<HostLevel>,
    /// Products, by weight format.
    #[serde(default)]
    pub product: Vec<HostProduct>,
}

/// Rates of a memory level with all threads together.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct HostLevel {
    /// Name, as in `memory`.
    pub name: String,
    /// Bytes read per second.
    pub read_bytes_per_s: Quantity,
    /// Bytes copied per second.
    pub copy_bytes_per_s: Quantity,
}

/// Rates of products with weights of one format.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct HostProduct {
    /// Format of the weights, named as in GGUF.
    pub format: String,
    /// Bytes of weights per second, for one token.
    pub weight_bytes_per_s: Quantity,
    /// Operations per second, for 512 tokens; a multiply-add is two.
    pub product_ops_per_s: Quantity,
}

/// Constants of the time of products, and of those of experts.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct MatMulFit {
    /// Format of the activations.
    pub activations: Dtype,
    /// Format of the weights.
    pub weights: Dtype,
    /// Fraction of the peak rate that a tile reaches.
    pub compute_fraction: Quantity,
    /// Fraction of the bandwidth of main memory.
    pub memory_fraction: Quantity,
    /// Time of an empty kernel.
    pub overhead_ns: Quantity,
    /// Extra time per wave of output tiles [default: 0].
    pub wave_ns: Option<Quantity>,
    /// Extra time for split-k [default: 0].
    pub split_ns: Option<Quantity>,
    /// Overlap exponent of compute and memory time; 1: no overlap [default: 1].
    pub overlap_exponent: Option<Quantity>,
    /// Errors of the times.
    pub errors: FitErrors,
}

/// Constants of the time of exchanges between chips, over the first level of links.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct CollectiveFit {
    /// Time to start a ring.
    pub overhead_ns: Quantity,
    /// Time of a step of a ring.
    pub hop_ns: Quantity,
    /// Fraction of the bandwidth for messages that are sent with their flags.
    pub small_fraction: Quantity,
    /// Additional time to start a ring that copies in bulk.
    pub bulk_ns: Quantity,
    /// Fraction of the bandwidth of such a ring.
    pub bulk_fraction: Quantity,
    /// Time of a sum for which every chip sends everything to every other; absent if it was not measured.
    pub direct_ns: Option<Quantity>,
    /// Fraction of the bandwidth of such a sum.
    pub direct_fraction: Option<Quantity>,
    /// Errors of the times.
    pub errors: FitErrors,
}

/// Constants of the time of decode attention.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct AttentionFit {
    /// Format of the activations.
    pub activations: Dtype,
    /// Format of the KV cache.
    pub weights: Dtype,
    /// Fraction of the bandwidth of main memory.
    pub memory_fraction: Quantity,
    /// Fraction of the bandwidth of the last cache.
    pub cache_fraction: Quantity,
    /// Fraction of the last cache that keeps the KV cache between runs.
    pub resident_fraction: Quantity,
    /// Time of an empty kernel.
    pub overhead_ns: Quantity,
    /// Time per work item besides its keys and values.
    pub item_ns: Quantity,
    /// Bytes of keys and values per second of one tile.
    pub tile_bytes_per_s: Quantity,
    /// Extra time if positions are split.
    pub split_ns: Quantity,
    /// Overlap exponent of compute and memory time; 1: no overlap.
    pub overlap_exponent: Quantity,
    /// Errors of the times.
    pub errors: FitErrors,
}

/// Constants of the time of prefill attention.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct PrefillFit {
    /// Format of the activations.
    pub activations: Dtype,
    /// Format of the KV cache.
    pub weights: Dtype,
    /// Fraction of the peak rate that a tile reaches.
    pub compute_fraction: Quantity,
    /// Fraction of the bandwidth of main memory.
    pub memory_fraction: Quantity,
    /// Time of an empty kernel.
    pub overhead_ns: Quantity,
    /// Time per work item besides its keys and values.
    pub item_ns: Quantity,
    /// Time per block of 128 x 128 scores besides its products.
    pub block_ns: Quantity,
    /// Overlap exponent of compute and memory time; 1: no overlap.
    pub overlap_exponent: Quantity,
    /// Errors of the times.
    pub errors: FitErrors,
}

/// Errors of fitted times relative to measured ones, on held-out shapes. Regimes without measurements are
/// absent.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct FitErrors {
    /// Number of measurements.
    pub points: Quantity,
    /// Mean absolute error.
    pub mean_error_fraction: Quantity,
    /// Largest error.
    pub worst_error_fraction: Quantity,
    /// Mean error of kernels that would take less than 3 us at the profile's peaks.
    pub small_error_fraction: Option<Quantity>,
    /// Mean error of the others that are memory-bound.
    pub memory_error_fraction: Option<Quantity>,
    /// Mean error of the others that are compute-bound.
    pub compute_error_fraction: Option<Quantity>,
    /// Where measured times lie, by regime.
    #[serde(default)]
    pub interval: Vec<FitInterval>,
}

/// The middle 80 % of measured times, as multiples of the predicted ones, in one regime.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct FitInterval {
    /// `small`, `memory` or `compute`, as in the errors.
    pub regime: FitRegime,
    /// One in ten is below this.
    pub low_ratio: Quantity,
    /// One in ten is above this.
    pub high_ratio: Quantity,
    /// Fraction of held-out measurements in between; absent if the interval is theirs.
    pub coverage_fraction: Option<Quantity>,
}

/// What bounds a kernel at the profile's peaks.
// Exhaustive: each has its errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FitRegime {
    /// It would take less than 3 us: mostly overhead.
    Small,
    /// Memory-bound.
    Memory,
    /// Compute-bound.
    Compute,
}

impl FitRegime {
    /// All of them.
    pub const ALL: [FitRegime; 3] = [FitRegime::Small, FitRegime::Memory, FitRegime::Compute];

    /// Name, for people and for keys.
    pub fn name(self) -> &'static str {
        match self {
            FitRegime::Small => "small",
            FitRegime::Memory => "memory",
            FitRegime::Compute => "compute",
        }
    }
}

macro_rules! shipped {
    ($($name:literal)*) => {
        /// The profiles that come with Halite, by name.
        pub static SHIPPED: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../", $name, ".toml")))),*];
    };
}

shipped! {
    "aws-trainium"
    "cobalt-100"
    "coral-edge-tpu"
    "generic-x86-avx512"
    "groq-lpu"
    "hexagon-x-elite"
    "jetson-orin-nano-super"
    "maia-100"
    "maia-200"
    "nvidia-a100"
    "nvidia-h100"
    "sambanova-sn40l"
    "teaching-16x16"
    "tenstorrent-n150"
    "tenstorrent-p150"
    "tpu-v1"
}

/// Maximum bytes of a file.
const MAX_BYTES: u64 = 1 << 18;
/// Maximum faults to list; the others are counted.
const MAX_FAULTS: usize = 32;
/// Maximum paths to name for one that does not exist.
const NEAR: usize = 4;
/// Maximum bytes of a fault that quotes the file.
const MAX_SHOWN: usize = 1000;

impl Profile {
    /// Returns the joules that a chip's idle power takes; `None` if the profile lacks it.
    pub fn idle_joules(&self, seconds: f64) -> Option<f64> {
        Some(self.power.as_ref()?.idle_w.as_ref()?.value * seconds)
    }

    /// Seconds of the host for a step, during which the chip waits.
    pub fn host_s(&self) -> f64 {
        self.launch.step_ns.as_ref().map_or(0.0, |ns| 1e-9 * ns.value)
    }

    /// Opens the shipped profile of a name, or else a file.
    ///
    /// Errors: as `parse`; a file that cannot be read.
    pub fn open(name_or_path: &str) -> Result<Profile> {
        if let Some((name, text)) = SHIPPED.iter().find(|(name, _)| *name == name_or_path) {
            return Profile::parse(name, text);
        }
        let path = Path::new(name_or_path);
        if !path.exists() {
            let names: Vec<_> = SHIPPED.iter().map(|(name, _)| *name).collect();
            let expected = format!("a file, or one of {}", names.join(", "));
            return Err(Error::argument("profile", expected, format!("`{name_or_path}`")));
        }
        let text = String::from_utf8(map::read(path, MAX_BYTES)?);
        let wrong = |e: std::string::FromUtf8Error| std::io::Error::other(e.utf8_error());
        let text = text.map_err(|e| Error::Io { path: path.to_owned(), source: wrong(e) })?;
        Profile::parse(name_or_path, &text)
    }

    /// Parses the text of a profile; `origin` names it in errors.
    ///
    /// Errors: [`Error::Profile`] with all faults.
    pub fn parse(origin: &str, text: &str) -> Result<Profile> {
        let fail = |faults: Vec<String>| {
            let more = faults.len().saturating_sub(MAX_FAULTS);
            // Faults quote the file.
            let told = faults.iter().take(MAX_FAULTS).map(|fault| escaped(fault));
            let others = (more > 0).then(|| format!("and {more} more"));
            Err(Error::Profile { profile: escaped(origin), faults: told.chain(others).collect() })
        };
        if text.len() as u64 > MAX_BYTES {
            return fail(vec![format!("expected at most {MAX_BYTES} bytes, got {}", text.len())]);
        }
        let mut table: toml::Table = match toml::from_str(text) {
            Ok(table) => table,
            Err(error) => {
                // The error quotes the line, which may be the whole file.
                let (shown, start) = (error.to_string(), error.span().map_or(0, |span| span.start));
                let line = 1 + text.bytes().take(start).filter(|byte| *byte == b'\n').count();
                let short = || format!("line {line}: {}", error.message());
                return fail(vec![if shown.len() > MAX_SHOWN { short() } else { shown }]);
            }
        };
        if let Err(fault) = quantity::check_size(&table) {
            return fail(vec![fault]);
        }
        let resolved = quantity::resolve(&mut table);
        let lines = if resolved.is_empty() { BTreeMap::new() } else { keys::lines(text) };
        let told = resolved.into_iter().map(|fault| match lines.get(&fault.path) {
            Some(line) => format!("line {line}: {}", fault.text),
            None => fault.text,
        });
        let mut faults: Vec<String> = told.collect();
        let quantities = quantity::list(&table);
        let profile: Profile = match toml::Value::Table(table).try_into() {
            Ok(profile) => Profile { quantities, ..profile },
            Err(error) => {
                let mut found = keys::faults(text);
                if found.is_empty() {
                    found.push(error.to_string().trim().replace('\n', " "));
                }
                found.append(&mut faults);
                return fail(found);
            }
        };
        // What follows from a wrong number is no fault of its own.
        if faults.is_empty() {
            faults = check::check(&profile);
        }
        if faults.is_empty() { Ok(profile) } else { fail(faults) }
    }

    /// Returns the chip with another value for one of its [`Profile::quantities`], without consistency
    /// checks.
    ///
    /// Errors: [`Error::Argument`] if there is no number of that path.
    pub fn with(&self, path: &str, value: f64) -> Result<Profile> {
        let mut profile = self.clone();
        profile.set(path, value)?;
        Ok(profile)
    }

    /// Changes the value of one of the chip's [`Profile::quantities`], without consistency checks.
    ///
    /// Errors: [`Error::Argument`] if there is no number of that path; it names the nearest ones.
    pub fn set(&mut self, path: &str, value: f64) -> Result<()> {
        let Some(number) = self.number(path) else {
            return Err(Error::argument("path of a number", self.near(path), format!("`{path}`")));
        };
        number.value = value;
        let listed = self.quantities.iter_mut().filter(|(listed, _)| listed == path);
        listed.for_each(|(_, quantity)| quantity.value = value);
        Ok(())
    }

    /// Names the paths that are nearest to one that does not exist.
    fn near(&self, path: &str) -> String {
        let parts = |path: &str| -> Vec<String> { path.split(['.', '_']).map(str::to_owned).collect() };
        let asked = parts(path);
        let shared = |listed: &str| parts(listed).iter().filter(|part| asked.contains(part)).count();
        let mut near: Vec<_> = self.quantities.iter().map(|(listed, _)| (shared(listed), listed)).collect();
        near.sort_by_key(|(shared, listed)| (std::cmp::Reverse(*shared), listed.len().abs_diff(path.len())));
        let near: Vec<_> =
            near.into_iter().filter(|(n, _)| *n > 0).take(NEAR).map(|(_, path)| &path[..]).collect();
        let some = if near.is_empty() { String::new() } else { format!(", such as {}", near.join(", ")) };
        format!("one of `halite profile NAME --numbers`{some}")
    }

    /// Returns the number of tiles.
    pub fn tiles(&self) -> f64 {
        self.chip.clusters.value * self.chip.tiles_per_cluster.value
    }

    /// Returns the number of instances of a scope.
    pub fn instances(&self, scope: Scope) -> f64 {
        match scope {
            Scope::Tile => self.tiles(),
            Scope::Cluster => self.chip.clusters.value,
            Scope::Chip | Scope::Host => 1.0,
        }
    }

    /// The memories that hold weights, the KV cache and activations, the nearest first: the last one, and those outside of the tiles that
    /// software manages.
    pub fn holding(&self) -> impl Iterator<Item = &Memory> {
        let last = self.memory.len().saturating_sub(1);
        let holds = move |i: usize, m: &Memory| {
            i == last || (m.scope != Scope::Tile && m.managed == Managed::Software)
        };
        self.memory.iter().enumerate().filter(move |(i, memory)| holds(*i, memory)).map(|(_, memory)| memory)
    }

    /// Bytes of all memories that hold weights, the KV cache and activations.
    pub fn holding_bytes(&self) -> u64 {
        self.holding().map(|m| m.capacity_bytes.value * self.instances(m.scope)).sum::<f64>() as u64
    }

    /// Returns the operations per second of all matrix units, from geometry and clock; a multiply-add is two.
    pub fn matrix_ops_per_s(&self, matrix: &Matrix, rate: &MatrixRate) -> f64 {
        let clock = matrix.clock_hz.as_ref().unwrap_or(&self.chip.clock_hz).value;
        let results = matrix.rows.value * matrix.columns.value * matrix.units_per_tile.value * self.tiles();
        2.0 * results * rate.depth_per_cycle.value * clock
    }

    /// Returns the operations per second of all vector units, from widths and clock; a multiply-add is two.
    pub fn vector_ops_per_s(&self, rate: &VectorRate) -> f64 {
        let clock = self.vector.clock_hz.as_ref().unwrap_or(&self.chip.clock_hz).value;
        rate.ops_per_cycle.value * self.vector.units_per_tile.value * self.tiles() * clock
    }

    /// Returns the bytes per second that all instances of a memory level read.
    pub fn read_bytes_per_s(&self, memory: &Memory) -> f64 {
        memory.read_bytes_per_s.value * self.instances(memory.scope)
    }

    /// Returns peak operations per second by format, matrix units first: `mx9 x mx9` or `fp32`.
    pub fn peaks(&self) -> Vec<(String, f64)> {
        let matrix = self.matrix.iter().flat_map(|matrix| {
            matrix.rate.iter().map(move |rate| {
                let name = format!("{} x {}", rate.activations, rate.weights);
                (name, self.matrix_ops_per_s(matrix, rate))
            })
        });
        let vector = self.vector.rate.iter().map(|r| (r.dtype.to_string(), self.vector_ops_per_s(r)));
        matrix.chain(vector).collect()
    }
}

/// Whether a format is a block format.
fn is_block(dtype: Dtype) -> bool {
    matches!(dtype.format(), Format::Block(_))
}
