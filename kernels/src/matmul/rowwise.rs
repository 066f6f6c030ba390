//! Products of a few tokens with plain rows of super-blocks. Lanes run along a row, so codes are read in
//! place.
//!
//! Sixteen rows at a time, two in one vector: rows `p` and `p + 8`, eight lanes each. A lane sums the
//! products of its codes, sub-scales applied, over a whole super-block. A transposition then adds up the
//! lanes of each row, once per 256 values. Scales, minimums and offsets of codes are applied with one row in
//! each lane.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use super::tiles::{Scales, add_group, bias};
use super::{CHUNK, Task, XChunk};
use crate::formats::{Bytes, Gridded, Interleaved, Quantised, ROWS, Split, Unpacked, Words};
use crate::isa::Isa;

/// Pairs of rows in sixteen.
const PAIRS: usize = ROWS / 2;
/// Parts of 32 values in a super-block: the codes of a part of two rows fill a vector.
const PARTS: usize = CHUNK / 32;

/// One super-block of each of sixteen rows.
trait Rows<I: Isa, Q: Quantised>: Copy {
    /// A row, from which codes are read.
    type Row;
    /// Scales, sub-scales and minimums.
    fn header(self, isa: I) -> Header<I>;
    /// One row.
    fn row(&self, r: usize) -> &Self::Row;
    /// The code bytes of a part of two rows.
    fn codes(isa: I, rows: [&Self::Row; 2], part: usize) -> I::I;
    /// Whether code bytes are signed, as [`Quantised::SIGNED`] has it.
    const SIGNED: bool = Q::SIGNED;
    /// The number by which code bytes exceed codes.
    const BIAS: i32 = bias::<I, Q::Shape>();
    /// Whether code bytes are magnitudes, with signs beside them.
    const MAGNITUDES: bool = false;
    /// The signs of a part, a bit for each value.
    fn signs(_: &Self::Row, _part: usize) -> u32 {
        0
    }
    /// The two sub-scales of a part of a row.
    #[inline(always)]
    fn subs(header: &Header<I>, r: usize, _: &Self::Row, part: usize) -> i32 {
        header.subs[part][r]
    }
    /// Prefetches pair `p`'s share of the next sixteen rows.
    fn prefetch_next(self, isa: I, p: usize);
}

/// Scales of a super-block, one row in each lane.
struct Header<I: Isa> {
    d: I::F,
    m: I::F,
    /// For each part, the sub-scales of its first and of its second 16 values as 16-bit integers.
    subs: [[i32; 16]; PARTS],
    /// [`Interleaved::mins`].
    mins: [I::I; 4],
}

impl<I: Isa> Scales<I> for &Header<I> {
    #[inline(always)]
    fn d(self, _: I, _: usize) -> I::F {
        self.d
    }
    #[inline(always)]
    fn m(self, _: I, _: usize) -> I::F {
        self.m
    }
    #[inline(always)]
    fn mins(self, isa: I, pair: usize) -> I::I {
        isa.and_i(isa.shr_by(self.mins[pair / 2], 8 * (pair % 2) as u32), isa.splat_i(0x00ff_00ff))
    }
}

/// Blocks where they are in the rows, `stride` blocks apart.
#[derive(Clone, Copy)]
struct Blocks<'a, Q> {
    /// From the first row on.
    blocks: &'a [Q],
    stride: usize,
    /// Number of the block in its row.
    c: usize,
    /// Replaces missing blocks.
    missing: &'a Q,
}

impl<'a, Q: Interleaved> Blocks<'a, Q> {
    #[inline(always)]
    fn get(self, r: usize) -> &'a Q {
        self.blocks.get(r * self.stride + self.c).unwrap_or(self.missing)
    }

    /// Four words of each row.
    #[inline(always)]
    fn quad<I: Isa>(self, isa: I, first: usize) -> [I::I; 4] {
        let bytes = Q::bytes_of(self.blocks.get(self.c..).unwrap_or(&[]));
        let bytes = bytes.get(4 * first..).unwrap_or(&[]);
        isa.transpose(bytes, self.stride * size_of::<Q>())
    }
}

