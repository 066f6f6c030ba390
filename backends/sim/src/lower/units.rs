//! Ops on independent units of work: rows, or runs of elements.

use std::ops::Range;

use super::{BLOCK_BYTES, Closed, Pipeline, SLOTS, TILE_BYTES, aligned, blocks, share, too_small};
use crate::chip::Chip;
use crate::places::{Amounts, Data, Traffic};
use crate::shape::{Norm, RowIndex, Rows, Units};
use crate::tile::{ALIGNMENT, Builder, Entry, Lowered, Operand, Piece, Ring, Step, TileProgram, Work};
use halite::Result;

/// The division of units between tiles and into blocks.
struct UnitsTiling {
    tiles: u32,
    /// Slots per operand.
    slots: u32,
    /// Units per command.
    block: u32,
    /// Bytes of a unit.
    each_bytes: u64,
    /// Bytes read once.
    once_bytes: u64,
}

fn is_broadcast(r: &&Rows) -> bool {
    r.index == RowIndex::Broadcast
}

fn units_tiling(chip: &Chip, units: &Units) -> Result<UnitsTiling> {
    let all = || units.reads.iter().chain(&units.writes);
    let once: u64 = all().filter(is_broadcast).map(|r| aligned(r.bytes.into())).sum();
    let sum =
        |rows: &[Rows]| -> u64 { rows.iter().filter(|r| !is_broadcast(r)).map(|r| u64::from(r.bytes)).sum() };
    let each = sum(&units.reads) + sum(&units.writes);
    // The rows that fit with a number of slots; `rounding` covers the alignment of slots.
    let rounding = 2 * u64::from(ALIGNMENT) * all().count() as u64;
    let fit = |slots: u64| chip.scratch_bytes.saturating_sub(once + rounding) / (slots * each).max(1);
    let Some(slots) = SLOTS.into_iter().find(|&slots| fit(slots.into()) > 0) else {
        return Err(too_small(chip, "one row of the op", once + rounding + each));
    };
    let total = each * u64::from(units.count);
    let tiles = u64::from(chip.tiles.min(units.count / units.pieces)).min(total.div_ceil(TILE_BYTES)) as u32;
    let block = (BLOCK_BYTES / each.max(1)).clamp(1, fit(slots.into())) as u32;
    Ok(UnitsTiling { tiles, slots, block, each_bytes: each, once_bytes: once })
}

/// Returns the time of units by the closed form.
pub fn units_closed(chip: &Chip, units: &Units) -> Result<Closed> {
    let UnitsTiling { tiles, slots, block, each_bytes, once_bytes: once } = units_tiling(chip, units)?;
    if tiles == 0 {
        return Ok(Closed::none(chip));
    }
    let per_tile = (units.count / units.pieces).div_ceil(tiles) * units.pieces;
    let block = block.min(per_tile);
    let count = f64::from(per_tile.div_ceil(block));
    // Activations may be narrower on the chip.
    let moved = |rows: &[Rows]| {
        let own = rows.iter().filter(|r| !is_broadcast(r));
        own.fold((0.0, Amounts::default()), |(each, all), r| {
            let bytes = chip.memory_bytes(&row_piece(r));
            (each + bytes, all.with(r.data, f64::from(units.count) * bytes))
        })
    };
    let ((read, read_all), (written, written_all)) = (moved(&units.reads), moved(&units.writes));
    let (reads, writes) = (f64::from(block) * read, f64::from(block) * written);
    let constants = (once * u64::from(tiles / chip.multicast(tiles))) as f64;
    let traffic = Traffic { read: read_all.with(Data::Weights, constants), written: written_all };
    let (vector_s, drain_s) = chip.compute_s(Work::Vector(units.work(block)));
    let all = units.reads.iter().chain(&units.writes);
    let setup_s = all.map(|r| chip.setup_s(&Piece::whole(r.operand, 0, 1).of(r.data))).fold(0.0, f64::max);
    let memory_s = chip.memory_s(&traffic);
    let pipeline = Pipeline {
        count,
        load_s: reads / chip.engine_bytes_per_s(),
        units_s: [vector_s, 0.0],
        drain_s,
        store_s: writes / chip.engine_bytes_per_s(),
        device_s: memory_s,
        setup_s,
        requests: (
            units.reads.iter().map(|rows| requests(rows, block)).sum(),
            units.writes.iter().map(|rows| requests(rows, block)).sum(),
        ),
        slots: f64::from(slots),
        ahead_s: 0.0,
        least_pace_s: 0.0,
    };
    let seconds = pipeline.seconds(chip) + once as f64 / chip.engine_bytes_per_s();
    Ok(Closed::new(chip, seconds, memory_s, once + u64::from(slots * block) * each_bytes))
}

