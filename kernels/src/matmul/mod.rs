//! Products of weight rows with activations: `out[t][r] = w[r] · x[t]`.
//!
//! The contract. Quantised formats: exact integer sums inside a group (integer sub-scales applied in
//! integers), then `acc = fma(sum, d_w · d_x, acc)` once a group, in order from k = 0, a minimum as a second
//! fma of the same kind after it. Plain formats: 16 strided accumulators (lane = k mod 16), fma, then the
//! fixed tree. A row's result never depends on its tile or its neighbours.
//!
//! Three kernels compute quantised products; which one runs never shows in the result:
//! - `rowwise`: a few tokens with plain rows of super-blocks. Lanes run along a row.
//! - `tiles`, direct: a few tokens with interleaved rows, or with plain rows of short blocks, whose words are
//!   transposed on the way. One weight row in each of 16 lanes, so that sums need no reduction.
//! - `tiles`: many tokens. Sixteen rows are expanded once, and meet all tokens.
//!
//! Formats without kernels of their own are unpacked to their normal form ([`Unpacked`]) first. Without vector
//! instructions all but Q8_0 are: `scalar` is one kernel for all formats.
//!
//! Code is what a library of many formats consists of. What multiplies expanded tiles is therefore compiled once
//! for all formats of one [`Shape`](crate::formats::Shape), and only what expands them for each format.

#![allow(clippy::needless_range_loop, reason = "loops by index over vectors are what inlines; see `isa`")]

use crate::activation::{self, Activation, SUMS, padded};
use crate::formats::{
    Bytes, Format, Gridded, Interleaved, Kind, Layout, MAX_BLOCK_BYTES, Plain, Quantised, ROWS, Split,
    Unpacked,
};
use crate::isa::{Cpu, Isa, WithIsa};
use crate::panel::PanelMut;
use core::marker::PhantomData;

mod plain;
mod rowwise;
mod scalar;
mod tiles;

pub(crate) use plain::converted;
use plain::plain;
use tiles::{ChunkBuffer, decode, lanes_of, prefill};

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

/// For kernels that are generic over the instruction set and the format, functions that choose the former, for all
/// CPUs or for those with vectors.
macro_rules! for_every_cpu {
    ($($kernel:ident<$format:ident>: $run:ident;)+) => {
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
                cpu.$run(Call::<Q>(product, PhantomData));
            })+
        }
    };
}

for_every_cpu! {
    interleaved<Interleaved>: run_vectors;
    gridded<Gridded>: run_vectors;
    unpacked<Quantised>: run_vectors;
    plain<Plain>: run_inline;
}

/// The loop that computes a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loop {
    /// Four rows by one or four tokens, lanes along k.
    Plain,
    /// Lanes along a row, codes straight from its blocks.
    Rows,
    /// Sixteen rows in lanes, codes straight from the blocks.
    Direct,
    /// Sixteen rows in lanes, expanded once for all tokens; twice as many where there are registers.
    Tiles,
}

impl Loop {
    /// Loops that read codes from the blocks pay while a block meets no more tokens than registers hold.
    const fn choose(format: Format, layout: Layout, tokens: usize) -> Loop {
        match format.kind() {
            Kind::Float => Loop::Plain,
            Kind::Quantised { .. } if tokens > TILE_TOKENS => Loop::Tiles,
            Kind::Quantised { group: CHUNK, .. } if matches!(layout, Layout::Rows) => Loop::Rows,
            Kind::Quantised { .. } if format.interleaves() => Loop::Direct,
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
            if let (Cpu::Scalar(_), Kind::Quantised { .. }) = (cpu, format.kind()) {
                return write!(f, "{isa}: without vectors, block by block for {tokens} tokens");
            }
            match Loop::choose(format, layout, tokens) {
                Loop::Plain => write!(f, "{isa} plain: lanes along k, {} floats", format.name()),
                Loop::Rows => write!(f, "{isa} rows: lanes along k; {tokens} <= {TILE_TOKENS} tokens"),
                Loop::Direct => write!(f, "{isa} direct: {source}; {tokens} <= {TILE_TOKENS} tokens"),
                Loop::Tiles => write!(f, "{isa} tiles: {source}; expanded once for {tokens} tokens"),
            }
        }
    }
    Line(cpu, format, layout, tokens)
}