impl<I: Isa, Q: Interleaved> Rows<I, Q> for Blocks<'_, Q> {
    type Row = Q;

    #[inline(always)]
    fn header(self, isa: I) -> Header<I> {
        let first = self.quad(isa, Q::HEADER[0]);
        let second = if Q::HEADER[1] == Q::HEADER[0] { first } else { self.quad(isa, Q::HEADER[1]) };
        let words = HeaderWords { blocks: self, quads: [first, second] };
        let mut subs = [[0; 16]; PARTS];
        if Q::SUB < CHUNK {
            let all = Q::subs(isa, &words);
            for part in 0..PARTS {
                let s = part * 32 / Q::SUB;
                let last = s + (32 / Q::SUB).saturating_sub(1);
                isa.store_i(isa.byte_pair(all[s / 4], [s % 4, last % 4]), &mut subs[part]);
            }
        }
        let (d, mut m, mut mins) = (Q::d(isa, &words, 0), isa.splat(0.0), [isa.splat_i(0); 4]);
        if Q::HAS_MIN {
            (m, mins) = (Q::m(isa, &words), Q::mins(isa, &words));
        }
        Header { d, m, subs, mins }
    }
    #[inline(always)]
    fn row(&self, r: usize) -> &Q {
        self.get(r)
    }
    #[inline(always)]
    fn codes(isa: I, rows: [&Q; 2], part: usize) -> I::I {
        Q::code(isa, &CodeWords(rows), part, 0)
    }
    #[inline(always)]
    fn prefetch_next(self, isa: I, p: usize) {
        prefetch_next::<I, Q, 2>(isa, self.blocks, self.stride, self.c, 2 * p);
    }
}

/// The words of [`Interleaved::HEADER`], one row in each lane.
struct HeaderWords<'a, I: Isa, Q> {
    blocks: Blocks<'a, Q>,
    quads: [[I::I; 4]; 2],
}

impl<I: Isa, Q: Interleaved> Words<I> for HeaderWords<'_, I, Q> {
    #[inline(always)]
    fn word(&self, _: I, w: usize) -> I::I {
        let quad = usize::from(w < Q::HEADER[0] || w >= Q::HEADER[0] + 4);
        self.quads[quad][(w - Q::HEADER[quad]) % 4]
    }
    /// Super-blocks have no such head.
    fn head_f16(&self, isa: I) -> I::F {
        isa.splat(0.0)
    }
    /// Super-blocks have no such head.
    fn head_u8(&self, isa: I) -> I::I {
        isa.splat_i(0)
    }
    #[inline(always)]
    fn tail_f16(&self, isa: I) -> I::F {
        let mut tails = [0; ROWS];
        for r in 0..ROWS {
            let bytes = Q::bytes_of(core::slice::from_ref(self.blocks.get(r)));
            tails[r] = u16::from_le_bytes(*bytes.last_chunk().unwrap_or(&[0; 2]));
        }
        isa.load_f16(&tails)
    }
}

/// Eight words of each of two rows: lane `l` has the `l % 8`-th from the wanted one on.
struct CodeWords<'a, Q>([&'a Q; 2]);

/// Bytes of a block from a word on; zeros if they are not all there.
#[inline(always)]
fn bytes_at<Q: Bytes, const N: usize>(block: &Q, w: usize) -> &[u8; N] {
    let bytes = Q::bytes_of(core::slice::from_ref(block));
    bytes.get(4 * w..).and_then(<[u8]>::first_chunk).unwrap_or(&[0; N])
}

impl<I: Isa, Q: Interleaved> Words<I> for CodeWords<'_, Q> {
    #[inline(always)]
    fn word(&self, isa: I, w: usize) -> I::I {
        isa.load_halves(bytes_at(self.0[0], w), bytes_at(self.0[1], w))
    }
    #[inline(always)]
    fn pick(&self, isa: I, _: usize, words: [usize; 8]) -> I::I {
        let mut halves = [[0; 32]; 2];
        for (half, row) in halves.iter_mut().zip(self.0) {
            for (word, w) in half.as_chunks_mut().0.iter_mut().zip(words) {
                *word = *bytes_at::<Q, 4>(row, w);
            }
        }
        isa.load_halves(&halves[0], &halves[1])
    }
    #[inline(always)]
    fn numbers(&self, isa: I, _: usize, numbers: [i32; 8]) -> I::I {
        let mut lanes = [0; 16];
        for l in 0..16 {
            lanes[l] = numbers[l % 8];
        }
        isa.load_i(&lanes)
    }
    #[inline(always)]
    fn split_nibbles(&self, isa: I, w: usize, _: usize) -> I::I {
        isa.load_nibble_halves(bytes_at(self.0[0], w), bytes_at(self.0[1], w))
    }
    /// Codes are read, not scales.
    fn head_f16(&self, isa: I) -> I::F {
        isa.splat(0.0)
    }
    /// Codes are read, not scales.
    fn head_u8(&self, isa: I) -> I::I {
        isa.splat_i(0)
    }
    /// Codes are read, not scales.
    fn tail_f16(&self, isa: I) -> I::F {
        isa.splat(0.0)
    }
}

