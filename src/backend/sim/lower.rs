//! Ops as commands: how work is divided between tiles, and what each tile does.
//!
//! - Products: a grid of tiles divides rows of activations and columns of the output. A tile keeps a block of activations,
//!   converted once, and streams blocks of weight rows past it.
//! - Attention: a tile takes some tokens with the query heads of one KV head and streams the pages past them. Where there are
//!   too few of these, tiles take runs of pages, and what they find is merged by a second phase.
//! - The rest: tiles take runs of units.
//!
//! Everything that is loaded has two slots, so that the next load runs while a unit works.

use std::ops::Range;

use super::chip::{Chip, Multiplication, form_bytes};
use super::shape::{After, Attend, Experts, Part, Product, Rows, Shape, Units, Which};
use super::tile::{
    ALIGNMENT, Builder, Entry, Form, Lowered, Operand, Piece, QueryRows, Ring, Step, TileProgram, VectorWork,
    Work,
};
use crate::program::PAGE_POSITIONS;
use crate::{Error, Result};

/// Slots of what is loaded: two, so that a load runs while a unit works, or one, where there is no room.
const SLOTS: [u32; 2] = [2, 1];
/// Bytes that are worth a command of their own.
const BLOCK_BYTES: u64 = 16 * 1024;
/// Bytes that are worth a tile of their own.
const TILE_BYTES: u64 = 1024;
/// Columns of an output that are not divided between tiles.
const COLUMNS: u32 = 16;
/// Most query heads that share a pass over a page.
const HEADS: u32 = halite_kernels::attention::ROWS as u32;

