//! The time of one kernel on a chip, from its profile and the constants of the profile's `[calibration]`.
//!
//! The profile decides between two kinds of chips. With a hardware-managed *cache*, kernels divide a product
//! into output tiles, cores process them in waves, and the formula chooses tile shapes and split-k as
//! libraries do. With *software*-managed memory, the output is divided once over all tiles, and operands
//! stream through their scratchpads.

use halite::{Error, Result};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{AttentionFit, Managed, MatMulFit, Memory, Profile};

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
    bits: (f64, f64),
}

impl Machine {
    /// Reads the formulas' numbers from a profile.
    ///
    /// # Errors
    /// `Error::Argument` if its matrix unit does not multiply these formats.
    pub fn new(profile: &Profile, formats: Formats) -> Result<Machine> {
        let Formats { activations, weights } = formats;
        let rate =
            profile.matrix.iter().flat_map(|matrix| matrix.rate.iter().map(move |rate| (matrix, rate)));
        let rate = rate.into_iter().find(|(_, r)| r.activations == activations && r.weights == weights);
        let Some((matrix, rate)) = rate else {
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
            ops_per_s: profile.matrix_ops_per_s(matrix, rate),
            bytes_per_s: profile.memory.last().map_or(f64::INFINITY, read),
            cache: cache.map(|c| (c.capacity_bytes.value * profile.instances(c.scope), read(c))),
            scratchpad_bytes: profile.memory.first().map_or(f64::INFINITY, |m| m.capacity_bytes.value),
            bits: (activations.bits(), weights.bits()),
        })
    }
}

