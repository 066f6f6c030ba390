//! A chip as data: `hw-profiles/*.toml`.
//!
//! Each number says where it comes from and how sure it is ([`Quantity`]); each key has its unit in its name; unknown keys are
//! refused; and numbers that contradict each other or physics are refused too (`check.rs`).

mod check;
mod quantity;

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::numerics::{Dtype, Format, Rounding, Rules, ScaleRule};
use halite::error::escaped;
use halite::map;
use halite::{Error, Result};

pub use quantity::{Basis, Quantity, schema};

/// A chip.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// What it is called on the command line.
    pub name: String,
    /// Who makes it.
    pub vendor: String,
    /// One sentence on what it is, and what of it is known.
    pub summary: String,
    /// What runs programs for it.
    pub driver: Driver,
    /// Documents, by the short names that `source` keys cite.
    #[serde(default)]
    pub sources: BTreeMap<String, String>,
    /// Clock and counts.
    pub chip: Chip,
    /// The matrix unit, if there is one.
    pub matrix: Option<Matrix>,
    /// The vector unit.
    pub vector: Vector,
    /// Memory levels, from the nearest to the arithmetic to the farthest. The last one holds the weights.
    pub memory: Vec<Memory>,
    /// Engines that copy between levels.
    #[serde(default)]
    pub dma: Vec<Dma>,
    /// The network on the chip.
    pub noc: Option<Noc>,
    /// What it costs to wait for each other.
    pub sync: Option<Sync>,
    /// What it costs to start work.
    pub launch: Launch,
    /// To other chips.
    pub interconnect: Option<Interconnect>,
    /// Watts.
    pub power: Option<Power>,
    /// Money.
    pub price: Option<Price>,
    /// What the chip chooses where formats leave a choice.
    #[serde(default)]
    pub rounding: RoundingRules,
    /// What measured kernels reach of these numbers.
    pub calibration: Option<Calibration>,
    /// Every number above with its path, such as `memory.hbm.latency_ns`.
    #[serde(skip)]
    pub quantities: Vec<(String, Quantity)>,
    /// The file that it was read from, each number with its provenance.
    #[serde(skip)]
    table: toml::Table,
}

/// What runs programs for a chip.
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
    /// As in profiles.
    pub fn name(self) -> &'static str {
        match self {
            Driver::Cpu => "cpu",
            Driver::Gpu => "gpu",
            Driver::Sim => "sim",
        }
    }
}

/// Clock and counts. A tile is what holds an arithmetic unit and its nearest memory: a core, an SM, a NeuronCore.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Chip {
    /// The clock of all units that do not have their own.
    pub clock_hz: Quantity,
    /// Clusters that are in use.
    pub clusters: Quantity,
    /// Tiles of each cluster that are in use.
    pub tiles_per_cluster: Quantity,
}

/// A unit that multiplies matrices: `rows x columns` results, and of each `depth_per_cycle` products a cycle.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// Units of a tile.
    pub units_per_tile: Quantity,
    /// Rows of the array.
    pub rows: Quantity,
    /// Columns of the array.
    pub columns: Quantity,
    /// Which operand stays in the array.
    pub dataflow: Dataflow,
    /// Whether a product starts before the one before has left the array.
    pub pipelined: bool,
    /// The clock of this unit, if not the chip's.
    pub clock_hz: Option<Quantity>,
    /// Cycles from the first operand to the first result.
    pub fill_cycles: Option<Quantity>,
    /// The fewest cycles between two instructions.
    pub min_issue_cycles: Option<Quantity>,
    /// Bytes of accumulators of a unit.
    pub accumulator_bytes: Option<Quantity>,
    /// What it multiplies, and how fast.
    pub rate: Vec<MatrixRate>,
}

/// Which operand stays in a systolic array while the others pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dataflow {
    /// Sums stay.
    OutputStationary,
    /// Weights stay.
    WeightStationary,
    /// Activations stay.
    InputStationary,
}

