//! Products of activations with weights.
//!
//! A tile computes blocks of rows and columns of the output, one after the other. It multiplies a block in chunks of `k`, whose
//! sums stay in the matrix unit until the last one. Where the scratchpad has room, one chunk has all of `k`.

use std::ops::Range;

use super::units::{requests, row_pieces};
use super::{Ahead, COLUMNS, Closed, Pipeline, aligned, blocks, share, too_small};
use crate::chip::{Chip, Multiplication, form_bytes};
use crate::places::{Amounts, Data, Traffic};
use crate::shape::{Epilogue, Part, Product, X};
use crate::tile::{Builder, Entry, Form, Piece, Ring, Step, TileProgram, VectorWork, Work};
use halite::Result;
use halite_kernels::formats::{Format, Kind};

/// The division of a product between tiles and into blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tiling {
    /// Tiles along the rows of activations, and along the columns.
    grid: (u32, u32),
    /// Maximum number of weights of which a tile multiplies columns.
    parts: u32,
    /// Rows of activations in the scratchpad of a tile.
    rows: u32,
    /// Columns of a block of the output.
    columns: u32,
    /// How a block is multiplied.
    cut: Cut,
}

/// The chunks in which the sums of a product are computed.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cut {
    /// Elements of a chunk; the last one may be shorter.
    depth: u32,
    /// Number of chunks.
    chunks: u32,
    /// Whether the scratchpad keeps all chunks of activations. If not, each block of columns loads them again.
    keeps: bool,
    /// Bytes of a row of a weight in a chunk, as stored and as the unit reads it: the longest of all weights.
    row_bytes: (u64, u64),
}

impl Cut {
    /// Slots for results and for what is added to them. The next results come many chunks later, if there are several.
    fn out_slots(self) -> u32 {
        if self.chunks == 1 { 2 } else { 1 }
    }

    /// Slots for chunks of activations.
    fn x_slots(self) -> u32 {
        if self.keeps { self.chunks } else { 2 }
    }
}

