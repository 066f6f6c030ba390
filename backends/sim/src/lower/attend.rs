//! Attention to a paged cache.

use std::ops::Range;

use super::{HEADS, PAGE_SLOTS, Pipeline, aligned, blocks, too_small};
use crate::chip::Chip;
use crate::shape::{Attend, chunks};
use crate::tile::{
    Builder, Entry, Lowered, Operand, Piece, QueryRows, Ring, Step, TileProgram, VectorWork, Work,
};
use halite::Result;
use halite::program::PAGE_POSITIONS;

const QUERIES: Operand = Operand::In(0);
const PAGES: Operand = Operand::In(1);
const SINKS: Operand = Operand::In(2);
const PARTIAL: Operand = Operand::Temp(0);

impl Attend {
    /// Floats in the partial result of a row of queries: values, maximum, sum.
    fn found(&self) -> u32 {
        self.value_dim + 2
    }

    /// Returns the last position that token `i` sees.
    fn last(&self, rows: QueryRows, i: u32) -> u32 {
        rows.position + if self.causal { i } else { 0 }
    }

    /// Returns the chunks that a token sees; `position` is the last visible position.
    pub fn chunks(&self, position: u32) -> Range<u32> {
        chunks(position, self.window)
    }

    /// Returns the chunks that any of the tokens sees.
    fn chunks_of(&self, rows: QueryRows) -> Range<u32> {
        self.chunks(rows.position).start..self.chunks(self.last(rows, rows.tokens.max(1) - 1)).end
    }

    /// Returns the number of tokens that see a chunk.
    fn seeing(&self, rows: QueryRows, chunk: u32) -> u32 {
        let sees = |i: &u32| self.chunks(self.last(rows, *i)).contains(&chunk);
        (0..rows.tokens).filter(sees).count() as u32
    }

    /// Returns the bytes of `floats` floats per row of queries.
    fn floats(&self, rows: QueryRows, each: u32) -> u64 {
        4 * u64::from(rows.tokens * rows.heads) * u64::from(each)
    }

    fn page_bytes(&self) -> u64 {
        self.page(0, 0).iter().map(|(_, bytes)| u64::from(*bytes)).sum()
    }

    /// Returns the scratchpad bytes for the given rows of queries and slots for pages.
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

/// How attention is divided.
struct AttendTiling<'a> {
    /// Slots for pages.
    slots: u32,
    /// Maximum rows of queries of a tile.
    rows: u32,
    /// Queries that are processed together, and their pages.
    work: Vec<(QueryRows, &'a [u32])>,
    /// Chunks that all of them see.
    chunks: u32,
    /// Chunks of a tile, if there is too little work for all tiles.
    run: Option<u32>,
}

fn attend_tiling<'a>(chip: &Chip, a: &'a Attend) -> Result<AttendTiling<'a>> {
    let group = a.heads / a.kv_heads.max(1);
    let fits = |slots: u32| (1..=HEADS).rev().find(|&n| a.scratch_bytes(n, slots) <= chip.scratch_bytes);
    let Some((slots, fit)) = PAGE_SLOTS.into_iter().find_map(|slots| Some((slots, fits(slots)?))) else {
        return Err(too_small(chip, "a page of the cache", a.scratch_bytes(1, 1)));
    };
    let heads = group.min(fit);
    let head_runs: Vec<Range<u32>> =
        (0..a.kv_heads).flat_map(|h| blocks(h * group..(h + 1) * group, heads)).collect();
    let tokens: u32 = a.spans.iter().map(|(_, _, n)| n).sum();
    // Group tokens as long as every tile has work.
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
                    position: start + if a.causal { range.start } else { len - 1 },
                    head: run.start,
                    heads: run.end - run.start,
                };
                work.push((rows, pages));
            }
            first += len;
        }
    }
    let chunks: u32 = work.iter().map(|(rows, _)| a.chunks_of(*rows).len() as u32).sum();
    let few = 2 * work.len() as u32 <= chip.tiles && chunks > work.len() as u32;
    let run = few.then(|| chunks.div_ceil(chip.tiles).max(1));
    Ok(AttendTiling { slots, rows: heads * together, work, chunks, run })
}

