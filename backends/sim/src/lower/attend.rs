//! Attention over a paged KV cache.

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
    /// Returns the floats in the partial result of a query row: values, maximum, sum.
    fn partial_len(&self) -> u32 {
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
    fn visible_tokens(&self, rows: QueryRows, chunk: u32) -> u32 {
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
            + 4 * floats(self.partial_len())
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
    /// Query rows that are processed together, and their pages.
    work: Vec<(QueryRows, &'a [u32])>,
    /// Number of chunks of all work.
    chunks: u32,
    /// Chunks per tile if the chunks of a sequence are split between tiles, because there is too little work.
    chunks_per_tile: Option<u32>,
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
    let token_group = (fit / heads).min(spread).max(1);
    let mut work: Vec<(QueryRows, &[u32])> = Vec::new();
    for run in &head_runs {
        let mut first = 0;
        for (pages, start, len) in &a.spans {
            for range in blocks(0..*len, token_group) {
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
    let split = 2 * work.len() as u32 <= chip.tiles && chunks > work.len() as u32;
    let chunks_per_tile = split.then(|| chunks.div_ceil(chip.tiles).max(1));
    Ok(AttendTiling { slots, rows: heads * token_group, work, chunks, chunks_per_tile })
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
    let softmax = chip.compute_s(softmax_work(queries));
    let merge = chip.compute_s(merge_work(a, *rows, 1));
    let setup_s = chip.setup_s(&Piece::whole(QUERIES, 0, 1));
    let partial = 4.0 * f64::from(queries) * f64::from(a.partial_len());
    let tiles = match tiling.chunks_per_tile {
        Some(chunks_per_tile) => tiling
            .work
            .iter()
            .map(|(rows, _)| (a.chunks_of(*rows).len() as u32).div_ceil(chunks_per_tile))
            .sum(),
        None => chip.tiles.min(tiling.work.len() as u32),
    };
    let drain_s = score.1 + softmax.1 + weigh.1 + 2.0 * signal;
    let ahead = tiling.slots >= 3;
    // Without scores computed ahead, a chunk finishes before the next one starts; only the load overlaps.
    let chain = score.0 + softmax.0 + weigh.0 + drain_s;
    let work = f64::from((tiling.work.len() as u32).div_ceil(tiles));
    let pipeline = Pipeline {
        count: (all / f64::from(tiles)).ceil(),
        load_s: bytes / engine,
        units_s: if ahead { [score.0 + weigh.0, softmax.0 + merge.0] } else { [chain, merge.0] },
        drain_s: merge.1 + if ahead { drain_s } else { 0.0 },
        slots: f64::from(tiling.slots),
        store_s: partial / engine,
        device_s: all * bytes / chip.device_bytes_per_s(),
        setup_s,
        requests: (a.page(0, 0).len() as f64, tiling.chunks_per_tile.map_or(0.0, |_| 1.0)),
    };
    let query_s = work
        * (setup_s + chip.activation_bytes() * f64::from(queries) * f64::from(a.key_dim) / engine + signal);
    let mut seconds = pipeline.seconds(chip) + query_s;
    if tiling.chunks_per_tile.is_some() {
        let heads: u32 = tiling.work.iter().map(|(rows, _)| rows.heads).sum();
        let each = all * f64::from(rows.heads) / f64::from(heads);
        let one = QueryRows { heads: 1, tokens: 1, ..*rows };
        let merge = chip.compute_s(merge_work(a, one, each as u32));
        let row = 4.0 * f64::from(a.partial_len());
        let phases = f64::from(heads.div_ceil(chip.tiles));
        seconds += chip.barrier_s()
            + phases * (2.0 * setup_s + 2.0 * signal + each * row / engine + merge.0 + merge.1);
    }
    Ok(seconds)
}

pub fn attend_phases(chip: &Chip, a: &Attend, lowered: &mut Lowered) -> Result<()> {
    let AttendTiling { slots, rows: max_rows, work, chunks_per_tile, .. } = attend_tiling(chip, a)?;
    let Some(chunks_per_tile) = chunks_per_tile else {
        let tiles = chip.tiles.min(work.len() as u32);
        let programs = (0..tiles).map(|tile| {
            let mut b = Builder::default();
            let mut rings = AttendRings::new(&mut b, a, max_rows, slots);
            for (rows, pages) in work.iter().skip(tile as usize).step_by(tiles as usize) {
                rings.all_chunks(&mut Tile { chip, a, b: &mut b }, *rows, pages);
            }
            b.finish()
        });
        lowered.phases.push(programs.collect());
        return Ok(());
    };
    // Split chunks between tiles, then merge. Partial results are stored as `[token][head][chunk]`.
    let max_chunks = work.iter().map(|(rows, _)| a.chunks_of(*rows).end).max().unwrap_or(0);
    let tokens: u32 = a.spans.iter().map(|(_, _, n)| n).sum();
    let rows = u64::from(tokens) * u64::from(a.heads);
    lowered.temps.push(4 * rows * u64::from(max_chunks) * u64::from(a.partial_len()));
    let mut first = Vec::new();
    for (rows, pages) in &work {
        for range in blocks(a.chunks_of(*rows), chunks_per_tile) {
            let mut b = Builder::default();
            let mut rings = AttendRings::new(&mut b, a, max_rows, slots);
            rings.some_chunks(&mut Tile { chip, a, b: &mut b }, *rows, pages, range, max_chunks);
            first.push(b.finish());
        }
    }
    let second = work.iter().flat_map(|(rows, _)| (0..rows.heads).map(|h| (*rows, h)));
    let second = second
        .map(|(rows, h)| merge_program(a, QueryRows { head: rows.head + h, heads: 1, ..rows }, max_chunks));
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
    softmax: Ring,
    partial: Ring,
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
            softmax: b.ring(2, floats(PAGE_POSITIONS)),
            partial: b.ring(2, floats(a.partial_len())),
            state: b.ring(2, floats(a.partial_len())),
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

    /// Loads a page, and computes the softmax numerators of its scores.
    fn softmax(
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
        let visible_rows = a.visible_tokens(rows, chunk) * rows.heads;
        let rate = chip.attention_rate();
        let score = Work::Matrix { rate, m: visible_rows, n: PAGE_POSITIONS, k: a.key_dim };
        let table = a.floats(rows, PAGE_POSITIONS);
        let [scores] = b.compute((score, Step::Part), &[queries, page], [(&mut self.scores, table)], &[]);
        let to = (&mut self.softmax, table);
        let [softmax] = b.compute((softmax_work(visible_rows), Step::Part), &[scores], [to], &[scores]);
        Page { rows, queries, chunk, visible_rows, page, softmax }
    }

    /// Computes the partial result of a page. The simulated step also computes the scores and the softmax.
    /// `last` frees the queries.
    fn partial_result(&mut self, tile: &mut Tile<'_>, from: Page, last: bool) -> Entry {
        let Tile { chip, a, b } = tile;
        let Page { rows, queries, chunk, visible_rows, page, softmax } = from;
        let rate = chip.attention_rate();
        let work = Work::Matrix { rate, m: visible_rows, n: a.value_dim, k: PAGE_POSITIONS };
        let mut frees = vec![page, softmax];
        frees.extend(last.then_some(queries));
        let to = (&mut self.partial, a.floats(rows, a.partial_len()));
        b.compute((work, Step::Page { rows, chunk }), &[queries, page, softmax], [to], &frees)[0]
    }

    /// Calls `then` with the partial result of each chunk. With three slots for pages, the scores of the next
    /// chunk are computed before the values of this one are weighted, so that the matrix unit does not wait
    /// for the vector unit.
    fn for_each_chunk(
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
                let partial = self.partial_result(tile, page, false);
                then(self, tile, before, partial);
            }
            let next = self.softmax(tile, rows, queries, pages, chunk);
            if let Some(page) = waiting.replace(next) {
                let before = page.chunk;
                let partial = self.partial_result(tile, page, false);
                then(self, tile, before, partial);
            }
        }
        if let Some(page) = waiting {
            let chunk = page.chunk;
            let partial = self.partial_result(tile, page, true);
            then(self, tile, chunk, partial);
        }
    }

    /// Processes all chunks of some query rows, and merges them in order.
    fn all_chunks(&mut self, tile: &mut Tile<'_>, rows: QueryRows, pages: &[u32]) {
        let sinks = tile.a.sinks.then(|| tile.b.load(&mut self.sinks, [sinks(rows)], 1));
        let chunks = tile.a.chunks_of(rows);
        let mut state: Option<Entry> = None;
        self.for_each_chunk(tile, rows, pages, chunks.clone(), |rings, Tile { a, b, .. }, chunk, partial| {
            let last = chunk + 1 == chunks.end;
            let step = Step::Merge { rows, chunks: chunk..chunk + 1, fresh: state.is_none(), last };
            let mut reads = vec![partial];
            reads.extend(state);
            reads.extend(sinks.filter(|_| last));
            let to = match last {
                true => (&mut rings.out, a.floats(rows, a.value_dim)),
                false => (&mut rings.state, a.floats(rows, a.partial_len())),
            };
            let [merged] = b.compute((merge_work(a, rows, 1), step), &reads, [to], &reads);
            state = Some(merged);
        });
        if let Some(out) = state {
            tile.b.store(out, [outputs(tile.a, rows)]);
        }
    }

    /// Processes some chunks of some query rows, and stores each partial result.
    fn some_chunks(
        &mut self,
        tile: &mut Tile<'_>,
        rows: QueryRows,
        pages: &[u32],
        chunks: Range<u32>,
        max_chunks: u32,
    ) {
        self.for_each_chunk(tile, rows, pages, chunks, |_, Tile { a, b, .. }, chunk, partial| {
            let pieces = (0..rows.tokens).map(|i| Piece {
                runs: rows.heads,
                run_bytes: 4 * a.partial_len(),
                ..partial_piece(a, rows.token + i, rows.head, chunk, max_chunks)
            });
            b.store(partial, pieces);
        });
    }
}

/// A tile's program for attention, under construction.
struct Tile<'t> {
    chip: &'t Chip,
    a: &'t Attend,
    b: &'t mut Builder,
}

/// A page in the scratchpad, with the softmax numerators of some query rows.
struct Page {
    rows: QueryRows,
    queries: Entry,
    chunk: u32,
    visible_rows: u32,
    page: Entry,
    softmax: Entry,
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

/// Returns the location of the partial result of a token, head and chunk; those of later chunks follow.
fn partial_piece(a: &Attend, token: u32, head: u32, chunk: u32, max_chunks: u32) -> Piece {
    let row = 4 * u64::from(a.partial_len());
    let before = u64::from(token) * u64::from(a.heads) + u64::from(head);
    let offset = (before * u64::from(max_chunks) + u64::from(chunk)) * row;
    Piece {
        operand: PARTIAL,
        offset,
        runs: 1,
        run_bytes: 0,
        stride: u64::from(max_chunks) * row,
        activations: false,
    }
}

fn merge_work(a: &Attend, rows: QueryRows, chunks: u32) -> Work {
    let each = u64::from(rows.tokens * rows.heads) * u64::from(chunks);
    let simple = 2 * each * u64::from(a.value_dim);
    Work::Vector(VectorWork { simple, exp: 2 * each, divide: each, ..Default::default() })
}

/// Returns the vector work of turning the scores of a page into softmax numerators.
fn softmax_work(rows: u32) -> Work {
    let each = u64::from(rows) * u64::from(PAGE_POSITIONS);
    Work::Vector(VectorWork { simple: 3 * each, exp: each, ..Default::default() })
}

/// Maximum chunks that one command merges.
const MERGED: u32 = 32;

/// Returns the program of the second phase for one head.
fn merge_program(a: &Attend, rows: QueryRows, max_chunks: u32) -> TileProgram {
    let mut b = Builder::default();
    let partial_bytes = 4 * u64::from(a.partial_len());
    let mut partial_ring = b.ring(2, u64::from(MERGED) * partial_bytes);
    let mut state_ring = b.ring(2, partial_bytes);
    let mut out_ring = b.ring(1, 4 * u64::from(a.value_dim));
    let mut sink_ring = b.ring(1, 4);
    for i in 0..rows.tokens {
        let rows = QueryRows { token: rows.token + i, tokens: 1, position: a.last(rows, i), ..rows };
        let sinks = a.sinks.then(|| b.load(&mut sink_ring, [sinks(rows)], 1));
        let all = a.chunks_of(rows);
        let mut state: Option<Entry> = None;
        for chunks in blocks(all.clone(), MERGED) {
            let last = chunks.end == all.end;
            let run_bytes = chunks.len() as u32 * partial_bytes as u32;
            let piece =
                Piece { run_bytes, ..partial_piece(a, rows.token, rows.head, chunks.start, max_chunks) };
            let partial = b.load(&mut partial_ring, [piece], 1);
            let mut reads = vec![partial];
            reads.extend(state);
            reads.extend(sinks.filter(|_| last));
            let work = merge_work(a, rows, chunks.len() as u32);
            let step = Step::Merge { rows, chunks, fresh: state.is_none(), last };
            let to = match last {
                true => (&mut out_ring, a.floats(rows, a.value_dim)),
                false => (&mut state_ring, a.floats(rows, a.partial_len())),
            };
            state = Some(b.compute((work, step), &reads, [to], &reads)[0]);
        }
        if let Some(out) = state {
            b.store(out, [outputs(a, rows)]);
        }
    }
    b.finish()
}
