//! Sixteen rows in lanes: tiles for many tokens, and blocks read directly for a few.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use core::marker::PhantomData;
use core::ops::Range;

use super::{CHUNK, Inputs, TILE_TOKENS, Task, XChunk};
use crate::formats::{Bytes, Interleave, Interleaved, Layout, Quantised, ROWS, Shape, ShortBlocks, Unpacked};
use crate::isa::Isa;

/// The scales of sixteen rows of a chunk, one row in each lane.
pub(super) trait Scales<I: Isa>: Copy {
    /// The scale of a group.
    fn d(self, isa: I, group: usize) -> I::F;
    /// The minimum of a group.
    fn m(self, isa: I, group: usize) -> I::F;
    /// Factors of the minimum as 16-bit pairs: number `2 i` has those of sums `4 i` and `4 i + 2`, number
    /// `2 i + 1` those of `4 i + 1` and `4 i + 3`.
    fn mins(self, isa: I, pair: usize) -> I::I;
}

/// Sixteen rows of a chunk, one in each lane: what a dot product reads.
trait Source<I: Isa>: Scales<I> {
    /// Whether reading code bytes is much shorter where the number of the word is a constant.
    const UNROLLED: bool;
    /// The code bytes of values `32 part + 4 k` and the next seven, as [`Isa::pair`].
    fn codes(self, isa: I, part: usize, k: usize) -> [I::I; 2];
    /// The integer sub-scale of the `s`-th [`Quantised::SUB`] values.
    fn sub(self, isa: I, s: usize) -> I::I;
}

/// Interleaved blocks of one chunk, and the sub-scales and minimums that stand in them.
#[derive(Clone, Copy)]
struct Direct<'a, Q: Interleaved> {
    lanes: &'a [Q::Lanes],
    /// Whether they are read from a file, in order.
    streamed: bool,
    subs: &'a [[u8; 64]; 4],
    mins: &'a [[u8; 64]; 4],
}

/// How far ahead interleaved blocks are asked for.
const STREAM_BYTES: usize = 8 * 1024;

/// Four words of sub-scales or minimums.
type Words = [[u8; 64]; 4];

/// Stores the sub-scales and minimums of a chunk.
#[inline(always)]
pub(super) fn store_subs<I: Isa, Q: Interleaved>(
    isa: I,
    lanes: &[Q::Lanes],
    subs: &mut Words,
    mins: &mut Words,
) {
    if Q::GROUP < CHUNK {
        return;
    }
    let Some(lanes) = lanes.first() else { return };
    // With one sub-scale for each 32 values only two words are used.
    let words = if Q::SUB == 16 { 4 } else { 2 };
    if Q::SUB < CHUNK {
        let all = Q::subs(isa, lanes);
        for i in 0..words {
            isa.store_words(all[i], &mut subs[i]);
        }
    }
    if Q::HAS_MIN {
        let all = Q::mins(isa, lanes);
        for i in 0..words {
            isa.store_words(all[i], &mut mins[i]);
        }
    }
}

impl<I: Isa, Q: Interleaved> Scales<I> for Direct<'_, Q> {
    #[inline(always)]
    fn d(self, isa: I, group: usize) -> I::F {
        let groups = Q::LEN / Q::GROUP;
        Q::d(isa, &self.lanes[group / groups], group % groups)
    }
    #[inline(always)]
    fn m(self, isa: I, group: usize) -> I::F {
        Q::m(isa, &self.lanes[group * Q::GROUP / Q::LEN])
    }
    #[inline(always)]
    fn mins(self, isa: I, pair: usize) -> I::I {
        let word = isa.load_words(&self.mins[pair / 2]);
        isa.and_i(isa.shr_by(word, 8 * (pair % 2) as u32), isa.splat_i(0x00ff_00ff))
    }
}

