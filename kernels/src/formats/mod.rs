//! The tensor types of GGUF: one file a format, one row a format in the table of [`Format`].
//!
//! A *block* is the unit of a format: a fixed number of values in a fixed number of bytes. Each quantised
//! block is a struct whose fields are its bytes in file order, so a mapped page is a slice of blocks
//! ([`Bytes::cast`]). The one definition of what a block means is [`Quantised::unpack`], which writes it in a
//! normal form, [`Unpacked`]; dequantisation follows from it, and every kernel is tested against it.
//!
//! Layouts, code tables and formulas are those that the GGML project publishes for GGUF.
#![allow(clippy::needless_range_loop, reason = "constant ranges over arrays read as the formulas they are")]

mod bits;
mod bytes;
mod error;
mod gridded;
mod grids;
mod lanes;
mod plain;
#[cfg(feature = "quantize")]
mod points;
mod shape;

mod iq1_m;
mod iq1_s;
mod iq2_s;
mod iq2_xs;
mod iq2_xxs;
mod iq3_s;
mod iq3_xxs;
mod iq4_nl;
mod iq4_xs;
mod mxfp4;
mod nvfp4;
mod q1_0;
mod q2_0;
mod q2_k;
mod q3_k;
pub(crate) mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod q8_1;
mod q8_k;
#[cfg(feature = "quantize")]
mod search;
mod tq1_0;
mod tq2_0;

use crate::isa::{Isa, Scalar};
use crate::matmul::{Kernel, converted, every_cpu};

pub use bytes::Bytes;
pub use error::{FormatError, LengthMismatch, UnknownFormat, Why};
pub use gridded::{Gridded, Split};
pub use grids::{IQ1_GRID, IQ2_S_GRID, IQ2_XS_GRID, IQ2_XXS_GRID, IQ3_S_GRID, IQ3_XXS_GRID};
pub use iq1_m::IQ1_M;
pub use iq1_s::IQ1_S;
pub use iq2_s::IQ2_S;
pub use iq2_xs::IQ2_XS;
pub use iq2_xxs::IQ2_XXS;
pub use iq3_s::IQ3_S;
pub use iq3_xxs::IQ3_XXS;
pub use iq4_nl::{IQ4_NL, IQ4_VALUES};
pub use iq4_xs::IQ4_XS;
pub use lanes::{Interleave, Lanes, Layout, ROWS, ShortBlocks, Words};
pub use mxfp4::{E2M1_DOUBLED, E8M0, MXFP4};
pub use nvfp4::{NVFP4, UE4M3};
pub use plain::{BF16, F16, F32, F64, I8, I16, I32, I64};
pub use q1_0::Q1_0;
pub use q2_0::Q2_0;
pub use q2_k::Q2_K;
pub use q3_k::Q3_K;
pub use q4_0::Q4_0;
pub use q4_1::Q4_1;
pub use q4_k::Q4_K;
pub use q5_0::Q5_0;
pub use q5_1::Q5_1;
pub use q5_k::Q5_K;
pub use q6_k::Q6_K;
pub use q8_0::Q8_0;
pub use q8_1::Q8_1;
pub use q8_k::Q8_K;
pub use shape::{Codes, Groups, Raised, Shape, Signed, SuperBlock, WithMin};
pub use tq1_0::TQ1_0;
pub use tq2_0::TQ2_0;

/// A block of a format: the part that plain and quantised formats share.
pub trait Block: Bytes {
    /// The format that this is a block of.
    const FORMAT: Format;
    /// Values in a block.
    const LEN: usize;
    /// Whether [`Block::quantize_weights`] needs the importance of columns.
    const NEEDS_IMPORTANCE: bool = false;

    /// Whether no scale of the block is NaN, infinite or, in MXFP4, the code that stands for NaN. For a plain
    /// float, whether the value is finite.
    fn is_finite(&self) -> bool;

    /// Sets every float scale, the minimum's included, to `scale` or the nearest below that the format has.
    /// Codes and integer sub-scales stay, so that random bytes become a block of sane values. A plain float
    /// keeps its sign and fraction and takes the exponent of `scale`; a plain integer stays.
    fn set_scale(&mut self, scale: f32);

