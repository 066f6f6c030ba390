//! The time of one kernel on a chip, from its profile and the constants of the profile's `[calibration]`.
//!
//! The profile decides between two kinds of chips. With a hardware-managed *cache*, kernels divide a product
//! into output tiles, cores process them in waves, and the formula chooses tile shapes and split-k as
//! libraries do. With *software*-managed memory, the output is divided once over all tiles, and operands
//! stream through their scratchpads.

use super::fit::{Op, regime};
use halite::{Error, Result};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{
    AttentionFit, Calibration, FitErrors, FitRegime, Managed, MatMulFit, MatrixRate, Memory, PrefillFit,
    Profile,
};

/// A kernel to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// A product of `m x k` activations with `k x n` weights.
    MatMul {
        /// Rows of the result.
        m: u64,
        /// Columns of the result.
        n: u64,
        /// What is summed over.
        k: u64,
    },
    /// Attention of one new token per sequence; all sequences have the same length.
    Attention {
        /// Sequences.
        batch: u64,
        /// Query heads.
        heads: u64,
        /// KV heads.
        kv_heads: u64,
        /// Elements of a head.
        head_dim: u64,
        /// Positions of each sequence, the new one included.
        kv_len: u64,
    },
    /// Attention of several new tokens per sequence; all sequences have the same lengths.
    Prefill {
        /// Sequences.
        batch: u64,
        /// Query heads.
        heads: u64,
        /// KV heads.
        kv_heads: u64,
        /// Elements of a head.
        head_dim: u64,
        /// New tokens of each sequence.
        tokens: u64,
        /// Positions of each sequence that are read, the new ones included.
        kv_len: u64,
        /// Pairs of a new token and a position that it attends to, per sequence.
        seen: u64,
    },
    /// The feed-forward block of experts: two products of the rows of each.
    Experts {
        /// Distinct experts that rows were routed to.
        experts: u64,
        /// Rows of all experts: tokens times experts per token.
        rows: u64,
        /// Elements of a row.
        columns: u64,
        /// Elements of an expert's hidden row.
        hidden: u64,
    },
}

/// Expected number of distinct experts, of `experts`, that `tokens` tokens choose: each token takes `used`,
/// independently and each expert as often.
pub fn distinct_experts(experts: f64, used: f64, tokens: f64) -> f64 {
    experts * (1.0 - (1.0 - (used / experts.max(1.0)).min(1.0)).powf(tokens))
}

/// Formats of a kernel's operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Formats {
    /// Of activations and results.
    pub activations: Dtype,
    /// Of weights, or of the KV cache.
    pub weights: Dtype,
}

/// The profile's numbers for the formulas, in SI units.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Number of independent cores.
    pub tiles: f64,
    clusters: f64,
    tiles_per_cluster: f64,
    /// Peak operations per second of the whole chip in these formats; a multiply-add is two.
    pub ops_per_s: f64,
    /// Bytes per second of the main memory.
    pub bytes_per_s: f64,
    /// The last-level cache, if hardware manages one: its bytes, and its bytes per second.
    pub cache: Option<(f64, f64)>,
    /// Bytes of a tile's own memory.
    scratchpad_bytes: f64,
    scratchpad_bytes_per_s: f64,
    stored: Stored,
}

/// Returns the formats that a chip multiplies, with the operations per second of the whole chip: those of the
/// matrix unit, or without one those of the vector unit.
pub fn products(profile: &Profile) -> Vec<(Formats, f64)> {
    let matrix = profile.matrix.iter().flat_map(|matrix| {
        let rate = |r: &MatrixRate| {
            (Formats { activations: r.activations, weights: r.weights }, profile.matrix_ops_per_s(matrix, r))
        };
        matrix.rate.iter().map(rate)
    });
    let vector = profile
        .vector
        .rate
        .iter()
        .filter(|_| profile.matrix.is_none())
        .map(|r| (Formats { activations: r.dtype, weights: r.dtype }, profile.vector_ops_per_s(r)));
    matrix.chain(vector).collect()
}

impl Machine {
    /// Reads the formulas' numbers from a profile. Weights of fewer bits than activations are multiplied in
    /// the format of activations if the chip does not multiply them as they are.
    ///
    /// # Errors
    /// `Error::Argument` if the chip multiplies neither.
    pub fn new(profile: &Profile, formats: Formats) -> Result<Machine> {
        Machine::of(profile, &products(profile), formats)
    }

