//! Lowers ops to commands, and divides their work between tiles.
//!
//! - Products: a grid of tiles divides the rows of activations and the columns of the output. A tile converts a
//!   block of activations once, keeps it, and streams blocks of weight rows.
//! - Attention: a tile processes some tokens with the query heads of one KV head, and streams the pages. If that
//!   is too little work for all tiles, each tile processes a range of pages, and a second phase merges the
//!   partial results.
//! - All other ops: each tile processes a range of units.
//!
//! Loaded data has two slots, so that the next load overlaps with the unit's work.

mod attend;
mod experts;
mod product;
mod units;

use std::ops::Range;

use super::chip::Chip;
use super::shape::Shape;
use super::tile::{ALIGNMENT, Lowered};
use attend::{attend_closed, attend_phases};
use experts::{blocks_closed, blocks_phases, experts_closed, experts_phases};
use halite::{Error, Result};
pub use product::Tiling;
use product::{Costs, product_programs};
use units::{
    arg_max_stages, norm_stages, stage_phases, stages_closed, top_k_stages, units_closed, units_programs,
};

/// Numbers of slots for loaded data, best first. With two, a load overlaps with the unit's work.
const SLOTS: [u32; 2] = [2, 1];
/// Minimum bytes of a command.
const BLOCK_BYTES: u64 = 16 * 1024;
/// Minimum bytes of a tile's work.
const TILE_BYTES: u64 = 1024;
/// Granularity of output columns: a group of this many stays on one tile.
const COLUMNS: u32 = 16;
/// Maximum query heads that share a pass over a page.
const HEADS: u32 = halite_kernels::attention::ROWS as u32;

/// Lowers an op to commands for a chip.
///
/// # Errors
/// [`Error::Backend`] if its smallest parts do not fit the scratchpad.
pub fn lower(chip: &Chip, shape: &Shape) -> Result<Lowered> {
    let mut lowered = Lowered::default();
    match shape {
        Shape::Units(units) => lowered.phases.push(units_programs(chip, units, 0)?),
        Shape::Norm(norm) => stage_phases(chip, &norm_stages(chip, norm)?, &mut lowered)?,
        Shape::Product(product) => lowered.phases.push(product_programs(chip, product, chip.tiles)?),
        Shape::Blocks(blocks) => blocks_phases(chip, blocks, &mut lowered)?,
        Shape::Attend(attend) => attend_phases(chip, attend, &mut lowered)?,
        Shape::Experts(experts) => experts_phases(chip, experts, &mut lowered)?,
        Shape::ArgMax { rows, cols } => stage_phases(chip, &arg_max_stages(*rows, *cols), &mut lowered)?,
        Shape::TopK { rows, cols, k } => stage_phases(chip, &top_k_stages(*rows, *cols, *k), &mut lowered)?,
    }
    Ok(lowered)
}

/// An op by the closed form.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Closed {
    /// Seconds from start to end.
    pub seconds: f64,
    /// Seconds of these that the memories outside of the tiles need.
    pub memory_s: f64,
    /// Bytes of the scratchpads that the op leaves free.
    pub free_bytes: u64,
    /// What may be loaded before the op starts.
    pub ahead: Ahead,
}

/// The first weights of an op, which may be loaded while the op before it runs.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Ahead {
    /// Seconds that the op then takes less.
    pub saved_s: f64,
    /// Seconds that the memories need for the weights.
    pub memory_s: f64,
    /// Bytes in the scratchpad of a tile.
    pub bytes: u64,
}

impl Closed {
    fn new(chip: &Chip, seconds: f64, memory_s: f64, used_bytes: u64) -> Closed {
        let free_bytes = chip.scratch_bytes.saturating_sub(used_bytes);
        Closed { seconds, memory_s, free_bytes, ahead: Ahead::default() }
    }

    fn none(chip: &Chip) -> Closed {
        Closed::new(chip, 0.0, 0.0, 0)
    }

    fn after(self, seconds: f64) -> Closed {
        Closed { seconds: self.seconds + seconds, ..self }
    }

    /// This, and then other commands.
    fn then(self, next: Closed) -> Closed {
        Closed {
            seconds: self.seconds + next.seconds,
            memory_s: self.memory_s + next.memory_s,
            free_bytes: self.free_bytes.min(next.free_bytes),
            ahead: self.ahead,
        }
    }

    /// Seconds that an op takes less because its first weights are loaded while this one runs, as far as the memories have time and the
    /// scratchpads have room.
    pub fn saves_s(&self, next: &Closed) -> f64 {
        // The first weights of this one may have been loaded before it as well.
        let early_s = (self.ahead.saved_s - self.ahead.memory_s).max(0.0);
        let idle_s = (self.seconds - self.memory_s - early_s).max(0.0);
        let Ahead { saved_s, memory_s, bytes } = next.ahead;
        if saved_s <= 0.0 {
            return 0.0;
        }
        saved_s * (idle_s / memory_s).min(self.free_bytes as f64 / bytes as f64).min(1.0)
    }
}