/// Returns the number of requests for `count` rows.
pub fn requests(rows: &Rows, count: u32) -> f64 {
    match rows.index {
        RowIndex::Own => 1.0,
        RowIndex::Broadcast => 0.0,
        RowIndex::Gather(_) => f64::from(count),
    }
}

pub fn units_programs(chip: &Chip, units: &Units, stage: u32) -> Result<Vec<TileProgram>> {
    let UnitsTiling { tiles, slots, block, .. } = units_tiling(chip, units)?;
    let program = |tile| {
        let mut b = Builder::default();
        let mut constants = Vec::new();
        for read in units.reads.iter().filter(is_broadcast) {
            let mut ring = b.ring(1, read.bytes.into());
            constants.push(b.load(&mut ring, [Piece::whole(read.operand, 0, read.bytes)], tiles));
        }
        let rings = |b: &mut Builder, rows: &[Rows]| -> Vec<_> {
            let own = rows.iter().filter(|r| r.index != RowIndex::Broadcast);
            own.map(|r| (r.clone(), b.ring(slots, u64::from(block) * u64::from(r.bytes)))).collect()
        };
        let (mut reads, mut writes) = (rings(&mut b, &units.reads), rings(&mut b, &units.writes));
        for range in blocks(share(units.count, units.pieces, tiles, tile), block) {
            let own: Vec<Entry> = reads
                .iter_mut()
                .map(|(rows, ring)| b.load(ring, row_pieces(rows, range.clone()), 1))
                .collect();
            let count = range.end - range.start;
            let step = Step::Units { stage, first: range.start, count };
            let inputs: Vec<Entry> = own.iter().chain(&constants).copied().collect();
            let work = Work::Vector(units.work(count));
            let out: Vec<Entry> = match writes.as_mut_slice() {
                [one] => b.compute((work, step), &inputs, [filled(one, count)], &own).into(),
                [one, two] => {
                    let writes = [filled(one, count), filled(two, count)];
                    b.compute((work, step), &inputs, writes, &own).into()
                }
                _ => Vec::new(),
            };
            for (entry, (rows, _)) in out.into_iter().zip(&writes) {
                b.store(entry, row_pieces(rows, range.clone()));
            }
        }
        b.finish()
    };
    Ok((0..tiles).map(program).collect())
}

fn filled((rows, ring): &mut (Rows, Ring), count: u32) -> (&mut Ring, u64) {
    (ring, u64::from(count) * u64::from(rows.bytes))
}

fn row_piece(rows: &Rows) -> Piece {
    Piece::whole(rows.operand, 0, rows.bytes).of(rows.data)
}

/// Returns the pieces of some rows of an operand.
pub fn row_pieces(rows: &Rows, range: Range<u32>) -> Vec<Piece> {
    let at = |row: u32| u64::from(row) * u64::from(rows.bytes);
    let pieces = match &rows.index {
        RowIndex::Own => vec![Piece::whole(rows.operand, at(range.start), rows.bytes * range.len() as u32)],
        RowIndex::Broadcast => vec![Piece::whole(rows.operand, 0, rows.bytes)],
        RowIndex::Gather(list) => {
            let rows_of = list.get(range.start as usize..range.end as usize).unwrap_or(&[]);
            rows_of.iter().map(|&row| Piece::whole(rows.operand, at(row), rows.bytes)).collect()
        }
    };
    pieces.into_iter().map(|piece| piece.of(rows.data)).collect()
}

/// Returns the stages of norms: one if whole rows fit the scratchpad. Else rows are read in pieces, once for each sum that a norm needs
/// and once for its results.
pub fn norm_stages(chip: &Chip, norm: &Norm) -> Result<Vec<Units>> {
    let whole = units_tiling(chip, &norm.rows);
    let Err(error) = whole else { return Ok(vec![norm.rows.clone()]) };
    // The sixteen sums of a row take runs of sixteen elements.
    let pieces = (2..=norm.elements / 16).filter(|pieces| norm.elements.is_multiple_of(16 * pieces));
    let mut stages = pieces.map(|pieces| norm_pieces(norm, pieces));
    let fits = |stages: &Vec<Units>| stages.iter().all(|stage| units_tiling(chip, stage).is_ok());
    stages.find(fits).ok_or(error)
}