    /// As [`Machine::new`], with the [`products`] of the profile.
    pub(super) fn of(profile: &Profile, all: &[(Formats, f64)], formats: Formats) -> Result<Machine> {
        let Formats { activations, weights } = formats;
        let find = |weights| all.iter().find(|(f, _)| *f == Formats { activations, weights });
        let unpacked = || find(activations).filter(|_| weights.bits() < activations.bits());
        let Some((_, ops_per_s)) = find(weights).or_else(unpacked) else {
            let found =
                format!("{activations} x {weights}, which profile {} has no matrix.rate for", profile.name);
            return Err(Error::argument("formats", "formats that the matrix unit multiplies", found));
        };
        let read = |memory: &Memory| profile.read_bytes_per_s(memory);
        let cache = profile.memory.iter().rev().find(|m| m.managed == Managed::Hardware);
        Ok(Machine {
            tiles: profile.tiles(),
            clusters: profile.chip.clusters.value,
            tiles_per_cluster: profile.chip.tiles_per_cluster.value,
            ops_per_s: *ops_per_s,
            bytes_per_s: profile.memory.last().map_or(f64::INFINITY, read),
            cache: cache.map(|c| (c.capacity_bytes.value * profile.instances(c.scope), read(c))),
            scratchpad_bytes: profile.memory.first().map_or(f64::INFINITY, |m| m.capacity_bytes.value),
            scratchpad_bytes_per_s: profile
                .memory
                .first()
                .map_or(f64::INFINITY, |m| m.read_bytes_per_s.value),
            stored: Stored::of(formats),
        })
    }
}

/// Returns the minimum bytes that a kernel moves, each operand and result once, and its operations.
pub fn work(machine: &Machine, kernel: Kernel) -> (f64, f64) {
    let [activation, weight, result] = machine.stored.bytes();
    match kernel {
        Kernel::MatMul { m, n, k } => {
            let (m, n, k) = (m as f64, n as f64, k as f64);
            (m * k * activation + m * n * result + k * n * weight, 2.0 * m * n * k)
        }
        Kernel::Attention { batch, heads, kv_heads, head_dim, kv_len } => {
            let rows = batch as f64 * head_dim as f64;
            let (keys, queries) = (rows * kv_heads as f64 * kv_len as f64, rows * heads as f64);
            (2.0 * keys * weight + 2.0 * queries * activation, 4.0 * queries * kv_len as f64)
        }
        Kernel::Prefill { batch, heads, kv_heads, head_dim, tokens, kv_len, seen } => {
            let rows = batch as f64 * head_dim as f64;
            let (keys, queries) = (rows * kv_heads as f64 * kv_len as f64, rows * heads as f64);
            let bytes = 2.0 * keys * weight + 2.0 * queries * tokens as f64 * activation;
            (bytes, 4.0 * queries * seen as f64)
        }
        Kernel::Experts { experts, rows, columns, hidden } => {
            let (rows, columns, hidden) = (rows as f64, columns as f64, hidden as f64);
            let weights = 3.0 * experts as f64 * columns * hidden * weight;
            let moved = rows * ((columns + hidden) * activation + (columns + 2.0 * hidden) * result);
            (weights + moved, 6.0 * rows * columns * hidden)
        }
    }
}

/// The constants of a product's time; see [`MatMulFit`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "as in `MatMulFit`, in seconds")]
pub struct MatMulConstants {
    pub compute_fraction: f64,
    pub memory_fraction: f64,
    pub overhead_s: f64,
    pub wave_s: f64,
    pub split_s: f64,
    pub overlap_exponent: f64,
}

/// The constants of attention's time; see [`AttentionFit`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "as in `AttentionFit`, in seconds")]
pub struct AttentionConstants {
    pub memory_fraction: f64,
    pub cache_fraction: f64,
    pub resident_fraction: f64,
    pub overhead_s: f64,
    pub item_s: f64,
    pub tile_bytes_per_s: f64,
    pub split_s: f64,
    pub overlap_exponent: f64,
}

/// The constants of prefill attention's time; see [`PrefillFit`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "as in `PrefillFit`, in seconds")]
pub struct PrefillConstants {
    pub compute_fraction: f64,
    pub memory_fraction: f64,
    pub overhead_s: f64,
    pub item_s: f64,
    pub block_s: f64,
    pub overlap_exponent: f64,
}

impl From<&PrefillFit> for PrefillConstants {
    fn from(fit: &PrefillFit) -> PrefillConstants {
        PrefillConstants {
            compute_fraction: fit.compute_fraction.value,
            memory_fraction: fit.memory_fraction.value,
            overhead_s: fit.overhead_ns.value * 1e-9,
            item_s: fit.item_ns.value * 1e-9,
            block_s: fit.block_ns.value * 1e-9,
            overlap_exponent: fit.overlap_exponent.value,
        }
    }
}

impl From<&MatMulFit> for MatMulConstants {
    fn from(fit: &MatMulFit) -> MatMulConstants {
        let seconds =
            |ns: &Option<halite_profiles::profile::Quantity>| ns.as_ref().map_or(0.0, |ns| ns.value * 1e-9);
        MatMulConstants {
            compute_fraction: fit.compute_fraction.value,
            memory_fraction: fit.memory_fraction.value,
            overhead_s: fit.overhead_ns.value * 1e-9,
            wave_s: seconds(&fit.wave_ns),
            split_s: seconds(&fit.split_ns),
            overlap_exponent: fit.overlap_exponent.as_ref().map_or(1.0, |p| p.value),
        }
    }
}

impl From<&AttentionFit> for AttentionConstants {
    fn from(fit: &AttentionFit) -> AttentionConstants {
        AttentionConstants {
            memory_fraction: fit.memory_fraction.value,
            cache_fraction: fit.cache_fraction.value,
            resident_fraction: fit.resident_fraction.value,
            overhead_s: fit.overhead_ns.value * 1e-9,
            item_s: fit.item_ns.value * 1e-9,
            tile_bytes_per_s: fit.tile_bytes_per_s.value,
            split_s: fit.split_ns.value * 1e-9,
            overlap_exponent: fit.overlap_exponent.value,
        }
    }
}