/// Rows in normal form; of formats without minimums.
impl<I: Isa, Q: Quantised> Rows<I, Q> for &[Unpacked; ROWS] {
    type Row = Unpacked;

    #[inline(always)]
    fn header(self, isa: I) -> Header<I> {
        const { assert!(!Q::HAS_MIN && Q::SIGNED && (Q::GROUP < CHUNK || Q::SUB == 16)) };
        let mut d = [0.0; ROWS];
        for r in 0..ROWS {
            d[r] = self[r].d[0];
        }
        let mut subs = [[0; 16]; PARTS];
        let bytes = Unpacked::all_bytes(self).get(core::mem::offset_of!(Unpacked, sub)..).unwrap_or(&[]);
        store_subs(isa, bytes, size_of::<Unpacked>(), &mut subs);
        Header { d: isa.load(&d), m: isa.splat(0.0), subs, mins: [isa.splat_i(0); 4] }
    }
    #[inline(always)]
    fn row(&self, r: usize) -> &Unpacked {
        &self[r % ROWS]
    }
    #[inline(always)]
    fn codes(isa: I, rows: [&Unpacked; 2], part: usize) -> I::I {
        let [a, b] = rows;
        let [a, b] = [i8::bytes_of(&a.codes).as_chunks::<32>().0, i8::bytes_of(&b.codes).as_chunks::<32>().0];
        isa.signed(isa.load_halves(a.get(part).unwrap_or(&[0; 32]), b.get(part).unwrap_or(&[0; 32])))
    }
    fn prefetch_next(self, _: I, _: usize) {}
}

/// The 16-bit sub-scales of rows, `stride` bytes apart, in pairs.
#[inline(always)]
fn store_subs<I: Isa>(isa: I, rows: &[u8], stride: usize, subs: &mut [[i32; 16]; PARTS]) {
    for quad in 0..PARTS / 4 {
        let words = isa.transpose(rows.get(16 * quad..).unwrap_or(&[]), stride);
        for i in 0..4 {
            isa.store_i(words[i], &mut subs[4 * quad + i]);
        }
    }
}

/// Rows of points in a grid.
#[derive(Clone, Copy)]
struct Grid<'a> {
    rows: &'a [Split; ROWS],
    scales: &'a [u16; ROWS],
}

impl<I: Isa, Q: Gridded> Rows<I, Q> for Grid<'_> {
    type Row = Split;
    const SIGNED: bool = false;
    const BIAS: i32 = match Q::RAISED {
        Some(raised) => raised as i32,
        None => 0,
    };
    const MAGNITUDES: bool = Q::RAISED.is_none();

    #[inline(always)]
    fn header(self, isa: I) -> Header<I> {
        let d = isa.mul(isa.load_f16(self.scales), isa.splat(Q::FACTOR));
        // Each row has its sub-scales, but an excess of codes is told by those of all rows.
        let mut subs = [[0; 16]; PARTS];
        if Q::RAISED.is_some() {
            store_subs(isa, Split::all_bytes(self.rows), size_of::<Split>(), &mut subs);
        }
        Header { d, m: isa.splat(0.0), subs, mins: [isa.splat_i(0); 4] }
    }
    #[inline(always)]
    fn row(&self, r: usize) -> &Split {
        &self.rows[r % ROWS]
    }
    #[inline(always)]
    fn codes(isa: I, [a, b]: [&Split; 2], part: usize) -> I::I {
        let magnitudes = isa.load_halves(a.part(part), b.part(part));
        if Q::RAISED.is_none() {
            return magnitudes;
        }
        Split::code_bytes::<I, Q>(isa, magnitudes, [a.signs[part], b.signs[part]])
    }
    #[inline(always)]
    fn signs(row: &Split, part: usize) -> u32 {
        row.signs[part]
    }
    #[inline(always)]
    fn subs(_: &Header<I>, _: usize, row: &Split, part: usize) -> i32 {
        let [low, high] = row.subs.as_chunks::<2>().0[part];
        (i32::from(low) & 0xffff) | (i32::from(high) << 16)
    }
    fn prefetch_next(self, _: I, _: usize) {}
}