/// Computes a product of rows stored as `format`. Rows and tokens for which bytes or activations are missing
/// are left alone; if `x` is not of the kind that the format wants, or `k` is no whole number of blocks, all
/// are. So they are without the [`missing_feature`].
pub fn matmul(cpu: Cpu, format: Format, product: MatMul<'_, '_>) {
    match (cpu, format.kind(), format.kernel()) {
        (Cpu::Scalar(_), Kind::Quantised { .. }, _) => scalar::quantised(format, product, false),
        (_, _, Ok(kernel)) => kernel(cpu, product),
        (_, _, Err(_)) => {}
    }
}

/// Computes as [`matmul`], but continues the sums in `out`, which earlier values of the rows began. Only quantised formats have
/// such sums: one number for each output.
pub fn matmul_onto(format: Format, product: MatMul<'_, '_>) {
    scalar::quantised(format, product, true);
}

/// The cargo feature that has the kernels of a format for a CPU, if this build lacks it. Scalar code and plain
/// formats need none, and neither does anything but products.
pub fn missing_feature(cpu: Cpu, format: Format) -> Option<&'static str> {
    match cpu {
        Cpu::Scalar(_) => None,
        #[allow(unreachable_patterns, reason = "some targets have no vector instructions")]
        _ => format.kernel().err(),
    }
}

/// Quantised activations, checked.
struct Inputs<'a> {
    k: usize,
    tokens: usize,
    /// Codes and sums, chunk by chunk.
    codes: &'a [[[i8; 4]; CHUNK / 4]],
    sums: &'a [[i32; SUMS]],
    scales: &'a [f32],
    /// Chunks of a token, and scales of a chunk.
    chunks: usize,
    chunk_scales: usize,
}

impl<'a> Inputs<'a> {
    /// At most `tokens` of them, of `k` values for blocks of `block_len`; `None` if that does not fit.
    fn new(x: X<'a>, k: usize, block_len: usize, to: Activation, tokens: usize) -> Option<Self> {
        let X::Quantised(x) = x else { return None };
        // No longer row could be in memory, and its padded length might overflow.
        if k == 0 || k > isize::MAX as usize || !k.is_multiple_of(block_len) || k != x.k {
            return None;
        }
        let width = padded(k);
        let (scales, sums) = (width / to.block_len(), width / activation::PADDING * SUMS);
        let tokens =
            (x.codes.len() / width).min(x.scales.len() / scales).min(x.sums.len() / sums).min(tokens);
        let codes = x.codes[..tokens * width].as_chunks::<4>().0.as_chunks::<{ CHUNK / 4 }>().0;
        let sums = x.sums[..tokens * sums].as_chunks().0;
        let (chunks, chunk_scales) = (k.div_ceil(CHUNK), CHUNK / to.block_len());
        let scales = &x.scales[..tokens * scales];
        Some(Inputs { k, tokens, codes, sums, scales, chunks, chunk_scales })
    }

    /// A token's chunk; zeros past the end.
    #[inline(always)]
    fn chunk(&self, token: usize, c: usize) -> XChunk<'a> {
        let i = token * self.chunks + c;
        let scales = self.scales.get(i * self.chunk_scales..).unwrap_or(&[]);
        XChunk {
            codes: self.codes.get(i).unwrap_or(&[[0; 4]; CHUNK / 4]),
            sums: self.sums.get(i).unwrap_or(&[0; SUMS]),
            scale: scales.first().copied().unwrap_or(0.0),
            scales: scales.first_chunk().unwrap_or(&[0.0; CHUNK / 32]),
        }
    }
}

/// A product with quantised activations, checked.
struct Task<'a, 'o, Q> {
    w: &'a [Q],
    row_blocks: usize,
    rows: usize,
    layout: Layout,
    x: Inputs<'a>,
    out: PanelMut<'o>,
}

impl<'a, Q> Task<'a, '_, Q> {
    /// The blocks of a row. Rows past the end repeat the last one.
    #[inline(always)]
    fn row(&self, r: usize) -> &'a [Q] {
        &self.w[r.min(self.rows - 1) * self.row_blocks..][..self.row_blocks]
    }
}

impl<'a, 'o, Q: Quantised> Task<'a, 'o, Q> {
    /// `None` if there is nothing to compute.
    fn new(product: MatMul<'a, 'o>) -> Option<Self> {
        let MatMul { w, layout, k, x, out } = product;
        let x = Inputs::new(x, k, Q::LEN, Q::ACTIVATION, out.rows())?;
        let (w, row_blocks) = (Q::cast(w), k / Q::LEN);
        let rows = (w.len() / row_blocks).min(out.cols());
        (x.tokens > 0 && rows > 0).then_some(Task { w, row_blocks, rows, layout, x, out })
    }
}