    /// The block that stands for `LEN` values, or `None` from a format without a quantiser, or for another
    /// length.
    fn quantize(_values: &[f32]) -> Option<Self> {
        None
    }

    /// As [`Block::quantize`], for a weight: by the rules of published files, with the least error where
    /// columns are important.
    fn quantize_weights(values: &[f32], _importance: Option<Importance>) -> Option<Self> {
        Self::quantize(values)
    }
}

/// How much the errors of a block's columns count.
#[derive(Clone, Copy, Debug)]
pub struct Importance<'a> {
    /// Mean square of the input by column: as many as the block has values.
    pub columns: &'a [f32],
    /// Mean square of the values of the block's row.
    pub mean_square: f32,
}

/// A format of one value a block: floats and integers.
pub trait Plain: Block {
    /// The value as an f32, rounded to nearest even where it has more digits.
    fn value(&self) -> f32;
}

/// A format whose values are small integer codes under shared scales.
pub trait Quantised: Block {
    /// How codes are scaled.
    type Shape: Shape;
    /// The format to which activations are quantised for a dot product with this format.
    const ACTIVATION: Activation = <Self::Shape as Shape>::ACTIVATION;
    /// See [`Shape::GROUP`].
    const GROUP: usize = <Self::Shape as Shape>::GROUP;
    /// See [`Shape::SUB`].
    const SUB: usize = <Self::Shape as Shape>::SUB;
    /// See [`Shape::SIGNED`].
    const SIGNED: bool = <Self::Shape as Shape>::SIGNED;
    /// See [`Shape::HAS_MIN`].
    const HAS_MIN: bool = <Self::Shape as Shape>::HAS_MIN;
    /// See [`Shape::OFFSET`].
    const OFFSET: i32 = <Self::Shape as Shape>::OFFSET;

    /// Writes the block in normal form, exactly. Only the entries that the format uses are written: `LEN`
    /// codes, `LEN / 16` sub-scales, `LEN / GROUP` scales, and as many minimums if `HAS_MIN`.
    fn unpack(&self, out: &mut Unpacked);
}

/// A format with kernels on sixteen interleaved rows: how vectors of 16 rows are read from their words.
pub trait Interleaved: Quantised {
    /// Its interleaved block.
    type Lanes: Interleave;

    /// For blocks of 256 values: all words that the scales, sub-scales and minimums are read from are among
    /// the four from each of these on. (Kernels on plain rows transpose only them.)
    const HEADER: [usize; 2] = [0; 2];

    /// The code bytes of values `32 part + 4 k` to `32 part + 4 k + 3`, `k` < 8, of each row: codes plus
    /// [`Quantised::OFFSET`], or, if they are signed, made so by [`Isa::signed`].
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, part: usize, k: usize) -> I::I;

    /// The scale of group `group` of each row's block.
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, group: usize) -> I::F;

    /// The minimum of each row, with the sign with which it is added.
    fn m<I: Isa>(isa: I, _lanes: &impl Words<I>) -> I::F {
        isa.splat(0.0)
    }

    /// The integer sub-scales, one a byte, four to a word in order, signed.
    fn subs<I: Isa>(isa: I, _lanes: &impl Words<I>) -> [I::I; 4] {
        [isa.splat_i(0); 4]
    }

    /// The integer factors of the minimum, one for each [`Quantised::SUB`] values, laid out as
    /// [`Interleaved::subs`].
    fn mins<I: Isa>(isa: I, _lanes: &impl Words<I>) -> [I::I; 4] {
        [isa.splat_i(0); 4]
    }
}

/// The format to which activations are quantised before a dot product with quantised weights.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(non_camel_case_types, reason = "formats keep their published names")]
pub enum Activation {
    /// Blocks of 32 with an f16 scale.
    Q8_0,
    /// Blocks of 256 with an f32 scale.
    Q8_K,
}

/// How a dot product with a format is computed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// In f32: the format's values are plain floats or integers.
    Float,
    /// In integers, on quantised activations.
    Quantised {
        /// What activations are quantised to.
        activation: Activation,
        /// Values that share one f32 scale: [`Quantised::GROUP`].
        group: usize,
        /// Whether values have a minimum added.
        has_min: bool,
    },
}

