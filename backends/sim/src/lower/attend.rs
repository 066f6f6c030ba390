//! Attention over a paged KV cache.

use std::collections::VecDeque;
use std::ops::Range;

use super::{Closed, HEADS, Pipeline, aligned, blocks, too_small};
use crate::chip::Chip;
use crate::places::{Amounts, Data, Traffic};
use crate::shape::Attend;
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

    /// Returns the chunks that token `i` sees.
    fn chunks(&self, rows: QueryRows, i: u32) -> Range<u32> {
        let chunks = self.sight.chunks((rows.position + i) as usize, rows.end as usize);
        chunks.start as u32..chunks.end as u32
    }

    /// Returns the chunks that any of the tokens sees.
    fn chunks_of(&self, rows: QueryRows) -> Range<u32> {
        self.chunks(rows, 0).start..self.chunks(rows, rows.tokens.max(1) - 1).end
    }

    /// Returns the number of tokens that see a chunk.
    fn visible_tokens(&self, rows: QueryRows, chunk: u32) -> u32 {
        let sees = |i: &u32| self.chunks(rows, *i).contains(&chunk);
        (0..rows.tokens).filter(sees).count() as u32
    }

    /// Returns the bytes of `floats` floats per row of queries.
    fn floats(&self, rows: QueryRows, each: u32) -> u64 {
        4 * u64::from(rows.tokens * rows.heads) * u64::from(each)
    }

    /// Returns the scratchpad bytes for the given rows of queries.
    fn scratch_bytes(&self, page_bytes: u64, rows: u32, depth: Depth) -> u64 {
        let rows = u64::from(rows);
        let Depth { chunks, ahead, slots } = depth;
        let floats = |each: u32| aligned(4 * rows * u64::from(each));
        u64::from(slots) * (floats(self.key_dim) + aligned(u64::from(chunks) * page_bytes))
            + u64::from(3 + ahead) * floats(chunks * PAGE_POSITIONS)
            + 2 * floats(chunks * self.partial_len())
            + 2 * floats(self.partial_len())
            + floats(self.value_dim)
            + aligned(4 * rows)
    }
}

/// What a page of one KV head is made of.
#[derive(Debug, Clone, Copy)]
struct Pages {
    bytes: u64,
    /// Runs of bytes.
    pieces: u32,
}

impl Pages {
    fn of(a: &Attend) -> Pages {
        let pieces = a.page(0, 0);
        Pages { bytes: pieces.iter().map(|(_, bytes)| u64::from(*bytes)).sum(), pieces: pieces.len() as u32 }
    }
}

/// How far a tile's pipeline reaches: more of each hides more latency, and takes more of the scratchpad.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Depth {
    /// Chunks of a command.
    chunks: u32,
    /// Commands whose scores are computed before the values of an earlier one are weighted, so that the matrix unit does not
    /// wait for the vector unit.
    ahead: u32,
    /// Slots for the pages of a command, and for its queries.
    slots: u32,
}

impl Depth {
    /// All that are worth a try, from the one that needs the least.
    fn all() -> impl Iterator<Item = Depth> {
        let pipelines = [(0, 1), (0, 2), (1, 3), (1, 4), (2, 6), (4, 10)];
        let chunks = [1, 2, 4, 8, 16];
        chunks
            .into_iter()
            .flat_map(move |chunks| pipelines.map(|(ahead, slots)| Depth { chunks, ahead, slots }))
    }
}

/// Query rows that are processed together, and their pages.
struct AttendWork<'a> {
    rows: QueryRows,
    pages: &'a [u32],
}

/// Work in pieces of at most some heads of one KV head and some tokens, and what its time depends on.
#[derive(Clone, Copy)]
struct Division {
    heads: u32,
    token_group: u32,
    /// Number of pieces.
    pieces: u32,
    /// Chunks of all pieces.
    chunks: u32,
    /// Chunks of the tile that has the most, if tiles take pieces in turns.
    most: u32,
    /// The piece that sees the most chunks, and their number.
    longest: (QueryRows, u32),
    /// Rows of queries of all pieces.
    queries: u32,
}