/// Seconds of attention by the closed form.
pub fn attend_s(chip: &Chip, a: &Attend) -> Result<f64> {
    let tiling = attend_tiling(chip, a)?;
    let Some((rows, _)) = tiling.work.first() else { return Ok(0.0) };
    let (engine, signal) = (chip.engine_bytes_per_s(), chip.semaphore_s());
    let queries = rows.tokens * rows.heads;
    let (bytes, all) = (f64::from(a.page_bytes() as u32), f64::from(tiling.chunks));
    let rate = chip.attention_rate();
    let matrix = |n, k| chip.compute_s(Work::Matrix { rate, m: queries, n, k });
    let (score, weigh) = (matrix(PAGE_POSITIONS, a.key_dim), matrix(a.value_dim, PAGE_POSITIONS));
    let share = chip.compute_s(sharing(queries));
    let merge = chip.compute_s(merging(a, *rows, 1));
    let setup_s = chip.setup_s(&Piece::whole(QUERIES, 0, 1));
    let found = 4.0 * f64::from(queries) * f64::from(a.found());
    let tiles = match tiling.run {
        Some(run) => {
            tiling.work.iter().map(|(rows, _)| (a.chunks_of(*rows).len() as u32).div_ceil(run)).sum()
        }
        None => chip.tiles.min(tiling.work.len() as u32),
    };
    let drain_s = score.1 + share.1 + weigh.1 + 2.0 * signal;
    let ahead = tiling.slots >= 3;
    // Unless scores are computed ahead, a chunk goes through all steps before the next one, which is loaded
    // meanwhile.
    let chain = score.0 + share.0 + weigh.0 + drain_s;
    let work = f64::from((tiling.work.len() as u32).div_ceil(tiles));
    let pipeline = Pipeline {
        count: (all / f64::from(tiles)).ceil(),
        load_s: bytes / engine,
        units_s: if ahead { [score.0 + weigh.0, share.0 + merge.0] } else { [chain, merge.0] },
        drain_s: merge.1 + if ahead { drain_s } else { 0.0 },
        slots: f64::from(tiling.slots),
        store_s: found / engine,
        device_s: all * bytes / chip.device_bytes_per_s(),
        setup_s,
        requests: (a.page(0, 0).len() as f64, tiling.run.map_or(0.0, |_| 1.0)),
    };
    let query_s = work
        * (setup_s + chip.activation_bytes() * f64::from(queries) * f64::from(a.key_dim) / engine + signal);
    let mut seconds = pipeline.seconds(chip) + query_s;
    if tiling.run.is_some() {
        let heads: u32 = tiling.work.iter().map(|(rows, _)| rows.heads).sum();
        let each = all * f64::from(rows.heads) / f64::from(heads);
        let one = QueryRows { heads: 1, tokens: 1, ..*rows };
        let merge = chip.compute_s(merging(a, one, each as u32));
        let row = 4.0 * f64::from(a.found());
        let phases = f64::from(heads.div_ceil(chip.tiles));
        seconds += chip.barrier_s()
            + phases * (2.0 * setup_s + 2.0 * signal + each * row / engine + merge.0 + merge.1);
    }
    Ok(seconds)
}