/// Output tile sides of libraries for chips with caches, in elements, and the rows of the least tile of those
/// for experts and for packed weights.
const TILE_SIDES: [f64; 2] = [64.0, 128.0];
const LEAST_ROWS: f64 = 16.0;
/// Numbers of split-k parts, and the values of a block.
const SUM_SPLITS: [f64; 5] = [1.0, 2.0, 4.0, 8.0, 16.0];
const SUM_BLOCK: f64 = 64.0;
/// Positions of a block of keys, query rows of a work item, and maximum splits of the positions
/// (FlashAttention).
const KEY_BLOCK: f64 = 128.0;
const ITEM_ROWS: f64 = 64.0;
const MOST_KEY_SPLITS: i32 = 128;
/// Query rows of a work item of prefill attention (FlashAttention).
const PREFILL_ROWS: f64 = 128.0;
/// Side of the tiles that a product on scratchpads is divided by, in elements.
const SCRATCHPAD_TILE: f64 = 32.0;

/// Combines two overlapping times: their sum for exponent 1, the longer one for infinity.
fn overlap(a: f64, b: f64, exponent: f64) -> f64 {
    let (long, short) = (a.max(b), a.min(b));
    if long == 0.0 { 0.0 } else { long * (1.0 + (short / long).powf(exponent)).powf(1.0 / exponent) }
}

/// The least seconds of ways to compute while memory moves the same bytes for `memory_s`. `compute_s` has the least of the ways without
/// parts that must be added up, and of those with, which take `split_s` more: the overlapped time grows with the time of computation.
fn quickest(compute_s: [f64; 2], memory_s: f64, split_s: f64, exponent: f64) -> f64 {
    let [whole, split] = compute_s;
    let least = overlap(whole, memory_s, exponent);
    // The longer one of the two times is a bound that needs no powers.
    let may_be_less = split.max(memory_s) + split_s < least;
    if may_be_less { least.min(overlap(split, memory_s, exponent) + split_s) } else { least }
}

/// Seconds of a product of `m x k` with `k x n`.
pub fn matmul_seconds(machine: &Machine, c: &MatMulConstants, m: u64, n: u64, k: u64) -> f64 {
    c.overhead_s + grouped_seconds(machine, c, 1.0, m as f64, n as f64, k as f64)
}

/// Seconds of the feed-forward block of experts: the products of all experts run at once, gate and up as one.
pub fn experts_seconds(machine: &Machine, c: &MatMulConstants, kernel: Kernel) -> f64 {
    let Kernel::Experts { experts, rows, columns, hidden } = kernel else { return f64::NAN };
    let (experts, columns, hidden) = (experts.max(1) as f64, columns as f64, hidden as f64);
    let each = (rows as f64 / experts).ceil();
    c.overhead_s
        + grouped_seconds(machine, c, experts, each, 2.0 * hidden, columns)
        + grouped_seconds(machine, c, experts, each, columns, hidden)
}

/// Seconds of `groups` products of `m x k` with `k x n` at once, without the overhead.
fn grouped_seconds(machine: &Machine, c: &MatMulConstants, groups: f64, m: f64, n: f64, k: f64) -> f64 {
    if machine.cache.is_none() {
        return groups * scratchpad_matmul_seconds(machine, c, m, n, k);
    }
    let [activation, weight, result] = machine.stored.bytes();
    let bytes = groups * (m * k * activation + m * n * result + k * n * weight);
    let memory_s = bytes / (machine.bytes_per_s * c.memory_fraction);
    let tile_ops_per_s = machine.ops_per_s / machine.tiles * c.compute_fraction;
    let blocks = (k / SUM_BLOCK).ceil();
    let is_packed = machine.stored.weight_bits < machine.stored.activation_bits;
    let least_rows = (groups > 1.0 || is_packed).then_some(LEAST_ROWS);
    let mut compute_s = [f64::INFINITY; 2];
    for rows in TILE_SIDES.into_iter().chain(least_rows) {
        for columns in TILE_SIDES {
            let outputs = groups * (m / rows).ceil() * (n / columns).ceil();
            for splits in SUM_SPLITS.into_iter().filter(|&s| s == 1.0 || s <= blocks) {
                let waves = (outputs * splits / machine.tiles).ceil();
                let tile_ops = 2.0 * rows * columns * SUM_BLOCK * (blocks / splits).ceil();
                let least = &mut compute_s[usize::from(splits > 1.0)];
                *least = least.min(waves * (tile_ops / tile_ops_per_s + c.wave_s));
            }
        }
    }
    quickest(compute_s, memory_s, c.split_s, c.overlap_exponent)
}