/// An op as commands for a chip.
///
/// # Errors
/// [`Error::Backend`] if its smallest parts do not fit the scratchpad.
pub fn lower(chip: &Chip, shape: &Shape) -> Result<Lowered> {
    let mut lowered = Lowered::default();
    match shape {
        Shape::Units(units) => lowered.phases.push(units_programs(chip, units, 0)?),
        Shape::Product(product) => lowered.phases.push(product_programs(chip, product, chip.tiles)?),
        Shape::Attend(attend) => attend_phases(chip, attend, &mut lowered)?,
        Shape::Experts(experts) => experts_phases(chip, experts, &mut lowered)?,
        Shape::TopK { rows, cols, k } => top_k_phases(chip, *rows, *cols, *k, &mut lowered)?,
        Shape::ArgMax { rows, cols } => arg_max_phases(chip, *rows, *cols, &mut lowered)?,
    }
    Ok(lowered)
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

/// A range in pieces of at most `step`.
fn blocks(range: Range<u32>, step: u32) -> impl Iterator<Item = Range<u32>> {
    let end = range.end;
    range.step_by(step.max(1) as usize).map(move |start| start..(start + step).min(end))
}

// Units

fn units_programs(chip: &Chip, units: &Units, stage: u32) -> Result<Vec<TileProgram>> {
    let all = || units.reads.iter().chain(&units.writes);
    let only = |r: &&Rows| r.which == Which::Only;
    let once: u64 = all().filter(only).map(|r| aligned(r.bytes.into())).sum();
    let each: u64 = all().filter(|r| !only(r)).map(|r| u64::from(r.bytes)).sum();
    // Rows that fit, with so many slots of each and what rounding up adds.
    let rounding = 2 * u64::from(ALIGNMENT) * all().count() as u64;
    let fit = |slots: u64| chip.scratch_bytes.saturating_sub(once + rounding) / (slots * each).max(1);
    let Some(slots) = SLOTS.into_iter().find(|&slots| fit(slots.into()) > 0) else {
        return Err(too_small(chip, "one row of the op", once + rounding + each));
    };
    let fit = fit(slots.into());
    let total = each * u64::from(units.count);
    let tiles = u64::from(chip.tiles.min(units.count)).min(total.div_ceil(TILE_BYTES)) as u32;
    let block = (BLOCK_BYTES / each.max(1)).clamp(1, fit) as u32;
    let program = |tile| {
        let mut b = Builder::default();
        let mut constants = Vec::new();
        for read in units.reads.iter().filter(only) {
            let mut ring = b.ring(1, read.bytes.into());
            constants.push(b.load(&mut ring, [Piece::whole(read.operand, 0, read.bytes)], tiles));
        }
        let rings = |b: &mut Builder, rows: &[Rows]| -> Vec<_> {
            let own = rows.iter().filter(|r| r.which != Which::Only);
            own.map(|r| (r.clone(), b.ring(slots, u64::from(block) * u64::from(r.bytes)))).collect()
        };
        let (mut reads, mut writes) = (rings(&mut b, &units.reads), rings(&mut b, &units.writes));
        for range in blocks(share(units.count, 1, tiles, tile), block) {
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

/// The pieces that rows of an operand are.
fn row_pieces(rows: &Rows, range: Range<u32>) -> Vec<Piece> {
    let at = |row: u32| u64::from(row) * u64::from(rows.bytes);
    match &rows.which {
        Which::Own => vec![Piece::whole(rows.operand, at(range.start), rows.bytes * range.len() as u32)],
        Which::Only => vec![Piece::whole(rows.operand, 0, rows.bytes)],
        Which::Listed(list) => {
            let rows_of = list.get(range.start as usize..range.end as usize).unwrap_or(&[]);
            rows_of.iter().map(|&row| Piece::whole(rows.operand, at(row), rows.bytes)).collect()
        }
    }
}

fn arg_max_phases(chip: &Chip, rows: u32, cols: u32, lowered: &mut Lowered) -> Result<()> {
    // Rows in equal runs, whose largest elements a second phase compares.
    let run = (64..=2048.min(cols)).rev().find(|run| cols.is_multiple_of(*run)).unwrap_or(cols);
    let runs = cols / run.max(1);
    let found = Operand::Temp(0);
    let stage = |count, elements: u32, from: Rows, to: Rows| Units {
        count,
        reads: vec![from],
        writes: vec![to],
        work: [elements.into(), 0, 0, 0, 0],
    };
    let first = stage(rows * runs, run, Rows::own(Operand::In(0), run), Rows::own(found, 2));
    let second = stage(rows, runs, Rows::own(found, 2 * runs), Rows::own(Operand::Out(0), 1));
    lowered.temps.push(8 * u64::from(rows) * u64::from(runs));
    lowered.phases.push(units_programs(chip, &first, 0)?);
    lowered.phases.push(units_programs(chip, &second, 1)?);
    Ok(())
}

fn top_k_phases(chip: &Chip, rows: u32, cols: u32, k: u32, lowered: &mut Lowered) -> Result<()> {
    // Rows in equal runs, each of which leaves a list of pairs; then a few lists leave one, until there is one.
    let run = (k.max(64)..=2048.min(cols)).rev().find(|run| cols.is_multiple_of(*run)).unwrap_or(cols);
    let (mut from, mut words, mut lists) = (Operand::In(0), run, cols / run.max(1));
    for stage in 0.. {
        let last = lists == 1;
        let to = Operand::Temp(lowered.temps.len());
        let writes = match last {
            true => vec![Rows::own(Operand::Out(0), k), Rows::own(Operand::Out(1), k)],
            false => vec![Rows::own(to, 2 * k)],
        };
        let (count, reads) = (rows * lists, vec![Rows::own(from, words)]);
        let units = Units { count, reads, writes, work: [words.into(), 0, 0, 0, 0] };
        lowered.phases.push(units_programs(chip, &units, stage)?);
        if last {
            break;
        }
        lowered.temps.push(8 * u64::from(rows) * u64::from(lists) * u64::from(k));
        let together = (2..=4).rev().find(|n| lists.is_multiple_of(*n)).unwrap_or(lists);
        (from, words, lists) = (to, together * 2 * k, lists / together);
    }
    Ok(())
}

// Products

/// How a product is divided.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Tiling {
    /// Tiles along rows of activations, and along columns.
    grid: (u32, u32),
    /// Rows of activations that a tile keeps.
    rows: u32,
    /// Columns of a block of weights.
    columns: u32,
}

impl Product {
    /// Columns that are divided: those of all parts, or of gates.
    fn columns(&self) -> u32 {
        match self.after {
            After::Glu => self.parts.first().map_or(0, |p| p.n),
            _ => self.parts.iter().map(|p| p.n).sum(),
        }
    }

    /// Products that a column takes.
    fn width(&self) -> u32 {
        if self.after == After::Glu { 2 } else { 1 }
    }

    fn finishes(&self) -> bool {
        self.after != After::Nothing || self.parts.iter().any(|p| p.bias.is_some())
    }

    /// Parts that columns `range` belong to, with their own columns.
    fn parts(&self, range: Range<u32>, step: u32) -> Vec<(usize, Range<u32>)> {
        if self.after == After::Glu {
            return blocks(range, step).map(|r| (0, r)).collect();
        }
        let mut first = 0;
        let mut found = Vec::new();
        for (i, part) in self.parts.iter().enumerate() {
            let here = range.start.max(first)..range.end.min(first + part.n);
            if here.start < here.end {
                found.extend(blocks(here.start - first..here.end - first, step).map(|r| (i, r)));
            }
            first += part.n;
        }
        found
    }
}

/// The numbers of a product that do not depend on how it is divided.
struct Costs<'a> {
    chip: &'a Chip,
    p: &'a Product,
    tiles: u32,
    how: Vec<Multiplication>,
    /// Forms of activations.
    forms: Vec<Form>,
    /// Bytes of the longest row of a weight, as stored and as the unit takes it.
    row_bytes: (u64, u64),
    /// Bytes of a column's weights, on average.
    column_bytes: f64,
}

impl<'a> Costs<'a> {
    fn new(chip: &'a Chip, p: &'a Product, tiles: u32) -> Costs<'a> {
        let how: Vec<_> = p.parts.iter().map(|part| chip.multiplication(part.format, p.k)).collect();
        let mut forms: Vec<Form> = Vec::new();
        for m in &how {
            if !forms.contains(&m.x) {
                forms.push(m.x);
            }
        }
        let stored = |part: &Part| form_bytes(Form::File(part.format), 1, p.k);
        let total: f64 = p.parts.iter().map(|part| stored(part) as f64 * f64::from(part.n)).sum();
        Costs {
            row_bytes: (
                p.parts.iter().map(stored).max().unwrap_or(0),
                how.iter().map(|m| form_bytes(m.w, 1, p.k)).max().unwrap_or(0),
            ),
            column_bytes: total / f64::from(p.columns().max(1)),
            chip,
            p,
            tiles,
            how,
            forms,
        }
    }

    /// Whether weights take room in another form than the stored one.
    fn unpacks_to_memory(&self) -> bool {
        self.how.iter().any(|m| !matches!(m.w, Form::File(_)))
    }

    /// Bytes of scratchpad that a tiling takes.
    fn scratch_bytes(&self, t: Tiling) -> u64 {
        let (p, rows, columns) = (self.p, t.rows, t.columns);
        let out = aligned(4 * u64::from(rows) * u64::from(columns));
        let converted = self.forms.iter().filter(|&&f| f != Form::F32);
        let x: u64 = converted.map(|&f| aligned(form_bytes(f, rows, p.k))).sum();
        let x = x + aligned(form_bytes(Form::F32, rows, p.k));
        let stored = aligned(self.row_bytes.0 * u64::from(columns));
        let unpacked =
            if self.unpacks_to_memory() { aligned(self.row_bytes.1 * u64::from(columns)) } else { 0 };
        let products = 2 * u64::from(p.width()) * (stored + unpacked + out);
        let biases = 2 * u64::from(p.width()) * aligned(4 * u64::from(columns));
        let residual = if matches!(p.after, After::Add(_)) { 2 * out } else { 0 };
        x + products + if p.finishes() { biases + residual + 2 * out } else { 0 }
    }

    /// Seconds by the closed form: the busiest resource, and what cannot overlap.
    fn seconds(&self, t: Tiling) -> f64 {
        let (chip, p) = (self.chip, self.p);
        let (grid_m, grid_n) = t.grid;
        let (m, k, width) = (f64::from(p.m), f64::from(p.k), f64::from(p.width()));
        let rows = p.m.div_ceil(grid_m);
        let passes = rows.div_ceil(t.rows);
        let columns = p.columns().div_ceil(COLUMNS).div_ceil(grid_n) * COLUMNS;
        let columns = columns.min(p.columns());
        let steps = f64::from(passes * columns.div_ceil(t.columns));
        let (rows, columns, passes) = (f64::from(rows), f64::from(columns), f64::from(passes));
        let row_count = t.rows.min(p.m.div_ceil(grid_m));
        let block = t.columns.min(p.columns());
        let rate = self.how.first().map_or(0, |m| m.rate);
        let (product_s, drain_s) = chip.compute_s(Work::Matrix { rate, m: row_count, n: block, k: p.k });
        let vector_s = |work: VectorWork| chip.compute_s(Work::Vector(work)).0;
        let elements = |rows: u32, columns: u32| u64::from(rows) * u64::from(columns);
        let convert = VectorWork { quantize: elements(row_count, p.k), ..Default::default() };
        let convert_s = if self.forms.contains(&Form::F32) { 0.0 } else { vector_s(convert) };
        let unpacks = self.how.iter().any(|m| m.unpacks);
        let unpack_s = if unpacks { width * vector_s(unpacking(block, p.k)) } else { 0.0 };
        let finish_s = if p.finishes() { vector_s(finishing(p, row_count, block)) } else { 0.0 };
        let added = if matches!(p.after, After::Add(_)) { 4.0 } else { 0.0 };
        let load_bytes = 4.0 * rows * k + passes * columns * self.column_bytes + added * rows * columns;
        let store_bytes = 4.0 * rows * columns;
        let weights = passes * f64::from(grid_m) / f64::from(chip.multicast(grid_m));
        let activations = f64::from(grid_n) / f64::from(chip.multicast(grid_n));
        let all_columns = f64::from(p.columns());
        let device_bytes = 4.0 * m * k * activations
            + weights * all_columns * self.column_bytes
            + (4.0 + added) * m * all_columns;
        let engine = chip.engine_bytes_per_s();
        let busiest = [
            steps * width * product_s,
            passes * convert_s + steps * (unpack_s + finish_s),
            load_bytes / engine,
            store_bytes / engine,
            device_bytes / chip.device_bytes_per_s(),
        ];
        let first = Piece::whole(super::shape::X, 0, 1);
        let x_s = 4.0 * f64::from(row_count) * k / engine;
        let fill_s = 2.0 * chip.setup_s(&first) + x_s + convert_s + drain_s + unpack_s + finish_s;
        busiest.into_iter().fold(0.0, f64::max) + fill_s
    }

    /// The tiling that the closed form likes best.
    fn tiling(&self) -> Result<Tiling> {
        let p = self.p;
        let halves = |n: u32| std::iter::successors(Some(n.max(1)), |n| (*n > 1).then(|| n.div_ceil(2)));
        let mut best: Option<(f64, Tiling)> = None;
        let mut least = u64::MAX;
        for grid_m in halves(p.m.min(self.tiles)) {
            let grid_n = (self.tiles / grid_m).min(p.columns().div_ceil(COLUMNS)).max(1);
            let columns = p.columns().div_ceil(COLUMNS).div_ceil(grid_n) * COLUMNS;
            for rows in halves(p.m.div_ceil(grid_m)) {
                for columns in halves(columns) {
                    let tiling = Tiling { grid: (grid_m, grid_n), rows, columns };
                    let bytes = self.scratch_bytes(tiling);
                    least = least.min(bytes);
                    if bytes > self.chip.scratch_bytes {
                        continue;
                    }
                    let seconds = self.seconds(tiling);
                    if best.is_none_or(|(s, _)| seconds < s) {
                        best = Some((seconds, tiling));
                    }
                }
            }
        }
        let what = || format!("a product with {} elements a row", p.k);
        best.map(|(_, tiling)| tiling).ok_or_else(|| too_small(self.chip, &what(), least))
    }
}

/// Shifts, masks and a scale.
fn unpacking(rows: u32, k: u32) -> VectorWork {
    VectorWork { simple: 2 * u64::from(rows) * u64::from(k), ..Default::default() }
}

fn finishing(p: &Product, rows: u32, columns: u32) -> VectorWork {
    let each = match p.after {
        After::Glu => VectorWork { simple: 4, exp: 1, divide: 1, ..Default::default() },
        _ => VectorWork { simple: 2, ..Default::default() },
    };
    each.times(u64::from(rows) * u64::from(columns))
}

fn product_programs(chip: &Chip, p: &Product, tiles: u32) -> Result<Vec<TileProgram>> {
    let costs = Costs::new(chip, p, tiles);
    let tiling = costs.tiling()?;
    let (grid_m, grid_n) = tiling.grid;
    let cells = (0..grid_m).flat_map(|i| (0..grid_n).map(move |j| (i, j)));
    let programs = cells.map(|(i, j)| {
        let rows = share(p.m, 1, grid_m, i);
        let columns = share(p.columns(), COLUMNS, grid_n, j);
        product_program(&costs, tiling, rows, columns)
    });
    Ok(programs.filter(|program| !program.commands.is_empty()).collect())
}

fn product_program(costs: &Costs<'_>, t: Tiling, rows: Range<u32>, columns: Range<u32>) -> TileProgram {
    let p = costs.p;
    let list = p.parts(columns, t.columns);
    let mut b = Builder::default();
    if rows.is_empty() || list.is_empty() {
        return b.finish();
    }
    // What columns of the output need: the parts of a gated unit go together.
    let parts = |part: usize| if p.after == After::Glu { 0..2 } else { part..part + 1 };
    let out_bytes = 4 * u64::from(t.rows) * u64::from(t.columns);
    let mut x_ring = b.ring(1, form_bytes(Form::F32, t.rows, p.k));
    let used = |form: Form| list.iter().flat_map(|(part, _)| parts(*part)).any(|i| costs.how[i].x == form);
    let forms: Vec<Form> = costs.forms.iter().copied().filter(|&f| used(f)).collect();
    let mut converted: Vec<_> = forms
        .iter()
        .filter(|&&f| f != Form::F32)
        .map(|&f| (f, b.ring(1, form_bytes(f, t.rows, p.k))))
        .collect();
    let rings =
        |b: &mut Builder, bytes: u64| -> Vec<_> { (0..p.width()).map(|_| b.ring(2, bytes)).collect() };
    let mut weights = rings(&mut b, costs.row_bytes.0 * u64::from(t.columns));
    let unpacked_bytes = if costs.unpacks_to_memory() { costs.row_bytes.1 * u64::from(t.columns) } else { 0 };
    let mut unpacked = rings(&mut b, unpacked_bytes);
    let mut products = rings(&mut b, out_bytes);
    let finish_bytes = if p.finishes() { out_bytes } else { 0 };
    let mut biases = rings(&mut b, if p.finishes() { 4 * u64::from(t.columns) } else { 0 });
    let residual_bytes = if matches!(p.after, After::Add(_)) { out_bytes } else { 0 };
    let mut residual = b.ring(2, residual_bytes);
    let mut finished = b.ring(2, finish_bytes);

    for rows in blocks(rows, t.rows) {
        let row_count = rows.end - rows.start;
        let x = b.load(&mut x_ring, row_pieces(&p.x, rows.clone()), t.grid.1);
        let keeps_floats = forms.contains(&Form::F32);
        let mut xs: Vec<(Form, Entry)> = if keeps_floats { vec![(Form::F32, x)] } else { Vec::new() };
        let conversions = converted.len();
        for (i, (form, ring)) in converted.iter_mut().enumerate() {
            let elements = u64::from(row_count) * u64::from(p.k);
            let work = Work::Vector(VectorWork { quantize: elements, ..Default::default() });
            let step = Step::Convert { rows: row_count, k: p.k, to: *form };
            let frees = if i + 1 == conversions && !keeps_floats { vec![x] } else { Vec::new() };
            let bytes = form_bytes(*form, row_count, p.k);
            let [entry] = b.compute((work, step), &[x], [(ring, bytes)], &frees);
            xs.push((*form, entry));
        }
        for (position, (first, range)) in list.iter().enumerate() {
            let last_block = position + 1 == list.len();
            let count = range.end - range.start;
            let mut results = Vec::new();
            let mut addends = Vec::new();
            for (slot, i) in parts(*first).enumerate() {
                let (part, how) = (&p.parts[i], costs.how[i]);
                let row = form_bytes(Form::File(part.format), 1, p.k);
                let from = part.weight.1 + u64::from(range.start) * row;
                let piece = Piece::whole(part.weight.0, from, (u64::from(count) * row) as u32);
                let stored = b.load(&mut weights[slot], [piece], t.grid.0);
                if let Some((operand, from)) = part.bias {
                    let piece = Piece::whole(operand, from + 4 * u64::from(range.start), 4 * count);
                    addends.push(b.load(&mut biases[slot], [piece], t.grid.0));
                }
                let work = Work::Vector(unpacking(count, p.k));
                // Of what the unit takes as it is stored, unpacking costs time but makes nothing: the bits are the file's.
                let (step, bytes) = match how.w {
                    Form::Chip(_) => {
                        let step = Step::Unpack { rows: count, k: p.k, from: part.format, to: how.w };
                        (step, form_bytes(how.w, count, p.k))
                    }
                    _ => (Step::Part, 0),
                };
                let mut weight = vec![stored];
                if how.unpacks {
                    let done = if bytes > 0 { std::mem::take(&mut weight) } else { Vec::new() };
                    let to = (&mut unpacked[slot], bytes);
                    weight.extend(b.compute((work, step), &[stored], [to], &done));
                }
                let x = xs.iter().find(|(form, _)| *form == how.x).map_or(x, |(_, entry)| *entry);
                let mut frees = weight.clone();
                if last_block && i + 1 == parts(*first).end {
                    frees.extend(xs.iter().map(|(_, entry)| *entry));
                }
                let work = Work::Matrix { rate: how.rate, m: row_count, n: count, k: p.k };
                let step = Step::Product { rows: row_count, columns: count, k: p.k, x: how.x, w: how.w };
                let reads: Vec<Entry> = std::iter::once(x).chain(weight).collect();
                let to = (&mut products[slot], 4 * u64::from(row_count) * u64::from(count));
                results.extend(b.compute((work, step), &reads, [to], &frees));
            }
            let out = &p.parts[*first];
            let to = out_pieces(p, out, rows.clone(), range.clone());
            if p.finishes() {
                let biases = parts(*first).map(|i| p.parts[i].bias.is_some()).collect();
                if let After::Add(operand) = p.after {
                    let from = Part { out: operand, ..out.clone() };
                    let pieces = out_pieces(p, &from, rows.clone(), range.clone());
                    addends.push(b.load(&mut residual, pieces, 1));
                }
                let reads: Vec<Entry> = results.iter().chain(&addends).copied().collect();
                let work = Work::Vector(finishing(p, row_count, count));
                let step = Step::Finish { columns: count, biases };
                let to = (&mut finished, 4 * u64::from(row_count) * u64::from(count));
                results = b.compute((work, step), &reads, [to], &reads).into();
            }
            for entry in results {
                b.store(entry, to.clone());
            }
        }
    }
    b.finish()
}

/// Columns `range` of rows of an output.
fn out_pieces(p: &Product, part: &Part, rows: Range<u32>, range: Range<u32>) -> Vec<Piece> {
    let bytes = 4 * (range.end - range.start);
    let stride = 4 * u64::from(part.n);
    let at = |row: u32| u64::from(row) * stride + 4 * u64::from(range.start);
    match &p.out_rows {
        None => {
            let runs = rows.end - rows.start;
            vec![Piece { operand: part.out, offset: at(rows.start), runs, run_bytes: bytes, stride }]
        }
        Some(list) => {
            let rows = list.get(rows.start as usize..rows.end as usize).unwrap_or(&[]);
            rows.iter().map(|&row| Piece::whole(part.out, at(row), bytes)).collect()
        }
    }
}

// Mixtures of experts

/// Where the operands are, besides those of [`super::shape::X`].
mod expert {
    use super::Operand;
    pub const WEIGHTS: [Operand; 3] = [Operand::In(1), Operand::In(2), Operand::In(3)];
    pub const BIASES: [Operand; 3] = [Operand::In(4), Operand::In(5), Operand::In(6)];
    pub const SHARES: Operand = Operand::In(7);
    pub const HIDDEN: Operand = Operand::Temp(0);
    pub const FOUND: Operand = Operand::Temp(1);
}

fn experts_phases(chip: &Chip, e: &Experts, lowered: &mut Lowered) -> Result<()> {
    let pairs = e.tokens * e.used;
    lowered.temps.push(4 * u64::from(pairs) * u64::from(e.hidden));
    lowered.temps.push(4 * u64::from(pairs) * u64::from(e.cols));
    let mut rows_of = vec![Vec::new(); e.experts as usize];
    for (pair, &id) in e.ids.iter().enumerate() {
        if let Some(rows) = rows_of.get_mut(id as usize) {
            rows.push(pair as u32);
        }
    }
    let chosen: Vec<(u32, &Vec<u32>)> =
        rows_of.iter().enumerate().filter(|(_, rows)| !rows.is_empty()).map(|(i, r)| (i as u32, r)).collect();
    let part = |which: usize, expert: u32, out: Operand| {
        let (n, k) = if which == 2 { (e.cols, e.hidden) } else { (e.hidden, e.cols) };
        let bytes = form_bytes(Form::File(e.formats[which]), n, k);
        let bias = e.biases.then_some((expert::BIASES[which], 4 * u64::from(expert) * u64::from(n)));
        let weight = (expert::WEIGHTS[which], u64::from(expert) * bytes);
        Part { n, format: e.formats[which], weight, bias, out }
    };
    // Experts at the same time, each with an equal share of the tiles.
    for wave in chosen.chunks(chip.tiles.max(1) as usize) {
        let tiles = chip.tiles / wave.len() as u32;
        let mut gates = Vec::new();
        let mut downs = Vec::new();
        for &(i, rows) in wave {
            let m = rows.len() as u32;
            let tokens = rows.iter().map(|pair| pair / e.used).collect();
            let listed = |operand, elements: u32, list| Rows {
                operand,
                bytes: 4 * elements,
                which: Which::Listed(list),
            };
            gates.extend(product_programs(
                chip,
                &Product {
                    m,
                    k: e.cols,
                    x: listed(super::shape::X, e.cols, tokens),
                    parts: vec![part(0, i, expert::HIDDEN), part(1, i, expert::HIDDEN)],
                    after: After::Glu,
                    out_rows: Some(rows.clone()),
                },
                tiles,
            )?);
            downs.extend(product_programs(
                chip,
                &Product {
                    m,
                    k: e.hidden,
                    x: listed(expert::HIDDEN, e.hidden, rows.clone()),
                    parts: vec![part(2, i, expert::FOUND)],
                    after: After::Nothing,
                    out_rows: Some(rows.clone()),
                },
                tiles,
            )?);
        }
        lowered.phases.extend([gates, downs]);
    }
    let sum = Units {
        count: e.tokens,
        reads: vec![Rows::own(expert::FOUND, e.used * e.cols), Rows::own(expert::SHARES, e.used)],
        writes: vec![Rows::own(Operand::Out(0), e.cols)],
        work: [u64::from(e.used) * u64::from(e.cols), 0, 0, 0, 0],
    };
    lowered.phases.push(units_programs(chip, &sum, 0)?);
    Ok(())
}

// Attention

const QUERIES: Operand = Operand::In(0);
const PAGES: Operand = Operand::In(1);
const SINKS: Operand = Operand::In(2);
const PARTIAL: Operand = Operand::Temp(0);

impl Attend {
    /// Floats that a row of queries leaves behind: values, maximum, sum.
    fn found(&self) -> u32 {
        self.value_dim + 2
    }

    /// The chunks that a token at `position` sees.
    pub fn chunks(&self, position: u32) -> Range<u32> {
        let chunks = halite_kernels::attention::chunks(position as usize, self.window);
        chunks.start as u32..chunks.end as u32
    }

    /// The chunks that any of some tokens sees.
    fn chunks_of(&self, rows: QueryRows) -> Range<u32> {
        self.chunks(rows.position).start..self.chunks(rows.position + rows.tokens.max(1) - 1).end
    }

    /// How many of some tokens see a chunk.
    fn seeing(&self, rows: QueryRows, chunk: u32) -> u32 {
        let sees = |i: &u32| self.chunks(rows.position + i).contains(&chunk);
        (0..rows.tokens).filter(sees).count() as u32
    }

    /// Bytes of so many floats for each row of queries.
    fn floats(&self, rows: QueryRows, each: u32) -> u64 {
        4 * u64::from(rows.tokens * rows.heads) * u64::from(each)
    }

    fn page_bytes(&self) -> u64 {
        self.page(0, 0).iter().map(|(_, bytes)| u64::from(*bytes)).sum()
    }

    /// Bytes of scratchpad that so many rows take, with so many slots for pages.
    fn scratch_bytes(&self, rows: u32, pages: u32) -> u64 {
        let rows = u64::from(rows);
        let floats = |each: u32| aligned(4 * rows * u64::from(each));
        floats(self.key_dim)
            + u64::from(pages) * aligned(self.page_bytes())
            + 4 * floats(PAGE_POSITIONS)
            + 4 * floats(self.found())
            + floats(self.value_dim)
            + aligned(4 * rows)
    }
}

fn attend_phases(chip: &Chip, a: &Attend, lowered: &mut Lowered) -> Result<()> {
    let group = a.heads / a.kv_heads.max(1);
    let heads = group.min(HEADS);
    let fits = |slots: u32| (1..=HEADS).rev().find(|&n| a.scratch_bytes(n, slots) <= chip.scratch_bytes);
    let Some((slots, fit)) = SLOTS.into_iter().find_map(|slots| Some((slots, fits(slots)?))) else {
        return Err(too_small(chip, "a page of the cache", a.scratch_bytes(1, 1)));
    };
    let heads = heads.min(fit);
    let head_runs: Vec<Range<u32>> =
        (0..a.kv_heads).flat_map(|h| blocks(h * group..(h + 1) * group, heads)).collect();
    let tokens: u32 = a.spans.iter().map(|(_, _, n)| n).sum();
    // Tokens together, as long as every tile has something to do.
    let spread = (tokens * head_runs.len() as u32).div_ceil(chip.tiles);
    let together = (fit / heads).min(spread).max(1);
    let mut work: Vec<(QueryRows, &[u32])> = Vec::new();
    for run in &head_runs {
        let mut first = 0;
        for (pages, start, len) in &a.spans {
            for range in blocks(0..*len, together) {
                let rows = QueryRows {
                    token: first + range.start,
                    tokens: range.end - range.start,
                    position: start + range.start,
                    head: run.start,
                    heads: run.end - run.start,
                };
                work.push((rows, pages));
            }
            first += len;
        }
    }
    let chunks: u32 = work.iter().map(|(rows, _)| a.chunks_of(*rows).len() as u32).sum();
    if 2 * work.len() as u32 > chip.tiles || chunks <= work.len() as u32 {
        let tiles = chip.tiles.min(work.len() as u32);
        let programs = (0..tiles).map(|tile| {
            let mut b = Builder::default();
            let mut rings = AttendRings::new(&mut b, a, heads * together, slots);
            for (rows, pages) in work.iter().skip(tile as usize).step_by(tiles as usize) {
                rings.whole(chip, &mut b, a, *rows, pages);
            }
            b.finish()
        });
        lowered.phases.push(programs.collect());
        return Ok(());
    }
    // Runs of chunks, then merging: what each finds goes to memory `[token][head][chunk]`.
    let most = work.iter().map(|(rows, _)| a.chunks_of(*rows).end).max().unwrap_or(0);
    lowered.temps.push(4 * u64::from(tokens * a.heads * most) * u64::from(a.found()));
    let run = chunks.div_ceil(chip.tiles).max(1);
    let mut first = Vec::new();
    for (rows, pages) in &work {
        for range in blocks(a.chunks_of(*rows), run) {
            let mut b = Builder::default();
            let mut rings = AttendRings::new(&mut b, a, heads * together, slots);
            rings.run(chip, &mut b, a, *rows, pages, range, most);
            first.push(b.finish());
        }
    }
    let second = work.iter().flat_map(|(rows, _)| (0..rows.heads).map(|h| (*rows, h)));
    let second =
        second.map(|(rows, h)| merge_program(a, QueryRows { head: rows.head + h, heads: 1, ..rows }, most));
    let second: Vec<TileProgram> = second.collect();
    for wave in [first, second] {
        for programs in wave.chunks(chip.tiles as usize) {
            lowered.phases.push(programs.to_vec());
        }
    }
    Ok(())
}

struct AttendRings {
    queries: Ring,
    sinks: Ring,
    page: Ring,
    scores: Ring,
    shares: Ring,
    found: Ring,
    state: Ring,
    out: Ring,
}

impl AttendRings {
    fn new(b: &mut Builder, a: &Attend, rows: u32, pages: u32) -> AttendRings {
        let floats = |each: u32| 4 * u64::from(rows) * u64::from(each);
        AttendRings {
            queries: b.ring(1, floats(a.key_dim)),
            sinks: b.ring(1, floats(1)),
            page: b.ring(pages, a.page_bytes()),
            scores: b.ring(2, floats(PAGE_POSITIONS)),
            shares: b.ring(2, floats(PAGE_POSITIONS)),
            found: b.ring(2, floats(a.found())),
            state: b.ring(2, floats(a.found())),
            out: b.ring(1, floats(a.value_dim)),
        }
    }

    fn load_queries(&mut self, b: &mut Builder, a: &Attend, rows: QueryRows) -> Entry {
        let row = 4 * u64::from(a.key_dim);
        let piece = Piece {
            operand: QUERIES,
            offset: (u64::from(rows.token) * u64::from(a.heads) + u64::from(rows.head)) * row,
            runs: rows.tokens,
            run_bytes: rows.heads * row as u32,
            stride: u64::from(a.heads) * row,
        };
        b.load(&mut self.queries, [piece], 1)
    }

    /// What rows find in a chunk. The last of the steps computes all of them.
    fn page(
        &mut self,
        chip: &Chip,
        b: &mut Builder,
        a: &Attend,
        (rows, queries, last): (QueryRows, Entry, bool),
        pages: &[u32],
        chunk: u32,
    ) -> Entry {
        let kv_head = rows.head / (a.heads / a.kv_heads.max(1)).max(1);
        let number = pages.get(chunk as usize).copied().unwrap_or(u32::MAX);
        let pieces = a.page(number, kv_head);
        let pieces = pieces.into_iter().map(|(offset, bytes)| Piece::whole(PAGES, offset, bytes));
        let page = b.load(&mut self.page, pieces, 1);
        let seeing = a.seeing(rows, chunk) * rows.heads;
        let positions = u64::from(PAGE_POSITIONS);
        let each = u64::from(seeing) * positions;
        let rate = chip.attention_rate();
        let score = Work::Matrix { rate, m: seeing, n: PAGE_POSITIONS, k: a.key_dim };
        let share = Work::Vector(VectorWork { simple: 3 * each, exp: each, ..Default::default() });
        let weigh = Work::Matrix { rate, m: seeing, n: a.value_dim, k: PAGE_POSITIONS };
        let table = 4 * u64::from(rows.tokens * rows.heads) * positions;
        let [scores] = b.compute((score, Step::Part), &[queries, page], [(&mut self.scores, table)], &[]);
        let [shares] = b.compute((share, Step::Part), &[scores], [(&mut self.shares, table)], &[scores]);
        let mut frees = vec![page, shares];
        frees.extend(last.then_some(queries));
        let step = Step::Page { rows, chunk };
        let found = a.floats(rows, a.found());
        b.compute((weigh, step), &[queries, page, shares], [(&mut self.found, found)], &frees)[0]
    }

    /// All chunks of some rows, merged one after the other.
    fn whole(&mut self, chip: &Chip, b: &mut Builder, a: &Attend, rows: QueryRows, pages: &[u32]) {
        let queries = self.load_queries(b, a, rows);
        let sinks = a.sinks.then(|| b.load(&mut self.sinks, [sinks(rows)], 1));
        let chunks = a.chunks_of(rows);
        let mut state: Option<Entry> = None;
        for chunk in chunks.clone() {
            let last = chunk + 1 == chunks.end;
            let found = self.page(chip, b, a, (rows, queries, last), pages, chunk);
            let step = Step::Merge { rows, chunks: chunk..chunk + 1, fresh: state.is_none(), last };
            let mut reads = vec![found];
            reads.extend(state);
            reads.extend(sinks.filter(|_| last));
            let to = match last {
                true => (&mut self.out, a.floats(rows, a.value_dim)),
                false => (&mut self.state, a.floats(rows, a.found())),
            };
            let merged = b.compute((merging(a, rows, 1), step), &reads, [to], &reads);
            state = Some(merged[0]);
        }
        if let Some(out) = state {
            b.store(out, [outputs(a, rows)]);
        }
    }

    /// Some chunks of some rows, each stored by itself.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &mut self,
        chip: &Chip,
        b: &mut Builder,
        a: &Attend,
        rows: QueryRows,
        pages: &[u32],
        chunks: Range<u32>,
        most: u32,
    ) {
        let queries = self.load_queries(b, a, rows);
        for chunk in chunks.clone() {
            let last = chunk + 1 == chunks.end;
            let found = self.page(chip, b, a, (rows, queries, last), pages, chunk);
            let pieces = (0..rows.tokens).map(|i| Piece {
                runs: rows.heads,
                run_bytes: 4 * a.found(),
                ..partial(a, rows.token + i, rows.head, chunk, most)
            });
            b.store(found, pieces);
        }
    }
}