/// Products of two formats in a matrix unit.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MatrixRate {
    /// Format of the activations.
    pub activations: Dtype,
    /// Format of the weights.
    pub weights: Dtype,
    /// Format of the sums.
    pub accumulator: Dtype,
    /// Products added up for each result in a cycle; a half means two cycles a product.
    pub depth_per_cycle: Quantity,
    /// The peak that the maker states, of the whole chip, without sparsity; a multiply-add is two.
    pub dense_ops_per_s: Option<Quantity>,
    /// The peak that the maker states with structured sparsity. Nothing is computed from it.
    pub sparse_ops_per_s: Option<Quantity>,
    /// The best that was measured, of the whole chip.
    pub measured_ops_per_s: Option<Quantity>,
    /// Energy of an operation in the unit, without the memory; a multiply-add is two.
    pub pj_per_op: Option<Quantity>,
}

/// A unit that works element by element.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vector {
    /// Units of a tile.
    pub units_per_tile: Quantity,
    /// The clock of this unit, if not the chip's.
    pub clock_hz: Option<Quantity>,
    /// Cycles before the first result of an instruction.
    pub open_cycles: Option<Quantity>,
    /// Further cycles where an instruction needs the result of the one before.
    pub dependent_cycles: Option<Quantity>,
    /// Cycles of an exponential, where an addition takes one.
    pub exp_cycles: Option<Quantity>,
    /// Cycles of a reciprocal square root, where an addition takes one.
    pub rsqrt_cycles: Option<Quantity>,
    /// Cycles of a division, where an addition takes one.
    pub divide_cycles: Option<Quantity>,
    /// Cycles of rounding to a block format, where an addition takes one.
    pub quantize_cycles: Option<Quantity>,
    /// What it computes with, and how fast.
    pub rate: Vec<VectorRate>,
}

/// Operations of one format in a vector unit.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VectorRate {
    /// Format of the operands.
    pub dtype: Dtype,
    /// Operations of a unit in a cycle; a fused multiply-add is two.
    pub ops_per_cycle: Quantity,
    /// The peak that the maker states, of the whole chip.
    pub dense_ops_per_s: Option<Quantity>,
    /// The best that was measured, of the whole chip.
    pub measured_ops_per_s: Option<Quantity>,
    /// Energy of an operation in the unit, without the memory.
    pub pj_per_op: Option<Quantity>,
}

/// A memory level. All numbers are of one instance.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Name, unique in the profile.
    pub name: String,
    /// What each instance is shared by.
    pub scope: Scope,
    /// Who decides what is in it.
    pub managed: Managed,
    /// Bytes it holds.
    pub capacity_bytes: Quantity,
    /// Bytes read per second.
    pub read_bytes_per_s: Quantity,
    /// Bytes written per second [default: as many as are read].
    pub write_bytes_per_s: Option<Quantity>,
    /// Time to the first byte.
    pub latency_ns: Quantity,
    /// Banks that work at once.
    pub banks: Option<Quantity>,
    /// Bytes that are moved at least.
    pub line_bytes: Option<Quantity>,
    /// The part of the bandwidth that long transfers reach [default: all].
    pub achievable_fraction: Option<Quantity>,
    /// Energy of a byte that is read or written.
    pub pj_per_byte: Option<Quantity>,
}

/// What an instance belongs to, from inside to outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// One a tile.
    Tile,
    /// One a cluster.
    Cluster,
    /// One a chip.
    Chip,
    /// The host's, reached over its bus.
    Host,
}

/// Who decides what a memory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Managed {
    /// The program: a scratchpad, or main memory.
    Software,
    /// The hardware: a cache.
    Hardware,
}