/// One block in the normal form of all quantised formats.
///
/// `value[i] = d[i / GROUP] * sub[i / 16] * codes[i] + m[i / GROUP] * mins[i / 16]`, where the last term is
/// present only in formats with a minimum. Codes, sub-scales and their products are exact integers; `d` and
/// `m` are exact.
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// Integer codes, one a value, in order.
    pub codes: [i8; 256],
    /// Integer sub-scales, one for each 16 values; 1 in formats that have none.
    pub sub: [i16; 16],
    /// Integer factors of the minimum, one for each 16 values; 1 in formats that have none.
    pub mins: [i16; 16],
    /// Scales, one for each `GROUP` values.
    pub d: [f32; 16],
    /// Minimums, one for each `GROUP` values, with the sign with which they are added.
    pub m: [f32; 16],
}

impl Unpacked {
    /// All zero.
    pub const ZERO: Unpacked =
        Unpacked { codes: [0; 256], sub: [0; 16], mins: [0; 16], d: [0.0; 16], m: [0.0; 16] };

    /// The bytes of several, which start with codes.
    #[inline(always)]
    pub(crate) fn all_bytes(all: &[Unpacked]) -> &[u8] {
        const {
            assert!(
                size_of::<Unpacked>() == 256 + 2 * 32 + 2 * 64 && core::mem::offset_of!(Unpacked, codes) == 0
            )
        };
        // SAFETY: the size is the sum of the fields' sizes, so there is no padding.
        unsafe { core::slice::from_raw_parts(all.as_ptr().cast(), size_of_val(all)) }
    }

    /// The codes, eight at a time.
    #[inline(always)]
    fn octets(&mut self) -> &mut [[u8; 8]; 32] {
        // SAFETY: both are 256 bytes of alignment 1, and every byte is both an i8 and a u8.
        unsafe { &mut *self.codes.as_mut_ptr().cast() }
    }
}

impl Default for Unpacked {
    fn default() -> Self {
        Unpacked::ZERO
    }
}

/// Writes the values of one unpacked block of `Q` to `out`, whose length is `Q::LEN`.
///
/// The order of operations is the published one: scale times sub-scale, times code, plus minimum. The two
/// products are exact in every format but Q6_K, whose second one rounds; no fused operation is used.
fn write_values<Q: Quantised>(block: &Unpacked, out: &mut [f32]) {
    let sixteens = out.as_chunks_mut::<16>().0.iter_mut().zip(block.codes.as_chunks::<16>().0);
    for (i, (out, codes)) in sixteens.enumerate() {
        let group = 16 * i / Q::GROUP;
        let scale = block.d[group] * f32::from(block.sub[i]);
        let min = Q::HAS_MIN.then(|| block.m[group] * f32::from(block.mins[i]));
        write_sixteen(codes, scale, min, out);
    }
}

/// Not inlined: across a loop of these, compilers vectorise in the wrong direction, four times as slow.
#[inline(never)]
fn write_sixteen(codes: &[i8; 16], scale: f32, min: Option<f32>, out: &mut [f32; 16]) {
    *out = codes.map(|code| scale * f32::from(code));
    if let Some(min) = min {
        *out = out.map(|value| value + min);
    }
}

/// The first value of largest magnitude, with its sign.
fn extreme(values: &[f32; 32]) -> f32 {
    values.iter().fold(0.0, |extreme: f32, &x| if x.abs() > extreme.abs() { x } else { extreme })
}

/// The least and the greatest value.
fn range(values: &[f32; 32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &x| (min.min(x), max.max(x)))
}

/// 1 / d, or 0 for 0.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// One row of the table: a format's facts, and its functions over byte slices of matching lengths.
struct Entry {
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    kind: Kind,
    dequantize: fn(&[u8], &mut [f32]),
    unpack: Option<fn(&[u8], &mut Unpacked)>,
    quantize: fn(&[f32], &mut [u8]) -> bool,
    quantize_weights: QuantizeWeights,
    needs_importance: bool,
    is_finite: fn(&[u8]) -> bool,
    set_scale: fn(&mut [u8], f32),
    /// Or the cargo feature that has it, which this build lacks.
    kernel: Result<Kernel, &'static str>,
    interleaving: Option<Interleaving>,
}

/// Values and the importance of their columns to blocks; false if there is no quantiser.
type QuantizeWeights = fn(&[f32], Option<&[f32]>, &mut [u8]) -> bool;