/// Maximum number of chunks.
const MOST_CHUNKS: u32 = 64;

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

    /// Returns the parts that are multiplied for a column of `part`: gate and up of a gated unit go together.
    fn together(&self, part: usize) -> Range<usize> {
        if self.epilogue == Epilogue::Glu { 0..2 } else { part..part + 1 }
    }

    fn finishes(&self) -> bool {
        self.epilogue != Epilogue::None || self.parts.iter().any(|p| p.bias.is_some())
    }

    /// Returns the number of parts of which a range has output columns.
    fn parts_in(&self, range: Range<u32>) -> u32 {
        if self.epilogue == Epilogue::Glu {
            return 1;
        }
        let mut first = 0;
        let is_in = self.parts.iter().map(|part| {
            let here = range.start.max(first)..range.end.min(first + part.n);
            first += part.n;
            u32::from(here.start < here.end)
        });
        is_in.sum()
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
    /// The ways to cut `k`; the first one has a single chunk.
    cuts: Vec<Cut>,
    /// Average bytes of the weights per column.
    column_bytes: f64,
    /// Whether the vector unit unpacks weights.
    unpacks: bool,
    /// Whether the scratchpad holds weights in a second, unpacked form.
    unpacks_to_memory: bool,
    /// Whether the vector unit converts activations for some of the weights.
    converts: bool,
    /// Whether products read unconverted activations.
    keeps_floats: bool,
    /// The rate of the matrix unit.
    rate: usize,
    /// Bytes of an activation in device memory.
    activation_bytes: f64,
    /// The rate of an engine.
    engine_bytes_per_s: f64,
    /// Share of the memories' rates that these tiles have.
    device_share: f64,
    /// Seconds from a request of one run to its first byte.
    setup_s: f64,
    /// Seconds from block to block at least, of blocks without work.
    least_pace_s: f64,
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
        let stored = |part: &Part| form_bytes(chip.stored(part.format), 1, p.k);
        let total: f64 = p.parts.iter().map(|part| stored(part) as f64 * f64::from(part.n)).sum();
        let setup_s = chip.setup_s(&Piece::whole(X, 0, 1));
        let requests_s = f64::from(p.width()) * setup_s / chip.queue_entries() as f64;
        Costs {
            unpacks: how.iter().any(|m| m.unpacks),
            unpacks_to_memory: how.iter().any(|m| !matches!(m.w, Form::File(_) | Form::Packed(_))),
            converts: how.iter().any(|m| m.converts),
            keeps_floats: forms.contains(&Form::F32),
            rate: how.first().map_or(0, |m| m.rate),
            activation_bytes: chip.activation_bytes(),
            engine_bytes_per_s: chip.engine_bytes_per_s(),
            device_share: f64::from(tiles) / f64::from(chip.tiles),
            setup_s,
            // A block takes one of two slots until its load and its work have ended.
            least_pace_s: requests_s.max(setup_s / 2.0 + chip.semaphore_s()),
            cuts: cuts(chip, p, &how),
            column_bytes: total / f64::from(p.columns().max(1)),
            chip,
            p,
            tiles,
            how,
            forms,
        }
    }

    /// Returns the vector work of converting `k` elements of rows of activations to the formats of the products.
    fn converting(&self, rows: u32, k: u32) -> VectorWork {
        let elements = if self.converts { u64::from(rows) * u64::from(k) } else { 0 };
        VectorWork { quantize: elements, ..Default::default() }
    }

    /// Slots for chunks of unconverted activations.
    fn float_slots(&self, cut: Cut) -> u32 {
        if self.keeps_floats { cut.x_slots() } else { cut.chunks.min(2) }
    }

    /// Returns the bytes of a block's sums that stay in the scratchpad between chunks: none, or those of one product.
    fn sums_bytes(&self, t: Tiling) -> u64 {
        let bytes = 4 * u64::from(t.rows) * u64::from(t.columns);
        let kept = t.cut.chunks == 1 || self.chip.keeps_sums(u64::from(self.p.width()) * bytes);
        if kept { 0 } else { bytes }
    }

    /// Returns the scratchpad bytes of a tiling.
    fn scratch_bytes(&self, t: Tiling) -> u64 {
        let (p, rows, columns, cut) = (self.p, t.rows, t.columns, t.cut);
        let out = aligned(4 * u64::from(rows) * u64::from(columns));
        let converted = self.forms.iter().filter(|&&f| f != Form::F32);
        let x: u64 = converted.map(|&f| aligned(form_bytes(f, rows, cut.depth))).sum();
        let floats = u64::from(self.float_slots(cut)) * aligned(form_bytes(Form::F32, rows, cut.depth));
        let x = u64::from(cut.x_slots()) * x + floats;
        let stored = aligned(cut.row_bytes.0 * u64::from(columns));
        let unpacked = if self.unpacks_to_memory { aligned(cut.row_bytes.1 * u64::from(columns)) } else { 0 };
        let sums = u64::from(p.width()) * aligned(self.sums_bytes(t));
        let biases = u64::from(p.width()) * aligned(4 * u64::from(columns));
        let residual = if matches!(p.epilogue, Epilogue::Add(_)) { out } else { 0 };
        let finishes = if p.finishes() { biases + residual + out } else { 0 };
        let outs = u64::from(cut.out_slots()) * (u64::from(p.width()) * out + finishes);
        x + 2 * u64::from(p.width()) * (stored + unpacked) + outs + sums
    }

    /// Returns the blocks of the columns of a tile. They end where a weight ends; that counts for activations that are loaded for each.
    fn column_blocks(&self, t: Tiling, columns: u32) -> u32 {
        let blocks = columns.div_ceil(t.columns).max(1);
        if t.cut.keeps { blocks } else { blocks + t.parts - 1 }
    }

    /// Returns the most columns of a tile.
    fn tile_columns(&self, t: Tiling) -> u32 {
        let columns = self.p.columns();
        (columns.div_ceil(COLUMNS).div_ceil(t.grid.1) * COLUMNS).min(columns)
    }

    /// Returns the bytes of weights that all tiles load.
    fn weights_bytes(&self, t: Tiling) -> f64 {
        let (p, (grid_m, _)) = (self.p, t.grid);
        let passes = f64::from(p.m.div_ceil(grid_m).div_ceil(t.rows));
        passes * copies(self.chip, grid_m) * self.column_bytes * f64::from(p.columns())
    }

    /// Returns the seconds that device memory needs for these.
    fn weights_s(&self, t: Tiling) -> f64 {
        let read = Amounts::default().with(Data::Weights, self.weights_bytes(t));
        self.chip.memory_s(&Traffic { read, ..Traffic::default() }) / self.device_share
    }

    /// Returns the seconds that device memory needs for the activations of all tiles, loaded once, and for everything else. Tiles have
    /// an equal share of its rate.
    fn device_s(&self, t: Tiling) -> [f64; 2] {
        let (chip, p, (_, grid_n)) = (self.chip, self.p, t.grid);
        let (m, columns, each) = (f64::from(p.m), f64::from(p.columns()), self.activation_bytes);
        let none = Amounts::default();
        let added = if matches!(p.epilogue, Epilogue::Add(_)) { 1.0 } else { 0.0 };
        let results = columns * each * m;
        let x = none.with(Data::Activations, copies(chip, grid_n) * each * m * f64::from(p.k));
        let rest = none.with(Data::Weights, self.weights_bytes(t)).with(Data::Activations, added * results);
        let moved = [
            Traffic { read: x, written: none },
            Traffic { read: rest, written: none.with(Data::Activations, results) },
        ];
        moved.map(|traffic| chip.memory_s(&traffic) / self.device_share)
    }

    /// Returns the seconds of a tiling by the closed form.
    fn seconds(&self, t: Tiling, floor: &Floor) -> f64 {
        let (chip, p, cut, rate) = (self.chip, self.p, t.cut, self.rate);
        let width = f64::from(p.width());
        let Floor { rows, columns, passes, .. } = *floor;
        let blocks = self.column_blocks(t, columns);
        let block = t.columns.min(columns.div_ceil(blocks));
        let (blocks, chunks) = (f64::from(blocks), f64::from(cut.chunks));
        // The first chunk does not read sums, and the last one does not write them.
        let sums_bytes = self.sums_bytes(t) * u64::from(2 * cut.chunks - 2) / u64::from(cut.chunks);
        let work = Work::Matrix { rate, m: rows, n: block, k: cut.depth, sums_bytes, sparse: chip.sparse };
        let (product_s, drain_s) = chip.compute_s(work);
        let vector_s = |work: VectorWork| chip.compute_s(Work::Vector(work)).0;
        let converts = !self.keeps_floats;
        let convert_s = if converts { vector_s(self.converting(rows, cut.depth)) } else { 0.0 };
        let unpack_s = if self.unpacks { width * vector_s(unpacking(block, cut.depth)) } else { 0.0 };
        let finish_s = if p.finishes() { vector_s(finishing(p, rows, block)) } else { 0.0 };
        let each = self.activation_bytes;
        let added = if matches!(p.epilogue, Epilogue::Add(_)) { each } else { 0.0 };
        let [x_device_s, rest_device_s] = floor.device_s;
        let x_device_s = if cut.keeps { x_device_s } else { blocks * x_device_s };
        let engine = self.engine_bytes_per_s;
        // Chunks of weights and activations are runs within rows.
        let run = |runs: u32, bytes: f64, whole: Piece| match cut.chunks {
            1 => whole,
            _ => Piece { runs, run_bytes: bytes as u32, ..whole },
        };
        let weight = run(block, self.column_bytes / width / chunks, Piece::whole(X, 0, 1));
        let x = run(rows, 4.0 * f64::from(cut.depth), Piece::whole(X, 0, 4).of(Data::Activations));
        let slowed = |piece: &Piece| match cut.chunks {
            1 => 1.0,
            _ => chip.slowed(piece),
        };
        let finishing_requests = if p.finishes() { width / chunks } else { 0.0 };
        let (rows, block) = (f64::from(rows), f64::from(block));
        let store_s = each * rows * block / engine;
        let pipeline = Pipeline {
            count: passes * blocks * chunks,
            load_s: block * (self.column_bytes * slowed(&weight) + added * rows) / chunks / engine,
            units_s: [width * product_s, unpack_s + finish_s / chunks],
            drain_s,
            store_s: store_s / chunks,
            device_s: x_device_s + rest_device_s,
            setup_s: chip.setup_s(&weight),
            requests: (width + finishing_requests, p.out_rows.as_ref().map_or(1.0, |_| rows) / chunks),
            slots: 2.0,
            ahead_s: 0.0,
            // With one slot for results, the next ones wait until these are stored.
            least_pace_s: match cut.chunks {
                1 => 0.0,
                _ => (product_s + drain_s + finish_s + store_s + 3.0 * chip.semaphore_s()) / chunks,
            },
        };
        let waits = if chip.queue_entries() > 1 { 0.0 } else { pipeline.setup_s };
        if cut.chunks == 1 {
            // Activations are loaded first; nothing overlaps with that.
            let x_s = floor.x_s.max(x_device_s) + waits * requests(&p.x, rows as u32);
            let again = passes - 1.0;
            // Converted activations free their slot for the next load. Unconverted ones keep it until the last
            // product.
            let x_s = if convert_s > 0.0 { x_s } else { x_s + again * (x_s + pipeline.setup_s + drain_s) };
            return pipeline.seconds(chip) + x_s + passes * (convert_s + 2.0 * chip.semaphore_s());
        }
        // Some chunks come with their activations, and others find them in the scratchpad.
        let with = passes * chunks * if cut.keeps { 1.0 } else { blocks };
        let without = pipeline.count - with;
        let device_s = |count: f64| rest_device_s * count / pipeline.count;
        // Tiles load activations at about the same time, and then weights.
        let x_s = (each * rows * f64::from(cut.depth) * slowed(&x) / engine).max(x_device_s / with);
        // Gate and up have slots of their own.
        let apart_s = (1.0 - 1.0 / width) * (pipeline.load_s + width * product_s + unpack_s);
        let first = Pipeline {
            count: with,
            load_s: pipeline.load_s.max(device_s(1.0)) + x_s,
            units_s: [pipeline.units_s[0], pipeline.units_s[1] + convert_s],
            // Converted activations free their slot for the next load before the product.
            ahead_s: apart_s + if converts { x_s + convert_s } else { 0.0 },
            device_s: device_s(with) + x_device_s,
            setup_s: pipeline.setup_s.max(chip.setup_s(&x)),
            requests: (pipeline.requests.0 + requests(&p.x, rows as u32), pipeline.requests.1),
            ..pipeline
        };
        let rest = Pipeline { count: without, device_s: device_s(without), ahead_s: apart_s, ..pipeline };
        let rest_s = if without > 0.0 { without * rest.paces(chip).1 } else { 0.0 };
        // The last block ends as a whole.
        first.seconds(chip) + rest_s + (1.0 - 1.0 / chunks) * (finish_s + store_s)
    }

    /// Returns the time of the best tiling, and what of it may be loaded ahead: the weights of the first two chunks.
    /// `similar` is the tiling on a similar chip, and then that on this one.
    pub fn closed(&self, similar: &mut Option<Tiling>) -> Result<Closed> {
        let (t, seconds) = self.tiling_near(*similar)?;
        *similar = Some(t);
        let (chip, floor) = (self.chip, self.floor(t));
        let [x_device_s, rest_device_s] = floor.device_s;
        let closed = Closed::new(chip, seconds, x_device_s + rest_device_s, self.scratch_bytes(t));
        let chunks = floor.passes * f64::from(self.column_blocks(t, floor.columns)) * f64::from(t.cut.chunks);
        let loaded = chunks.min(2.0);
        let memory_s = self.weights_s(t) * loaded / chunks;
        let load_s = (floor.passes * floor.loads_s / chunks).max(memory_s / loaded);
        let work_s = floor.units_s[0].max(floor.units_s[1]) / chunks;
        // What multiplies the first chunk starts earlier by its load, and what loads the others by both, less the work that it waits for.
        let device_s = x_device_s + rest_device_s - memory_s;
        let least_s = floor.units_s[0].max(floor.units_s[1]).max(device_s);
        let saved_s = load_s.max(loaded * load_s - work_s).min((seconds - least_s).max(0.0));
        let bytes = u64::from(self.p.width()) * 2 * aligned(t.cut.row_bytes.0 * u64::from(t.columns));
        Ok(Closed { ahead: Ahead { saved_s, memory_s, bytes }, ..closed })
    }

    /// Returns what bounds the seconds of the tilings of a grid and of a number of rows, however columns and `k` are cut.
    fn floor(&self, t: Tiling) -> Floor {
        let (chip, p) = (self.chip, self.p);
        let rows = p.m.div_ceil(t.grid.0);
        let passes = f64::from(rows.div_ceil(t.rows));
        let (m, n, width, rate) = (t.rows.min(rows), self.tile_columns(t), f64::from(p.width()), self.rate);
        let work = Work::Matrix { rate, m, n, k: p.k, sums_bytes: 0, sparse: chip.sparse };
        let products_s = chip.compute_s(work).0;
        let vector_s = |work: VectorWork| chip.compute_s(Work::Vector(work)).0;
        let unpack_s = if self.unpacks { width * vector_s(unpacking(n, p.k)) } else { 0.0 };
        let finish_s = if p.finishes() { vector_s(finishing(p, m, n)) } else { 0.0 };
        let (rows, columns, each) = (f64::from(m), f64::from(n), self.activation_bytes);
        let loads_s = passes * columns * self.column_bytes / self.engine_bytes_per_s;
        let stores_s = passes * each * rows * columns / self.engine_bytes_per_s;
        let [x_device_s, rest_device_s] = self.device_s(t);
        let device_s = x_device_s + rest_device_s;
        let units_s = [passes * width * products_s, passes * (unpack_s + finish_s)];
        // A sum of blocks rounds otherwise.
        let least_s = units_s[0].max(units_s[1]).max(loads_s).max(device_s) * NEARLY;
        let x_s = each * rows * f64::from(p.k) / self.engine_bytes_per_s;
        let device_s = [x_device_s, rest_device_s];
        Floor { least_s, rows: m, columns: n, passes, loads_s, x_s, units_s, stores_s, device_s }
    }

    /// Returns seconds that a tiling takes at least: a cheap bound of [`Costs::seconds`].
    fn least_s(&self, t: Tiling, floor: &Floor) -> f64 {
        let Floor { loads_s, x_s, passes, units_s, stores_s, device_s, .. } = *floor;
        let blocks = f64::from(self.column_blocks(t, floor.columns));
        let count = passes * blocks * f64::from(t.cut.chunks);
        let (alone_s, x_s) = match t.cut.chunks {
            1 => (x_s.max(device_s[0]), 0.0),
            _ => (0.0, passes * x_s * if t.cut.keeps { 1.0 } else { blocks }),
        };
        // The first block passes through all stages, and each of the others takes at least the time of the busiest one, or of a slot.
        let stages_s = [loads_s + x_s, units_s[0], units_s[1], stores_s];
        let all_s: f64 = stages_s.iter().sum();
        let busiest_s = stages_s.iter().fold(0.0, |most: f64, s| most.max(*s));
        let pace_s = (busiest_s / count).max(self.least_pace_s);
        (alone_s + 2.0 * self.setup_s + all_s / count + (count - 1.0) * pace_s) * NEARLY
    }

    /// Returns all divisions into tiles and rows, each with the largest blocks of columns and without a cut of `k`.
    fn groups(&self) -> Vec<Tiling> {
        let p = self.p;
        let divisors = (1..=self.tiles).filter(|n| self.tiles.is_multiple_of(*n));
        let mut grids: Vec<u32> = halves(self.tiles).chain(divisors).map(|n| n.min(p.m).max(1)).collect();
        grids.sort_unstable();
        grids.dedup();
        let mut all = Vec::new();
        for grid_m in grids.into_iter().rev() {
            let grid_n = (self.tiles / grid_m).min(p.columns().div_ceil(COLUMNS)).max(1);
            let columns = p.columns().div_ceil(COLUMNS).div_ceil(grid_n) * COLUMNS;
            let parts = (0..grid_n).map(|tile| p.parts_in(share(p.columns(), COLUMNS, grid_n, tile))).max();
            let (grid, parts) = ((grid_m, grid_n), parts.unwrap_or(1).max(1));
            all.extend(halves(p.m.div_ceil(grid_m)).map(|rows| Tiling {
                grid,
                parts,
                rows,
                columns,
                cut: self.cuts[0],
            }));
        }
        all
    }

    /// Returns the tiling with the shortest time by the closed form, and the time.
    pub fn tiling(&self) -> Result<(Tiling, f64)> {
        self.tiling_near(None)
    }

    /// As [`Costs::tiling`]. With the tiling of the same product on a similar chip, it takes less of a search.
    fn tiling_near(&self, similar: Option<Tiling>) -> Result<(Tiling, f64)> {
        let floors = self.groups().into_iter().map(|group| (self.floor(group), group));
        let mut groups: Vec<(Floor, Tiling)> = floors.collect();
        groups.sort_by(|a, b| a.0.least_s.total_cmp(&b.0.least_s));
        let mut best: Option<(f64, Tiling)> = None;
        // The best takes at most these.
        let most_s = similar.and_then(|similar| self.seconds_if_found(similar, &groups));
        let most_s = most_s.map_or(f64::INFINITY, |seconds| seconds / NEARLY);
        // More chunks in all take longer than the best.
        let mut most_chunks = self.most_chunks(most_s);
        let mut least = u64::MAX;
        if most_s == f64::INFINITY
            && let Some((floor, group)) = groups.first()
            && let Some(tiling) = self.likeliest(group, floor)
        {
            let seconds = self.seconds(tiling, floor);
            (best, most_chunks) = (Some((seconds, tiling)), self.most_chunks(seconds));
        }
        for (floor, group) in &groups {
            if floor.least_s > most_s || best.is_some_and(|(s, _)| floor.least_s >= s) {
                break;
            }
            for &cut in &self.cuts {
                let chunks = floor.passes * f64::from(cut.chunks);
                if chunks > most_chunks {
                    break;
                }
                for columns in halves(group.columns) {
                    let tiling = Tiling { cut, columns, ..*group };
                    if chunks * f64::from(self.column_blocks(tiling, floor.columns)) > most_chunks {
                        break;
                    }
                    let least_s = self.least_s(tiling, floor);
                    if least_s > most_s || best.is_some_and(|(s, _)| least_s >= s) {
                        continue;
                    }
                    let bytes = self.scratch_bytes(tiling);
                    least = least.min(bytes);
                    if bytes > self.chip.scratch_bytes {
                        continue;
                    }
                    let seconds = self.seconds(tiling, floor);
                    if best.is_none_or(|(s, _)| seconds < s) {
                        best = Some((seconds, tiling));
                        most_chunks = self.most_chunks(seconds);
                    }
                }
            }
        }
        let what = || format!("a product with {} elements a row", self.p.k);
        best.map(|(seconds, tiling)| (tiling, seconds)).ok_or_else(|| too_small(self.chip, &what(), least))
    }

    /// Returns the seconds of a tiling, if it is one of those that are compared and fits.
    fn seconds_if_found(&self, t: Tiling, groups: &[(Floor, Tiling)]) -> Option<f64> {
        let (floor, group) = groups.iter().find(|(_, group)| (group.grid, group.rows) == (t.grid, t.rows))?;
        let cut = *self.cuts.iter().find(|cut| **cut == t.cut)?;
        let columns = halves(group.columns).find(|columns| *columns == t.columns)?;
        let tiling = Tiling { cut, columns, ..*group };
        (self.scratch_bytes(tiling) <= self.chip.scratch_bytes).then(|| self.seconds(tiling, floor))
    }

    /// Returns the tiling of a group with the least bound, of those that fit.
    fn likeliest(&self, group: &Tiling, floor: &Floor) -> Option<Tiling> {
        let of_cut = |&cut: &Cut| halves(group.columns).map(move |columns| Tiling { cut, columns, ..*group });
        let fits = |t: &Tiling| self.scratch_bytes(*t) <= self.chip.scratch_bytes;
        let bounds = self.cuts.iter().flat_map(of_cut).map(|t| (self.least_s(t, floor), t));
        let mut least: Option<(f64, Tiling)> = None;
        for (bound_s, t) in bounds {
            if least.is_none_or(|(s, _)| bound_s < s) && fits(&t) {
                least = Some((bound_s, t));
            }
        }
        least.map(|(_, t)| t)
    }

    /// Returns how many chunks of all blocks may at most take less than some seconds.
    fn most_chunks(&self, seconds: f64) -> f64 {
        let free = self.least_pace_s == 0.0;
        if free { f64::INFINITY } else { (seconds / NEARLY - 2.0 * self.setup_s) / self.least_pace_s + 1.0 }
    }
}