impl Division {
    /// Divides the work; absent if there is none.
    fn new(chip: &Chip, a: &Attend, heads: u32, token_group: u32) -> Option<Division> {
        // All heads see the same chunks.
        let runs = head_runs(a, heads).count();
        let last = head_runs(a, heads).last()?;
        let seen: Vec<(QueryRows, u32)> =
            (rows_of(a, last, token_group)).map(|(rows, _)| (rows, a.chunks_of(rows).len() as u32)).collect();
        let pieces = (runs * seen.len()) as u32;
        let mut tiles = vec![0; chip.tiles.min(pieces) as usize];
        let all = (0..runs).flat_map(|_| &seen);
        for ((_, seen), tile) in all.zip((0..tiles.len()).cycle()) {
            tiles[tile] += seen;
        }
        Some(Division {
            heads,
            token_group,
            pieces,
            chunks: tiles.iter().sum(),
            most: tiles.into_iter().max().unwrap_or(0),
            longest: *seen.iter().max_by_key(|(_, seen)| *seen)?,
            queries: head_runs(a, heads).map(|run| run.end - run.start).sum::<u32>()
                * a.spans.iter().map(|(_, _, len)| len).sum::<u32>(),
        })
    }
}

impl Division {
    /// Bytes of pages that all tiles load.
    fn traffic(&self, pages: Pages) -> Traffic {
        let bytes = f64::from(self.chunks) * pages.bytes as f64;
        Traffic { read: Amounts::default().with(Data::Cache, bytes), ..Traffic::default() }
    }
}

/// How attention is divided.
struct AttendTiling {
    depth: Depth,
    /// Maximum rows of queries of a tile.
    rows: u32,
    division: Division,
    /// Chunks of a tile if each takes an equal run of all chunks, so that some sequences are split between tiles.
    chunks_per_tile: Option<u32>,
}

/// Returns the heads of pieces: at most `heads` heads of one KV head.
fn head_runs(a: &Attend, heads: u32) -> impl Iterator<Item = Range<u32>> {
    let group = a.heads / a.kv_heads.max(1);
    (0..a.kv_heads).flat_map(move |h| blocks(h * group..(h + 1) * group, heads))
}

/// Returns the pieces of some heads, of at most `token_group` tokens, with their pages.
fn rows_of(a: &Attend, heads: Range<u32>, token_group: u32) -> impl Iterator<Item = (QueryRows, &[u32])> {
    let (head, heads) = (heads.start, heads.end - heads.start);
    let firsts = a.spans.iter().scan(0, |next, (_, _, len)| {
        let first = *next;
        *next += len;
        Some(first)
    });
    a.spans.iter().zip(firsts).flat_map(move |((pages, start, len), first)| {
        blocks(0..*len, token_group).map(move |range| {
            let rows = QueryRows {
                token: first + range.start,
                tokens: range.end - range.start,
                position: start + range.start,
                end: start + len,
                head,
                heads,
            };
            (rows, &pages[..])
        })
    })
}

/// Returns the work of a division.
fn divide<'a>(a: &'a Attend, division: &Division) -> Vec<AttendWork<'a>> {
    let runs = head_runs(a, division.heads);
    let pieces = runs.flat_map(|run| rows_of(a, run, division.token_group));
    pieces.map(|(rows, pages)| AttendWork { rows, pages }).collect()
}