/// Each of the `clusters x tiles_per_cluster` tiles owns a block of the output. Both operands are read once
/// and sent to all tiles that need them while the previous step computes; the output is written at the end. A
/// block larger than half a scratchpad is computed in parts, each of which reads the activations once.
fn scratchpad_matmul_seconds(machine: &Machine, c: &MatMulConstants, m: f64, n: f64, k: f64) -> f64 {
    let [activation, weight, result] = machine.stored.bytes();
    let tiles_of = |elements: f64, share: f64| (elements / SCRATCHPAD_TILE / share).ceil();
    let area = SCRATCHPAD_TILE * SCRATCHPAD_TILE;
    // The longer side goes over the longer side of the grid, as far as tiles fill it.
    let grid = [(machine.tiles_per_cluster, machine.clusters), (machine.clusters, machine.tiles_per_cluster)];
    let blocks = grid.map(|(down, across)| tiles_of(m, down) * tiles_of(n, across));
    let block = blocks[0].min(blocks[1]);
    let parts = (block * area * result.max(2.0) / (machine.scratchpad_bytes / 2.0)).ceil().max(1.0);
    let compute_s = 2.0 * block * area * k / (machine.ops_per_s / machine.tiles * c.compute_fraction);
    let rate = machine.bytes_per_s * c.memory_fraction;
    let read_s = (parts * m * k * activation + k * n * weight) / rate;
    compute_s.max(read_s) + m * n * result / rate
}

/// Seconds of attention of one token each for `batch` sequences of `kv_len` positions.
pub fn attention_seconds(machine: &Machine, c: &AttentionConstants, kernel: Kernel) -> f64 {
    let Kernel::Attention { batch, heads, kv_heads, head_dim, kv_len } = kernel else { return f64::NAN };
    let (bytes, _) = work(machine, kernel);
    let (cache_bytes, cache_bytes_per_s) = machine.cache.unwrap_or((0.0, machine.bytes_per_s));
    let memory_s = if bytes <= cache_bytes * c.resident_fraction {
        bytes / (cache_bytes_per_s * c.cache_fraction)
    } else {
        bytes / (machine.bytes_per_s * c.memory_fraction)
    };
    let group = (heads as f64 / kv_heads.max(1) as f64 / ITEM_ROWS).ceil();
    let items = batch as f64 * kv_heads as f64 * group;
    let block_s = 2.0 * KEY_BLOCK * head_dim as f64 * machine.stored.weight_bits / 8.0 / c.tile_bytes_per_s;
    let blocks = (kv_len as f64 / KEY_BLOCK).ceil();
    let mut compute_s = [f64::INFINITY; 2];
    for splits in (0..).map(|i| f64::from(1 << i)).take_while(|&s| s <= f64::from(MOST_KEY_SPLITS)) {
        if splits > blocks.max(1.0) {
            break;
        }
        let waves = (items * splits / machine.tiles).ceil();
        let least = &mut compute_s[usize::from(splits > 1.0)];
        *least = least.min(waves * (c.item_s + (blocks / splits).ceil() * block_s));
    }
    c.overhead_s + quickest(compute_s, memory_s, c.split_s, c.overlap_exponent)
}

/// Seconds of attention of several tokens each for `batch` sequences. Work items are blocks of query rows;
/// query heads that share a KV head share blocks. The tile with the longest item may be the last to end.
pub fn prefill_seconds(machine: &Machine, c: &PrefillConstants, kernel: Kernel) -> f64 {
    let Kernel::Prefill { batch, heads, kv_heads, head_dim, tokens, kv_len, seen } = kernel else {
        return f64::NAN;
    };
    let (bytes, _) = work(machine, kernel);
    let memory_s = bytes / (machine.bytes_per_s * c.memory_fraction);
    let group = heads as f64 / kv_heads.max(1) as f64;
    let items = batch as f64 * kv_heads as f64 * (tokens as f64 * group / PREFILL_ROWS).ceil();
    // An item also computes the half of its last block that is masked.
    let full = batch as f64 * heads as f64 * seen as f64 / (PREFILL_ROWS * KEY_BLOCK);
    let blocks = full + items / 2.0;
    let longest = (kv_len as f64 / KEY_BLOCK).ceil();
    let block_ops = 4.0 * PREFILL_ROWS * KEY_BLOCK * head_dim as f64;
    let block_s = block_ops / (machine.ops_per_s / machine.tiles * c.compute_fraction) + c.block_s;
    let items_s = (items / machine.tiles).ceil() * c.item_s;
    let compute_s = items_s + block_s * (blocks / machine.tiles).max(longest);
    c.overhead_s + overlap(compute_s, memory_s, c.overlap_exponent)
}

/// What the constants of an estimate rest on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Source {
    /// Kernels of these formats were measured; the mean relative error on shapes that were held out.
    Measured(f64),
    /// Kernels of the chip in the nearest formats were measured.
    Nearest(Formats),
    /// Nothing of the chip was measured: fractions of its peaks that are stated here.
    Assumed,
}

/// Seconds of a kernel, and what they rest on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The time.
    pub seconds: f64,
    /// The part of it that an empty kernel takes.
    pub overhead_s: f64,
    /// What the constants rest on.
    pub source: Source,
    /// The middle 80 % of measured times of the kernels that the constants were fitted to, in the regime of
    /// this one, as multiples of [`Estimate::seconds`]; of assumed constants, of the kernels of other chips.
    pub interval: Option<[f64; 2]>,
}