/// Between rows and interleaved rows, by bytes.
struct Interleaving {
    /// Whole groups of [`ROWS`] rows of so many blocks.
    interleave: fn(&[u8], usize, &mut [u8]),
    /// One row's block out of an interleaved one.
    block: fn(&[u8], usize, &mut [u8]),
}

/// Most bytes of a block of any format.
pub const MAX_BLOCK_BYTES: usize = 292;

impl Entry {
    const fn new<B: Block>(
        name: &'static str,
        kind: Kind,
        dequantize: fn(&[u8], &mut [f32]),
        kernel: Kernel,
    ) -> Entry {
        assert!(size_of::<B>() <= MAX_BLOCK_BYTES);
        Entry {
            interleaving: None,
            kernel: Ok(kernel),
            name,
            block_len: B::LEN,
            block_bytes: size_of::<B>(),
            kind,
            dequantize,
            unpack: None,
            quantize: |values, bytes| {
                let blocks = values.chunks_exact(B::LEN).zip(B::cast_mut(bytes));
                let mut all = true;
                for (values, block) in blocks {
                    match B::quantize(values) {
                        Some(quantised) => *block = quantised,
                        None => all = false,
                    }
                }
                all
            },
            quantize_weights: |values, columns, bytes| {
                let sum = values.iter().fold(0.0, |sum, x| sum + x * x);
                let mean_square = if columns.is_some() { sum / values.len() as f32 } else { 0.0 };
                let mut blocks = values.chunks_exact(B::LEN).zip(B::cast_mut(bytes)).enumerate();
                blocks.all(|(i, (values, block))| {
                    let columns = columns.map(|columns| &columns[i * B::LEN..(i + 1) * B::LEN]);
                    let importance = columns.map(|columns| Importance { columns, mean_square });
                    B::quantize_weights(values, importance).map(|quantised| *block = quantised).is_some()
                })
            },
            needs_importance: B::NEEDS_IMPORTANCE,
            is_finite: |bytes| B::cast(bytes).iter().all(B::is_finite),
            set_scale: |bytes, scale| B::cast_mut(bytes).iter_mut().for_each(|block| block.set_scale(scale)),
        }
    }

    const fn plain<P: Plain>(name: &'static str) -> Entry {
        let dequantize = |bytes: &[u8], out: &mut [f32]| {
            for (out, block) in out.iter_mut().zip(P::cast(bytes)) {
                *out = block.value();
            }
        };
        Entry::new::<P>(name, Kind::Float, dequantize, every_cpu::plain::<P>)
    }

    /// A plain format without a kernel of its own.
    const fn converted<P: Plain>(name: &'static str) -> Entry {
        Entry { kernel: Ok(converted::<P>), ..Entry::plain::<P>(name) }
    }

    const fn quantised<Q: Quantised>(name: &'static str) -> Entry {
        // What the normal form and its readers take for granted.
        assert!(Q::LEN <= 256 && Q::LEN % Q::GROUP == 0 && Q::GROUP % 16 == 0 && Q::LEN / Q::GROUP <= 16);
        let kind = Kind::Quantised { activation: Q::ACTIVATION, group: Q::GROUP, has_min: Q::HAS_MIN };
        let dequantize = |bytes: &[u8], out: &mut [f32]| {
            let mut unpacked = Unpacked::ZERO;
            for (out, block) in out.chunks_exact_mut(Q::LEN).zip(Q::cast(bytes)) {
                block.unpack(&mut unpacked);
                write_values::<Q>(&unpacked, out);
            }
        };
        let unpack =
            |bytes: &[u8], out: &mut Unpacked| Q::cast(bytes).iter().for_each(|block| block.unpack(out));
        Entry { unpack: Some(unpack), ..Entry::new::<Q>(name, kind, dequantize, every_cpu::unpacked::<Q>) }
    }
}

impl Entry {
    /// Leaves kernels out of a build without the feature.
    const fn of_feature(self, feature: &'static str, has_feature: bool) -> Entry {
        if has_feature { self } else { Entry { kernel: Err(feature), ..self } }
    }

    const fn gridded<Q: Gridded>(name: &'static str) -> Entry {
        Entry { kernel: Ok(every_cpu::gridded::<Q>), ..Entry::quantised::<Q>(name) }
    }

