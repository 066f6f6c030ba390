//! Products of weight rows with activations: `out[t][r] = w[r] · x[t]`.
//!
//! The contract. Quantised formats: exact integer sums inside a group (integer sub-scales applied in
//! integers), then `acc = fma(sum, d_w · d_x, acc)` once a group, in order from k = 0, a minimum as a second
//! fma of the same kind after it. Plain formats: 16 strided accumulators (lane = k mod 16), fma, then the
//! fixed tree. A row's result never depends on its tile or its neighbours.
//!
//! Every quantised product holds one weight row in each of 16 lanes, so that sums need no reduction. Formats
//! with kernels of their own ([`Interleaved`]) bring their blocks into that order by transposing words, or
//! find them so in a packed file; the others are unpacked to their normal form ([`Unpacked`]) first. For a
//! few tokens, codes go from the blocks straight into dot products (decode); for many, they are expanded once
//! into a tile (prefill). Which one runs never shows in the result.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use crate::activation::{self, SUMS, padded};
use crate::formats::{
    Bytes, Format, Interleave, Interleaved, Kind, Layout, MAX_BLOCK_BYTES, Near, Plain, Quantised, ROWS,
    Unpacked,
};
use crate::isa::{Cpu, Isa, WithIsa};
use crate::panel::PanelMut;
use core::marker::PhantomData;

/// Tokens that a tile keeps in registers.
const TILE_TOKENS: usize = 4;
/// Values of a row that are unpacked at a time.
const CHUNK: usize = 256;

/// Activations as the weight's format wants them.
#[derive(Debug, Clone, Copy)]
pub enum X<'a> {
    /// For plain formats: `[tokens][k]`.
    F32(&'a [f32]),
    /// For quantised formats.
    Quantised(activation::Quantised<'a>),
}

/// One product: some rows of a weight with all tokens.
#[derive(Debug)]
pub struct MatMul<'a, 'o> {
    /// The rows' bytes.
    pub w: &'a [u8],
    /// How they lie. Interleaved ones start with a whole group of rows.
    pub layout: Layout,
    /// Values of a row.
    pub k: usize,
    /// Activations.
    pub x: X<'a>,
    /// One row for each token, one column for each weight row.
    pub out: PanelMut<'o>,
}

/// A format's kernel for every CPU.
pub(crate) type Kernel = fn(Cpu, MatMul<'_, '_>);

/// For kernels that are generic over the instruction set and the format, functions that choose the former.
macro_rules! for_every_cpu {
    ($($kernel:ident<$format:ident>)+) => {
        pub(crate) mod every_cpu {
            use super::*;
            $(pub(crate) fn $kernel<Q: $format>(cpu: Cpu, product: MatMul<'_, '_>) {
                struct Call<'a, 'o, Q>(MatMul<'a, 'o>, PhantomData<Q>);
                impl<Q: $format> WithIsa for Call<'_, '_, Q> {
                    type Out = ();
                    #[inline(always)]
                    fn call<I: Isa>(self, isa: I) {
                        super::$kernel::<I, Q>(isa, self.0);
                    }
                }
                cpu.run_inline(Call::<Q>(product, PhantomData));
            })+
        }
    };
}

for_every_cpu! { interleaved<Interleaved> unpacked<Quantised> plain<Plain> }

/// The loop that computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loop {
    /// Four rows by one or four tokens, lanes along k.
    Plain,
    /// Sixteen rows in lanes, codes straight from the blocks.
    Direct,
    /// Sixteen rows in lanes, expanded once for all tokens; twice as many where there are registers.
    Tiles,
}

impl Loop {
    /// Direct loops pay while a block meets no more tokens than registers hold.
    const fn choose(format: Format, tokens: usize) -> Loop {
        match format.kind() {
            Kind::Float => Loop::Plain,
            Kind::Quantised { .. } if format.interleaves() && tokens <= TILE_TOKENS => Loop::Direct,
            Kind::Quantised { .. } => Loop::Tiles,
        }
    }
}

/// Describes, in a line for people, which kernel computes a product with `tokens` tokens, and why.
pub fn describe(cpu: Cpu, format: Format, layout: Layout, tokens: usize) -> impl core::fmt::Display {
    struct Line(Cpu, Format, Layout, usize);
    impl core::fmt::Display for Line {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            let Line(cpu, format, layout, tokens) = *self;
            let isa = cpu.name();
            let source = match layout {
                Layout::Interleaved => "rows interleaved in the file",
                Layout::Rows if format.interleaves() => "rows interleaved on the way",
                Layout::Rows => "blocks unpacked: the format has no kernel on interleaved rows",
            };
            match Loop::choose(format, tokens) {
                Loop::Plain => write!(f, "{isa} plain: lanes along k, {} floats", format.name()),
                Loop::Direct => write!(f, "{isa} direct: {source}; {tokens} <= {TILE_TOKENS} tokens"),
                Loop::Tiles => write!(f, "{isa} tiles: {source}; expanded once for {tokens} tokens"),
            }
        }
    }
    Line(cpu, format, layout, tokens)
}