pub fn attend_phases(chip: &Chip, a: &Attend, lowered: &mut Lowered) -> Result<()> {
    let AttendTiling { slots, rows: most_rows, work, run, .. } = attend_tiling(chip, a)?;
    let Some(run) = run else {
        let tiles = chip.tiles.min(work.len() as u32);
        let programs = (0..tiles).map(|tile| {
            let mut b = Builder::default();
            let mut rings = AttendRings::new(&mut b, a, most_rows, slots);
            for (rows, pages) in work.iter().skip(tile as usize).step_by(tiles as usize) {
                rings.whole(&mut Tile { chip, a, b: &mut b }, *rows, pages);
            }
            b.finish()
        });
        lowered.phases.push(programs.collect());
        return Ok(());
    };
    // Runs of chunks, then a merge: partial results go to memory `[token][head][chunk]`.
    let most = work.iter().map(|(rows, _)| a.chunks_of(*rows).end).max().unwrap_or(0);
    let tokens: u32 = a.spans.iter().map(|(_, _, n)| n).sum();
    let rows = u64::from(tokens) * u64::from(a.heads);
    lowered.temps.push(4 * rows * u64::from(most) * u64::from(a.found()));
    let mut first = Vec::new();
    for (rows, pages) in &work {
        for range in blocks(a.chunks_of(*rows), run) {
            let mut b = Builder::default();
            let mut rings = AttendRings::new(&mut b, a, most_rows, slots);
            rings.run(&mut Tile { chip, a, b: &mut b }, *rows, pages, range, most);
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
            activations: true,
        };
        b.load(&mut self.queries, [piece], 1)
    }

    /// Loads a page, and what rows see of it becomes shares.
    fn shares(
        &mut self,
        tile: &mut Tile<'_>,
        rows: QueryRows,
        queries: Entry,
        pages: &[u32],
        chunk: u32,
    ) -> Page {
        let Tile { chip, a, b } = tile;
        let kv_head = rows.head / (a.heads / a.kv_heads.max(1)).max(1);
        let number = pages.get(chunk as usize).copied().unwrap_or(u32::MAX);
        let pieces = a.page(number, kv_head);
        let pieces = pieces.into_iter().map(|(offset, bytes)| Piece::whole(PAGES, offset, bytes));
        let page = b.load(&mut self.page, pieces, 1);
        let seeing = a.seeing(rows, chunk) * rows.heads;
        let rate = chip.attention_rate();
        let score = Work::Matrix { rate, m: seeing, n: PAGE_POSITIONS, k: a.key_dim };
        let table = a.floats(rows, PAGE_POSITIONS);
        let [scores] = b.compute((score, Step::Part), &[queries, page], [(&mut self.scores, table)], &[]);
        let to = (&mut self.shares, table);
        let [shares] = b.compute((sharing(seeing), Step::Part), &[scores], [to], &[scores]);
        Page { rows, queries, chunk, seeing, page, shares }
    }

    /// What rows find in a page; its step computes scores and shares as well. `last` if the queries are not
    /// needed any more.
    fn found(&mut self, tile: &mut Tile<'_>, from: Page, last: bool) -> Entry {
        let Tile { chip, a, b } = tile;
        let Page { rows, queries, chunk, seeing, page, shares } = from;
        let rate = chip.attention_rate();
        let work = Work::Matrix { rate, m: seeing, n: a.value_dim, k: PAGE_POSITIONS };
        let mut frees = vec![page, shares];
        frees.extend(last.then_some(queries));
        let to = (&mut self.found, a.floats(rows, a.found()));
        b.compute((work, Step::Page { rows, chunk }), &[queries, page, shares], [to], &frees)[0]
    }

    /// Goes through chunks: `then` gets what was found in each. With three slots for pages, scores of the
    /// next chunk come before the values of this one, so that the matrix unit does not wait for the vector
    /// unit.
    fn each(
        &mut self,
        tile: &mut Tile<'_>,
        rows: QueryRows,
        pages: &[u32],
        chunks: Range<u32>,
        mut then: impl FnMut(&mut Self, &mut Tile<'_>, u32, Entry),
    ) {
        let queries = self.load_queries(tile.b, tile.a, rows);
        let mut waiting: Option<Page> = None;
        for chunk in chunks {
            if self.page.slots < 3
                && let Some(page) = waiting.take()
            {
                let before = page.chunk;
                let found = self.found(tile, page, false);
                then(self, tile, before, found);
            }
            let next = self.shares(tile, rows, queries, pages, chunk);
            if let Some(page) = waiting.replace(next) {
                let before = page.chunk;
                let found = self.found(tile, page, false);
                then(self, tile, before, found);
            }
        }
        if let Some(page) = waiting {
            let chunk = page.chunk;
            let found = self.found(tile, page, true);
            then(self, tile, chunk, found);
        }
    }

    /// All chunks of some rows, merged one after the other.
    fn whole(&mut self, tile: &mut Tile<'_>, rows: QueryRows, pages: &[u32]) {
        let sinks = tile.a.sinks.then(|| tile.b.load(&mut self.sinks, [sinks(rows)], 1));
        let chunks = tile.a.chunks_of(rows);
        let mut state: Option<Entry> = None;
        self.each(tile, rows, pages, chunks.clone(), |rings, Tile { a, b, .. }, chunk, found| {
            let last = chunk + 1 == chunks.end;
            let step = Step::Merge { rows, chunks: chunk..chunk + 1, fresh: state.is_none(), last };
            let mut reads = vec![found];
            reads.extend(state);
            reads.extend(sinks.filter(|_| last));
            let to = match last {
                true => (&mut rings.out, a.floats(rows, a.value_dim)),
                false => (&mut rings.state, a.floats(rows, a.found())),
            };
            let [merged] = b.compute((merging(a, rows, 1), step), &reads, [to], &reads);
            state = Some(merged);
        });
        if let Some(out) = state {
            tile.b.store(out, [outputs(tile.a, rows)]);
        }
    }

    /// Some chunks of some rows, each stored by itself.
    fn run(&mut self, tile: &mut Tile<'_>, rows: QueryRows, pages: &[u32], chunks: Range<u32>, most: u32) {
        self.each(tile, rows, pages, chunks, |_, Tile { a, b, .. }, chunk, found| {
            let pieces = (0..rows.tokens).map(|i| Piece {
                runs: rows.heads,
                run_bytes: 4 * a.found(),
                ..partial(a, rows.token + i, rows.head, chunk, most)
            });
            b.store(found, pieces);
        });
    }
}

/// A tile's program for attention, under construction.
struct Tile<'t> {
    chip: &'t Chip,
    a: &'t Attend,
    b: &'t mut Builder,
}