    const fn interleaved<Q: Interleaved>(name: &'static str) -> Entry {
        // One scale for a super-block, or several for a short block.
        assert!(Q::LEN == 256 && Q::GROUP == 256 || Q::LEN <= 128 && Q::GROUP <= 32);
        let interleaving = Interleaving {
            interleave: |rows, row_blocks, out| {
                let stride = row_blocks * size_of::<Q>();
                let groups = rows.chunks_exact(ROWS * stride).zip(out.chunks_exact_mut(ROWS * stride));
                for (rows, out) in groups {
                    Q::Lanes::interleave(Scalar, rows, stride, Q::Lanes::cast_mut(out));
                }
            },
            block: |lanes, row, out| {
                for (lanes, out) in Q::Lanes::cast(lanes).iter().zip(Q::cast_mut(out)) {
                    lanes.row(row, out);
                }
            },
        };
        let kernel = Ok(every_cpu::interleaved::<Q> as Kernel);
        Entry { kernel, interleaving: Some(interleaving), ..Entry::quantised::<Q>(name) }
    }
}

/// The table: one row a format, with the cargo feature that its kernels are in. Order is that of the ids.
macro_rules! formats {
    ($($name:ident = $id:literal, $kind:ident $(in $feature:literal)?: $doc:literal;)+) => {
        /// A GGUF tensor type, by its published id.
        #[allow(non_camel_case_types, reason = "formats keep their published names")]
        #[repr(u32)]
        #[non_exhaustive]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        pub enum Format { $(#[doc = $doc] $name = $id,)+ }

        impl Format {
            /// Every format, in the order of ids.
            pub const ALL: &'static [Format] = &[$(Format::$name),+];

            const fn entry(self) -> &'static Entry {
                match self {
                    $(Format::$name => const {
                        assert!(<$name as Block>::FORMAT as u32 == $id);
                        &Entry::$kind::<$name>(stringify!($name))
                            $(.of_feature($feature, cfg!(feature = $feature)))?
                    })+
                }
            }
        }
    };
}

formats! {
    F32 = 0, plain: "IEEE binary32.";
    F16 = 1, plain: "IEEE binary16.";
    Q4_0 = 2, interleaved in "formats-legacy": "4-bit codes, a scale for each 32.";
    Q4_1 = 3, interleaved in "formats-legacy": "4-bit codes, a scale and a minimum for each 32.";
    Q5_0 = 6, interleaved in "formats-legacy": "5-bit codes, a scale for each 32.";
    Q5_1 = 7, interleaved in "formats-legacy": "5-bit codes, a scale and a minimum for each 32.";
    Q8_0 = 8, interleaved: "8-bit codes, a scale for each 32; also an activation format.";
    Q8_1 = 9, quantised in "formats-legacy": "Q8_0 with the sum of the values; an activation format, odd in a file.";
    Q2_K = 10, interleaved in "formats-k": "2-bit codes, 4-bit scales and minimums for each 16.";
    Q3_K = 11, interleaved in "formats-k": "3-bit codes, 6-bit scales for each 16.";
    Q4_K = 12, interleaved in "formats-k": "4-bit codes, 6-bit scales and minimums for each 32.";
    Q5_K = 13, interleaved in "formats-k": "5-bit codes, 6-bit scales and minimums for each 32.";
    Q6_K = 14, interleaved in "formats-k": "6-bit codes, 8-bit scales for each 16.";
    Q8_K = 15, quantised in "formats-k": "8-bit codes, an f32 scale for each 256; an activation format, odd in a file.";
    IQ2_XXS = 16, gridded in "formats-iq": "8 values from a grid of 256 points, signs, 4-bit scales for each 32.";
    IQ2_XS = 17, gridded in "formats-iq": "8 values from a grid of 512 points, signs, 4-bit scales for each 16.";
    IQ3_XXS = 18, gridded in "formats-iq": "4 values from a grid of 256 points, signs, 4-bit scales for each 32.";
    IQ1_S = 19, gridded in "formats-iq": "8 values from a grid of 2048 points, a shift and 3-bit scales for each 32.";
    IQ4_NL = 20, interleaved in "formats-iq": "4-bit codes into a table of uneven steps, a scale for each 32.";
    IQ3_S = 21, gridded in "formats-iq": "4 values from a grid of 512 points, signs, 4-bit scales for each 32.";
    IQ2_S = 22, gridded in "formats-iq": "8 values from a grid of 1024 points, signs, 4-bit scales for each 16.";
    IQ4_XS = 23, interleaved in "formats-iq": "4-bit codes into the table of IQ4_NL, 6-bit scales for each 32.";
    I8 = 24, converted: "Signed 8-bit integer.";
    I16 = 25, converted: "Signed 16-bit integer.";
    I32 = 26, converted: "Signed 32-bit integer.";
    I64 = 27, converted: "Signed 64-bit integer.";
    F64 = 28, converted: "IEEE binary64.";
    IQ1_M = 29, gridded in "formats-iq": "The grid of IQ1_S, a shift for each 8, 3-bit scales for each 16.";
    BF16 = 30, plain: "The upper half of an IEEE binary32.";
    TQ1_0 = 34, interleaved in "formats-ternary": "Ternary codes, five to a byte, a scale for each 256.";
    TQ2_0 = 35, interleaved in "formats-ternary": "Ternary codes, four to a byte, a scale for each 256.";
    MXFP4 = 39, interleaved in "formats-fp4": "OCP MXFP4: E2M1 codes, an E8M0 scale for each 32.";
    NVFP4 = 40, interleaved in "formats-fp4": "E2M1 codes, an unsigned E4M3 scale for each 16.";
    Q1_0 = 41, interleaved in "formats-ternary": "Signs, a scale for each 128.";
    Q2_0 = 42, interleaved in "formats-ternary": "2-bit codes, a scale for each 64.";
}