impl<I: Isa, Q: Interleaved> Source<I> for Direct<'_, Q> {
    const UNROLLED: bool = true;
    #[inline(always)]
    fn codes(self, isa: I, part: usize, k: usize) -> [I::I; 2] {
        if self.streamed {
            // The CPU's own prefetcher follows words that are read in order, but not far enough ahead.
            let share = size_of::<Q::Lanes>() / (Q::LEN / 32);
            prefetch_quarter(isa, self.lanes, STREAM_BYTES + part * share, share, k / 2);
        }
        let parts = Q::LEN / 32;
        let (lanes, part) = (&self.lanes[part / parts], part % parts);
        isa.pair([Q::code(isa, lanes, part, k), Q::code(isa, lanes, part, k + 1)])
    }
    #[inline(always)]
    fn sub(self, isa: I, s: usize) -> I::I {
        let word = isa.load_words(&self.subs[s / 4]);
        isa.sar_i::<24>(isa.shl_by(word, 24 - 8 * (s % 4) as u32))
    }
}

/// Sixteen rows of one chunk, expanded.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Tile {
    codes: [[u8; 64]; CHUNK / 4],
    sub: [[i32; 16]; 16],
    mins: [[u8; 64]; 8],
    d: [[f32; 16]; 16],
    m: [[f32; 16]; 16],
}

impl<I: Isa> Scales<I> for &Tile {
    #[inline(always)]
    fn d(self, isa: I, group: usize) -> I::F {
        isa.load(&self.d[group])
    }
    #[inline(always)]
    fn m(self, isa: I, group: usize) -> I::F {
        isa.load(&self.m[group])
    }
    #[inline(always)]
    fn mins(self, isa: I, pair: usize) -> I::I {
        isa.load_words(&self.mins[pair])
    }
}

impl<I: Isa> Source<I> for &Tile {
    const UNROLLED: bool = false;
    #[inline(always)]
    fn codes(self, isa: I, part: usize, k: usize) -> [I::I; 2] {
        [isa.load_words(&self.codes[8 * part + k]), isa.load_words(&self.codes[8 * part + k + 1])]
    }
    #[inline(always)]
    fn sub(self, isa: I, s: usize) -> I::I {
        isa.load_i(&self.sub[s])
    }
}

impl Tile {
    const ZERO: Tile = Tile {
        codes: [[0; 64]; CHUNK / 4],
        sub: [[0; 16]; 16],
        mins: [[0; 64]; 8],
        d: [[0.0; 16]; 16],
        m: [[0.0; 16]; 16],
    };

    /// From interleaved blocks.
    #[inline(always)]
    pub(super) fn expand<I: Isa, Q: Interleaved>(&mut self, isa: I, lanes: &[Q::Lanes]) {
        let (mut subs, mut mins) = ([[0; 64]; 4], [[0; 64]; 4]);
        store_subs::<I, Q>(isa, lanes, &mut subs, &mut mins);
        let source = Direct::<Q> { lanes, streamed: false, subs: &subs, mins: &mins };
        for part in 0..lanes.len() * Q::LEN / 32 {
            for k in (0..8).step_by(2) {
                let pair = source.codes(isa, part, k);
                isa.store_words(pair[0], &mut self.codes[8 * part + k]);
                isa.store_words(pair[1], &mut self.codes[8 * part + k + 1]);
            }
        }
        for group in 0..lanes.len() * Q::LEN / Q::GROUP {
            isa.store(source.d(isa, group), &mut self.d[group]);
            if Q::HAS_MIN {
                isa.store(source.m(isa, group), &mut self.m[group]);
            }
        }
        if Q::GROUP == CHUNK && Q::SUB < CHUNK {
            for s in 0..CHUNK / Q::SUB {
                isa.store_i(source.sub(isa, s), &mut self.sub[s]);
            }
        }
        if Q::GROUP == CHUNK && Q::HAS_MIN {
            for pair in 0..CHUNK / Q::SUB / 2 {
                isa.store_words(source.mins(isa, pair), &mut self.mins[pair]);
            }
        }
    }