/// Returns how often device memory is read for bytes that so many tiles load.
fn copies(chip: &Chip, tiles: u32) -> f64 {
    f64::from(tiles) / f64::from(chip.multicast(tiles))
}

/// What tilings of a grid and of a number of rows have in common, and what bounds their seconds.
struct Floor {
    /// Seconds of the busiest unit or memory: all of them take at least these.
    least_s: f64,
    /// Rows of a pass.
    rows: u32,
    /// Columns of a tile.
    columns: u32,
    /// Passes over the rows of a tile.
    passes: f64,
    /// Seconds that an engine needs for the weights of a tile.
    loads_s: f64,
    /// Seconds that an engine needs for the activations of a pass.
    x_s: f64,
    /// Seconds of the matrix unit and of the vector unit of a tile.
    units_s: [f64; 2],
    /// Seconds that an engine needs for the results of a tile.
    stores_s: f64,
    /// As [`Costs::device_s`].
    device_s: [f64; 2],
}

/// Makes a bound hold although its sums round otherwise.
const NEARLY: f64 = 1.0 - 1e-9;

/// Returns a number, its half, and so on to 1.
fn halves(n: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(n.max(1)), |n| (*n > 1).then(|| n.div_ceil(2)))
}

/// Returns the ways to cut a product's `k`: not at all, then in chunks of about a half, a quarter and so on. Chunks are whole blocks
/// of all formats.
fn cuts(chip: &Chip, p: &Product, how: &[Multiplication]) -> Vec<Cut> {
    let cut = |depth: u32, keeps: bool| Cut {
        depth,
        chunks: p.k.div_ceil(depth.max(1)).max(1),
        keeps,
        row_bytes: (
            p.parts.iter().map(|part| form_bytes(chip.stored(part.format), 1, depth)).max().unwrap_or(0),
            how.iter().map(|m| form_bytes(m.w, 1, depth)).max().unwrap_or(0),
        ),
    };
    let block = |format: Format| match format.kind() {
        Kind::Quantised { activation, .. } => format.block_len().max(activation.block_len()),
        // Sums of floats have one accumulator for each `k` mod 16.
        Kind::Float => format.block_len().max(16),
    };
    let of_chip = |m: &Multiplication| {
        let (x, w, _) = chip.formats(m.rate);
        x.block_len().max(w.block_len())
    };
    let lens = p.parts.iter().map(|part| block(part.format)).chain(how.iter().map(of_chip));
    let unit = lens.max().unwrap_or(1).next_power_of_two() as u32;
    let mut all = vec![cut(p.k, true)];
    let mut parts = 2;
    while parts <= MOST_CHUNKS {
        let depth = p.k.div_ceil(parts).next_multiple_of(unit);
        if depth < p.k && all.last().is_some_and(|cut| depth < cut.depth) {
            all.extend([cut(depth, true), cut(depth, false)]);
        }
        parts *= 2;
    }
    all
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

/// A chunk of a block of output columns of one part, with its operands in the scratchpad.
struct Chunk {
    part: usize,
    columns: Range<u32>,
    k: Range<u32>,
    /// The activations, and whether no later chunk needs them.
    xs: Vec<(Form, Entry)>,
    frees_x: bool,
    /// For each product, the slots that the matrix unit reads besides the activations.
    weights: Vec<Vec<Entry>>,
    addends: Vec<Entry>,
}

/// The rings of activations of a tile.
struct Activations {
    floats: Ring,
    converted: Vec<(Form, Ring)>,
}

impl Activations {
    fn new(b: &mut Builder, costs: &Costs<'_>, t: Tiling, forms: &[Form]) -> Activations {
        let bytes = |form: Form| form_bytes(form, t.rows, t.cut.depth);
        let floats = b.ring(costs.float_slots(t.cut), bytes(Form::F32));
        let converted = forms.iter().filter(|&&f| f != Form::F32);
        let converted = converted.map(|&f| (f, b.ring(t.cut.x_slots(), bytes(f)))).collect();
        Activations { floats, converted }
    }

    /// Loads the elements `k` of some rows, and converts them to the given forms.
    fn load(
        &mut self,
        b: &mut Builder,
        costs: &Costs<'_>,
        (rows, k): (&Range<u32>, &Range<u32>),
        sharers: u32,
        forms: &[Form],
    ) -> Vec<(Form, Entry)> {
        let p = costs.p;
        let (count, elements) = (rows.end - rows.start, k.end - k.start);
        let pieces = row_pieces(&p.x, rows.clone()).into_iter();
        let pieces = pieces.map(|piece| piece.within(p.x.bytes, 4 * k.start..4 * k.end));
        let x = b.load(&mut self.floats, pieces, sharers);
        let keeps_floats = forms.contains(&Form::F32);
        let mut xs: Vec<(Form, Entry)> = if keeps_floats { vec![(Form::F32, x)] } else { Vec::new() };
        let converted = self.converted.iter_mut().filter(|(form, _)| forms.contains(form));
        let mut converted = converted.peekable();
        while let Some((form, ring)) = converted.next() {
            let work = Work::Vector(costs.converting(count, elements));
            let step = Step::Convert { rows: count, k: elements, to: *form };
            let frees = if converted.peek().is_none() && !keeps_floats { vec![x] } else { Vec::new() };
            let bytes = form_bytes(*form, count, elements);
            let [entry] = b.compute((work, step), &[x], [(ring, bytes)], &frees);
            xs.push((*form, entry));
        }
        xs
    }
}

impl<'a> ProductRings<'a> {
    fn new(b: &mut Builder, costs: &'a Costs<'a>, t: Tiling) -> ProductRings<'a> {
        let p = costs.p;
        let columns = u64::from(t.columns);
        let out_bytes = 4 * u64::from(t.rows) * columns;
        let if_so = |so: bool, bytes: u64| if so { bytes } else { 0 };
        let outs = t.cut.out_slots();
        let mut rings =
            |slots, bytes| -> Vec<Ring> { (0..p.width()).map(|_| b.ring(slots, bytes)).collect() };
        let weights = rings(2, t.cut.row_bytes.0 * columns);
        let unpacked = rings(2, if_so(costs.unpacks_to_memory, t.cut.row_bytes.1 * columns));
        let products = rings(outs, out_bytes);
        let biases = rings(outs, if_so(p.finishes(), 4 * columns));
        let residual = b.ring(outs, if_so(matches!(p.epilogue, Epilogue::Add(_)), out_bytes));
        let finished = b.ring(outs, if_so(p.finishes(), out_bytes));
        // Room for sums that the matrix unit does not keep.
        let _ = b.ring(p.width(), costs.sums_bytes(t));
        ProductRings { costs, tiling: t, weights, unpacked, products, biases, residual, finished }
    }

    /// Loads and unpacks the weights of a chunk, and for the last one of a block what is added to the products.
    fn prepare(&mut self, b: &mut Builder, rows: &Range<u32>, chunk: &mut Chunk) {
        let p = self.costs.p;
        let sharers = self.tiling.grid.0;
        let Chunk { columns, k, .. } = &*chunk;
        let (columns, k) = (columns.clone(), k.clone());
        let (count, elements) = (columns.end - columns.start, k.end - k.start);
        let is_last = k.end == p.k;
        for (slot, i) in p.together(chunk.part).enumerate() {
            let (part, how) = (&p.parts[i], self.costs.how[i]);
            let at = |k: u32| form_bytes(self.costs.chip.stored(part.format), 1, k);
            let from = part.weight.1 + u64::from(columns.start) * at(p.k);
            let piece = Piece::whole(part.weight.0, from, (u64::from(count) * at(p.k)) as u32);
            let piece = piece.within(at(p.k) as u32, at(k.start) as u32..at(k.end) as u32);
            let stored = b.load(&mut self.weights[slot], [piece], sharers);
            if let Some((operand, from)) = part.bias.filter(|_| is_last) {
                let piece = Piece::whole(operand, from + 4 * u64::from(columns.start), 4 * count);
                chunk.addends.push(b.load(&mut self.biases[slot], [piece], sharers));
            }
            // If the unit's form is the stored one, unpacking costs time but has no output: the bits are the
            // file's.
            let (step, bytes) = match how.w {
                Form::Chip(_) => {
                    let step = Step::Unpack { rows: count, k: elements, from: part.format, to: how.w };
                    (step, form_bytes(how.w, count, elements))
                }
                _ => (Step::Part, 0),
            };
            let mut weight = vec![stored];
            if how.unpacks || bytes > 0 {
                let done = if bytes > 0 { std::mem::take(&mut weight) } else { Vec::new() };
                let work = if how.unpacks { unpacking(count, elements) } else { VectorWork::default() };
                let work = Work::Vector(work);
                let to = (&mut self.unpacked[slot], bytes);
                weight.extend(b.compute((work, step), &[stored], [to], &done));
            }
            chunk.weights.push(weight);
        }
        if let Epilogue::Add(operand) = p.epilogue
            && is_last
        {
            let from = Part { out: operand, ..p.parts[chunk.part].clone() };
            let pieces = out_pieces(p, &from, rows.clone(), columns);
            chunk.addends.push(b.load(&mut self.residual, pieces, 1));
        }
    }

    /// Multiplies a chunk with the activations. After the last one of a block, applies the epilogue and stores the result.
    fn complete(&mut self, b: &mut Builder, rows: &Range<u32>, chunk: Chunk) {
        let p = self.costs.p;
        let Chunk { part, columns, k, xs, frees_x, weights, addends } = chunk;
        let (row_count, count) = (rows.end - rows.start, columns.end - columns.start);
        let bytes = 4 * u64::from(row_count) * u64::from(count);
        let last = k.end == p.k;
        let sums = if self.costs.sums_bytes(self.tiling) > 0 { bytes } else { 0 };
        let sums_bytes = sums * (u64::from(k.start > 0) + u64::from(!last));
        let parts = p.together(part);
        let mut results = Vec::new();
        for (slot, (i, weight)) in parts.clone().zip(weights).enumerate() {
            let how = self.costs.how[i];
            let x = xs.iter().find(|(form, _)| *form == how.x).map(|(_, entry)| *entry);
            let reads: Vec<Entry> = x.into_iter().chain(weight.iter().copied()).collect();
            let mut frees = weight;
            if frees_x && i + 1 == parts.end {
                frees.extend(xs.iter().map(|(_, entry)| *entry));
            }
            let (m, n) = (row_count, count);
            let sparse = self.costs.chip.sparse;
            let work = Work::Matrix { rate: how.rate, m, n, k: k.end - k.start, sums_bytes, sparse };
            let k = k.clone();
            let step = Step::Product { rows: m, columns: n, k, last, sums: slot, x: how.x, w: how.w };
            if last {
                let to = (&mut self.products[slot], bytes);
                results.extend(b.compute((work, step), &reads, [to], &frees));
            } else {
                b.compute((work, step), &reads, [], &frees);
            }
        }
        if !last {
            return;
        }
        if p.finishes() {
            let biases = parts.map(|i| p.parts[i].bias.is_some()).collect();
            let reads: Vec<Entry> = results.iter().chain(&addends).copied().collect();
            let work = Work::Vector(finishing(p, row_count, count));
            let step = Step::Finish { columns: count, biases };
            results = b.compute((work, step), &reads, [(&mut self.finished, bytes)], &reads).into();
        }
        for entry in results {
            b.store(entry, out_pieces(p, &p.parts[part], rows.clone(), columns.clone()));
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
    let forms_of = |parts: &[(usize, Range<u32>)]| -> Vec<Form> {
        let used =
            |form: Form| parts.iter().flat_map(|(part, _)| p.together(*part)).any(|i| costs.how[i].x == form);
        costs.forms.iter().copied().filter(|&f| used(f)).collect()
    };
    let all_forms = forms_of(&list);
    let mut activations = Activations::new(&mut b, costs, t, &all_forms);
    let mut rings = ProductRings::new(&mut b, costs, t);
    for rows in blocks(rows, t.rows) {
        let mut kept: Vec<Vec<(Form, Entry)>> = Vec::new();
        // The vector unit unpacks the next chunk before it waits for the product of this one.
        let mut waiting: Option<Chunk> = None;
        for (number, block) in list.iter().enumerate() {
            for (c, k) in blocks(0..p.k, t.cut.depth).enumerate() {
                let xs = match kept.get(c) {
                    Some(xs) => xs.clone(),
                    None if t.cut.keeps => {
                        let xs = activations.load(&mut b, costs, (&rows, &k), t.grid.1, &all_forms);
                        kept.push(xs.clone());
                        xs
                    }
                    None => {
                        let forms = forms_of(std::slice::from_ref(block));
                        activations.load(&mut b, costs, (&rows, &k), t.grid.1, &forms)
                    }
                };
                let frees_x = !t.cut.keeps || number + 1 == list.len();
                let (part, columns) = block.clone();
                let (weights, addends) = (Vec::new(), Vec::new());
                let mut next = Chunk { part, columns, k, xs, frees_x, weights, addends };
                rings.prepare(&mut b, &rows, &mut next);
                if let Some(chunk) = waiting.replace(next) {
                    rings.complete(&mut b, &rows, chunk);
                }
            }
        }
        if let Some(chunk) = waiting {
            rings.complete(&mut b, &rows, chunk);
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
                data: Data::Activations,
            }]
        }
        Some(list) => {
            let rows = list.get(rows.start as usize..rows.end as usize).unwrap_or(&[]);
            rows.iter().map(|&row| Piece::whole(part.out, at(row), bytes).of(Data::Activations)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::closed;
    use super::*;
    use crate::chip::Numerics;
    use crate::shape::{RESIDUAL, Rows, Shape, bias, weight};
    use crate::tile::{Action, Operand};
    use halite_profiles::profile::{Driver, Profile, SHIPPED};

    fn chip(name: &str, memory: &str, scratch_bytes: u32) -> Chip {
        let path = format!("memory.{memory}.capacity_bytes");
        let profile = Profile::open(name).unwrap().with(&path, f64::from(scratch_bytes)).unwrap();
        Chip::new(profile, Numerics::Exact, None).unwrap()
    }

    /// `[m, k]` times weights of some formats, each with `n` rows.
    fn product(m: u32, k: u32, n: u32, formats: &[Format], epilogue: Epilogue) -> Product {
        let out = |i| Operand::Out(if epilogue == Epilogue::None { i } else { 0 });
        let part = |(i, &format): (usize, &Format)| Part {
            n,
            format,
            weight: (weight(i), 0),
            bias: (i == 0).then_some((bias(i), 0)),
            out: out(i),
        };
        let parts = formats.iter().enumerate().map(part).collect();
        Product { m, k, x: Rows::own(X, k), parts, epilogue, out_rows: None }
    }

    fn products() -> Vec<Product> {
        use Format::{F16, Q4_0, Q4_K, Q8_0};
        vec![
            product(1, 4096, 4096, &[Q4_0], Epilogue::None),
            product(512, 4096, 4096, &[F16], Epilogue::Add(RESIDUAL)),
            product(100, 4096, 11_008, &[Q4_K, Q4_K], Epilogue::Glu),
            product(33, 11_008, 512, &[Q8_0, F16, Q4_K], Epilogue::None),
        ]
    }

    /// However a product is cut, a tile reads its weights once for each pass over its rows, adds up every element of `k` in
    /// order, and writes each result once.
    #[test]
    fn cuts_lose_nothing() {
        let mut cut = 0;
        for (name, memory) in
            [("maia-100", "tsram"), ("teaching-16x16", "scratchpad"), ("tpu-v1", "unified_buffer")]
        {
            for (p, bytes) in products().iter().flat_map(|p| [(p, 32 << 10), (p, 256 << 10)]) {
                let chip = chip(name, memory, bytes);
                let (tiling, _) = Costs::new(&chip, p, chip.tiles).tiling().unwrap();
                cut += u32::from(tiling.cut.chunks > 1);
                let mut stored = 0;
                for program in product_programs(&chip, p, chip.tiles).unwrap() {
                    assert!(program.scratch_bytes() <= chip.scratch_bytes);
                    // By part: bytes of weights, columns that were multiplied and finished, and where the sums are.
                    let mut loaded = vec![0; p.parts.len()];
                    let (mut multiplied, mut at) = (0, vec![0; 2]);
                    let mut finished = 0;
                    for command in &program.commands {
                        match &command.action {
                            Action::Load { from, .. } => {
                                let part = p.parts.iter().position(|part| part.weight.0 == from.operand);
                                part.into_iter().for_each(|i| loaded[i] += from.bytes());
                            }
                            Action::Store { to, .. } => stored += to.bytes(),
                            Action::Compute {
                                step: Step::Product { rows, columns, k, last, sums, .. },
                                ..
                            } => {
                                assert_eq!((k.start, *last), (at[*sums], k.end == p.k));
                                at[*sums] = if *last { 0 } else { k.end };
                                multiplied += u64::from(rows * columns) * k.len() as u64;
                                finished += u64::from(rows * columns * u32::from(*last));
                            }
                            Action::Compute { .. } => {}
                        }
                    }
                    assert!(at == [0, 0] && multiplied == finished * u64::from(p.k));
                    // All tiles of a row of the grid have the same rows, but the first tiles may have one less.
                    let passes = |rows: u32| u64::from(rows.div_ceil(tiling.rows));
                    let (most, least) = (p.m.div_ceil(tiling.grid.0), p.m / tiling.grid.0);
                    for (part, bytes) in p.parts.iter().zip(loaded) {
                        let row = form_bytes(Form::File(part.format), 1, p.k);
                        let whole = |passes: u64| {
                            bytes % (passes * row) == 0 && bytes <= passes * row * u64::from(part.n)
                        };
                        assert!(whole(passes(most)) || whole(passes(least)), "{bytes} bytes of {row} a row");
                    }
                }
                assert_eq!(stored, 4 * u64::from(p.m) * u64::from(p.columns()), "{tiling:?}");
            }
        }
        assert!(cut > 12, "{cut} products were cut");
    }

    /// A product that fits as a whole is cut only where that is faster, so more room never costs time.
    #[test]
    fn larger_scratchpads_are_not_slower() {
        for (name, memory) in
            [("maia-100", "tsram"), ("teaching-16x16", "scratchpad"), ("tpu-v1", "unified_buffer")]
        {
            for p in products() {
                let shape = Shape::Product(p);
                let sizes = (0..57).map(|i| (32_768.0 * f64::from(i).mul_add(0.125, 0.0).exp2()) as u32);
                let times: Vec<f64> =
                    sizes.map(|bytes| closed(&chip(name, memory, bytes), &shape).unwrap().seconds).collect();
                assert!(times.is_sorted_by(|small, large| small >= large), "{name}, {shape:?}: {times:?}");
                assert!(times.first() > times.last());
            }
        }
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
                for (epilogue, parts) in
                    [(Epilogue::None, 1), (Epilogue::Glu, 2), (Epilogue::Add(RESIDUAL), 1)]
                {
                    let p = product(m, k, n, &[Format::Q8_0, Format::Q8_0][..parts], epilogue);
                    let costs = Costs::new(&chip, &p, chip.tiles);
                    let mut least = f64::INFINITY;
                    for group in costs.groups() {
                        let floor = costs.floor(group);
                        for (columns, &cut) in
                            halves(group.columns).flat_map(|c| costs.cuts.iter().map(move |cut| (c, cut)))
                        {
                            let t = Tiling { cut, columns, ..group };
                            let seconds = costs.seconds(t, &floor);
                            let bound_s = floor.least_s.max(costs.least_s(t, &floor));
                            assert!(bound_s <= seconds, "{name} {m} x {n} x {k}: {t:?}");
                            let blocks = f64::from(costs.column_blocks(t, floor.columns));
                            let count = floor.passes * blocks * f64::from(cut.chunks);
                            assert!(count <= costs.most_chunks(seconds), "{name} {m} x {n} x {k}: {t:?}");
                            if costs.scratch_bytes(t) <= chip.scratch_bytes {
                                least = least.min(seconds);
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