/// Engines that copy, of one kind. All numbers are of one engine.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dma {
    /// Name, unique in the profile.
    pub name: String,
    /// What each group of engines belongs to.
    pub scope: Scope,
    /// Engines of a group.
    pub engines: Quantity,
    /// Bytes per second.
    pub bytes_per_s: Quantity,
    /// Time from the request to the first byte.
    pub setup_ns: Quantity,
    /// Further time a descriptor.
    pub descriptor_ns: Option<Quantity>,
    /// Length of the contiguous runs that are copied at half the bandwidth.
    pub half_rate_run_bytes: Option<Quantity>,
    /// Strided dimensions of a descriptor.
    pub max_dimensions: Option<Quantity>,
    /// Descriptors that may wait.
    pub queue_entries: Option<Quantity>,
}

/// The network on the chip.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Noc {
    /// Bytes of a link in a cycle.
    pub link_bytes_per_cycle: Quantity,
    /// Cycles of a hop.
    pub hop_cycles: Quantity,
    /// Whether one read can serve many tiles.
    pub broadcast: bool,
}

/// What it costs to wait for each other.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sync {
    /// From a signal to the wait that it ends, in one tile.
    pub semaphore_ns: Quantity,
    /// A barrier of all tiles.
    pub barrier_ns: Option<Quantity>,
}

/// What it costs to start work.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Of one kernel by itself.
    pub kernel_ns: Quantity,
    /// Of one kernel in a recorded graph.
    pub graph_kernel_ns: Option<Quantity>,
    /// Bytes per second to and from the host.
    pub host_bytes_per_s: Option<Quantity>,
}

/// Links to other chips.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Interconnect {
    /// Links.
    pub links: Quantity,
    /// Bytes per second of a link, in one direction.
    pub link_bytes_per_s: Quantity,
    /// Time of a small message.
    pub latency_ns: Option<Quantity>,
}

/// Watts of the whole chip.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Power {
    /// The design's limit.
    pub tdp_w: Quantity,
    /// What it is run at, if less.
    pub provisioned_w: Option<Quantity>,
    /// Without work.
    pub idle_w: Option<Quantity>,
}

/// What running costs: rented, or bought.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Rent of one chip, power included.
    pub usd_per_hour: Option<Quantity>,
    /// Price of one chip.
    pub chip_usd: Option<Quantity>,
    /// Years until it is written off.
    pub lifetime_years: Option<Quantity>,
    /// Price of energy.
    pub usd_per_kwh: Option<Quantity>,
    /// The part of its life that it works.
    pub utilisation_fraction: Option<Quantity>,
}

/// What the chip chooses where formats leave a choice.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RoundingRules {
    /// How the scale of a block is found.
    pub block_scale: ScaleRule,
    /// How numbers are rounded.
    pub elements: Rounding,
    /// Whether subnormal numbers count as zero.
    pub flush_subnormals: bool,
}

impl RoundingRules {
    /// For [`crate::numerics::BlockFormat::quantize`].
    pub fn rules(&self) -> Rules {
        Rules { scale: self.block_scale, rounding: self.elements }
    }
}

/// What measured kernels reach of a profile's numbers: constants of the formulas of `halite-sim`, which were fitted to
/// measurements.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Calibration {
    /// Products, by formats.
    pub matmul: Vec<MatMulFit>,
    /// Decode attention, by formats.
    pub attention: Vec<AttentionFit>,
    /// The kernels of the backend `cpu`, by numbers of threads.
    pub host: Vec<HostRates>,
}

/// What the kernels of the backend `cpu` reach on so many threads, measured by `halite calibrate`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostRates {
    /// Threads that compute.
    pub threads: Quantity,
    /// The instruction set.
    pub isa: String,
    /// Time of an op that does nothing, its barrier included.
    pub op_ns: Quantity,
    /// Peak of integer dot products; a multiply-add is two.
    pub integer_ops_per_s: Quantity,
    /// Peak of fused multiply-adds; each is two.
    pub float_ops_per_s: Quantity,
    /// Bytes of tensors per second of norms, rotations and additions.
    pub row_bytes_per_s: Quantity,
    /// Bytes of the KV cache per second, of attention of one token.
    pub attend_bytes_per_s: Quantity,
    /// Operations per second of attention of many tokens.
    pub attend_ops_per_s: Quantity,
    /// Memory levels.
    #[serde(default)]
    pub level: Vec<HostLevel>,
    /// Products, by formats of weights.
    #[serde(default)]
    pub product: Vec<HostProduct>,
}