    /// From rows in normal form; for formats without minimums.
    #[inline(always)]
    pub(super) fn set<I: Isa, Q: Quantised>(&mut self, isa: I, rows: &[Unpacked; ROWS]) {
        const { assert!(!Q::HAS_MIN && Q::SIGNED && (Q::GROUP < CHUNK || Q::SUB == 16)) };
        let bytes = Unpacked::all_bytes(rows);
        for quad in 0..CHUNK / 16 {
            let words = isa.transpose(&bytes[16 * quad..], size_of::<Unpacked>());
            for i in (0..4).step_by(2) {
                let pair = isa.pair([isa.signed(words[i]), isa.signed(words[i + 1])]);
                isa.store_words(pair[0], &mut self.codes[4 * quad + i]);
                isa.store_words(pair[1], &mut self.codes[4 * quad + i + 1]);
            }
        }
        for r in 0..ROWS {
            for g in 0..CHUNK / Q::GROUP {
                self.d[g][r] = rows[r].d[g];
            }
            if Q::GROUP == CHUNK {
                for s in 0..16 {
                    self.sub[s][r] = rows[r].sub[s].into();
                }
            }
        }
    }
}

/// Blocks of a chunk, at most.
const BLOCKS: usize = CHUNK / 32;

/// Memory for the interleaved blocks of one chunk of any format.
#[repr(C, align(64))]
pub(super) struct ChunkBuffer([u8; ROWS * BLOCKS * 34]);

impl ChunkBuffer {
    pub(super) const ZERO: ChunkBuffer = ChunkBuffer([0; ROWS * BLOCKS * 34]);
}

/// The interleaved blocks of chunk `c` of sixteen rows: where they are, or in `buffer`.
#[inline(always)]
pub(super) fn lanes_of<'b, I: Isa, Q: Interleaved>(
    isa: I,
    task: &Task<'b, '_, Q>,
    first: usize,
    c: usize,
    buffer: &'b mut ChunkBuffer,
) -> &'b [Q::Lanes] {
    let start = c * CHUNK / Q::LEN;
    let count = (CHUNK / Q::LEN).min(task.row_blocks - start);
    if task.layout == Layout::Interleaved && first + ROWS <= task.rows {
        let group = &task.w[first * task.row_blocks..][..ROWS * task.row_blocks];
        return &Q::Lanes::cast(Q::bytes_of(group))[start..start + count];
    }
    const { assert!(CHUNK / Q::LEN * size_of::<Q::Lanes>() <= size_of::<ChunkBuffer>()) };
    let buffer = &mut Q::Lanes::cast_mut(&mut buffer.0)[..count];
    let stride = task.row_blocks * size_of::<Q>();
    let group = task.w.get(first * task.row_blocks..).unwrap_or(&[]);
    let rows = group.get(start..).unwrap_or(&[]);
    if first + ROWS <= task.rows {
        for pair in (0..count).step_by(2) {
            let end = (pair + 2).min(count);
            prefetch_next::<I, Q, ROWS>(isa, group, task.row_blocks, start + pair, end - pair);
            Q::Lanes::interleave(isa, Q::bytes_of(&rows[pair..]), stride, &mut buffer[pair..end]);
        }
        return buffer;
    }
    let mut blocks = [[task.w[0]; BLOCKS]; ROWS];
    for r in 0..ROWS {
        blocks[r][..count].copy_from_slice(&task.row(first + r)[start..start + count]);
    }
    let bytes = <[Q; BLOCKS]>::bytes_of(&blocks);
    Q::Lanes::interleave(isa, bytes, BLOCKS * size_of::<Q>(), buffer);
    buffer
}

/// Prefetches the part of the next `R` rows that corresponds, in the order of memory, to `count` blocks of
/// these rows from number `start` on. The CPU's own prefetcher follows one row, not many.
#[inline(always)]
pub(super) fn prefetch_next<I: Isa, B: Bytes, const R: usize>(
    isa: I,
    w: &[B],
    row_blocks: usize,
    start: usize,
    count: usize,
) {
    let ahead = R * (row_blocks + start) * size_of::<B>();
    for line in (0..count * R * size_of::<B>()).step_by(64) {
        isa.prefetch::<false, _>(B::bytes_of(w), ahead + line);
    }
}