/// Returns the minimum bytes that a kernel moves, each operand and result once, and its operations.
pub fn work(machine: &Machine, kernel: Kernel) -> (f64, f64) {
    let (activation, weight) = (machine.bits.0 / 8.0, machine.bits.1 / 8.0);
    match kernel {
        Kernel::MatMul { m, n, k } => {
            let (m, n, k) = (m as f64, n as f64, k as f64);
            ((m * k + m * n) * activation + k * n * weight, 2.0 * m * n * k)
        }
        Kernel::Attention { batch, heads, kv_heads, head_dim, kv_len } => {
            let rows = batch as f64 * head_dim as f64;
            let (keys, queries) = (rows * kv_heads as f64 * kv_len as f64, rows * heads as f64);
            (2.0 * keys * weight + 2.0 * queries * activation, 4.0 * queries * kv_len as f64)
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

/// Output tile sides of libraries for chips with caches, in elements.
const TILE_SIDES: [f64; 2] = [64.0, 128.0];
/// Numbers of split-k parts, and the values of a block.
const SUM_SPLITS: [f64; 5] = [1.0, 2.0, 4.0, 8.0, 16.0];
const SUM_BLOCK: f64 = 64.0;
/// Positions of a block of keys, query rows of a work item, and maximum splits of the positions
/// (FlashAttention).
const KEY_BLOCK: f64 = 128.0;
const ITEM_ROWS: f64 = 64.0;
const MOST_KEY_SPLITS: i32 = 128;
/// Side of the tiles that a product on scratchpads is divided by, in elements.
const SCRATCHPAD_TILE: f64 = 32.0;

/// Combines two overlapping times: their sum for exponent 1, the longer one for infinity.
fn overlap(a: f64, b: f64, exponent: f64) -> f64 {
    let (long, short) = (a.max(b), a.min(b));
    if long == 0.0 { 0.0 } else { long * (1.0 + (short / long).powf(exponent)).powf(1.0 / exponent) }
}

/// Seconds of a product of `m x k` with `k x n`.
pub fn matmul_seconds(machine: &Machine, c: &MatMulConstants, m: u64, n: u64, k: u64) -> f64 {
    let (bytes, _) = work(machine, Kernel::MatMul { m, n, k });
    let (m, n, k) = (m as f64, n as f64, k as f64);
    if machine.cache.is_none() {
        return scratchpad_matmul_seconds(machine, c, m, n, k);
    }
    let memory_s = bytes / (machine.bytes_per_s * c.memory_fraction);
    let tile_ops_per_s = machine.ops_per_s / machine.tiles * c.compute_fraction;
    let blocks = (k / SUM_BLOCK).ceil();
    let mut least = f64::INFINITY;
    for rows in TILE_SIDES {
        for columns in TILE_SIDES {
            let outputs = (m / rows).ceil() * (n / columns).ceil();
            for splits in SUM_SPLITS.into_iter().filter(|&s| s == 1.0 || s <= blocks) {
                let waves = (outputs * splits / machine.tiles).ceil();
                let tile_ops = 2.0 * rows * columns * SUM_BLOCK * (blocks / splits).ceil();
                let compute_s = waves * (tile_ops / tile_ops_per_s + c.wave_s);
                let split_s = if splits > 1.0 { c.split_s } else { 0.0 };
                least = least.min(overlap(compute_s, memory_s, c.overlap_exponent) + split_s);
            }
        }
    }
    c.overhead_s + least
}

/// Each of the `clusters x tiles_per_cluster` tiles owns a block of the output. Both operands are read once
/// and sent to all tiles that need them while the previous step computes; the output is written at the end. A
/// block larger than half a scratchpad is computed in parts, each of which reads the activations once.
fn scratchpad_matmul_seconds(machine: &Machine, c: &MatMulConstants, m: f64, n: f64, k: f64) -> f64 {
    let (activation, weight) = (machine.bits.0 / 8.0, machine.bits.1 / 8.0);
    let tiles_of = |elements: f64, share: f64| (elements / SCRATCHPAD_TILE / share).ceil();
    let area = SCRATCHPAD_TILE * SCRATCHPAD_TILE;
    // The longer side goes over the longer side of the grid, as far as tiles fill it.
    let grid = [(machine.tiles_per_cluster, machine.clusters), (machine.clusters, machine.tiles_per_cluster)];
    let blocks = grid.map(|(down, across)| tiles_of(m, down) * tiles_of(n, across));
    let block = blocks[0].min(blocks[1]);
    let parts = (block * area * activation.max(2.0) / (machine.scratchpad_bytes / 2.0)).ceil().max(1.0);
    let compute_s = 2.0 * block * area * k / (machine.ops_per_s / machine.tiles * c.compute_fraction);
    let rate = machine.bytes_per_s * c.memory_fraction;
    let read_s = (parts * m * k * activation + k * n * weight) / rate;
    c.overhead_s + compute_s.max(read_s) + m * n * activation / rate
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
    let block_s = 2.0 * KEY_BLOCK * head_dim as f64 * machine.bits.1 / 8.0 / c.tile_bytes_per_s;
    let blocks = (kv_len as f64 / KEY_BLOCK).ceil();
    let mut least = f64::INFINITY;
    for splits in (0..).map(|i| f64::from(1 << i)).take_while(|&s| s <= f64::from(MOST_KEY_SPLITS)) {
        if splits > blocks.max(1.0) {
            break;
        }
        let waves = (items * splits / machine.tiles).ceil();
        let compute_s = waves * (c.item_s + (blocks / splits).ceil() * block_s);
        let split_s = if splits > 1.0 { c.split_s } else { 0.0 };
        least = least.min(overlap(compute_s, memory_s, c.overlap_exponent) + split_s);
    }
    c.overhead_s + least
}

/// The constants of products in these formats, if they were measured.
pub fn matmul_fit(profile: &Profile, formats: Formats) -> Option<&MatMulFit> {
    let fits = profile.calibration.iter().flat_map(|c| &c.matmul);
    fits.into_iter().find(|f| f.activations == formats.activations && f.weights == formats.weights)
}

/// Seconds of a kernel, with the mean relative error of such predictions on shapes that were held out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The time.
    pub seconds: f64,
    /// Mean relative error of such times.
    pub mean_error_fraction: f64,
}

/// The time of a kernel by itself.
///
/// # Errors
/// `Error::Argument` if the profile's matrix unit does not multiply these formats, or nothing is calibrated
/// for them.
pub fn estimate(profile: &Profile, formats: Formats, kernel: Kernel) -> Result<Estimate> {
    estimate_stored(profile, formats, Stored::of(formats), kernel)
}

/// Bits per value of operands in memory, scales included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stored {
    /// Of activations and results.
    pub activation_bits: f64,
    /// Of weights, or of the KV cache.
    pub weight_bits: f64,
}

impl Stored {
    /// Operands that are stored as they are multiplied.
    pub fn of(formats: Formats) -> Stored {
        Stored { activation_bits: formats.activations.bits(), weight_bits: formats.weights.bits() }
    }
}

/// The time of a kernel in measured formats whose operands are stored in others: with the bytes of these, and
/// otherwise as measured. The time of conversions is unknown and not included.
///
/// # Errors
/// As [`estimate`].
pub fn estimate_stored(
    profile: &Profile,
    formats: Formats,
    stored: Stored,
    kernel: Kernel,
) -> Result<Estimate> {
    let mut machine = Machine::new(profile, formats)?;
    machine.bits = (stored.activation_bits, stored.weight_bits);
    let Formats { activations, weights } = formats;
    let missing = |table: &str| {
        let found = format!("profile {} without one for {activations} x {weights}", profile.name);
        Error::argument("profile", format!("a [[calibration.{table}]] (`halite calibrate --fit`)"), found)
    };
    let calibration = profile.calibration.as_ref();
    match kernel {
        Kernel::MatMul { m, n, k } => {
            let fit = matmul_fit(profile, formats).ok_or_else(|| missing("matmul"))?;
            let seconds = matmul_seconds(&machine, &fit.into(), m, n, k);
            Ok(Estimate { seconds, mean_error_fraction: fit.errors.mean_error_fraction.value })
        }
        Kernel::Attention { .. } => {
            let fits = calibration.into_iter().flat_map(|c| &c.attention);
            let fit = fits.into_iter().find(|f| f.activations == activations && f.weights == weights);
            let fit = fit.ok_or_else(|| missing("attention"))?;
            let seconds = attention_seconds(&machine, &fit.into(), kernel);
            Ok(Estimate { seconds, mean_error_fraction: fit.errors.mean_error_fraction.value })
        }
    }
}
