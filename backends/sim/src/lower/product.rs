//! Products of activations with weights.

use std::ops::Range;

use super::units::{requests, row_pieces};
use super::{COLUMNS, Pipeline, aligned, blocks, share, too_small};
use crate::chip::{Chip, Multiplication, form_bytes};
use crate::shape::{Epilogue, Part, Product, X};
use crate::tile::{Builder, Entry, Form, Piece, Ring, Step, TileProgram, VectorWork, Work};
use halite::Result;

/// The division of a product between tiles and into blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tiling {
    /// Tiles along the rows of activations, and along the columns.
    grid: (u32, u32),
    /// Rows of activations in the scratchpad of a tile.
    rows: u32,
    /// Columns of a block of the output.
    columns: u32,
}

impl Product {
    /// Returns the output columns to divide: those of all parts, or of the gate.
    pub fn columns(&self) -> u32 {
        match self.epilogue {
            Epilogue::Glu => self.parts.first().map_or(0, |p| p.n),
            _ => self.parts.iter().map(|p| p.n).sum(),
        }
    }

    /// Returns the number of products per output column.
    fn width(&self) -> u32 {
        if self.epilogue == Epilogue::Glu { 2 } else { 1 }
    }

    fn finishes(&self) -> bool {
        self.epilogue != Epilogue::None || self.parts.iter().any(|p| p.bias.is_some())
    }