/// Prefetches a quarter of the `bytes` bytes that start `ahead` bytes after `place`. Many requests at once
/// would delay the present reads.
#[inline(always)]
fn prefetch_quarter<I: Isa, T>(isa: I, place: &[T], ahead: usize, bytes: usize, quarter: usize) {
    let line = |quarter: usize| (quarter * bytes / 4).next_multiple_of(64);
    for line in (line(quarter)..line(quarter + 1)).step_by(64) {
        isa.prefetch::<false, _>(place, ahead + line);
    }
}

/// One short block of each row, in registers.
struct Transposed<'a, I: Isa, Q>(&'a ShortBlocks<I>, PhantomData<Q>);

impl<I: Isa, Q> Copy for Transposed<'_, I, Q> {}

impl<I: Isa, Q> Clone for Transposed<'_, I, Q> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<I: Isa, Q: Interleaved> Scales<I> for Transposed<'_, I, Q> {
    #[inline(always)]
    fn d(self, isa: I, group: usize) -> I::F {
        Q::d(isa, self.0, group % (Q::LEN / Q::GROUP))
    }
    #[inline(always)]
    fn m(self, isa: I, _: usize) -> I::F {
        Q::m(isa, self.0)
    }
    /// Short blocks have no factors of a minimum.
    fn mins(self, isa: I, _: usize) -> I::I {
        isa.splat_i(0)
    }
}

impl<I: Isa, Q: Interleaved> Source<I> for Transposed<'_, I, Q> {
    const UNROLLED: bool = true;
    #[inline(always)]
    fn codes(self, isa: I, part: usize, k: usize) -> [I::I; 2] {
        let part = part % (Q::LEN / 32);
        isa.pair([Q::code(isa, self.0, part, k), Q::code(isa, self.0, part, k + 1)])
    }
    /// Short blocks have no sub-scales.
    fn sub(self, isa: I, _: usize) -> I::I {
        isa.splat_i(0)
    }
}

/// Calls `f` for the parts of a short block, of which there are at most four. Compilers do not unroll loops
/// this long, and words in registers have no variable numbers.
#[inline(always)]
fn for_each(parts: usize, mut f: impl FnMut(usize)) {
    f(0);
    if parts > 1 {
        f(1);
    }
    if parts > 2 {
        f(2);
        f(3);
    }
}

/// A few tokens: codes go from the blocks into dot products.
#[inline(always)]
pub(super) fn decode<I: Isa, Q: Interleaved, const T: usize>(isa: I, task: &mut Task<'_, '_, Q>) {
    let mut buffer = ChunkBuffer::ZERO;
    let (mut subs, mut mins) = ([[0; 64]; 4], [[0; 64]; 4]);
    for first in (0..task.rows).step_by(ROWS) {
        let mut acc = [[isa.splat(0.0); 1]; T];
        for c in 0..task.x.chunks {
            let mut x = [task.x.chunk(0, c); T];
            for t in 1..T {
                x[t] = task.x.chunk(t.min(task.x.tokens - 1), c);
            }
            let starts = starts::<I, Q::Shape, T>(isa, &x);
            if let (Some((head, words)), Layout::Rows) = (Q::Lanes::SHORT, task.layout)
                && first + ROWS <= task.rows
            {
                // Short blocks of plain rows are transposed in registers.
                let stride = task.row_blocks * size_of::<Q>();
                let group = task.w.get(first * task.row_blocks..).unwrap_or(&[]);
                let (per_chunk, parts) = (CHUNK / Q::LEN, Q::LEN / 32);
                for block in c * per_chunk..((c + 1) * per_chunk).min(task.row_blocks) {
                    let rows = Q::bytes_of(group.get(block..).unwrap_or(&[]));
                    let ahead = ROWS * (stride + block * size_of::<Q>());
                    let blocks = ShortBlocks::<I>::new(
                        isa,
                        rows,
                        stride,
                        head,
                        words,
                        #[inline(always)]
                        |quarter| prefetch_quarter(isa, group, ahead, ROWS * size_of::<Q>(), quarter),
                    );
                    let source = [Transposed::<I, Q>(&blocks, PhantomData)];
                    let first = (block - c * per_chunk) * parts;
                    for_each(
                        parts,
                        #[inline(always)]
                        |part| {
                            let part = first + part;
                            dot::<I, Q::Shape, _, 1, T>(isa, source, &x, &starts, part..part + 1, &mut acc);
                        },
                    );
                }
                continue;
            }
            let lanes = lanes_of::<I, Q>(isa, task, first, c, &mut buffer);
            store_subs::<I, Q>(isa, lanes, &mut subs, &mut mins);
            let streamed = task.layout == Layout::Interleaved;
            let source = Direct::<Q> { lanes, streamed, subs: &subs, mins: &mins };
            dot::<I, Q::Shape, _, 1, T>(isa, [source], &x, &starts, 0..lanes.len() * Q::LEN / 32, &mut acc);
        }
        for t in 0..task.x.tokens.min(T) {
            let mut lanes = [0.0; ROWS];
            isa.store(acc[t][0], &mut lanes);
            let here = (task.rows - first).min(ROWS);
            task.out.row(t)[first..first + here].copy_from_slice(&lanes[..here]);
        }
    }
}