/// Computes a product of rows stored as `format`. Rows and tokens for which bytes or activations are missing
/// are left alone; if `x` is not of the kind that the format wants, or `k` is no whole number of blocks, all
/// are.
pub fn matmul(cpu: Cpu, format: Format, product: MatMul<'_, '_>) {
    (format.kernel())(cpu, product);
}

/// A product with quantised activations, checked.
struct Task<'a, 'o, Q> {
    w: &'a [Q],
    row_blocks: usize,
    rows: usize,
    layout: Layout,
    x: activation::Quantised<'a>,
    /// Codes and sums of `x`, chunk by chunk.
    codes: &'a [[[i8; 4]; CHUNK / 4]],
    sums: &'a [[i32; SUMS]],
    tokens: usize,
    out: PanelMut<'o>,
}

impl<Q> Task<'_, '_, Q> {
    /// Chunks of a row.
    #[inline(always)]
    fn chunks(&self) -> usize {
        self.x.k.div_ceil(CHUNK)
    }
}

impl<'a, 'o, Q: Quantised> Task<'a, 'o, Q> {
    /// `None` if there is nothing to compute.
    fn new(product: MatMul<'a, 'o>) -> Option<Self> {
        let X::Quantised(x) = product.x else { return None };
        let k = product.k;
        // No longer row could be in memory, and its padded length might overflow.
        if k == 0 || k > isize::MAX as usize || !k.is_multiple_of(Q::LEN) || k != x.k {
            return None;
        }
        let row_blocks = k / Q::LEN;
        let w = Q::cast(product.w);
        let width = padded(k);
        let tokens = (x.codes.len() / width)
            .min(x.scales.len() / (width / Q::ACTIVATION.block_len()))
            .min(x.sums.len() / (width / activation::PADDING * SUMS))
            .min(product.out.rows());
        let rows = (w.len() / row_blocks).min(product.out.cols());
        if tokens == 0 || rows == 0 {
            return None;
        }
        let x = activation::Quantised {
            k,
            codes: &x.codes[..tokens * width],
            scales: &x.scales[..tokens * (width / Q::ACTIVATION.block_len())],
            sums: &x.sums[..tokens * (width / activation::PADDING * SUMS)],
        };
        let codes = x.codes.as_chunks::<4>().0.as_chunks::<{ CHUNK / 4 }>().0;
        let sums = x.sums.as_chunks().0;
        Some(Task { w, row_blocks, rows, layout: product.layout, x, codes, sums, tokens, out: product.out })
    }
}

/// Formats that are read as interleaved rows.
fn interleaved<I: Isa, Q: Interleaved>(isa: I, product: MatMul<'_, '_>) {
    let Some(mut task) = Task::<Q>::new(product) else { return };
    isa.run(
        #[inline(always)]
        || match Loop::choose(Q::FORMAT, task.tokens) {
            Loop::Direct if task.tokens == 1 => decode::<I, Q, 1>(isa, &mut task),
            Loop::Direct => decode::<I, Q, TILE_TOKENS>(isa, &mut task),
            Loop::Plain | Loop::Tiles => {
                let mut near = Room::ZERO;
                prefill::<I, Q>(
                    isa,
                    &mut task,
                    #[inline(always)]
                    |task, first, c, tile| {
                        let lanes = lanes_of::<I, Q>(isa, task, first, c, &mut near);
                        tile.expand::<I, Q>(isa, lanes);
                    },
                );
            }
        },
    );
}

/// Formats that are unpacked to their normal form.
fn unpacked<I: Isa, Q: Quantised>(isa: I, product: MatMul<'_, '_>) {
    let Some(mut task) = Task::<Q>::new(product) else { return };
    isa.run(
        #[inline(always)]
        || {
            let mut rows = [Unpacked::ZERO; ROWS];
            prefill::<I, Q>(
                isa,
                &mut task,
                #[inline(always)]
                |task, first, c, tile| {
                    for r in 0..ROWS {
                        let row = (first + r).min(task.rows - 1) * task.row_blocks;
                        unpack_chunk(&task.w[row..row + task.row_blocks], c, &mut rows[r]);
                    }
                    tile.set::<I, Q>(isa, &rows);
                },
            );
        },
    );
}