    /// Splits a range of output columns into blocks: the part, and columns of that part.
    fn parts(&self, range: Range<u32>, step: u32) -> Vec<(usize, Range<u32>)> {
        if self.epilogue == Epilogue::Glu {
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

/// Costs of a product that do not depend on the tiling.
pub struct Costs<'a> {
    chip: &'a Chip,
    p: &'a Product,
    tiles: u32,
    how: Vec<Multiplication>,
    /// Forms of the activations, without duplicates.
    forms: Vec<Form>,
    /// Bytes of the longest row of a weight, as stored and as the unit reads it.
    row_bytes: (u64, u64),
    /// Average bytes of the weights per column.
    pub column_bytes: f64,
}

impl<'a> Costs<'a> {
    pub fn new(chip: &'a Chip, p: &'a Product, tiles: u32) -> Costs<'a> {
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

    /// Whether the scratchpad holds weights in a second, unpacked form.
    fn unpacks_to_memory(&self) -> bool {
        self.how.iter().any(|m| !matches!(m.w, Form::File(_)))
    }

    /// Returns the vector work of converting rows of activations to the formats of the products.
    fn converting(&self, rows: u32) -> VectorWork {
        let needed = self.how.iter().any(|m| m.converts);
        let elements = if needed { u64::from(rows) * u64::from(self.p.k) } else { 0 };
        VectorWork { quantize: elements, ..Default::default() }
    }

    /// Returns the scratchpad bytes of a tiling.
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
        let residual = if matches!(p.epilogue, Epilogue::Add(_)) { 2 * out } else { 0 };
        x + products + if p.finishes() { biases + residual + 2 * out } else { 0 }
    }

    /// Returns the seconds of a tiling by the closed form.
    fn seconds(&self, t: Tiling) -> f64 {
        let (pipeline, outside_s) = self.pipeline(t);
        pipeline.seconds(self.chip) + outside_s
    }

    /// Returns seconds that no tiling with the grid and the rows of `t` takes less than. Those of `t` are one block of all columns:
    /// blocks of fewer move as many bytes and leave no unit less to do.
    fn least_s(&self, t: Tiling) -> f64 {
        let (one, outside_s) = self.pipeline(t);
        let busy_s =
            [one.load_s, one.units_s[0], one.units_s[1], one.store_s].into_iter().fold(0.0, f64::max);
        let least_s = (one.count * busy_s).max(one.device_s + 2.0 * one.setup_s) + outside_s;
        // A sum of blocks rounds otherwise.
        least_s * (1.0 - 1e-9)
    }

    /// Returns the pipeline of a tiling, and the seconds outside of it, which do not depend on the columns of a block.
    fn pipeline(&self, t: Tiling) -> (Pipeline, f64) {
        let (chip, p) = (self.chip, self.p);
        let (grid_m, grid_n) = t.grid;
        let (m, k, width) = (f64::from(p.m), f64::from(p.k), f64::from(p.width()));
        let rows = p.m.div_ceil(grid_m);
        let passes = f64::from(rows.div_ceil(t.rows));
        let columns = (p.columns().div_ceil(COLUMNS).div_ceil(grid_n) * COLUMNS).min(p.columns());
        let (rows, block) = (t.rows.min(rows), t.columns.min(columns));
        let rate = self.how.first().map_or(0, |m| m.rate);
        let (product_s, drain_s) = chip.compute_s(Work::Matrix { rate, m: rows, n: block, k: p.k });
        let vector_s = |work: VectorWork| chip.compute_s(Work::Vector(work)).0;
        let convert_s = if self.forms.contains(&Form::F32) { 0.0 } else { vector_s(self.converting(rows)) };
        let unpacks = self.how.iter().any(|m| m.unpacks);
        let unpack_s = if unpacks { width * vector_s(unpacking(block, p.k)) } else { 0.0 };
        let finish_s = if p.finishes() { vector_s(finishing(p, rows, block)) } else { 0.0 };
        let each = chip.activation_bytes();
        let added = if matches!(p.epilogue, Epilogue::Add(_)) { each } else { 0.0 };
        let weights = passes * f64::from(grid_m) / f64::from(chip.multicast(grid_m));
        let activations = f64::from(grid_n) / f64::from(chip.multicast(grid_n));
        let all_columns = f64::from(p.columns());
        let device_bytes = each * m * k * activations
            + weights * all_columns * self.column_bytes
            + (each + added) * m * all_columns;
        let engine = chip.engine_bytes_per_s();
        let (rows, block) = (f64::from(rows), f64::from(block));
        let pipeline = Pipeline {
            count: passes * f64::from(columns.div_ceil(t.columns)),
            load_s: block * (self.column_bytes + added * rows) / engine,
            units_s: [width * product_s, unpack_s + finish_s],
            drain_s,
            store_s: each * rows * block / engine,
            device_s: device_bytes / chip.device_bytes_per_s(),
            setup_s: chip.setup_s(&Piece::whole(X, 0, 1)),
            requests: (
                width * if p.finishes() { 2.0 } else { 1.0 },
                p.out_rows.as_ref().map_or(1.0, |_| rows),
            ),
            slots: 2.0,
            least_pace_s: 0.0,
        };
        // Activations are loaded first; nothing overlaps with that.
        let waits = if chip.queue_entries() > 1 { 0.0 } else { pipeline.setup_s };
        let x_s = (each * rows * k / engine).max(each * m * k * activations / chip.device_bytes_per_s());
        let x_s = x_s + waits * requests(&p.x, rows as u32);
        let again = passes - 1.0;
        // Converted activations free their slot for the next load. Unconverted ones keep it until the last
        // product.
        let x_s = if convert_s > 0.0 { x_s } else { x_s + again * (x_s + pipeline.setup_s + drain_s) };
        (pipeline, x_s + passes * (convert_s + 2.0 * chip.semaphore_s()))
    }

    /// Returns the tiling with the shortest time by the closed form, and the time.
    pub fn tiling(&self) -> Result<(Tiling, f64)> {
        let p = self.p;
        let halves = |n: u32| std::iter::successors(Some(n.max(1)), |n| (*n > 1).then(|| n.div_ceil(2)));
        let divisors = (1..=self.tiles).filter(|n| self.tiles.is_multiple_of(*n));
        let mut grids: Vec<u32> = halves(self.tiles).chain(divisors).map(|n| n.min(p.m).max(1)).collect();
        grids.sort_unstable();
        grids.dedup();
        let mut best: Option<(f64, Tiling)> = None;
        let mut least = u64::MAX;
        for grid_m in grids.into_iter().rev() {
            let grid_n = (self.tiles / grid_m).min(p.columns().div_ceil(COLUMNS)).max(1);
            let columns = p.columns().div_ceil(COLUMNS).div_ceil(grid_n) * COLUMNS;
            let grid = (grid_m, grid_n);
            for rows in halves(p.m.div_ceil(grid_m)) {
                if best.is_some_and(|(s, _)| self.least_s(Tiling { grid, rows, columns }) >= s) {
                    continue;
                }
                for columns in halves(columns) {
                    let tiling = Tiling { grid, rows, columns };
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
        best.map(|(seconds, tiling)| (tiling, seconds)).ok_or_else(|| too_small(self.chip, &what(), least))
    }
}

/// Returns the vector work of unpacking weights: shifts, masks and a scale.
fn unpacking(rows: u32, k: u32) -> VectorWork {
    VectorWork { simple: 2 * u64::from(rows) * u64::from(k), ..Default::default() }
}

fn finishing(p: &Product, rows: u32, columns: u32) -> VectorWork {
    let each = match p.epilogue {
        Epilogue::Glu => VectorWork { simple: 4, exp: 1, divide: 1, ..Default::default() },
        _ => VectorWork { simple: 2, ..Default::default() },
    };
    each.times(u64::from(rows) * u64::from(columns))
}

pub fn product_programs(chip: &Chip, p: &Product, tiles: u32) -> Result<Vec<TileProgram>> {
    let costs = Costs::new(chip, p, tiles);
    let (tiling, _) = costs.tiling()?;
    let (grid_m, grid_n) = tiling.grid;
    let cells = (0..grid_m).flat_map(|i| (0..grid_n).map(move |j| (i, j)));
    let programs = cells.map(|(i, j)| {
        let rows = share(p.m, 1, grid_m, i);
        let columns = share(p.columns(), COLUMNS, grid_n, j);
        product_program(&costs, tiling, rows, columns)
    });
    Ok(programs.filter(|program| !program.commands.is_empty()).collect())
}

/// The rings of slots of a tile.
struct ProductRings<'a> {
    costs: &'a Costs<'a>,
    tiling: Tiling,
    /// For each product of a column: stored weights, unpacked weights, results, biases.
    weights: Vec<Ring>,
    unpacked: Vec<Ring>,
    products: Vec<Ring>,
    biases: Vec<Ring>,
    residual: Ring,
    finished: Ring,
}

/// A block of output columns of one part, with its operands in the scratchpad.
struct Block {
    part: usize,
    columns: Range<u32>,
    /// For each product, the slots that the matrix unit reads besides the activations.
    weights: Vec<Vec<Entry>>,
    addends: Vec<Entry>,
}

impl<'a> ProductRings<'a> {
    fn new(b: &mut Builder, costs: &'a Costs<'a>, t: Tiling) -> ProductRings<'a> {
        let p = costs.p;
        let columns = u64::from(t.columns);
        let out_bytes = 4 * u64::from(t.rows) * columns;
        let if_so = |so: bool, bytes: u64| if so { bytes } else { 0 };
        let mut rings = |bytes: u64| -> Vec<Ring> { (0..p.width()).map(|_| b.ring(2, bytes)).collect() };
        let weights = rings(costs.row_bytes.0 * columns);
        let unpacked = rings(if_so(costs.unpacks_to_memory(), costs.row_bytes.1 * columns));
        let products = rings(out_bytes);
        let biases = rings(if_so(p.finishes(), 4 * columns));
        let residual = b.ring(2, if_so(matches!(p.epilogue, Epilogue::Add(_)), out_bytes));
        let finished = b.ring(2, if_so(p.finishes(), out_bytes));
        ProductRings { costs, tiling: t, weights, unpacked, products, biases, residual, finished }
    }

    /// Returns the parts that are multiplied for a column of `part`: gate and up of a gated unit go together.
    fn parts(&self, part: usize) -> Range<usize> {
        if self.costs.p.epilogue == Epilogue::Glu { 0..2 } else { part..part + 1 }
    }

    /// Loads and unpacks a block's weights.
    fn prepare(&mut self, b: &mut Builder, rows: &Range<u32>, part: usize, columns: &Range<u32>) -> Block {
        let p = self.costs.p;
        let sharers = self.tiling.grid.0;
        let count = columns.end - columns.start;
        let mut block = Block { part, columns: columns.clone(), weights: Vec::new(), addends: Vec::new() };
        for (slot, i) in self.parts(part).enumerate() {
            let (part, how) = (&p.parts[i], self.costs.how[i]);
            let row = form_bytes(Form::File(part.format), 1, p.k);
            let from = part.weight.1 + u64::from(columns.start) * row;
            let piece = Piece::whole(part.weight.0, from, (u64::from(count) * row) as u32);
            let stored = b.load(&mut self.weights[slot], [piece], sharers);
            if let Some((operand, from)) = part.bias {
                let piece = Piece::whole(operand, from + 4 * u64::from(columns.start), 4 * count);
                block.addends.push(b.load(&mut self.biases[slot], [piece], sharers));
            }
            // If the unit's form is the stored one, unpacking costs time but has no output: the bits are the
            // file's.
            let (step, bytes) = match how.w {
                Form::Chip(_) => {
                    let step = Step::Unpack { rows: count, k: p.k, from: part.format, to: how.w };
                    (step, form_bytes(how.w, count, p.k))
                }
                _ => (Step::Part, 0),
            };
            let mut weight = vec![stored];
            if how.unpacks || bytes > 0 {
                let done = if bytes > 0 { std::mem::take(&mut weight) } else { Vec::new() };
                let work = if how.unpacks { unpacking(count, p.k) } else { VectorWork::default() };
                let work = Work::Vector(work);
                let to = (&mut self.unpacked[slot], bytes);
                weight.extend(b.compute((work, step), &[stored], [to], &done));
            }
            block.weights.push(weight);
        }
        if let Epilogue::Add(operand) = p.epilogue {
            let from = Part { out: operand, ..p.parts[part].clone() };
            let pieces = out_pieces(p, &from, rows.clone(), columns.clone());
            block.addends.push(b.load(&mut self.residual, pieces, 1));
        }
        block
    }

    /// Multiplies a block with the activations, applies the epilogue and stores the result. `last` frees the
    /// activations.
    fn complete(
        &mut self,
        b: &mut Builder,
        rows: &Range<u32>,
        xs: &[(Form, Entry)],
        block: Block,
        last: bool,
    ) {
        let p = self.costs.p;
        let (row_count, count) = (rows.end - rows.start, block.columns.end - block.columns.start);
        let bytes = 4 * u64::from(row_count) * u64::from(count);
        let parts = self.parts(block.part);
        let mut results = Vec::new();
        for (slot, (i, weight)) in parts.clone().zip(block.weights).enumerate() {
            let how = self.costs.how[i];
            let x = xs.iter().find(|(form, _)| *form == how.x).map(|(_, entry)| *entry);
            let reads: Vec<Entry> = x.into_iter().chain(weight.iter().copied()).collect();
            let mut frees = weight;
            if last && i + 1 == parts.end {
                frees.extend(xs.iter().map(|(_, entry)| *entry));
            }
            let work = Work::Matrix { rate: how.rate, m: row_count, n: count, k: p.k };
            let step = Step::Product { rows: row_count, columns: count, k: p.k, x: how.x, w: how.w };
            results.extend(b.compute((work, step), &reads, [(&mut self.products[slot], bytes)], &frees));
        }
        if p.finishes() {
            let biases = parts.map(|i| p.parts[i].bias.is_some()).collect();
            let reads: Vec<Entry> = results.iter().chain(&block.addends).copied().collect();
            let work = Work::Vector(finishing(p, row_count, count));
            let step = Step::Finish { columns: count, biases };
            results = b.compute((work, step), &reads, [(&mut self.finished, bytes)], &reads).into();
        }
        for entry in results {
            b.store(entry, out_pieces(p, &p.parts[block.part], rows.clone(), block.columns.clone()));
        }
    }
}

fn product_program(costs: &Costs<'_>, t: Tiling, rows: Range<u32>, columns: Range<u32>) -> TileProgram {
    let p = costs.p;
    let list = p.parts(columns, t.columns);
    let mut b = Builder::default();
    if rows.is_empty() || list.is_empty() {
        return b.finish();
    }
    let mut x_ring = b.ring(1, form_bytes(Form::F32, t.rows, p.k));
    let mut rings = ProductRings::new(&mut b, costs, t);
    let used =
        |form: Form| list.iter().flat_map(|(part, _)| rings.parts(*part)).any(|i| costs.how[i].x == form);
    let forms: Vec<Form> = costs.forms.iter().copied().filter(|&f| used(f)).collect();
    let keeps_floats = forms.contains(&Form::F32);
    let converts = forms.iter().filter(|&&f| f != Form::F32);
    let mut converted: Vec<_> = converts.map(|&f| (f, b.ring(1, form_bytes(f, t.rows, p.k)))).collect();
    for rows in blocks(rows, t.rows) {
        let row_count = rows.end - rows.start;
        let x = b.load(&mut x_ring, row_pieces(&p.x, rows.clone()), t.grid.1);
        let mut xs: Vec<(Form, Entry)> = if keeps_floats { vec![(Form::F32, x)] } else { Vec::new() };
        let conversions = converted.len();
        for (i, (form, ring)) in converted.iter_mut().enumerate() {
            let work = Work::Vector(costs.converting(row_count));
            let step = Step::Convert { rows: row_count, k: p.k, to: *form };
            let frees = if i + 1 == conversions && !keeps_floats { vec![x] } else { Vec::new() };
            let bytes = form_bytes(*form, row_count, p.k);
            let [entry] = b.compute((work, step), &[x], [(ring, bytes)], &frees);
            xs.push((*form, entry));
        }
        // The vector unit unpacks the next block before it waits for the product of this one.
        let mut waiting: Option<Block> = None;
        for (part, columns) in &list {
            let next = rings.prepare(&mut b, &rows, *part, columns);
            if let Some(block) = waiting.replace(next) {
                rings.complete(&mut b, &rows, &xs, block, false);
            }
        }
        if let Some(block) = waiting {
            rings.complete(&mut b, &rows, &xs, block, true);
        }
    }
    b.finish()
}

/// Returns the pieces of an output: some rows, and columns `range` of each.
fn out_pieces(p: &Product, part: &Part, rows: Range<u32>, range: Range<u32>) -> Vec<Piece> {
    let bytes = 4 * (range.end - range.start);
    let stride = 4 * u64::from(part.n);
    let at = |row: u32| u64::from(row) * stride + 4 * u64::from(range.start);
    match &p.out_rows {
        None => {
            let runs = rows.end - rows.start;
            vec![Piece {
                operand: part.out,
                offset: at(rows.start),
                runs,
                run_bytes: bytes,
                stride,
                activations: true,
            }]
        }
        Some(list) => {
            let rows = list.get(rows.start as usize..rows.end as usize).unwrap_or(&[]);
            rows.iter().map(|&row| Piece::whole(part.out, at(row), bytes).of_activations()).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Numerics;
    use crate::shape::Rows;
    use crate::tile::Operand;
    use halite::kernels::formats::Format;
    use halite_profiles::profile::{Driver, Profile, SHIPPED};

    fn product(m: u32, n: u32, k: u32, format: Format, epilogue: Epilogue) -> Product {
        let part = Part { n, format, weight: (X, 0), bias: None, out: Operand::Out(0) };
        let count = if epilogue == Epilogue::Glu { 2 } else { 1 };
        Product { m, k, x: Rows::own(X, k), parts: vec![part; count], epilogue, out_rows: None }
    }

    /// The tilings that are left out are none of the quickest.
    #[test]
    fn the_tiling_is_the_quickest_of_all() {
        let mut tried = 0;
        for (name, _) in SHIPPED {
            let profile = Profile::open(name).unwrap();
            if profile.driver != Driver::Sim {
                continue;
            }
            let chip = Chip::new(profile, Numerics::Exact, None).unwrap();
            for (m, n, k) in
                [(1, 4096, 4096), (7, 32000, 2048), (33, 1000, 512), (512, 11008, 4096), (640, 64, 320)]
            {
                for epilogue in [Epilogue::None, Epilogue::Glu, Epilogue::Add(Operand::In(1))] {
                    let p = product(m, n, k, Format::Q8_0, epilogue);
                    let costs = Costs::new(&chip, &p, chip.tiles);
                    let mut least = f64::INFINITY;
                    for grid_m in 1..=chip.tiles.min(m) {
                        let grid_n = (chip.tiles / grid_m).min(n.div_ceil(COLUMNS)).max(1);
                        let cell = n.div_ceil(COLUMNS).div_ceil(grid_n) * COLUMNS;
                        let all =
                            |n: u32| std::iter::successors(Some(n), |n| (*n > 1).then(|| n.div_ceil(2)));
                        let listed = chip.tiles.is_multiple_of(grid_m)
                            || all(chip.tiles).any(|tiles| tiles == grid_m)
                            || grid_m == m;
                        for rows in all(m.div_ceil(grid_m)).filter(|_| listed) {
                            let grid = (grid_m, grid_n);
                            let bound_s = costs.least_s(Tiling { grid, rows, columns: cell });
                            for columns in all(cell) {
                                let t = Tiling { grid, rows, columns };
                                assert!(bound_s <= costs.seconds(t), "{name} {m} x {n} x {k}: {t:?}");
                                if costs.scratch_bytes(t) <= chip.scratch_bytes {
                                    least = least.min(costs.seconds(t));
                                }
                            }
                        }
                    }
                    match costs.tiling() {
                        Ok((_, seconds)) => {
                            tried += 1;
                            assert_eq!(seconds, least, "{name} {m} x {n} x {k} {epilogue:?}");
                        }
                        Err(_) => assert_eq!(least, f64::INFINITY, "{name} {m} x {n} x {k}"),
                    }
                }
            }
        }
        assert!(tried > 30, "{tried}");
    }
}