/// Many tokens: `fill` expands sixteen rows of a chunk, which then meet all tokens.
#[inline(always)]
pub(super) fn prefill<'a, I: Isa, Q: Quantised>(
    isa: I,
    task: &mut Task<'a, '_, Q>,
    fill: impl FnMut(&Task<'a, '_, Q>, usize, usize, &mut Tile),
) {
    if I::WIDE_TILES {
        tiles::<I, Q, 2>(isa, task, fill);
    } else {
        tiles::<I, Q, 1>(isa, task, fill);
    }
}

/// `G` tiles of 16 rows side by side.
#[inline(always)]
fn tiles<'a, I: Isa, Q: Quantised, const G: usize>(
    isa: I,
    task: &mut Task<'a, '_, Q>,
    mut fill: impl FnMut(&Task<'a, '_, Q>, usize, usize, &mut Tile),
) {
    let mut tiles = [Tile::ZERO; G];
    let mut sums = [[[0.0; ROWS]; G]; BLOCK_TOKENS];
    for start in (0..task.x.tokens).step_by(BLOCK_TOKENS) {
        let tokens = start..(start + BLOCK_TOKENS).min(task.x.tokens);
        for first in (0..task.rows).step_by(ROWS * G) {
            let here = (task.rows - first).min(ROWS * G);
            for c in 0..task.x.chunks {
                for g in 0..here.div_ceil(ROWS) {
                    fill(task, first + ROWS * g, c, &mut tiles[g]);
                }
                multiply::<I, Q::Shape, G>(isa, &tiles, &task.x, c, tokens.clone(), &mut sums);
            }
            for (t, sums) in tokens.clone().zip(&sums) {
                let out = &mut task.out.row(t)[first..first + here];
                let (whole, rest) = out.as_chunks_mut::<ROWS>();
                for g in 0..G {
                    match whole.get_mut(g) {
                        Some(out) => isa.store(isa.load(&sums[g]), out),
                        None if g * ROWS < here => rest.copy_from_slice(&sums[g][..here % ROWS]),
                        None => {}
                    }
                }
            }
        }
    }
}

/// Tokens whose sums stay in the cache while all chunks of a tile's rows are read.
const BLOCK_TOKENS: usize = 256;

/// Adds the products of one chunk of tiled rows with some tokens to their sums; sets these if the chunk is the
/// first. Compiled once for all formats of a shape.
#[inline(never)]
fn multiply<I: Isa, S: Shape, const G: usize>(
    isa: I,
    tiles: &[Tile; G],
    x: &Inputs<'_>,
    c: usize,
    tokens: Range<usize>,
    sums: &mut [[[f32; ROWS]; G]],
) {
    isa.run(
        #[inline(always)]
        || {
            if tokens.len() == 1 {
                return multiply_some::<I, S, G, 1>(isa, tiles, x, c, tokens.start, sums);
            }
            for (t, sums) in tokens.step_by(TILE_TOKENS).zip(sums.chunks_mut(TILE_TOKENS)) {
                multiply_some::<I, S, G, TILE_TOKENS>(isa, tiles, x, c, t, sums);
            }
        },
    );
}