impl Format {
    /// The format of a published id; the error says what is known of an id that is none.
    pub fn from_id(id: u32) -> Result<Format, UnknownFormat> {
        Format::ALL.iter().copied().find(|format| format.id() == id).ok_or_else(|| UnknownFormat::new(id))
    }

    /// The format of a published name, such as `Q4_K`.
    pub fn from_name(name: &str) -> Option<Format> {
        Format::ALL.iter().copied().find(|format| format.name() == name)
    }

    /// The published id.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The published name.
    pub const fn name(self) -> &'static str {
        self.entry().name
    }

    /// Values in a block.
    pub const fn block_len(self) -> usize {
        self.entry().block_len
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        self.entry().block_bytes
    }

    /// Bytes of a row of `len` values, or `None` if that is not a whole number of blocks or more bytes than a
    /// `usize`.
    pub const fn row_bytes(self, len: usize) -> Option<usize> {
        if len.is_multiple_of(self.block_len()) {
            (len / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// Whether rows of this format can be interleaved.
    pub const fn interleaves(self) -> bool {
        self.entry().interleaving.is_some()
    }

    /// A matrix of rows of `cols` values, from [`Layout::Rows`] to [`Layout::Interleaved`]. `rows` and `out`
    /// are as long as each other; a format that does not interleave is copied.
    ///
    /// # Errors
    /// Lengths that do not match or are no whole rows.
    pub fn interleave(self, cols: usize, rows: &[u8], out: &mut [u8]) -> Result<(), LengthMismatch> {
        let mismatch = LengthMismatch { format: self, bytes: out.len(), values: cols };
        let row_bytes = self.row_bytes(cols).filter(|&bytes| bytes > 0).ok_or(mismatch)?;
        if rows.len() != out.len() || !rows.len().is_multiple_of(row_bytes) {
            return Err(mismatch);
        }
        let mut whole = 0;
        if let Some(interleaving) = &self.entry().interleaving {
            whole = rows.len() / (ROWS * row_bytes) * (ROWS * row_bytes);
            (interleaving.interleave)(&rows[..whole], cols / self.block_len(), &mut out[..whole]);
        }
        out[whole..].copy_from_slice(&rows[whole..]);
        Ok(())
    }

    /// Copies one block of one row of a matrix whose rows have `row_blocks` blocks; `None` if it is not there
    /// or `out` is not as long as a block.
    pub fn copy_block(
        self,
        layout: Layout,
        matrix: &[u8],
        row_blocks: usize,
        row: usize,
        block: usize,
        out: &mut [u8],
    ) -> Option<()> {
        let bytes = self.block_bytes();
        let rows = matrix.len() / bytes.checked_mul(row_blocks)?.max(1);
        if row >= rows || block >= row_blocks || out.len() != bytes {
            return None;
        }
        let group = row / ROWS * ROWS;
        match &self.entry().interleaving {
            Some(interleaving) if layout == Layout::Interleaved && group + ROWS <= rows => {
                let at = (group * row_blocks + block * ROWS) * bytes;
                (interleaving.block)(matrix.get(at..)?.get(..ROWS * bytes)?, row % ROWS, out);
            }
            _ => {
                let at = (row * row_blocks + block) * bytes;
                out.copy_from_slice(matrix.get(at..)?.get(..bytes)?);
            }
        }
        Some(())
    }

    /// Its matrix products on vectors, or the cargo feature that has them, which this build lacks.
    pub(crate) const fn kernel(self) -> Result<Kernel, &'static str> {
        self.entry().kernel
    }

    /// How a dot product with this format is computed.
    pub const fn kind(self) -> Kind {
        self.entry().kind
    }

    /// The values of whole blocks. Bit for bit those of GGML's published decoders, for any bytes.
    pub fn dequantize(self, blocks: &[u8], values: &mut [f32]) -> Result<(), LengthMismatch> {
        self.check(blocks.len(), values.len())?;
        (self.entry().dequantize)(blocks, values);
        Ok(())
    }

    /// One block in normal form; see [`Quantised::unpack`].
    pub fn unpack(self, block: &[u8], out: &mut Unpacked) -> Result<(), FormatError> {
        let unpack = self.entry().unpack.ok_or(FormatError::NotQuantised(self))?;
        self.check(block.len(), self.block_len())?;
        unpack(block, out);
        Ok(())
    }

    /// The function that unpacks a block whose length was checked; `None` for a plain format.
    pub(crate) const fn unpacker(self) -> Option<fn(&[u8], &mut Unpacked)> {
        self.entry().unpack
    }

    /// The blocks that stand for `values`: whole blocks. Not every format has a quantiser.
    pub fn quantize(self, values: &[f32], blocks: &mut [u8]) -> Result<(), FormatError> {
        self.check(blocks.len(), values.len())?;
        if (self.entry().quantize)(values, blocks) { Ok(()) } else { Err(FormatError::NoQuantiser(self)) }
    }

    /// The blocks that stand for one row of a weight, by the rules of published files: bit for bit those of
    /// GGML's quantisers, with a mean square of the input for each column as the importance of errors, or
    /// without. Any values give some blocks; whether they are finite, [`Format::is_finite`] says.
    ///
    /// # Errors
    /// Lengths that do not match, no importance where the format needs it, or a format without a quantiser (in a
    /// build without the cargo feature `quantize`, of K-quants, for example).
    pub fn quantize_weights(
        self,
        values: &[f32],
        importance: Option<&[f32]>,
        blocks: &mut [u8],
    ) -> Result<(), FormatError> {
        self.check(blocks.len(), values.len())?;
        if let Some(columns) = importance.map(<[f32]>::len).filter(|&columns| columns != values.len()) {
            return Err(FormatError::Columns { expected: values.len(), got: columns });
        }
        if importance.is_none() && self.entry().needs_importance {
            return Err(FormatError::NoImportance(self));
        }
        let done = (self.entry().quantize_weights)(values, importance, blocks);
        if done { Ok(()) } else { Err(FormatError::NoQuantiser(self)) }
    }

    /// Whether every scale (of a plain float: every value) in `blocks` is finite. Bytes after the last whole
    /// block are not looked at.
    pub fn is_finite(self, blocks: &[u8]) -> bool {
        (self.entry().is_finite)(blocks)
    }

    /// Sets the float scales of every whole block; see [`Block::set_scale`].
    pub fn set_scale(self, blocks: &mut [u8], scale: f32) {
        (self.entry().set_scale)(blocks, scale);
    }

    fn check(self, bytes: usize, values: usize) -> Result<(), LengthMismatch> {
        if self.row_bytes(values) == Some(bytes) {
            Ok(())
        } else {
            Err(LengthMismatch { format: self, bytes, values })
        }
    }
}