/// Formats whose code bytes are read from blocks.
#[inline(always)]
pub(super) fn interleaved<I: Isa, Q: Interleaved, const T: usize>(isa: I, task: &mut Task<'_, '_, Q>) {
    rowwise::<I, Q, T>(
        isa,
        task,
        #[inline(always)]
        |task, first, c, x, acc| {
            let blocks = task.w.get(first * task.row_blocks..).unwrap_or(&[]);
            if first + ROWS <= task.rows {
                let rows = Blocks { blocks, stride: task.row_blocks, c, missing: &task.w[0] };
                return add::<I, Q, _, T>(isa, rows, x, acc);
            }
            let mut blocks = [task.w[0]; ROWS];
            for r in 0..ROWS {
                blocks[r] = task.row(first + r)[c];
            }
            add::<I, Q, _, T>(isa, Blocks { blocks: &blocks, stride: 1, c: 0, missing: &task.w[0] }, x, acc);
        },
    );
}

/// Formats whose codes are points in a grid.
#[inline(always)]
pub(super) fn gridded<I: Isa, Q: Gridded, const T: usize>(isa: I, task: &mut Task<'_, '_, Q>) {
    let (mut rows, mut scales) = ([Split::ZERO; ROWS], [0; ROWS]);
    rowwise::<I, Q, T>(
        isa,
        task,
        #[inline(always)]
        |task, first, c, x, acc| {
            for r in 0..ROWS {
                prefetch_next::<I, Q, 1>(isa, &task.w[first * task.row_blocks..], task.row_blocks, c, r);
                let block = &task.row(first + r)[c];
                block.split(&mut rows[r]);
                scales[r] = block.scale().to_bits();
            }
            for row in &mut rows {
                Q::look_up(isa, row);
            }
            add::<I, Q, _, T>(isa, Grid { rows: &rows, scales: &scales }, x, acc);
        },
    );
}

/// Formats that are unpacked to their normal form first.
#[inline(always)]
pub(super) fn unpacked<I: Isa, Q: Quantised, const T: usize>(isa: I, task: &mut Task<'_, '_, Q>) {
    let mut rows = [Unpacked::ZERO; ROWS];
    rowwise::<I, Q, T>(
        isa,
        task,
        #[inline(always)]
        |task, first, c, x, acc| {
            for r in 0..ROWS {
                prefetch_next::<I, Q, 1>(isa, &task.w[first * task.row_blocks..], task.row_blocks, c, r);
                unpack(&task.row(first + r)[c], &mut rows[r]);
            }
            add::<I, Q, _, T>(isa, &rows, x, acc);
        },
    );
}

/// Prefetches `N` blocks of the next sixteen rows, in the order of memory, while block `c` of row `r` is
/// read. The CPU's own prefetcher follows one row, not sixteen. Many requests at once would delay the present
/// reads, so each row asks for its share.
#[inline(always)]
fn prefetch_next<I: Isa, B: Bytes, const N: usize>(
    isa: I,
    rows: &[B],
    row_blocks: usize,
    c: usize,
    r: usize,
) {
    let ahead = (ROWS * (row_blocks + c) + r) * size_of::<B>();
    for line in (0..N * size_of::<B>()).step_by(64) {
        isa.prefetch::<true, _>(B::bytes_of(rows), ahead + line);
    }
}

/// Compiled without vector instructions: most of these formats consist of table look-ups and bit fields,
/// which compilers turn into slow gathers.
#[inline(never)]
fn unpack<Q: Quantised>(block: &Q, out: &mut Unpacked) {
    block.unpack(out);
}