/// Bits per value of operands in memory, scales included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stored {
    /// Of activations.
    pub activation_bits: f64,
    /// Of weights, or of the KV cache.
    pub weight_bits: f64,
    /// Of results.
    pub result_bits: f64,
}

/// Bits of the results of products of narrow numbers.
const RESULT_BITS: f64 = 16.0;

impl Stored {
    /// Operands that are stored as they are multiplied, and results as activations; results of single numbers
    /// of fewer than 16 bits have 16, as they have no scale yet.
    pub fn of(formats: Formats) -> Stored {
        let activation_bits = formats.activations.bits();
        let is_single = formats.activations.block_len() == 1;
        let result_bits = if is_single { activation_bits.max(RESULT_BITS) } else { activation_bits };
        Stored { activation_bits, weight_bits: formats.weights.bits(), result_bits }
    }

    fn bytes(&self) -> [f64; 3] {
        [self.activation_bits / 8.0, self.weight_bits / 8.0, self.result_bits / 8.0]
    }
}

/// A table of `[calibration]`.
trait Fitted {
    fn formats(&self) -> Formats;
    fn errors(&self) -> &FitErrors;
}

macro_rules! fitted {
    ($($fit:ty),*) => {
        $(impl Fitted for $fit {
            fn formats(&self) -> Formats {
                Formats { activations: self.activations, weights: self.weights }
            }
            fn errors(&self) -> &FitErrors {
                &self.errors
            }
        })*
    };
}

fitted!(MatMulFit, AttentionFit, PrefillFit);

/// The fit of the formats, if weights are stored in theirs, or else the nearest one: by the bits of activations, and then by those of weights.
fn nearest<T: Fitted>(fits: &[T], formats: Formats, weight_bits: f64) -> Option<(&T, Source)> {
    let is_stored = formats.weights.bits() == weight_bits;
    let own = fits.iter().find(|fit| is_stored && fit.formats() == formats);
    if let Some(fit) = own {
        return Some((fit, Source::Measured(fit.errors().mean_error_fraction.value)));
    }
    let far = |a: f64, b: f64| (a / b).ln().abs();
    let distance = |fit: &T| {
        let Formats { activations, weights } = fit.formats();
        [far(activations.bits(), formats.activations.bits()), far(weights.bits(), weight_bits)]
    };
    let order = |a: [f64; 2], b: [f64; 2]| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1]));
    let fit = fits.iter().min_by(|a, b| order(distance(a), distance(b)))?;
    Some((fit, Source::Nearest(fit.formats())))
}

/// The constants of products in these formats, if they were measured.
pub fn matmul_fit(profile: &Profile, formats: Formats) -> Option<&MatMulFit> {
    let (fit, source) = nearest(&profile.calibration.as_ref()?.matmul, formats, formats.weights.bits())?;
    matches!(source, Source::Measured(_)).then_some(fit)
}

/// Constants of chips without measurements: those that seven measured chips have in common, fitted to all of them (`docs/timing-model.md`;
/// `tests/silicon.rs` fits them again).
mod assumed {
    use super::{AttentionConstants, FitRegime, Formats, MatMulConstants, Op, PrefillConstants};

    /// What constants are common to.
    #[derive(Clone, Copy)]
    pub enum Kind {
        Products,
        /// Of activations with fewer than 16 bits, which are rounded first.
        Narrow,
        Experts,
        Attention,
        Prefill,
    }

    impl Kind {
        pub fn of(op: Op, formats: Formats) -> Kind {
            match op {
                Op::MatMul if formats.activations.bits() < 16.0 => Kind::Narrow,
                Op::MatMul => Kind::Products,
                Op::Experts => Kind::Experts,
                Op::Attention => Kind::Attention,
                Op::Prefill => Kind::Prefill,
            }
        }

        /// The overhead in launches of a kernel: some have several.
        pub fn launches(self) -> f64 {
            [0.75, 4.17, 6.9, 3.0, 3.12][self as usize]
        }

        /// The middle 80 % of measured times of small kernels and of those that memory and computation bound, as multiples of predicted
        /// ones: of each generation of chips by a fit to the others.
        pub fn interval(self, regime: FitRegime) -> [f64; 2] {
            let all = [
                [[0.74, 1.34], [0.69, 1.38], [0.85, 1.34]],
                [[0.89, 1.33], [0.73, 1.47], [0.83, 1.35]],
                [[0.78, 1.44], [0.81, 1.43], [0.78, 1.44]],
                [[0.72, 1.85], [0.58, 1.69], [0.64, 1.79]],
                [[0.54, 1.54], [0.62, 1.90], [0.85, 1.34]],
            ];
            let regime = FitRegime::ALL.iter().position(|of| *of == regime).unwrap_or(0);
            all[self as usize][regime]
        }
    }

    const fn products(
        fractions: [f64; 2],
        wave_s: f64,
        split_s: f64,
        overlap_exponent: f64,
    ) -> MatMulConstants {
        let [compute_fraction, memory_fraction] = fractions;
        MatMulConstants {
            compute_fraction,
            memory_fraction,
            overhead_s: 0.0,
            wave_s,
            split_s,
            overlap_exponent,
        }
    }