/// Formats that are read as interleaved rows.
fn interleaved<I: Isa, Q: Interleaved>(isa: I, product: MatMul<'_, '_>) {
    let Some(mut task) = Task::<Q>::new(product) else { return };
    isa.run(
        #[inline(always)]
        || match Loop::choose(Q::FORMAT, task.layout, task.x.tokens) {
            // (Short blocks never get here; this says so to the compiler.)
            Loop::Rows if Q::GROUP < CHUNK => {}
            Loop::Rows if task.x.tokens == 1 => rowwise::interleaved::<I, Q, 1>(isa, &mut task),
            Loop::Rows => rowwise::interleaved::<I, Q, TILE_TOKENS>(isa, &mut task),
            Loop::Direct if task.x.tokens == 1 => decode::<I, Q, 1>(isa, &mut task),
            Loop::Direct => decode::<I, Q, TILE_TOKENS>(isa, &mut task),
            Loop::Plain | Loop::Tiles => {
                let mut buffer = ChunkBuffer::ZERO;
                prefill::<I, Q>(
                    isa,
                    &mut task,
                    #[inline(always)]
                    |task, first, c, tile| {
                        let lanes = lanes_of::<I, Q>(isa, task, first, c, &mut buffer);
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
        || match Loop::choose(Q::FORMAT, task.layout, task.x.tokens) {
            // (Shorter groups never get here; this says so to the compiler.)
            Loop::Rows if Q::GROUP < CHUNK => {}
            Loop::Rows if task.x.tokens == 1 => rowwise::unpacked::<I, Q, 1>(isa, &mut task),
            Loop::Rows => rowwise::unpacked::<I, Q, TILE_TOKENS>(isa, &mut task),
            _ => unpacked_tiles::<I, Q>(isa, &mut task),
        },
    );
}

/// Formats whose codes are points in a grid.
fn gridded<I: Isa, Q: Gridded>(isa: I, product: MatMul<'_, '_>) {
    let Some(mut task) = Task::<Q>::new(product) else { return };
    isa.run(
        #[inline(always)]
        || match Loop::choose(Q::FORMAT, task.layout, task.x.tokens) {
            Loop::Rows if task.x.tokens == 1 => rowwise::gridded::<I, Q, 1>(isa, &mut task),
            Loop::Rows => rowwise::gridded::<I, Q, TILE_TOKENS>(isa, &mut task),
            _ => gridded_tiles::<I, Q>(isa, &mut task),
        },
    );
}

/// Tiles of rows of points in a grid.
#[inline(always)]
fn gridded_tiles<I: Isa, Q: Gridded>(isa: I, task: &mut Task<'_, '_, Q>) {
    let (mut rows, mut splits) = ([Unpacked::ZERO; ROWS], [Split::ZERO; ROWS]);
    prefill::<I, Q>(
        isa,
        task,
        #[inline(always)]
        |task, first, c, tile| {
            for r in 0..ROWS {
                let block = &task.row(first + r)[c];
                block.split(&mut splits[r]);
                rows[r].d[0] = block.scale().value() * Q::FACTOR;
            }
            for r in 0..ROWS {
                Q::look_up(isa, &mut splits[r]);
                rows[r].sub = splits[r].subs;
            }
            for r in 0..ROWS {
                splits[r].codes::<I, Q>(isa, &mut rows[r]);
            }
            tile.set::<I, Q>(isa, &rows);
        },
    );
}

/// Tiles of rows in normal form.
#[inline(always)]
fn unpacked_tiles<I: Isa, Q: Quantised>(isa: I, task: &mut Task<'_, '_, Q>) {
    let mut rows = [Unpacked::ZERO; ROWS];
    prefill::<I, Q>(
        isa,
        task,
        #[inline(always)]
        |task, first, c, tile| {
            for r in 0..ROWS {
                unpack_chunk(task.row(first + r), c, &mut rows[r]);
            }
            tile.set::<I, Q>(isa, &rows);
        },
    );
}

/// One token's activations in one chunk.
#[derive(Clone, Copy)]
struct XChunk<'a> {
    codes: &'a [[i8; 4]; CHUNK / 4],
    sums: &'a [i32; SUMS],
    /// The first scale, or the only one.
    scale: f32,
    /// Those of short blocks.
    scales: &'a [f32; CHUNK / 32],
}

impl<'a> XChunk<'a> {
    /// The codes of 32 values.
    #[inline(always)]
    fn part(&self, part: usize) -> &'a [u8; 32] {
        let codes = <[i8; 4]>::bytes_of(self.codes).as_chunks::<32>().0;
        codes.get(part).unwrap_or(&[0; 32])
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