/// A page in the scratchpad, and what rows of queries make of it.
struct Page {
    rows: QueryRows,
    queries: Entry,
    chunk: u32,
    seeing: u32,
    page: Entry,
    shares: Entry,
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
        activations: true,
    }
}

/// What a head of a token found in a chunk, and from there on.
fn partial(a: &Attend, token: u32, head: u32, chunk: u32, most: u32) -> Piece {
    let row = 4 * u64::from(a.found());
    let before = u64::from(token) * u64::from(a.heads) + u64::from(head);
    let offset = (before * u64::from(most) + u64::from(chunk)) * row;
    Piece {
        operand: PARTIAL,
        offset,
        runs: 1,
        run_bytes: 0,
        stride: u64::from(most) * row,
        activations: false,
    }
}

fn merging(a: &Attend, rows: QueryRows, chunks: u32) -> Work {
    let each = u64::from(rows.tokens * rows.heads) * u64::from(chunks);
    let simple = 2 * each * u64::from(a.value_dim);
    Work::Vector(VectorWork { simple, exp: 2 * each, divide: each, ..Default::default() })
}

/// Scores that become shares.
fn sharing(rows: u32) -> Work {
    let each = u64::from(rows) * u64::from(PAGE_POSITIONS);
    Work::Vector(VectorWork { simple: 3 * each, exp: each, ..Default::default() })
}

/// Chunks to merge at a time.
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
        let rows = QueryRows { token: rows.token + i, tokens: 1, position: a.last(rows, i), ..rows };
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