/// What all threads together reach of a memory level.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostLevel {
    /// Name, as in `memory`.
    pub name: String,
    /// Bytes read per second.
    pub read_bytes_per_s: Quantity,
    /// Bytes copied per second.
    pub copy_bytes_per_s: Quantity,
}

/// What products with weights of one format reach.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostProduct {
    /// Format of the weights, as GGUF names it.
    pub format: String,
    /// Bytes of weights per second, of one token.
    pub weight_bytes_per_s: Quantity,
    /// Operations per second of 512 tokens; a multiply-add is two.
    pub product_ops_per_s: Quantity,
}

/// Constants of the time of products.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MatMulFit {
    /// Format of the activations.
    pub activations: Dtype,
    /// Format of the weights.
    pub weights: Dtype,
    /// Part of the peak rate that a tile reaches.
    pub compute_fraction: Quantity,
    /// Part of the bandwidth of main memory.
    pub memory_fraction: Quantity,
    /// Time of a kernel that does nothing.
    pub overhead_ns: Quantity,
    /// Further time of each wave of output tiles [default: 0].
    pub wave_ns: Option<Quantity>,
    /// Further time where sums are split [default: 0].
    pub split_ns: Option<Quantity>,
    /// How compute and memory time overlap: 1 is not at all [default: 1].
    pub overlap_exponent: Option<Quantity>,
    /// How far off the times are.
    pub errors: FitErrors,
}

/// Constants of the time of decode attention.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttentionFit {
    /// Format of the activations.
    pub activations: Dtype,
    /// Format of the KV cache.
    pub weights: Dtype,
    /// Part of the bandwidth of main memory.
    pub memory_fraction: Quantity,
    /// Part of the bandwidth of the last cache.
    pub cache_fraction: Quantity,
    /// Part of the last cache that holds the KV cache from one run to the next.
    pub resident_fraction: Quantity,
    /// Time of a kernel that does nothing.
    pub overhead_ns: Quantity,
    /// Time of a work item besides its keys and values.
    pub item_ns: Quantity,
    /// Bytes per second of keys and values that one tile works through.
    pub tile_bytes_per_s: Quantity,
    /// Further time where positions are split.
    pub split_ns: Quantity,
    /// How compute and memory time overlap: 1 is not at all.
    pub overlap_exponent: Quantity,
    /// How far off the times are.
    pub errors: FitErrors,
}

/// Errors of fitted times relative to the measured ones, on shapes that were not fitted to. Regimes without measurements are
/// left out.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FitErrors {
    /// Measurements that the errors are of.
    pub points: Quantity,
    /// Mean absolute error of all.
    pub mean_error_fraction: Quantity,
    /// The largest.
    pub worst_error_fraction: Quantity,
    /// Mean of those that would take less than 3 us at the profile's peaks.
    pub small_error_fraction: Option<Quantity>,
    /// Mean of the others that are bound by memory.
    pub memory_error_fraction: Option<Quantity>,
    /// Mean of the others that are bound by compute.
    pub compute_error_fraction: Option<Quantity>,
}

macro_rules! shipped {
    ($($name:literal)*) => {
        /// The profiles that come with Halite, by name.
        pub static SHIPPED: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../", $name, ".toml")))),*];
    };
}

shipped! {
    "cobalt-100"
    "coral-edge-tpu"
    "generic-x86-avx512"
    "jetson-orin-nano-super"
    "maia-100"
    "maia-200"
    "nvidia-a100"
    "nvidia-h100"
    "teaching-16x16"
    "tenstorrent-p150"
    "tpu-v1"
}