fn sinks(rows: QueryRows) -> Piece {
    Piece::whole(SINKS, 4 * u64::from(rows.head), 4 * rows.heads)
}

fn outputs(a: &Attend, rows: QueryRows) -> Piece {
    let row = 4 * u64::from(a.value_dim);
    Piece {
        operand: Operand::Out(0),
        offset: (u64::from(rows.token) * u64::from(a.heads) + u64::from(rows.head)) * row,
        runs: rows.tokens,
        run_bytes: rows.heads * row as u32,
        stride: u64::from(a.heads) * row,
    }
}

/// What a head of a token found in a chunk, and from there on.
fn partial(a: &Attend, token: u32, head: u32, chunk: u32, most: u32) -> Piece {
    let row = 4 * u64::from(a.found());
    let before = u64::from(token) * u64::from(a.heads) + u64::from(head);
    let offset = (before * u64::from(most) + u64::from(chunk)) * row;
    Piece { operand: PARTIAL, offset, runs: 1, run_bytes: 0, stride: u64::from(most) * row }
}

fn merging(a: &Attend, rows: QueryRows, chunks: u32) -> Work {
    let each = u64::from(rows.tokens * rows.heads) * u64::from(chunks);
    let simple = 2 * each * u64::from(a.value_dim);
    Work::Vector(VectorWork { simple, exp: 2 * each, divide: each, ..Default::default() })
}