    pub const PRODUCTS: MatMulConstants = products([0.828, 0.952], 0.367e-6, 2.51e-6, 1.65);
    pub const NARROW: MatMulConstants = products([0.621, 0.934], 0.41e-6, 2.39e-6, 1.58);
    pub const EXPERTS: MatMulConstants = products([0.447, 0.857], 1.36e-6, 16e-6, 1.7);
    pub const ATTENTION: AttentionConstants = AttentionConstants {
        memory_fraction: 0.902,
        cache_fraction: 0.5,
        resident_fraction: 0.0,
        overhead_s: 0.0,
        item_s: 1.71e-6,
        tile_bytes_per_s: 0.0,
        split_s: 2.3e-6,
        overlap_exponent: 1.38,
    };
    /// The rate of a tile in decode attention, as a fraction of its own memory's.
    pub const TILE_FRACTION: f64 = 0.293;
    pub const PREFILL: PrefillConstants = PrefillConstants {
        compute_fraction: 0.796,
        memory_fraction: 0.786,
        overhead_s: 0.0,
        item_s: 1.88e-6,
        block_s: 0.427e-6,
        overlap_exponent: 1.0,
    };
}

/// The interval of kernels of chips without measurements, from those of other chips: what [`Estimate::interval`] is then.
pub fn assumed_interval(op: Op, formats: Formats, regime: FitRegime) -> [f64; 2] {
    assumed::Kind::of(op, formats).interval(regime)
}

/// Operations of the vector unit to unpack a weight: shift or mask, convert, and a multiply-add with the
/// scale, which is two.
const UNPACK_OPS: f64 = 4.0;
/// Rows of results whose weights are unpacked once.
const UNPACK_ROWS: f64 = 128.0;

/// Returns the seconds in which the vector units unpack a kernel's weights, which overlap with the rest of it.
fn unpack_s(profile: &Profile, kernel: Kernel) -> f64 {
    let rates = profile.vector.rate.iter().map(|rate| profile.vector_ops_per_s(rate));
    let ops_per_s = rates.fold(0.0, f64::max);
    let weights = match kernel {
        Kernel::MatMul { m, n, k } => n as f64 * k as f64 * (m as f64 / UNPACK_ROWS).ceil(),
        Kernel::Experts { experts, rows, columns, hidden } => {
            let each = (rows as f64 / experts.max(1) as f64 / UNPACK_ROWS).ceil();
            3.0 * experts as f64 * columns as f64 * hidden as f64 * each
        }
        Kernel::Attention { .. } | Kernel::Prefill { .. } => 0.0,
    };
    weights * UNPACK_OPS / ops_per_s
}

/// The time of a kernel by itself.
///
/// # Errors
/// `Error::Argument` if the profile's matrix unit does not multiply these formats, or nothing is calibrated
/// for them.
pub fn estimate(profile: &Profile, formats: Formats, kernel: Kernel) -> Result<Estimate> {
    estimate_stored(profile, formats, Stored::of(formats), kernel)
}

/// The time of a kernel in measured formats whose operands are stored in others: with the bytes of these, and
/// otherwise as measured.
///
/// # Errors
/// As [`estimate`].
pub fn estimate_stored(
    profile: &Profile,
    formats: Formats,
    stored: Stored,
    kernel: Kernel,
) -> Result<Estimate> {
    let estimate = assume(profile, formats, stored, kernel)?;
    if matches!(estimate.source, Source::Measured(_)) {
        return Ok(estimate);
    }
    let Formats { activations, weights } = formats;
    let table = Op::of(kernel).name();
    let found = format!("profile {} without one for {activations} x {weights}", profile.name);
    Err(Error::argument("profile", format!("a [[calibration.{table}]] (`halite calibrate --fit`)"), found))
}

/// Constants of a kernel, what they rest on, and the errors of the fit.
pub struct Constants<'a, C> {
    /// The constants.
    pub values: C,
    /// What they rest on.
    pub source: Source,
    errors: Option<&'a FitErrors>,
}

/// The constants of the nearest fit, or else the assumed ones.
fn constants<'a, T: Fitted, C: From<&'a T>>(
    found: Option<(&'a T, Source)>,
    assumed: impl FnOnce() -> C,
) -> Constants<'a, C> {
    match found {
        Some((fit, source)) => Constants { values: fit.into(), source, errors: Some(fit.errors()) },
        None => Constants { values: assumed(), source: Source::Assumed, errors: None },
    }
}