/// Returns the stages of norms in pieces. Those that sum write the sums after each piece, of which the last ones are read.
fn norm_pieces(norm: &Norm, pieces: u32) -> Vec<Units> {
    let (elements, count) = (norm.elements / pieces, norm.rows.count * pieces);
    let piece = |operand| Rows::own(operand, elements);
    let (rows, adds) = (norm.rows.count, norm.adds);
    let ends = |temp: usize| Rows {
        index: RowIndex::Gather((0..count).map(|unit| (unit / pieces + 1) * pieces - 1).collect()),
        data: Data::Partial,
        ..Rows::own(Operand::Temp(temp), SUMS)
    };
    let sums = |temp: usize| Rows { data: Data::Partial, ..Rows::own(Operand::Temp(temp), SUMS) };
    let of_rows = norm.rows.reads.iter().filter(is_broadcast).map(|all| Rows {
        bytes: 4 * elements,
        index: RowIndex::Gather((0..rows).flat_map(|_| 0..pieces).collect()),
        ..all.clone()
    });
    let (x, sum, out) = (Operand::In(0), Operand::Out(1), Operand::Out(0));
    let mut first = (vec![piece(x)], vec![sums(0)]);
    if adds {
        first.0.push(piece(Operand::In(1)));
        first.1.push(piece(sum));
    }
    let x = if adds { sum } else { x };
    let mut stages = vec![first];
    if norm.centred {
        stages.push((vec![piece(x), ends(0)], vec![sums(1)]));
    }
    let found = (0..stages.len()).map(ends);
    stages.push((std::iter::once(piece(x)).chain(found).chain(of_rows).collect(), vec![piece(out)]));
    let stage = |(reads, writes): (Vec<Rows>, Vec<Rows>)| {
        let simple = u64::from(elements) * reads.len() as u64;
        Units { count, pieces, work: [simple, 0, 1, 0, 0], reads, writes }
    };
    stages.into_iter().map(stage).collect()
}

/// Sums of the elements of a row: one for each position mod 16.
const SUMS: u32 = 16;

/// Returns the stages of an arg-max: the largest element of each run of a row, then the largest of each row.
pub fn arg_max_stages(rows: u32, cols: u32) -> [Units; 2] {
    let run = (64..=2048.min(cols)).rev().find(|run| cols.is_multiple_of(*run)).unwrap_or(cols);
    let runs = cols / run.max(1);
    let found = Operand::Temp(0);
    let stage = |count, elements: u32, from: Rows, to: Rows| Units {
        count,
        pieces: 1,
        reads: vec![from],
        writes: vec![to],
        work: [elements.into(), 0, 0, 0, 0],
    };
    [
        stage(rows * runs, run, Rows::own(Operand::In(0), run), Rows::own(found, 2)),
        stage(rows, runs, Rows::own(found, 2 * runs), Rows::own(Operand::Out(0), 1)),
    ]
}

/// Returns the time of stages by the closed form.
pub fn stages_closed(chip: &Chip, stages: &[Units]) -> Result<Closed> {
    let stage = |all: Closed, units| Ok(all.then(units_closed(chip, units)?.after(chip.barrier_s())));
    stages.iter().try_fold(Closed::none(chip), stage)
}

/// Lowers consecutive stages. Each stage but the last writes to a temporary buffer, which the next one reads.
pub fn stage_phases(chip: &Chip, stages: &[Units], lowered: &mut Lowered) -> Result<()> {
    for (number, units) in stages.iter().enumerate() {
        let is_temp = |rows: &&Rows| matches!(rows.operand, Operand::Temp(_));
        let temps = units.writes.iter().filter(is_temp);
        lowered.temps.extend(temps.map(|rows| u64::from(rows.bytes) * u64::from(units.count)));
        lowered.phases.push(units_programs(chip, units, number as u32)?);
    }
    Ok(())
}

/// Returns the stages of a top-k: a list of pairs for each run of a row, then merges of a few lists into one,
/// until one is left.
pub fn top_k_stages(rows: u32, cols: u32, k: u32) -> Vec<Units> {
    let run = (k.max(64)..=2048.min(cols)).rev().find(|run| cols.is_multiple_of(*run)).unwrap_or(cols);
    let (mut from, mut words, mut lists) = (Operand::In(0), run, cols / run.max(1));
    let mut stages = Vec::new();
    loop {
        let last = lists <= 1;
        let to = Operand::Temp(stages.len());
        let writes = match last {
            true => vec![Rows::own(Operand::Out(0), k), Rows::own(Operand::Out(1), k)],
            false => vec![Rows::own(to, 2 * k)],
        };
        let reads = vec![Rows::own(from, words)];
        stages.push(Units {
            count: rows * lists,
            pieces: 1,
            reads,
            writes,
            work: [words.into(), 0, 0, 0, 0],
        });
        if last {
            return stages;
        }
        let together = (2..=4).rev().find(|n| lists.is_multiple_of(*n)).unwrap_or(lists);
        (from, words, lists) = (to, together * 2 * k, lists / together);
    }
}