/// Calls `add` for each super-block `c` of sixteen rows from each `first` on, and writes what it sums up.
#[inline(always)]
fn rowwise<'a, I: Isa, Q: Quantised, const T: usize>(
    isa: I,
    task: &mut Task<'a, '_, Q>,
    mut add: impl FnMut(&Task<'a, '_, Q>, usize, usize, &[XChunk<'_>; T], &mut [I::F; T]),
) {
    for first in (0..task.rows).step_by(ROWS) {
        let mut acc = [isa.splat(0.0); T];
        for c in 0..task.x.chunks {
            let mut x = [task.x.chunk(0, c); T];
            for t in 1..T {
                x[t] = task.x.chunk(t.min(task.x.tokens - 1), c);
            }
            add(task, first, c, &x, &mut acc);
        }
        for t in 0..task.x.tokens.min(T) {
            let mut lanes = [0.0; ROWS];
            isa.store(acc[t], &mut lanes);
            let here = (task.rows - first).min(ROWS);
            task.out.row(t)[first..first + here].copy_from_slice(&lanes[..here]);
        }
    }
}

/// Adds the products of one super-block of sixteen rows with `T` tokens to `acc`.
#[inline(always)]
fn add<I: Isa, Q: Quantised, R: Rows<I, Q>, const T: usize>(
    isa: I,
    rows: R,
    x: &[XChunk<'_>; T],
    acc: &mut [I::F; T],
) {
    let zero = isa.splat_i(0);
    let header = rows.header(isa);
    let mut x_codes = [[zero; PARTS]; T];
    for t in 0..T {
        for part in 0..PARTS {
            let codes = x[t].part(part);
            x_codes[t][part] = isa.load_halves(codes, codes);
        }
    }
    let mut lanes = [[[0; 16]; PAIRS]; T];
    for p in 0..PAIRS {
        rows.prefetch_next(isa, p);
        let pair = [rows.row(p), rows.row(p + PAIRS)];
        let mut sums = [zero; T];
        for_each_part(
            #[inline(always)]
            |part| {
                let codes = R::codes(isa, pair, part);
                let subs = [R::subs(&header, p, pair[0], part), R::subs(&header, p + PAIRS, pair[1], part)];
                let signs = [R::signs(pair[0], part), R::signs(pair[1], part)];
                let scales = match Q::SUB {
                    16 => isa.scales::<false>(subs),
                    32 => isa.scales::<true>(subs),
                    _ => zero,
                };
                for t in 0..T {
                    let x = x_codes[t][part];
                    let x = if R::MAGNITUDES { isa.negate(x, signs) } else { x };
                    sums[t] = match (Q::SUB < CHUNK, R::SIGNED) {
                        (true, true) => isa.dot4_scaled::<true>(sums[t], codes, x, scales),
                        (true, false) => isa.dot4_scaled::<false>(sums[t], codes, x, scales),
                        (false, true) => isa.dot4::<true>(sums[t], codes, x),
                        (false, false) => isa.dot4::<false>(sums[t], codes, x),
                    };
                }
            },
        );
        for t in 0..T {
            isa.store_i(sums[t], &mut lanes[t][p]);
        }
    }
    for t in 0..T {
        let mut sums = isa.sum_halves(&lanes[t]);
        if R::BIAS != 0 {
            sums = isa.sub_i(sums, isa.mul_i(raised::<I, Q>(isa, &header, &x[t]), isa.splat_i(R::BIAS)));
        }
        acc[t] = add_group::<I, Q::Shape>(isa, &header, &x[t], sums, acc[t]);
    }
}

/// Calls `f` for each part. Shifts depend on the part, so the loop must be unrolled, and compilers do not
/// unroll one this long.
#[inline(always)]
fn for_each_part(mut f: impl FnMut(usize)) {
    f(0);
    f(1);
    f(2);
    f(3);
    f(4);
    f(5);
    f(6);
    f(7);
}

/// The sums of activations times sub-scales. Code bytes that exceed their codes by 1 add this to each row.
#[inline(always)]
fn raised<I: Isa, Q: Quantised>(isa: I, header: &Header<I>, x: &XChunk<'_>) -> I::I {
    let mut sums = isa.splat_i(0);
    if Q::SUB == CHUNK {
        return isa.splat_i(x.sums[..16].iter().sum());
    }
    for part in 0..PARTS {
        let pair = (x.sums[2 * part] & 0xffff) | (x.sums[2 * part + 1] << 16);
        sums = isa.dot2(sums, isa.load_i(&header.subs[part]), isa.splat_i(pair));
    }
    sums
}