/// Returns the time of an op by the closed form: without commands, and close to the event engine's result.
///
/// # Errors
/// As [`lower`].
pub fn closed(chip: &Chip, shape: &Shape) -> Result<Closed> {
    closed_near(chip, shape, &mut None)
}

/// As [`closed`]. `similar` is the tiling of a product on a similar chip, and then that on this one.
///
/// # Errors
/// As [`lower`].
pub fn closed_near(chip: &Chip, shape: &Shape, similar: &mut Option<Tiling>) -> Result<Closed> {
    let barrier_s = chip.barrier_s();
    let closed = match shape {
        Shape::Units(units) => units_closed(chip, units)?.after(barrier_s),
        Shape::Norm(norm) => stages_closed(chip, &norm_stages(chip, norm)?)?,
        Shape::Product(product) => Costs::new(chip, product, chip.tiles).closed(similar)?.after(barrier_s),
        Shape::Blocks(blocks) => blocks_closed(chip, blocks)?,
        Shape::Attend(attend) => attend_closed(chip, attend)?.after(barrier_s),
        Shape::Experts(experts) => experts_closed(chip, experts)?,
        Shape::ArgMax { rows, cols } => stages_closed(chip, &arg_max_stages(*rows, *cols))?,
        Shape::TopK { rows, cols, k } => stages_closed(chip, &top_k_stages(*rows, *cols, *k))?,
    };
    Ok(closed.after(chip.launch_s()))
}

fn too_small(chip: &Chip, what: &str, need_bytes: u64) -> Error {
    Error::Backend {
        backend: format!("sim:{}", chip.profile.name),
        message: format!(
            "{what} needs {need_bytes} bytes of a scratchpad, `{}` has {}",
            chip.scratchpad().name,
            chip.scratch_bytes
        ),
    }
}

fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT.into())
}

/// Part `i` of `0..n` in `parts` about equal parts, cut at multiples of `unit`.
fn share(n: u32, unit: u32, parts: u32, i: u32) -> Range<u32> {
    let units = u64::from(n.div_ceil(unit));
    let at = |i: u32| ((units * u64::from(i) / u64::from(parts)) as u32 * unit).min(n);
    at(i)..at(i + 1)
}

/// Splits a range into pieces of at most `step`.
fn blocks(range: Range<u32>, step: u32) -> impl Iterator<Item = Range<u32>> {
    let end = range.end;
    range.step_by(step.max(1) as usize).map(move |start| start..start.saturating_add(step).min(end))
}

/// A pipeline of three stages: load, compute, store. Each stage works on another block.
struct Pipeline {
    /// Number of blocks.
    count: f64,
    /// Seconds that a block takes to load at the engine's rate.
    load_s: f64,
    /// Seconds that units are busy with a block.
    units_s: [f64; 2],
    /// Seconds from there to the last result.
    drain_s: f64,
    /// Seconds that a block takes to store.
    store_s: f64,
    /// Seconds that device memory needs for all bytes of all tiles.
    device_s: f64,
    /// Seconds from a request to its first byte.
    setup_s: f64,
    /// Number of load and of store requests per block.
    requests: (f64, f64),
    /// Number of slots for loaded blocks.
    slots: f64,
    /// Seconds of loads and units that are over before a block takes its slot.
    ahead_s: f64,
    /// Seconds from block to block that other waits cause; 0 if there are none.
    least_pace_s: f64,
}

impl Pipeline {
    /// Returns the seconds of all blocks: the latency of the first one, plus the slowest stage's time for
    /// each of the others, but at least the time that device memory needs.
    fn seconds(&self, chip: &Chip) -> f64 {
        let (first_s, pace_s) = self.paces(chip);
        (first_s + (self.count - 1.0) * pace_s).max(self.device_s + 2.0 * self.setup_s)
    }

    /// Returns the seconds of the first block, and those from block to block.
    fn paces(&self, chip: &Chip) -> (f64, f64) {
        let Pipeline { count, load_s, units_s, drain_s, store_s, device_s, setup_s, requests, slots, .. } =
            *self;
        // With one request at a time, each waits for its setup, and those after the first delay a block.
        let waits = if chip.queue_entries() > 1 { 0.0 } else { setup_s };
        // With several, the queue passes at most all of them in the time of one setup.
        let requests_s = requests.0.max(requests.1) * setup_s / chip.queue_entries() as f64;
        let delay_s = |requests: f64| (requests - 1.0).max(0.0) * waits;
        let signal = chip.semaphore_s();
        let work: f64 = units_s.iter().sum::<f64>() + drain_s;
        let arrives_s = setup_s + (load_s + delay_s(requests.0)).max(device_s / count);
        let first = arrives_s + signal + work + signal + setup_s + store_s + delay_s(requests.1);
        // A slot is reused only after its block went through load and compute.
        let slot = (arrives_s + 2.0 * signal + work - self.ahead_s) / slots;
        let (load_s, store_s) = (load_s + requests.0 * waits, store_s + requests.1 * waits);
        let load_s = load_s.max(device_s / count);
        let paces = [load_s, units_s[0], units_s[1], store_s, slot, requests_s, self.least_pace_s];
        (first, paces.into_iter().fold(0.0, f64::max))
    }
}