/// Returns the division with the shortest time by the closed form, and the time.
fn attend_tiling(chip: &Chip, a: &Attend) -> Result<(AttendTiling, f64)> {
    let group = a.heads / a.kv_heads.max(1);
    let tokens: u32 = a.spans.iter().map(|(_, _, n)| n).sum();
    let pages = Pages::of(a);
    let mut divided: Vec<((u32, u32), Option<Division>)> = Vec::new();
    let mut best: Option<(AttendTiling, f64)> = None;
    let longest = a.spans.iter().map(|(pages, ..)| pages.len()).max().unwrap_or(0);
    for depth in Depth::all().filter(|d| d.chunks == 1 || (d.chunks as usize) < 2 * longest) {
        let fits = |rows: &u32| a.scratch_bytes(pages.bytes, *rows, depth) <= chip.scratch_bytes;
        let Some(fit) = (1..=HEADS).rev().find(fits) else { continue };
        let heads = group.min(fit);
        // Group tokens as long as every tile has work.
        let spread = (tokens * a.kv_heads * group.div_ceil(heads)).div_ceil(chip.tiles);
        let token_group = (fit / heads).min(spread).max(1);
        let key = (heads, token_group);
        let division = match divided.iter().find(|(known, _)| *known == key) {
            Some((_, division)) => *division,
            None => {
                let division = Division::new(chip, a, heads, token_group);
                divided.push((key, division));
                division
            }
        };
        let Some(division) = division else { continue };
        let per_tile = division.chunks.div_ceil(chip.tiles).max(1);
        for chunks_per_tile in [None, Some(per_tile)] {
            let tiling = AttendTiling { depth, rows: heads * token_group, division, chunks_per_tile };
            let seconds = tiling.seconds(chip, a, pages);
            if best.as_ref().is_none_or(|(_, least)| seconds < *least) {
                best = Some((tiling, seconds));
            }
        }
    }
    let least = Depth { chunks: 1, ahead: 0, slots: 1 };
    best.ok_or_else(|| too_small(chip, "a page of the cache", a.scratch_bytes(pages.bytes, 1, least)))
}

/// Returns the time of attention by the closed form.
pub fn attend_closed(chip: &Chip, a: &Attend) -> Result<Closed> {
    let (tiling, seconds) = attend_tiling(chip, a)?;
    let pages = Pages::of(a);
    let used_bytes = a.scratch_bytes(pages.bytes, tiling.rows, tiling.depth);
    Ok(Closed::new(chip, seconds, chip.memory_s(&tiling.division.traffic(pages)), used_bytes))
}

impl AttendTiling {
    /// Returns the seconds by the closed form.
    fn seconds(&self, chip: &Chip, a: &Attend, pages: Pages) -> f64 {
        let division = &self.division;
        let (rows, longest) = (&division.longest.0, division.longest.1);
        let Depth { ahead, slots, .. } = self.depth;
        let pieces = division.pieces;
        // Of the tile that has the most.
        let (chunks, works) = match self.chunks_per_tile {
            Some(chunks) => (chunks, chunks.div_ceil(longest.max(1))),
            None => (division.most, pieces.div_ceil(chip.tiles.min(pieces))),
        };
        // The last command of each piece of work may have fewer.
        let whole = chunks.div_ceil(works.max(1));
        let count = works * whole.div_ceil(self.depth.chunks);
        let each = self.depth.chunks.min(whole);
        let (engine, signal) = (chip.engine_bytes_per_s(), chip.semaphore_s());
        let queries = rows.tokens * rows.heads;
        let rate = chip.attention_rate();
        let matrix =
            |n, k| chip.compute_s(Work::Matrix { rate, m: queries, n, k, sums_bytes: 0, sparse: false });
        let positions = each * PAGE_POSITIONS;
        let (score, weigh) = (matrix(positions, a.key_dim), matrix(a.value_dim, positions));
        let softmax = chip.compute_s(softmax_work(a, queries, each));
        let is_split = self.chunks_per_tile.is_some();
        let merge = if is_split { (0.0, 0.0) } else { chip.compute_s(merge_work(a, *rows, each)) };
        let setup_s = chip.setup_s(&Piece::whole(PAGES, 0, 1).of(Data::Cache));
        let bytes = f64::from(pages.bytes as u32);
        let partial = if is_split { 4.0 * f64::from(queries * each * a.partial_len()) } else { 0.0 };
        let load_s = f64::from(each) * bytes / engine;
        let chain_s = score.0 + score.1 + softmax.0 + softmax.1 + weigh.0 + weigh.1 + 2.0 * signal;
        let arrives_s = setup_s + load_s + 2.0 * signal;
        // A slot is loaded, waits for its turn, and is read; the commands under way hold the others.
        let slot_s =
            if slots > ahead + 1 { arrives_s / f64::from(slots - ahead - 1) } else { arrives_s + chain_s };
        let pipeline = Pipeline {
            count: f64::from(count),
            load_s,
            units_s: [score.0 + weigh.0, softmax.0 + merge.0],
            drain_s: score.1 + softmax.1 + weigh.1 + merge.1 + 2.0 * signal,
            ahead_s: 0.0,
            least_pace_s: slot_s
                .max(chain_s / f64::from(ahead + 1))
                .max((arrives_s + chain_s) / f64::from(slots)),
            slots: f64::from(slots),
            store_s: partial / engine,
            device_s: chip.memory_s(&division.traffic(pages)),
            setup_s,
            requests: (f64::from(each * pages.pieces), if is_split { f64::from(rows.tokens) } else { 0.0 }),
        };
        let query_s = f64::from(works) * chip.activation_bytes() * f64::from(queries * a.key_dim) / engine;
        let mut seconds = pipeline.seconds(chip) + query_s;
        if is_split {
            let heads = division.queries;
            let chunks = f64::from(division.chunks) * f64::from(rows.heads) / f64::from(heads);
            let one = QueryRows { heads: 1, tokens: 1, ..*rows };
            let merge = chip.compute_s(merge_work(a, one, chunks as u32));
            let load_s = chunks * 4.0 * f64::from(a.partial_len()) / engine;
            let rounds = f64::from(heads.div_ceil(chip.tiles));
            let latency_s = 2.0 * setup_s + 2.0 * signal + merge.1;
            // With two slots, the next rows load meanwhile.
            let pace_s = load_s.max(merge.0).max((latency_s + load_s + merge.0) / 2.0);
            seconds += chip.barrier_s() + latency_s + load_s + merge.0 + (rounds - 1.0) * pace_s;
        }
        seconds
    }
}