/// One token's activations in one chunk.
#[derive(Clone, Copy)]
struct XChunk<'a> {
    codes: &'a [[i8; 4]; CHUNK / 4],
    sums: &'a [i32; SUMS],
    scales: &'a [f32],
}

impl<'a> XChunk<'a> {
    #[inline(always)]
    fn new<Q>(task: &Task<'a, '_, Q>, token: usize, c: usize) -> Self {
        let i = token * task.chunks() + c;
        let scales = task.x.scales.len() / task.codes.len().max(1);
        XChunk {
            codes: task.codes.get(i).unwrap_or(&[[0; 4]; CHUNK / 4]),
            sums: task.sums.get(i).unwrap_or(&[0; SUMS]),
            scales: task.x.scales.get(i * scales..(i + 1) * scales).unwrap_or(&[0.0; CHUNK / 32]),
        }
    }

    /// The sums of each 16 codes (16 of them) or of each 32 (8), times `factor`.
    #[inline(always)]
    fn sums<I: Isa>(&self, isa: I, values: usize, factor: i32) -> [i32; 16] {
        let first = if values == 16 { 0 } else { 16 };
        let mut out = [0; 16];
        let sums = self.sums[first..].first_chunk().unwrap_or(&[0; 16]);
        isa.store_i(isa.mul_i(isa.load_i(sums), isa.splat_i(factor)), &mut out);
        out
    }
}

/// Unpacks a row's chunk `c`. Codes past a row's end are arbitrary: activations there are zero.
#[inline(always)]
fn unpack_chunk<Q: Quantised>(row: &[Q], c: usize, out: &mut Unpacked) {
    let per_chunk = CHUNK / Q::LEN;
    let blocks = &row[c * per_chunk..row.len().min((c + 1) * per_chunk)];
    if Q::LEN == CHUNK {
        return blocks[0].unpack(out);
    }
    let groups = Q::LEN / Q::GROUP;
    for (i, block) in blocks.iter().enumerate() {
        // Formats of short blocks have no integer sub-scales: `sub` and `mins` are ones, which nobody reads.
        let mut one = Unpacked::ZERO;
        block.unpack(&mut one);
        out.codes[i * Q::LEN..(i + 1) * Q::LEN].copy_from_slice(&one.codes[..Q::LEN]);
        out.d[i * groups..(i + 1) * groups].copy_from_slice(&one.d[..groups]);
    }
}

/// Sixteen rows of a chunk, one in each lane: what a dot product reads.
trait Source<I: Isa, Q: Quantised>: Copy {
    /// The code bytes of values `32 part + 4 k` and the next seven, as [`Isa::pair`].
    fn codes(self, isa: I, part: usize, k: usize) -> [I::I; 2];
    /// The scale of a group.
    fn d(self, isa: I, group: usize) -> I::F;
    /// The minimum of a group.
    fn m(self, isa: I, group: usize) -> I::F;
    /// The integer sub-scale of the `s`-th [`Quantised::SUB`] values.
    fn sub(self, isa: I, s: usize) -> I::I;
    /// Factors of the minimum as 16-bit pairs: number `2 i` has those of sums `4 i` and `4 i + 2`, number
    /// `2 i + 1` those of `4 i + 1` and `4 i + 3`.
    fn mins(self, isa: I, pair: usize) -> I::I;
}

/// Interleaved blocks of one chunk, and the sub-scales and minimums that stand in them.
#[derive(Clone, Copy)]
struct Direct<'a, Q: Interleaved> {
    lanes: &'a [Q::Lanes],
    subs: &'a [[u8; 64]; 4],
    mins: &'a [[u8; 64]; 4],
}

/// Four words of sub-scales or minimums.
type Words = [[u8; 64]; 4];

/// Stores the sub-scales and minimums of a chunk.
#[inline(always)]
fn store_subs<I: Isa, Q: Interleaved>(isa: I, lanes: &[Q::Lanes], subs: &mut Words, mins: &mut Words) {
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

impl<I: Isa, Q: Interleaved> Source<I, Q> for Direct<'_, Q> {
    #[inline(always)]
    fn codes(self, isa: I, part: usize, k: usize) -> [I::I; 2] {
        let (lanes, part) = if Q::LEN == 32 { (&self.lanes[part], 0) } else { (&self.lanes[0], part) };
        isa.pair([Q::code(isa, lanes, part, k), Q::code(isa, lanes, part, k + 1)])
    }
    #[inline(always)]
    fn d(self, isa: I, group: usize) -> I::F {
        Q::d(isa, &self.lanes[group])
    }
    #[inline(always)]
    fn m(self, isa: I, group: usize) -> I::F {
        Q::m(isa, &self.lanes[group])
    }
    #[inline(always)]
    fn sub(self, isa: I, s: usize) -> I::I {
        let word = isa.load_words(&self.subs[s / 4]);
        isa.sar_i::<24>(isa.shl_by(word, 24 - 8 * (s % 4) as u32))
    }
    #[inline(always)]
    fn mins(self, isa: I, pair: usize) -> I::I {
        let word = isa.load_words(&self.mins[pair / 2]);
        isa.and_i(isa.shr_by(word, 8 * (pair % 2) as u32), isa.splat_i(0x00ff_00ff))
    }
}