/// Most bytes of a file.
const MAX_BYTES: u64 = 1 << 18;
/// Most faults that are told; the others are counted.
const MAX_FAULTS: usize = 32;
/// Most bytes of a fault that quotes the file.
const MAX_SHOWN: usize = 1000;

impl Profile {
    /// The shipped profile of that name, or else the file.
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

    /// A profile from the text of a file; `origin` names it in errors.
    ///
    /// Errors: [`Error::Profile`] with everything that is wrong.
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
                // It quotes the line, which may be the whole file.
                let (shown, start) = (error.to_string(), error.span().map_or(0, |span| span.start));
                let line = 1 + text.bytes().take(start).filter(|byte| *byte == b'\n').count();
                let short = || format!("line {line}: {}", error.message());
                return fail(vec![if shown.len() > MAX_SHOWN { short() } else { shown }]);
            }
        };
        if let Err(fault) = quantity::check_size(&table) {
            return fail(vec![fault]);
        }
        let mut faults = quantity::resolve(&mut table);
        let quantities = quantity::list(&table);
        let profile: Profile = match toml::Value::Table(table.clone()).try_into() {
            Ok(profile) => Profile { quantities, table, ..profile },
            Err(error) => {
                // What is missing its source is easier understood than what does not fit the schema.
                faults.truncate(MAX_FAULTS - 1);
                faults.push(error.to_string().trim().replace('\n', " "));
                return fail(faults);
            }
        };
        faults.extend(check::check(&profile));
        if faults.is_empty() { Ok(profile) } else { fail(faults) }
    }

    /// The same chip with another value for one of its [`Profile::quantities`]. The new value is not checked against others.
    ///
    /// Errors: [`Error::Argument`] if there is no number of that path.
    pub fn with(&self, path: &str, value: f64) -> Result<Profile> {
        let mut table = self.table.clone();
        if !quantity::set(&mut table, path, value) {
            return Err(Error::argument("path of a number", "one of `halite profile --numbers`", path));
        }
        let quantities = quantity::list(&table);
        match toml::Value::Table(table.clone()).try_into() {
            Ok(profile) => Ok(Profile { quantities, table, ..profile }),
            Err(error) => Err(Error::Profile { profile: self.name.clone(), faults: vec![error.to_string()] }),
        }
    }

    /// Tiles of the chip.
    pub fn tiles(&self) -> f64 {
        self.chip.clusters.value * self.chip.tiles_per_cluster.value
    }

    /// Instances of what belongs to a scope.
    pub fn instances(&self, scope: Scope) -> f64 {
        match scope {
            Scope::Tile => self.tiles(),
            Scope::Cluster => self.chip.clusters.value,
            Scope::Chip | Scope::Host => 1.0,
        }
    }

    /// Operations per second of all matrix units, from geometry and clock; a multiply-add is two.
    pub fn matrix_ops_per_s(&self, matrix: &Matrix, rate: &MatrixRate) -> f64 {
        let clock = matrix.clock_hz.as_ref().unwrap_or(&self.chip.clock_hz).value;
        let results = matrix.rows.value * matrix.columns.value * matrix.units_per_tile.value * self.tiles();
        2.0 * results * rate.depth_per_cycle.value * clock
    }

    /// Operations per second of all vector units, from widths and clock; a multiply-add is two.
    pub fn vector_ops_per_s(&self, rate: &VectorRate) -> f64 {
        let clock = self.vector.clock_hz.as_ref().unwrap_or(&self.chip.clock_hz).value;
        rate.ops_per_cycle.value * self.vector.units_per_tile.value * self.tiles() * clock
    }

    /// Bytes per second that all instances of a memory level read.
    pub fn read_bytes_per_s(&self, memory: &Memory) -> f64 {
        memory.read_bytes_per_s.value * self.instances(memory.scope)
    }

    /// Peak operations per second by formats, matrix units first: `mx9 x mx9` or `fp32`.
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

/// Whether numbers of a format share scales.
fn is_block(dtype: Dtype) -> bool {
    matches!(dtype.format(), Format::Block(_))
}