/// [`multiply`] for `T` tokens from number `first` on.
#[inline(always)]
fn multiply_some<I: Isa, S: Shape, const G: usize, const T: usize>(
    isa: I,
    tiles: &[Tile; G],
    inputs: &Inputs<'_>,
    c: usize,
    first: usize,
    sums: &mut [[[f32; ROWS]; G]],
) {
    // A few too many at the end are computed in vain: there is room for whole blocks of tokens, and
    // activations read as zeros.
    let Some(sums) = sums.first_chunk_mut::<T>() else { return };
    let mut sources = [&tiles[0]; G];
    for g in 0..G {
        sources[g] = &tiles[g];
    }
    let mut x = [inputs.chunk(first, c); T];
    for t in 1..T {
        x[t] = inputs.chunk(first + t, c);
    }
    for t in 0..T {
        let next = inputs.chunk(first + T + t, c);
        for line in (0..CHUNK).step_by(64) {
            isa.prefetch::<true, _>(
                u8::cast(<[[i8; 4]; CHUNK / 4]>::bytes_of(core::slice::from_ref(next.codes))),
                line,
            );
        }
    }
    let mut acc = [[isa.splat(0.0); G]; T];
    if c > 0 {
        for t in 0..T {
            for g in 0..G {
                acc[t][g] = isa.load(&sums[t][g]);
            }
        }
    }
    let len = (inputs.k - c * CHUNK).min(CHUNK);
    let starts = starts::<I, S, T>(isa, &x);
    dot::<I, S, _, G, T>(isa, sources, &x, &starts, 0..len / 32, &mut acc);
    for t in 0..T {
        for g in 0..G {
            isa.store(acc[t][g], &mut sums[t][g]);
        }
    }
}

/// Values per integer accumulation.
const fn step<S: Shape>() -> usize {
    if S::SUB == 16 { 16 } else { 32 }
}

/// The number by which code bytes exceed codes.
pub(super) const fn bias<I: Isa, S: Shape>() -> i32 {
    if S::SIGNED { I::SIGNED_BIAS } else { S::OFFSET }
}