pub fn attend_phases(chip: &Chip, a: &Attend, lowered: &mut Lowered) -> Result<()> {
    let (tiling, _) = attend_tiling(chip, a)?;
    let work = &divide(a, &tiling.division);
    let Some(chunks_per_tile) = tiling.chunks_per_tile else {
        let tiles = chip.tiles.min(work.len() as u32) as usize;
        let programs = (0..tiles).map(|tile| {
            let all = work.iter().skip(tile).step_by(tiles).map(|w| (w, a.chunks_of(w.rows)));
            tile_program(chip, a, &tiling, all, None)
        });
        lowered.phases.push(programs.collect());
        return Ok(());
    };
    // Split chunks between tiles, then merge. Partial results are stored as `[token][head][chunk]`.
    let max_chunks = work.iter().map(|w| a.chunks_of(w.rows).end).max().unwrap_or(0);
    let tokens: u32 = a.spans.iter().map(|(_, _, n)| n).sum();
    let rows = u64::from(tokens) * u64::from(a.heads);
    lowered.temps.push(4 * rows * u64::from(max_chunks) * u64::from(a.partial_len()));
    let mut runs: Vec<Vec<(&AttendWork<'_>, Range<u32>)>> = Vec::new();
    let mut left = 0;
    for w in work.iter() {
        let mut chunks = a.chunks_of(w.rows);
        while !chunks.is_empty() {
            if left == 0 {
                runs.push(Vec::new());
                left = chunks_per_tile;
            }
            let end = chunks.end.min(chunks.start + left);
            left -= end - chunks.start;
            if let Some(run) = runs.last_mut() {
                run.push((w, chunks.start..end));
            }
            chunks.start = end;
        }
    }
    let programs = runs.into_iter().map(|run| tile_program(chip, a, &tiling, run, Some(max_chunks)));
    lowered.phases.push(programs.collect());
    let rows = work.iter().flat_map(|w| (0..w.rows.tokens * w.rows.heads).map(move |i| (w.rows, i)));
    let one = |(rows, i): (QueryRows, u32)| {
        let token = i / rows.heads;
        QueryRows {
            token: rows.token + token,
            tokens: 1,
            position: rows.position + token,
            end: rows.end,
            head: rows.head + i % rows.heads,
            heads: 1,
        }
    };
    let rows: Vec<QueryRows> = rows.map(one).collect();
    let tiles = rows.len().min(chip.tiles as usize);
    let programs = (0..tiles).map(|tile| merge_program(a, rows.iter().skip(tile).step_by(tiles), max_chunks));
    lowered.phases.push(programs.collect());
    Ok(())
}

/// Returns the program of a tile for the given chunks of query rows. It merges the results of chunks, or stores the result of
/// each, of `store_chunks`, for the second phase.
fn tile_program<'w>(
    chip: &Chip,
    a: &Attend,
    tiling: &AttendTiling,
    work: impl IntoIterator<Item = (&'w AttendWork<'w>, Range<u32>)>,
    store_chunks: Option<u32>,
) -> TileProgram {
    let mut b = Builder::default();
    let mut rings = AttendRings::new(&mut b, a, tiling.rows, tiling.depth);
    let mut tile = Tile { chip, a, b: &mut b };
    let mut waiting = VecDeque::new();
    let mut state = None;
    for (w, chunks) in work {
        let queries = rings.load_queries(&mut tile, w.rows);
        for part in blocks(chunks.clone(), tiling.depth.chunks) {
            let is_last = part.end == chunks.end;
            waiting.push_back(rings.softmax(&mut tile, w, queries, part, is_last));
            if waiting.len() > tiling.depth.ahead as usize
                && let Some(pages) = waiting.pop_front()
            {
                rings.finish(&mut tile, pages, &mut state, store_chunks);
            }
        }
    }
    for pages in waiting {
        rings.finish(&mut tile, pages, &mut state, store_chunks);
    }
    b.finish()
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
    fn new(b: &mut Builder, a: &Attend, rows: u32, depth: Depth) -> AttendRings {
        let floats = |each: u32| 4 * u64::from(rows) * u64::from(each);
        let Depth { chunks, ahead, slots } = depth;
        AttendRings {
            queries: b.ring(slots, floats(a.key_dim)),
            sinks: b.ring(1, floats(1)),
            page: b.ring(slots, u64::from(chunks) * Pages::of(a).bytes),
            scores: b.ring(2, floats(chunks * PAGE_POSITIONS)),
            softmax: b.ring(ahead + 1, floats(chunks * PAGE_POSITIONS)),
            partial: b.ring(2, floats(chunks * a.partial_len())),
            state: b.ring(2, floats(a.partial_len())),
            out: b.ring(1, floats(a.value_dim)),
        }
    }

    fn load_queries(&mut self, tile: &mut Tile<'_>, rows: QueryRows) -> Entry {
        let a = tile.a;
        let row = 4 * u64::from(a.key_dim);
        let piece = Piece {
            operand: QUERIES,
            offset: (u64::from(rows.token) * u64::from(a.heads) + u64::from(rows.head)) * row,
            runs: rows.tokens,
            run_bytes: rows.heads * row as u32,
            stride: u64::from(a.heads) * row,
            data: Data::Activations,
        };
        tile.b.load(&mut self.queries, [piece], 1)
    }

    /// Loads the pages of some chunks, and computes the softmax numerators of their scores.
    fn softmax(
        &mut self,
        tile: &mut Tile<'_>,
        work: &AttendWork<'_>,
        queries: Entry,
        chunks: Range<u32>,
        is_last: bool,
    ) -> Chunks {
        let Tile { chip, a, b } = tile;
        let rows = work.rows;
        let kv_head = rows.head / (a.heads / a.kv_heads.max(1)).max(1);
        let pieces = chunks.clone().flat_map(|chunk| {
            let number = work.pages.get(chunk as usize).copied().unwrap_or(u32::MAX);
            a.page(number, kv_head)
        });
        let pieces = pieces.map(|(offset, bytes)| Piece::whole(PAGES, offset, bytes).of(Data::Cache));
        let pages = b.load(&mut self.page, pieces, 1);
        let visible = chunks.clone().map(|chunk| a.visible_tokens(rows, chunk)).max();
        let visible_rows = visible.unwrap_or(0) * rows.heads;
        let count = chunks.len() as u32;
        let rate = chip.attention_rate();
        let score = Work::Matrix {
            rate,
            m: visible_rows,
            n: count * PAGE_POSITIONS,
            k: a.key_dim,
            sums_bytes: 0,
            sparse: false,
        };
        let table = a.floats(rows, count * PAGE_POSITIONS);
        let [scores] = b.compute((score, Step::Part), &[queries, pages], [(&mut self.scores, table)], &[]);
        let to = (&mut self.softmax, table);
        let work = (softmax_work(a, visible_rows, count), Step::Part);
        let [softmax] = b.compute(work, &[scores], [to], &[scores]);
        Chunks { rows, queries, chunks, is_last, visible_rows, pages, softmax }
    }

    /// Computes the partial results of chunks. The simulated step also computes the scores and the softmax. Then merges
    /// them into those of earlier chunks, or stores them.
    fn finish(
        &mut self,
        tile: &mut Tile<'_>,
        from: Chunks,
        state: &mut Option<Entry>,
        store_chunks: Option<u32>,
    ) {
        let Tile { chip, a, b } = tile;
        let Chunks { rows, queries, chunks, is_last, visible_rows, pages, softmax } = from;
        let count = chunks.len() as u32;
        let rate = chip.attention_rate();
        let work = Work::Matrix {
            rate,
            m: visible_rows,
            n: a.value_dim,
            k: count * PAGE_POSITIONS,
            sums_bytes: 0,
            sparse: false,
        };
        let mut frees = vec![pages, softmax];
        frees.extend(is_last.then_some(queries));
        let to = (&mut self.partial, a.floats(rows, count * a.partial_len()));
        let step = Step::Pages { rows, chunks: chunks.clone() };
        let [partial] = b.compute((work, step), &[queries, pages, softmax], [to], &frees);
        if let Some(max_chunks) = store_chunks {
            let pieces = (0..rows.tokens).map(|i| Piece {
                runs: rows.heads,
                run_bytes: 4 * count * a.partial_len(),
                ..partial_piece(a, rows.token + i, rows.head, chunks.start, max_chunks)
            });
            b.store(partial, pieces);
            return;
        }
        let sinks = (is_last && a.sinks).then(|| b.load(&mut self.sinks, [sinks(rows)], 1));
        let step = Step::Merge { rows, chunks, fresh: state.is_none(), last: is_last };
        let mut reads = vec![partial];
        reads.extend(state.take());
        reads.extend(sinks);
        let to = match is_last {
            true => (&mut self.out, a.floats(rows, a.value_dim)),
            false => (&mut self.state, a.floats(rows, a.partial_len())),
        };
        let [merged] = b.compute((merge_work(a, rows, count), step), &reads, [to], &reads);
        match is_last {
            true => b.store(merged, [outputs(a, rows)]),
            false => *state = Some(merged),
        }
    }
}