/// Sixteen rows of one chunk, expanded.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Tile {
    codes: [[u8; 64]; CHUNK / 4],
    sub: [[i32; 16]; 16],
    mins: [[u8; 64]; 8],
    d: [[f32; 16]; 16],
    m: [[f32; 16]; 16],
}

impl<I: Isa, Q: Quantised> Source<I, Q> for &Tile {
    #[inline(always)]
    fn codes(self, isa: I, part: usize, k: usize) -> [I::I; 2] {
        [isa.load_words(&self.codes[8 * part + k]), isa.load_words(&self.codes[8 * part + k + 1])]
    }
    #[inline(always)]
    fn d(self, isa: I, group: usize) -> I::F {
        isa.load(&self.d[group])
    }
    #[inline(always)]
    fn m(self, isa: I, group: usize) -> I::F {
        isa.load(&self.m[group])
    }
    #[inline(always)]
    fn sub(self, isa: I, s: usize) -> I::I {
        isa.load_i(&self.sub[s])
    }
    #[inline(always)]
    fn mins(self, isa: I, pair: usize) -> I::I {
        isa.load_words(&self.mins[pair])
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
    fn expand<I: Isa, Q: Interleaved>(&mut self, isa: I, lanes: &[Q::Lanes]) {
        let (mut subs, mut mins) = ([[0; 64]; 4], [[0; 64]; 4]);
        store_subs::<I, Q>(isa, lanes, &mut subs, &mut mins);
        let source = Direct::<Q> { lanes, subs: &subs, mins: &mins };
        for part in 0..lanes.len() * Q::LEN / 32 {
            for k in (0..8).step_by(2) {
                let pair = source.codes(isa, part, k);
                isa.store_words(pair[0], &mut self.codes[8 * part + k]);
                isa.store_words(pair[1], &mut self.codes[8 * part + k + 1]);
            }
        }
        for group in 0..lanes.len() {
            isa.store(Source::<I, Q>::d(source, isa, group), &mut self.d[group]);
            if Q::HAS_MIN {
                isa.store(Source::<I, Q>::m(source, isa, group), &mut self.m[group]);
            }
        }
        if Q::GROUP == CHUNK && Q::SUB < CHUNK {
            for s in 0..CHUNK / Q::SUB {
                isa.store_i(Source::<I, Q>::sub(source, isa, s), &mut self.sub[s]);
            }
        }
        if Q::GROUP == CHUNK && Q::HAS_MIN {
            for pair in 0..CHUNK / Q::SUB / 2 {
                isa.store_words(Source::<I, Q>::mins(source, isa, pair), &mut self.mins[pair]);
            }
        }
    }

    /// From rows in normal form; for formats without minimums.
    #[inline(always)]
    fn set<I: Isa, Q: Quantised>(&mut self, isa: I, rows: &[Unpacked; ROWS]) {
        const { assert!(!Q::HAS_MIN && Q::SIGNED && Q::SUB == 16) };
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

/// Short blocks of a chunk.
const BLOCKS: usize = CHUNK / 32;

/// Room for the interleaved blocks of one chunk of any format.
#[repr(C, align(64))]
struct Room([u8; ROWS * BLOCKS * 34]);

impl Room {
    const ZERO: Room = Room([0; ROWS * BLOCKS * 34]);
}

/// The interleaved blocks of chunk `c` of sixteen rows: where they are, or in `near`.
#[inline(always)]
fn lanes_of<'b, I: Isa, Q: Interleaved>(
    isa: I,
    task: &Task<'b, '_, Q>,
    first: usize,
    c: usize,
    near: &'b mut Room,
) -> &'b [Q::Lanes] {
    let start = c * CHUNK / Q::LEN;
    let count = (CHUNK / Q::LEN).min(task.row_blocks - start);
    if task.layout == Layout::Interleaved && first + ROWS <= task.rows {
        let group = &task.w[first * task.row_blocks..][..ROWS * task.row_blocks];
        return &Q::Lanes::cast(Q::bytes_of(group))[start..start + count];
    }
    const { assert!(CHUNK / Q::LEN * size_of::<Q::Lanes>() <= size_of::<Room>()) };
    let near = &mut Q::Lanes::cast_mut(&mut near.0)[..count];
    let stride = task.row_blocks * size_of::<Q>();
    let group = task.w.get(first * task.row_blocks..).unwrap_or(&[]);
    let rows = group.get(start..).unwrap_or(&[]);
    if first + ROWS <= task.rows {
        for pair in (0..count).step_by(2) {
            let end = (pair + 2).min(count);
            ask_ahead::<I, Q, ROWS>(isa, group, task.row_blocks, start + pair, end - pair);
            Q::Lanes::interleave(isa, Q::bytes_of(&rows[pair..]), stride, &mut near[pair..end]);
        }
        return near;
    }
    // Rows past the end repeat the last one.
    let mut blocks = [[task.w[0]; BLOCKS]; ROWS];
    for r in 0..ROWS {
        let row = &task.w[(first + r).min(task.rows - 1) * task.row_blocks..];
        blocks[r][..count].copy_from_slice(&row[start..start + count]);
    }
    let bytes = <[Q; BLOCKS]>::bytes_of(&blocks);
    Q::Lanes::interleave(isa, bytes, BLOCKS * size_of::<Q>(), near);
    near
}

/// Asks for as many bytes of the next `R` rows, from their start on, as `count` blocks of these have from
/// number `start` on: the CPU's own prefetcher follows one row, not many.
#[inline(always)]
fn ask_ahead<I: Isa, B: Bytes, const R: usize>(
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

/// One short block of each row, in registers.
#[derive(Clone, Copy)]
struct Transposed<I: Isa>(Near<I>);

impl<I: Isa, Q: Interleaved> Source<I, Q> for Transposed<I> {
    #[inline(always)]
    fn codes(self, isa: I, _: usize, k: usize) -> [I::I; 2] {
        isa.pair([Q::code(isa, &self.0, 0, k), Q::code(isa, &self.0, 0, k + 1)])
    }
    #[inline(always)]
    fn d(self, isa: I, _: usize) -> I::F {
        Q::d(isa, &self.0)
    }
    #[inline(always)]
    fn m(self, isa: I, _: usize) -> I::F {
        Q::m(isa, &self.0)
    }
    /// Short blocks have no sub-scales.
    fn sub(self, isa: I, _: usize) -> I::I {
        isa.splat_i(0)
    }
    /// Short blocks have no factors of a minimum.
    fn mins(self, isa: I, _: usize) -> I::I {
        isa.splat_i(0)
    }
}

/// A few tokens: codes go from the blocks into dot products.
#[inline(always)]
fn decode<I: Isa, Q: Interleaved, const T: usize>(isa: I, task: &mut Task<'_, '_, Q>) {
    let mut near = Room::ZERO;
    let (mut subs, mut mins) = ([[0; 64]; 4], [[0; 64]; 4]);
    for first in (0..task.rows).step_by(ROWS) {
        let mut acc = [[isa.splat(0.0); 1]; T];
        for c in 0..task.chunks() {
            let mut x = [XChunk::new(task, 0, c); T];
            for t in 1..T {
                x[t] = XChunk::new(task, t.min(task.tokens - 1), c);
            }
            let starts = starts::<I, Q, T>(isa, &x);
            if let (Some((head, words)), Layout::Rows) = (Q::Lanes::SHORT, task.layout)
                && first + ROWS <= task.rows
            {
                // Short blocks of plain rows are transposed in registers.
                let stride = task.row_blocks * size_of::<Q>();
                let group = task.w.get(first * task.row_blocks..).unwrap_or(&[]);
                for block in c * BLOCKS..((c + 1) * BLOCKS).min(task.row_blocks) {
                    let part = block - c * BLOCKS;
                    let rows = Q::bytes_of(group.get(block..).unwrap_or(&[]));
                    ask_ahead::<I, Q, ROWS>(isa, group, task.row_blocks, block, 1);
                    let source = Transposed::<I>(Near::new(isa, rows, stride, head, words));
                    dot::<I, Q, _, 1, T>(isa, [source], &x, &starts, part..part + 1, &mut acc);
                }
                continue;
            }
            let lanes = lanes_of::<I, Q>(isa, task, first, c, &mut near);
            store_subs::<I, Q>(isa, lanes, &mut subs, &mut mins);
            let source = Direct::<Q> { lanes, subs: &subs, mins: &mins };
            dot::<I, Q, _, 1, T>(isa, [source], &x, &starts, 0..lanes.len() * Q::LEN / 32, &mut acc);
        }
        for t in 0..task.tokens.min(T) {
            let mut lanes = [0.0; ROWS];
            isa.store(acc[t][0], &mut lanes);
            let here = (task.rows - first).min(ROWS);
            task.out.row(t)[first..first + here].copy_from_slice(&lanes[..here]);
        }
    }
}

/// Many tokens: `fill` expands sixteen rows of a chunk, which then meet all tokens.
#[inline(always)]
fn prefill<'a, I: Isa, Q: Quantised>(
    isa: I,
    task: &mut Task<'a, '_, Q>,
    fill: impl FnMut(&Task<'a, '_, Q>, usize, usize, &mut Tile),
) {
    if task.tokens <= 1 {
        tiles::<I, Q, 1, 1>(isa, task, fill);
    } else if I::WIDE_TILES {
        tiles::<I, Q, 2, TILE_TOKENS>(isa, task, fill);
    } else {
        tiles::<I, Q, 1, TILE_TOKENS>(isa, task, fill);
    }
}

/// `G` tiles of 16 rows side by side, `T` tokens at a time.
#[inline(always)]
fn tiles<'a, I: Isa, Q: Quantised, const G: usize, const T: usize>(
    isa: I,
    task: &mut Task<'a, '_, Q>,
    mut fill: impl FnMut(&Task<'a, '_, Q>, usize, usize, &mut Tile),
) {
    let mut tiles = [Tile::ZERO; G];
    let mut sums = [[[0.0; ROWS]; G]; BLOCK_TOKENS];
    for start in (0..task.tokens).step_by(BLOCK_TOKENS) {
        let tokens = (task.tokens - start).min(BLOCK_TOKENS);
        for first in (0..task.rows).step_by(ROWS * G) {
            let here = (task.rows - first).min(ROWS * G);
            for c in 0..task.chunks() {
                for g in 0..here.div_ceil(ROWS) {
                    fill(task, first + ROWS * g, c, &mut tiles[g]);
                }
                for t in (0..tokens).step_by(T) {
                    tile_tokens::<I, Q, G, T>(isa, task, &tiles, c, start + t, &mut sums[t..]);
                }
            }
            for (t, sums) in sums[..tokens].iter().enumerate() {
                let out = &mut task.out.row(start + t)[first..first + here];
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

/// Tokens whose sums are kept near while all chunks of a tile's rows pass.
const BLOCK_TOKENS: usize = 256;

/// Adds the products of one chunk of tiled rows with `T` tokens from number `first` on to their sums; sets
/// these if the chunk is the first.
#[inline(always)]
fn tile_tokens<I: Isa, Q: Quantised, const G: usize, const T: usize>(
    isa: I,
    task: &Task<'_, '_, Q>,
    tiles: &[Tile; G],
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
    let mut x = [XChunk::new(task, first, c); T];
    for t in 1..T {
        x[t] = XChunk::new(task, first + t, c);
    }
    for t in 0..T {
        let next = XChunk::new(task, first + T + t, c);
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
    let len = (task.x.k - c * CHUNK).min(CHUNK);
    dot::<I, Q, _, G, T>(isa, sources, &x, &starts::<I, Q, T>(isa, &x), 0..len / 32, &mut acc);
    for t in 0..T {
        for g in 0..G {
            isa.store(acc[t][g], &mut sums[t][g]);
        }
    }
}

/// Values of one integer accumulation.
const fn step<Q: Quantised>() -> usize {
    if Q::GROUP == 16 || Q::GROUP == CHUNK && Q::SUB == 16 { 16 } else { 32 }
}

/// How much code bytes stand above codes.
const fn bias<I: Isa, Q: Quantised>() -> i32 {
    if Q::SIGNED { I::SIGNED_BIAS } else { Q::OFFSET }
}

/// What the integer accumulations of a chunk start from: what takes the bias out again.
#[inline(always)]
fn starts<I: Isa, Q: Quantised, const T: usize>(isa: I, x: &[XChunk<'_>; T]) -> [[i32; 16]; T] {
    let mut starts = [[0; 16]; T];
    if bias::<I, Q>() != 0 {
        for t in 0..T {
            starts[t] = x[t].sums(isa, step::<Q>(), -bias::<I, Q>());
        }
    }
    starts
}

/// Adds the dots of some parts of 32 values of `G` times sixteen rows with `T` tokens to `acc`.
#[inline(always)]
fn dot<I: Isa, Q: Quantised, S: Source<I, Q>, const G: usize, const T: usize>(
    isa: I,
    w: [S; G],
    x: &[XChunk<'_>; T],
    starts: &[[i32; 16]; T],
    parts: core::ops::Range<usize>,
    acc: &mut [[I::F; G]; T],
) {
    let whole = Q::GROUP == CHUNK;
    let step = step::<Q>();
    let bias = bias::<I, Q>();
    let zero = isa.splat_i(0);
    let mut sums = [[zero; G]; T];
    for part in parts {
        for piece in 0..32 / step {
            let s = part * (32 / step) + piece;
            let mut dots = [[zero; G]; T];
            if bias != 0 {
                for t in (0..T).step_by(2) {
                    let next = (t + 1).min(T - 1);
                    let start = isa.splat_pair([starts[t][s], starts[next][s]]);
                    for g in 0..G {
                        [dots[t][g], dots[next][g]] = start;
                    }
                }
            }
            for k in (piece * step / 4..(piece + 1) * step / 4).step_by(2) {
                let mut codes = [[zero; 2]; G];
                for g in 0..G {
                    codes[g] = w[g].codes(isa, part, k);
                }
                let mut words = [[0; 2]; T];
                for t in 0..T {
                    for i in 0..2 {
                        words[t][i] = i32::from_le_bytes(x[t].codes[8 * part + k + i].map(|code| code as u8));
                    }
                }
                for t in (0..T - T % 2).step_by(2) {
                    for g in 0..G {
                        let (acc, x) = ([dots[t][g], dots[t + 1][g]], [words[t], words[t + 1]]);
                        [dots[t][g], dots[t + 1][g]] = if Q::SIGNED {
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
                            dots[t][g] = if Q::SIGNED {
                                isa.dot4::<true>(dots[t][g], codes[i], x)
                            } else {
                                isa.dot4::<false>(dots[t][g], codes[i], x)
                            };
                        }
                    }
                }
            }
            for t in (0..T - T % 2).step_by(2) {
                for g in 0..G {
                    [dots[t][g], dots[t + 1][g]] = isa.unpair([dots[t][g], dots[t + 1][g]]);
                }
            }
            if whole {
                for g in 0..G {
                    let sub = if Q::SUB < CHUNK { w[g].sub(isa, s) } else { zero };
                    for t in 0..T {
                        let scaled = if Q::SUB < CHUNK { isa.mul_i(dots[t][g], sub) } else { dots[t][g] };
                        sums[t][g] = isa.add_i(sums[t][g], scaled);
                    }
                }
                continue;
            }
            for t in 0..T {
                let scale = isa.splat(x[t].scales[s * Q::GROUP / Q::ACTIVATION.block_len()]);
                for g in 0..G {
                    let d = isa.mul(w[g].d(isa, s), scale);
                    acc[t][g] = isa.fma(isa.to_f32(dots[t][g]), d, acc[t][g]);
                }
                if Q::HAS_MIN {
                    let sum = isa.splat(x[t].sums[if step == 16 { s } else { 16 + s }] as f32);
                    for g in 0..G {
                        let m = isa.mul(w[g].m(isa, s), scale);
                        acc[t][g] = isa.fma(sum, m, acc[t][g]);
                    }
                }
            }
        }
    }
    if !whole {
        return;
    }
    for t in 0..T {
        let scale = isa.splat(x[t].scales[0]);
        for g in 0..G {
            let d = isa.mul(w[g].d(isa, 0), scale);
            acc[t][g] = isa.fma(isa.to_f32(sums[t][g]), d, acc[t][g]);
        }
        if Q::HAS_MIN {
            let pairs = if Q::SUB == 16 { 24..32 } else { 32..36 };
            let mut mins = [zero; G];
            for (pair, &x) in x[t].sums[pairs].iter().enumerate() {
                for g in 0..G {
                    mins[g] = isa.dot2(mins[g], w[g].mins(isa, pair), isa.splat_i(x));
                }
            }
            for g in 0..G {
                let m = isa.mul(w[g].m(isa, 0), scale);
                acc[t][g] = isa.fma(isa.to_f32(mins[g]), m, acc[t][g]);
            }
        }
    }
}

/// Plain formats: four rows by four tokens in registers.
fn plain<I: Isa, P: Plain>(isa: I, product: MatMul<'_, '_>) {
    let X::F32(x) = product.x else { return };
    let (k, mut out) = (product.k, product.out);
    let w = P::cast(product.w);
    if k == 0 {
        return;
    }
    let (rows, tokens) = ((w.len() / k).min(out.cols()), (x.len() / k).min(out.rows()));
    isa.run(
        #[inline(always)]
        || {
            const N: usize = 4;
            for first in (0..rows).step_by(N) {
                for t in (0..tokens).step_by(N) {
                    // Short blocks at the edges repeat their last row or token, and store it once.
                    let w: [&[P]; N] = core::array::from_fn(|i| &w[(first + i).min(rows - 1) * k..][..k]);
                    let x: [&[f32]; N] = core::array::from_fn(|i| &x[(t + i).min(tokens - 1) * k..][..k]);
                    if tokens - t == 1 {
                        let sums = plain_dot::<I, P, N, 1>(isa, w, [x[0]]);
                        for (i, sum) in sums.iter().enumerate().take(rows - first) {
                            out.row(t)[first + i] = sum[0];
                        }
                        continue;
                    }
                    let sums = plain_dot::<I, P, N, N>(isa, w, x);
                    for i in 0..N.min(rows - first) {
                        for j in 0..N.min(tokens - t) {
                            out.row(t + j)[first + i] = sums[i][j];
                        }
                    }
                }
            }
        },
    );
}

/// The dots of `R` weight rows with `T` tokens.
#[inline(always)]
fn plain_dot<I: Isa, P: Plain, const R: usize, const T: usize>(
    isa: I,
    w: [&[P]; R],
    x: [&[f32]; T],
) -> [[f32; T]; R] {
    let w_runs = w.map(|w| w.as_chunks::<16>());
    let x_runs = x.map(|x| x.as_chunks::<16>());
    let mut acc = [[isa.splat(0.0); T]; R];
    for run in 0..w_runs[0].0.len() {
        if T == 1 {
            ask_ahead::<I, P, R>(isa, w[0], w[0].len(), 16 * run, 16);
        }
        plain_step::<I, P, R, T>(isa, &mut acc, w_runs.map(|w| &w.0[run]), x_runs.map(|x| &x.0[run]));
    }
    let rest = w_runs[0].1.len();
    if rest > 0 {
        // Past the end of a row, activations are zero; the weight that stands there is finite if the row's
        // last one is.
        let w = w_runs.map(|w| {
            let mut run = [w.1[rest - 1]; 16];
            run[..rest].copy_from_slice(w.1);
            run
        });
        let x = x_runs.map(|x| {
            let mut run = [0.0; 16];
            run[..rest].copy_from_slice(x.1);
            run
        });
        plain_step::<I, P, R, T>(isa, &mut acc, w.each_ref(), x.each_ref());
    }
    let mut sums = [[0.0; T]; R];
    for r in 0..R {
        for t in 0..T {
            sums[r][t] = isa.sum(acc[r][t]);
        }
    }
    sums
}

/// One run of 16 values of `R` weight rows and `T` tokens.
#[inline(always)]
fn plain_step<I: Isa, P: Plain, const R: usize, const T: usize>(
    isa: I,
    acc: &mut [[I::F; T]; R],
    w: [&[P; 16]; R],
    x: [&[f32; 16]; T],
) {
    let mut x_lanes = [isa.splat(0.0); T];
    for t in 0..T {
        x_lanes[t] = isa.load(x[t]);
    }
    for r in 0..R {
        let w = load_plain::<I, P>(isa, w[r]);
        for t in 0..T {
            acc[r][t] = isa.fma(w, x_lanes[t], acc[r][t]);
        }
    }
}

/// Sixteen plain values as vector lanes.
#[inline(always)]
fn load_plain<I: Isa, P: Plain>(isa: I, w: &[P; 16]) -> I::F {
    let bits16 = || {
        let words = P::bytes_of(w).as_chunks::<2>().0;
        core::array::from_fn(|i| u16::from_le_bytes(words[i]))
    };
    match P::FORMAT {
        Format::F16 => isa.load_f16(&bits16()),
        Format::BF16 => isa.load_bf16(&bits16()),
        _ => isa.load(&w.map(|v| v.value())),
    }
}

/// Reads a row of a table as f32: `out` is filled with row `row`, times `scale`. Left alone if the row is not
/// there.
pub fn embed(format: Format, layout: Layout, table: &[u8], row: usize, scale: f32, out: &mut [f32]) {
    let (len, bytes) = (format.block_len(), format.block_bytes());
    let row_blocks = out.len() / len;
    let mut block = [0; MAX_BLOCK_BYTES];
    for (i, values) in out.chunks_exact_mut(len).enumerate() {
        let block = &mut block[..bytes];
        if format.copy_block(layout, table, row_blocks, row, i, block).is_none() {
            return;
        }
        let _ = format.dequantize(block, values);
        if scale != 1.0 {
            values.iter_mut().for_each(|x| *x *= scale);
        }
    }
}