/// Chunks that are merged at a time.
const MERGED: u32 = 32;

/// The second phase, for one head.
fn merge_program(a: &Attend, rows: QueryRows, most: u32) -> TileProgram {
    let mut b = Builder::default();
    let found_bytes = 4 * u64::from(a.found());
    let mut found_ring = b.ring(2, u64::from(MERGED) * found_bytes);
    let mut state_ring = b.ring(2, found_bytes);
    let mut out_ring = b.ring(1, 4 * u64::from(a.value_dim));
    let mut sink_ring = b.ring(1, 4);
    for i in 0..rows.tokens {
        let rows = QueryRows { token: rows.token + i, tokens: 1, position: rows.position + i, ..rows };
        let sinks = a.sinks.then(|| b.load(&mut sink_ring, [sinks(rows)], 1));
        let all = a.chunks_of(rows);
        let mut state: Option<Entry> = None;
        for chunks in blocks(all.clone(), MERGED) {
            let last = chunks.end == all.end;
            let run_bytes = chunks.len() as u32 * found_bytes as u32;
            let piece = Piece { run_bytes, ..partial(a, rows.token, rows.head, chunks.start, most) };
            let found = b.load(&mut found_ring, [piece], 1);
            let mut reads = vec![found];
            reads.extend(state);
            reads.extend(sinks.filter(|_| last));
            let work = merging(a, rows, chunks.len() as u32);
            let step = Step::Merge { rows, chunks, fresh: state.is_none(), last };
            let to = match last {
                true => (&mut out_ring, a.floats(rows, a.value_dim)),
                false => (&mut state_ring, a.floats(rows, a.found())),
            };
            state = Some(b.compute((work, step), &reads, [to], &reads)[0]);
        }
        if let Some(out) = state {
            b.store(out, [outputs(a, rows)]);
        }
    }
    b.finish()
}