/// A tile's program for attention, under construction.
struct Tile<'t> {
    chip: &'t Chip,
    a: &'t Attend,
    b: &'t mut Builder,
}

/// Pages in the scratchpad, with the softmax numerators of some query rows.
struct Chunks {
    rows: QueryRows,
    queries: Entry,
    chunks: Range<u32>,
    /// Whether they are the last of the tile's chunks of these rows.
    is_last: bool,
    visible_rows: u32,
    pages: Entry,
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
        data: Data::Activations,
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
        data: Data::Partial,
    }
}

fn merge_work(a: &Attend, rows: QueryRows, chunks: u32) -> Work {
    let each = u64::from(rows.tokens * rows.heads) * u64::from(chunks);
    let simple = 2 * each * u64::from(a.value_dim);
    Work::Vector(VectorWork { simple, exp: 2 * each, divide: each, ..Default::default() })
}

/// Returns the vector work of turning the scores of chunks into softmax numerators.
fn softmax_work(a: &Attend, rows: u32, chunks: u32) -> Work {
    let each = u64::from(rows) * u64::from(chunks * PAGE_POSITIONS);
    Work::Vector(VectorWork { simple: (3 + 3 * u64::from(a.slopes)) * each, exp: each, ..Default::default() })
}

/// Maximum chunks that one command merges.
const MERGED: u32 = 32;

/// Returns a tile's program of the second phase, for some rows of one token and head each.
fn merge_program<'r>(
    a: &Attend,
    all_rows: impl Iterator<Item = &'r QueryRows>,
    max_chunks: u32,
) -> TileProgram {
    let mut b = Builder::default();
    let partial_bytes = 4 * u64::from(a.partial_len());
    let mut partial_ring = b.ring(2, u64::from(MERGED) * partial_bytes);
    let mut state_ring = b.ring(2, partial_bytes);
    let mut out_ring = b.ring(2, 4 * u64::from(a.value_dim));
    let mut sink_ring = b.ring(1, 4);
    for &rows in all_rows {
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