/// The constants of products, or of those of experts, measured or not. Experts that were not measured take
/// those of single products.
pub fn matmul_constants(
    profile: &Profile,
    formats: Formats,
    weight_bits: f64,
    experts: bool,
) -> Constants<'_, MatMulConstants> {
    let calibration = profile.calibration.as_ref();
    let fits = |of: fn(&Calibration) -> &Vec<MatMulFit>| calibration.map_or(&[][..], |c| of(c));
    let single = || nearest(fits(|c| &c.matmul), formats, weight_bits);
    let found = if experts {
        let near = || single().map(|(fit, _)| (fit, Source::Nearest(fit.formats())));
        nearest(fits(|c| &c.experts), formats, weight_bits).or_else(near)
    } else {
        single()
    };
    let kind = assumed::Kind::of(if experts { Op::Experts } else { Op::MatMul }, formats);
    let assumed = match kind {
        assumed::Kind::Experts => assumed::EXPERTS,
        assumed::Kind::Narrow => assumed::NARROW,
        _ => assumed::PRODUCTS,
    };
    constants(found, || MatMulConstants { overhead_s: launches_s(profile, kind), ..assumed })
}

fn launches_s(profile: &Profile, kind: assumed::Kind) -> f64 {
    kind.launches() * profile.launch.kernel_ns.value * 1e-9
}

/// The time of a kernel, measured or not: by the constants of its formats, else of the chip's nearest formats,
/// else by stated fractions of the chip's peaks.
///
/// # Errors
/// `Error::Argument` if the chip does not multiply these formats.
pub fn assume(profile: &Profile, formats: Formats, stored: Stored, kernel: Kernel) -> Result<Estimate> {
    assume_on(profile, &products(profile), formats, stored, kernel)
}

/// As [`assume`], with the [`products`] of the profile.
pub(super) fn assume_on(
    profile: &Profile,
    all: &[(Formats, f64)],
    formats: Formats,
    stored: Stored,
    kernel: Kernel,
) -> Result<Estimate> {
    let machine = Machine { stored, ..Machine::of(profile, all, formats)? };
    let fits = profile.calibration.as_ref();
    let (seconds, overhead_s, source, errors) = match kernel {
        Kernel::MatMul { .. } | Kernel::Experts { .. } => {
            let experts = matches!(kernel, Kernel::Experts { .. });
            let Constants { values: c, source, errors } =
                matmul_constants(profile, formats, stored.weight_bits, experts);
            let seconds = match kernel {
                Kernel::MatMul { m, n, k } => matmul_seconds(&machine, &c, m, n, k),
                _ => experts_seconds(&machine, &c, kernel),
            };
            let is_native = all.iter().any(|(f, _)| *f == formats);
            let is_packed = !is_native || stored.weight_bits < formats.weights.bits();
            // Constants of packed weights include their unpacking.
            let is_counted = match source {
                Source::Measured(_) => true,
                Source::Nearest(f) => f.weights.bits() < f.activations.bits(),
                Source::Assumed => false,
            };
            let unpack_s = if is_packed && !is_counted { unpack_s(profile, kernel) } else { 0.0 };
            (seconds.max(c.overhead_s + unpack_s), c.overhead_s, source, errors)
        }
        Kernel::Attention { .. } => {
            let found = nearest(fits.map_or(&[][..], |c| &c.attention), formats, stored.weight_bits);
            let Constants { values: c, source, errors } =
                constants(found, || assumed_attention(profile, &machine));
            (attention_seconds(&machine, &c, kernel), c.overhead_s, source, errors)
        }
        Kernel::Prefill { .. } => {
            let found = nearest(fits.map_or(&[][..], |c| &c.prefill), formats, stored.weight_bits);
            let overhead_s = launches_s(profile, assumed::Kind::Prefill);
            let assumed = || PrefillConstants { overhead_s, ..assumed::PREFILL };
            let Constants { values: c, source, errors } = constants(found, assumed);
            (prefill_seconds(&machine, &c, kernel), c.overhead_s, source, errors)
        }
    };
    let regime = regime(&machine, kernel);
    let interval = match errors {
        Some(errors) => interval(errors, regime),
        None => Some(assumed_interval(Op::of(kernel), formats, regime)),
    };
    Ok(Estimate { seconds, overhead_s, source, interval })
}

/// The interval of a regime, or, if it was not measured, the widest.
fn interval(errors: &FitErrors, regime: FitRegime) -> Option<[f64; 2]> {
    let all = || errors.interval.iter().map(|i| (i.regime, [i.low_ratio.value, i.high_ratio.value]));
    let width = |[low, high]: [f64; 2]| high / low;
    let own = all().find(|(of, _)| *of == regime);
    own.or_else(|| all().max_by(|a, b| width(a.1).total_cmp(&width(b.1)))).map(|(_, ratios)| ratios)
}

fn assumed_attention(profile: &Profile, machine: &Machine) -> AttentionConstants {
    AttentionConstants {
        overhead_s: launches_s(profile, assumed::Kind::Attention),
        tile_bytes_per_s: assumed::TILE_FRACTION * machine.scratchpad_bytes_per_s,
        ..assumed::ATTENTION
    }
}

/// Says what an estimate assumes of a kernel that was not measured.
pub fn assumption(kernel: Kernel) -> String {
    let (compute, memory) = match kernel {
        Kernel::MatMul { .. } => {
            (Some(assumed::PRODUCTS.compute_fraction), assumed::PRODUCTS.memory_fraction)
        }
        Kernel::Experts { .. } => (Some(assumed::EXPERTS.compute_fraction), assumed::EXPERTS.memory_fraction),
        Kernel::Attention { .. } => (None, assumed::ATTENTION.memory_fraction),
        Kernel::Prefill { .. } => (Some(assumed::PREFILL.compute_fraction), assumed::PREFILL.memory_fraction),
    };
    let percent = |fraction: f64| format!("{:.0} %", 100.0 * fraction);
    let compute = compute.map_or(String::new(), |f| format!("{} of the chip's operations and ", percent(f)));
    format!("assumed to reach {compute}{} of its bandwidth", percent(memory))
}