/// The start values of a chunk's integer accumulators; they cancel the bias.
#[inline(always)]
fn starts<I: Isa, S: Shape, const T: usize>(isa: I, x: &[XChunk<'_>; T]) -> [[i32; 16]; T] {
    let mut starts = [[0; 16]; T];
    if bias::<I, S>() != 0 {
        for t in 0..T {
            starts[t] = x[t].sums(isa, step::<S>(), -bias::<I, S>());
        }
    }
    starts
}

/// Calls `f` with the first of each two words of a piece of `step` values. (With few
/// registers it pays to unroll the shortest loops only.)
#[inline(always)]
fn for_each_pair(step: usize, piece: usize, unrolled: bool, mut f: impl FnMut(usize)) {
    let first = piece * step / 4;
    if !unrolled {
        for k in (first..first + step / 4).step_by(2) {
            f(k);
        }
        return;
    }
    f(first);
    f(first + 2);
    if step == 32 {
        f(first + 4);
        f(first + 6);
    }
}

/// Adds the dot products of some parts of 32 values, of `G` times sixteen rows with `T` tokens, to `acc`.
#[inline(always)]
fn dot<I: Isa, S: Shape, W: Source<I>, const G: usize, const T: usize>(
    isa: I,
    w: [W; G],
    x: &[XChunk<'_>; T],
    starts: &[[i32; 16]; T],
    parts: Range<usize>,
    acc: &mut [[I::F; G]; T],
) {
    let whole = S::GROUP == CHUNK;
    let step = step::<S>();
    let zero = isa.splat_i(0);
    let mut sums = [[zero; G]; T];
    for part in parts {
        for piece in 0..32 / step {
            let s = part * (32 / step) + piece;
            let mut dots = [[zero; G]; T];
            if bias::<I, S>() != 0 {
                for t in (0..T).step_by(2) {
                    let next = (t + 1).min(T - 1);
                    let start = isa.splat_pair([starts[t][s], starts[next][s]]);
                    for g in 0..G {
                        [dots[t][g], dots[next][g]] = start;
                    }
                }
            }
            for_each_pair(
                step,
                piece,
                W::UNROLLED && (I::WIDE_TILES || T == 1 && S::GROUP < CHUNK),
                #[inline(always)]
                |k| {
                    let mut codes = [[zero; 2]; G];
                    for g in 0..G {
                        codes[g] = w[g].codes(isa, part, k);
                    }
                    let mut words = [[0; 2]; T];
                    for t in 0..T {
                        for i in 0..2 {
                            words[t][i] =
                                i32::from_le_bytes(x[t].codes[8 * part + k + i].map(|code| code as u8));
                        }
                    }
                    for t in (0..T - T % 2).step_by(2) {
                        for g in 0..G {
                            let (acc, x) = ([dots[t][g], dots[t + 1][g]], [words[t], words[t + 1]]);
                            [dots[t][g], dots[t + 1][g]] = if S::SIGNED {
                                isa.dot8::<true>(acc, codes[g], x)
                            } else {
                                isa.dot8::<false>(acc, codes[g], x)
                            };
                        }
                    }
                    for t in T - T % 2..T {
                        for g in 0..G {
                            let codes = isa.unpair(codes[g]);
                            for i in 0..2 {
                                let x = isa.splat_i(words[t][i]);
                                dots[t][g] = if S::SIGNED {
                                    isa.dot4::<true>(dots[t][g], codes[i], x)
                                } else {
                                    isa.dot4::<false>(dots[t][g], codes[i], x)
                                };
                            }
                        }
                    }
                },
            );
            for t in (0..T - T % 2).step_by(2) {
                for g in 0..G {
                    [dots[t][g], dots[t + 1][g]] = isa.unpair([dots[t][g], dots[t + 1][g]]);
                }
            }
            if whole {
                for g in 0..G {
                    let sub = if S::SUB < CHUNK { w[g].sub(isa, s) } else { zero };
                    for t in 0..T {
                        let scaled = if S::SUB < CHUNK { isa.mul_i(dots[t][g], sub) } else { dots[t][g] };
                        sums[t][g] = isa.add_i(sums[t][g], scaled);
                    }
                }
                continue;
            }
            for t in 0..T {
                let scale = isa.splat(x[t].scales[s * S::GROUP / S::ACTIVATION.block_len()]);
                for g in 0..G {
                    let d = isa.mul(w[g].d(isa, s), scale);
                    acc[t][g] = isa.fma(isa.to_f32(dots[t][g]), d, acc[t][g]);
                }
                if S::HAS_MIN {
                    let sum = isa.splat(x[t].sums[if step == 16 { s } else { 16 + s }] as f32);
                    for g in 0..G {
                        let m = isa.mul(w[g].m(isa, s), scale);
                        acc[t][g] = isa.fma(sum, m, acc[t][g]);
                    }
                }
            }
        }
    }
    if whole {
        for t in 0..T {
            for g in 0..G {
                acc[t][g] = add_group::<I, S>(isa, w[g], &x[t], sums[t][g], acc[t][g]);
            }
        }
    }
}

/// Adds the integer sums of a super-block to `acc`, with its scale and minimum.
#[inline(always)]
pub(super) fn add_group<I: Isa, S: Shape>(
    isa: I,
    w: impl Scales<I>,
    x: &XChunk<'_>,
    sums: I::I,
    acc: I::F,
) -> I::F {
    let scale = isa.splat(x.scale);
    let acc = isa.fma(isa.to_f32(sums), isa.mul(w.d(isa, 0), scale), acc);
    if !S::HAS_MIN {
        return acc;
    }
    let mut mins = isa.splat_i(0);
    for (pair, &x) in x.sums[pairs::<S>()].iter().enumerate() {
        mins = isa.dot2(mins, w.mins(isa, pair), isa.splat_i(x));
    }
    isa.fma(isa.to_f32(mins), isa.mul(w.m(isa, 0), scale), acc)
}

/// Where the pairs of sums are, one sum for each sub-scale.
pub(super) const fn pairs<S: Shape>() -> Range<usize> {
    if S::SUB == 16 { 24..32 } else { 32..36 }
}