#[cfg(test)]
mod tests {
    use super::*;
    use halite::rng::SplitMix64;

    /// Products and attention take the least of all ways to divide them, as `docs/timing-model.md` says.
    #[test]
    fn the_quickest_of_all_ways_counts() {
        let mut random = SplitMix64::new(7);
        let mut between = |from: f64, to: f64| {
            let part = (random.next() >> 11) as f64 / (1u64 << 53) as f64;
            from * (to / from).powf(part)
        };
        let mut split = [0, 0];
        for name in ["nvidia-h100", "nvidia-a100"] {
            let profile = Profile::open(name).unwrap();
            let formats = Formats { activations: Dtype::Bf16, weights: Dtype::Bf16 };
            for _ in 0..2000 {
                let machine = Machine {
                    ops_per_s: between(1e13, 1e16),
                    bytes_per_s: between(1e11, 1e13),
                    tiles: between(4.0, 1000.0).ceil(),
                    ..Machine::new(&profile, formats).unwrap()
                };
                let p = between(1.0, 20.0);
                let (m, n, k) =
                    (between(1.0, 1e5).ceil(), between(16.0, 1e5).ceil(), between(16.0, 1e5).ceil());
                let c = MatMulConstants {
                    compute_fraction: between(0.1, 1.0),
                    memory_fraction: between(0.1, 1.0),
                    overhead_s: between(1e-7, 1e-5),
                    wave_s: between(1e-9, 1e-5),
                    split_s: between(1e-9, 1e-4),
                    overlap_exponent: p,
                };
                let memory_s = 2.0 * (m * k + k * n + m * n) / (machine.bytes_per_s * c.memory_fraction);
                let mut all = Vec::new();
                for (rows, columns) in [(64.0, 64.0), (64.0, 128.0), (128.0, 64.0), (128.0, 128.0)] {
                    for s in [1.0, 2.0, 4.0, 8.0, 16.0] {
                        let blocks = (k / 64.0).ceil();
                        let waves = ((m / rows).ceil() * (n / columns).ceil() * s / machine.tiles).ceil();
                        let rate = machine.ops_per_s / machine.tiles * c.compute_fraction;
                        let one = 2.0 * rows * columns * 64.0 * (blocks / s).ceil() / rate + c.wave_s;
                        let time = overlap(waves * one, memory_s, p) + if s > 1.0 { c.split_s } else { 0.0 };
                        all.extend((s <= blocks.max(1.0)).then_some((time, s)));
                    }
                }
                let (least, s) = all.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
                split[0] += usize::from(s > 1.0);
                let got = matmul_seconds(&machine, &c, m as u64, n as u64, k as u64) - c.overhead_s;
                assert!((got / least - 1.0).abs() < 1e-9, "{m} x {n} x {k}: {got}, expected {least}");

                let c = AttentionConstants {
                    memory_fraction: between(0.1, 1.0),
                    cache_fraction: 0.5,
                    resident_fraction: 0.0,
                    overhead_s: 0.0,
                    item_s: between(1e-9, 1e-5),
                    tile_bytes_per_s: between(1e9, 1e12),
                    split_s: between(1e-9, 1e-4),
                    overlap_exponent: p,
                };
                let (batch, kv_heads) = (between(1.0, 256.0).ceil(), between(1.0, 64.0).ceil());
                let kv_len = between(1.0, 1e5).ceil();
                let kernel = Kernel::Attention {
                    batch: batch as u64,
                    heads: 8 * kv_heads as u64,
                    kv_heads: kv_heads as u64,
                    head_dim: 128,
                    kv_len: kv_len as u64,
                };
                let memory_s = work(&machine, kernel).0 / (machine.bytes_per_s * c.memory_fraction);
                let blocks = (kv_len / 128.0).ceil();
                let one = |s: f64| {
                    let waves = (batch * kv_heads * s / machine.tiles).ceil();
                    let each =
                        c.item_s + (blocks / s).ceil() * 2.0 * 128.0 * 128.0 * 2.0 / c.tile_bytes_per_s;
                    overlap(waves * each, memory_s, p) + if s > 1.0 { c.split_s } else { 0.0 }
                };
                let parts = (0..8).map(|i| f64::from(1 << i)).filter(|s| *s <= blocks);
                let (least, s) = parts.map(|s| (one(s), s)).min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
                split[1] += usize::from(s > 1.0);
                let got = attention_seconds(&machine, &c, kernel);
                assert!((got / least - 1.0).abs() < 1e-12, "{kernel:?}: {got}, expected {least}");
            }
        }
        // Both kinds of ways are the quickest often enough.
        assert!(split.iter().all(|count| (400..3600).contains(count)), "{split:?}");
    }
}
