//! How a KV cache is stored: pages of keys and values, in one of several formats. A format is one file here
//! and one line in `with_format`.
//!
//! A page holds [`CHUNK`] positions: keys transposed, `[kv_heads][key_dim][CHUNK]`, so that a lane is a
//! position and no score needs a reduction; then values `[kv_heads][CHUNK][value_dim]`. In formats of codes
//! the scales follow, in half precision, little-endian: `[kv_heads][key_dim / 32][CHUNK]` of the keys, then
//! `[kv_heads][value_dim / 32][CHUNK]` of the values. An element is scale times code, which f32 holds
//! exactly.
//!
//! Of a latent cache, which has one head, a page holds keys alone: their first elements are the values.

mod plain;
mod q4_0;
mod q8_0;

pub use plain::{F16, F32};
pub use q4_0::Q4_0;
pub use q8_0::Q8_0;

use crate::formats::Format;
use crate::isa::Isa;

/// Positions of a page, and of a chunk of attention.
pub const CHUNK: usize = 64;
/// Elements that share a scale, in formats of codes.
pub const BLOCK: usize = 32;

/// The list of formats: evaluates `$body` with `$f` as the format's type, or `$otherwise` for a format that
/// is none of a cache.
macro_rules! with_format {
    ($format:expr, $f:ident => $body:expr, $otherwise:expr) => {
        with_format!(@ $format, $f, $body, $otherwise, F32, F16, Q8_0, Q4_0)
    };
    (@ $format:expr, $f:ident, $body:expr, $otherwise:expr, $($name:ident),*) => {
        match $format {
            $($crate::formats::Format::$name => {
                type $f = $crate::kv::$name;
                $body
            })*
            _ => $otherwise,
        }
    };
}
pub(crate) use with_format;

/// The formats of a cache.
pub fn formats() -> impl Iterator<Item = Format> {
    Format::ALL.iter().copied().filter(|&format| with_format!(format, F => Some(F::SCALED), None).is_some())
}

/// The shape of a layer's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageShape {
    /// Heads with keys and values of their own.
    pub kv_heads: usize,
    /// Elements of a key; a multiple of [`BLOCK`] in formats of codes.
    pub key_dim: usize,
    /// Elements of a value; a multiple of [`BLOCK`] in formats of codes.
    pub value_dim: usize,
    /// Whether the first elements of a key are the value; then there is one head.
    pub latent: bool,
}

impl PageShape {
    /// Elements of a page.
    pub const fn elements(&self) -> usize {
        self.kv_heads * (self.key_dim + if self.latent { 0 } else { self.value_dim }) * CHUNK
    }

    /// Elements that are stored as a key besides the value.
    pub const fn key_only(&self) -> usize {
        if self.latent { self.key_dim - self.value_dim } else { self.key_dim }
    }

    /// Bytes of a page.
    pub fn bytes(&self, format: Format) -> usize {
        self.elements() / format.block_len() * format.block_bytes()
    }

    /// Where element `d` of the keys of all heads starts, one place for each position.
    pub(crate) const fn key(&self, d: usize) -> usize {
        d * CHUNK
    }

    /// Where the value of a head at a position starts.
    pub(crate) const fn value(&self, head: usize, slot: usize) -> usize {
        (self.kv_heads * self.key_dim + head * self.value_dim) * CHUNK + slot * self.value_dim
    }
}

/// A cache's pages.
#[derive(Debug, Clone, Copy)]
pub struct Pages<'a> {
    /// How they are stored, one of [`formats`].
    pub format: Format,
    /// Whole pages; the first byte at a multiple of four bytes.
    pub bytes: &'a [u8],
}

/// A cache's pages, to write.
#[derive(Debug)]
pub struct PagesMut<'a> {
    /// How they are stored, one of [`formats`].
    pub format: Format,
    /// Whole pages; the first byte at a multiple of four bytes.
    pub bytes: &'a mut [u8],
}

/// Stores one position's keys `[kv_heads][key_only]` and values `[kv_heads][value_dim]` at `slot` of page
/// `page`. Does nothing if the page is not there.
pub fn write(pages: &mut PagesMut<'_>, shape: PageShape, page: usize, slot: usize, k: &[f32], v: &[f32]) {
    let bytes = shape.bytes(pages.format);
    let start = page.saturating_mul(bytes);
    let Some(page) = pages.bytes.get_mut(start..start.saturating_add(bytes)) else { return };
    with_format!(pages.format, F => F::write(raw_mut(page), shape, slot, k, v), ());
}

/// What the bytes of a page are read as.
pub trait Raw: Copy + Default + private::Plain {}

mod private {
    /// Numbers of which every bit pattern is one.
    pub trait Plain {}
}

macro_rules! raw {
    ($($t:ty),*) => {
        $(
            impl private::Plain for $t {}
            impl Raw for $t {}
        )*
    };
}
raw!(f32, u16, i8, u8);

/// Bytes as numbers; none, if they do not start where such a number can.
pub(crate) fn raw<T: Raw>(bytes: &[u8]) -> &[T] {
    // SAFETY: `Plain` is sealed, and every bit pattern is a value of its types.
    let (before, numbers, _) = unsafe { bytes.align_to::<T>() };
    if before.is_empty() { numbers } else { &[] }
}

/// See [`raw`].
fn raw_mut<T: Raw>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: as above; and every number is plain bytes.
    let (before, numbers, _) = unsafe { bytes.align_to_mut::<T>() };
    if before.is_empty() { numbers } else { &mut [] }
}

/// A format of a cache.
pub trait KvFormat: Copy {
    /// What pages consist of.
    type Raw: Raw;
    /// Whether elements are codes, with scales.
    const SCALED: bool = false;
    /// Elements in one of [`KvFormat::Raw`].
    const PACKED: usize = 1;

    /// `R` times sixteen elements from number `at` on, a multiple of sixteen times `R`.
    fn lanes<I: Isa, const R: usize>(isa: I, x: &[Self::Raw], at: usize) -> [I::F; R];

    /// Sixteen scales of block `block`, for the positions from `slot` on.
    #[inline(always)]
    fn scales<I: Isa>(isa: I, _page: &[Self::Raw], _shape: PageShape, _block: usize, _slot: usize) -> I::F {
        isa.splat(1.0)
    }

    /// Stores a position's keys and values in a page.
    fn write(page: &mut [Self::Raw], shape: PageShape, slot: usize, k: &[f32], v: &[f32]);
}

/// `R` vectors, each loaded from sixteen elements.
#[inline(always)]
fn loaded<T, F: Copy, const R: usize>(x: &[T], at: usize, load: impl Fn(&[T; 16]) -> F) -> [F; R] {
    let x = x[at..][..16 * R].as_chunks::<16>().0;
    core::array::from_fn(|run| load(&x[run]))
}

/// [`KvFormat::write`] where each element is by itself.
fn write_elements<T>(
    page: &mut [T],
    shape: PageShape,
    slot: usize,
    k: &[f32],
    v: &[f32],
    convert: impl Fn(f32) -> T,
) {
    let first = if shape.latent { v } else { &[] };
    for (d, &x) in first.iter().chain(k).enumerate() {
        page[shape.key(d) + slot] = convert(x);
    }
    if shape.latent {
        return;
    }
    for (head, v) in v.chunks_exact(shape.value_dim).enumerate() {
        for (out, &x) in page[shape.value(head, slot)..].iter_mut().zip(v) {
            *out = convert(x);
        }
    }
}

/// A format of codes that share a scale in blocks of [`BLOCK`].
trait Codes: KvFormat {
    /// A block's scale, in half precision, and codes.
    fn quantise(x: &[f32; BLOCK]) -> (u16, [i8; BLOCK]);
    /// Stores the code of element `at` of a page.
    fn put(page: &mut [Self::Raw], at: usize, code: i8);
    /// A byte of a scale.
    fn from_byte(byte: u8) -> Self::Raw;
    /// See [`Codes::from_byte`].
    fn byte(raw: Self::Raw) -> u8;

    /// Where the scales of a block of all keys' elements, and then of all values', start.
    #[inline(always)]
    fn scales_at(shape: PageShape, block: usize) -> usize {
        shape.elements() / Self::PACKED + block * CHUNK * 2
    }

    /// [`KvFormat::scales`].
    #[inline(always)]
    fn load_scales<I: Isa>(isa: I, page: &[Self::Raw], shape: PageShape, block: usize, slot: usize) -> I::F {
        let bytes = page.get(Self::scales_at(shape, block) + 2 * slot..).unwrap_or(&[]);
        let mut bits = [0; 16];
        for (bits, x) in bits.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *bits = u16::from_le_bytes([Self::byte(x[0]), Self::byte(x[1])]);
        }
        isa.load_f16(&bits)
    }

    /// [`KvFormat::write`].
    fn write_codes(page: &mut [Self::Raw], shape: PageShape, slot: usize, k: &[f32], v: &[f32]) {
        let (k, v) = (k.as_chunks::<BLOCK>().0, v.as_chunks::<BLOCK>().0);
        let [keys, values] = if shape.latent { [v, k] } else { [k, v] };
        let key_blocks = shape.kv_heads * shape.key_dim / BLOCK;
        for (block, x) in keys.iter().chain(values).enumerate() {
            let (scale, codes) = Self::quantise(x);
            let scales = &mut page[Self::scales_at(shape, block) + 2 * slot..];
            for (place, byte) in scales.iter_mut().zip(scale.to_le_bytes()) {
                *place = Self::from_byte(byte);
            }
            for (i, code) in codes.into_iter().enumerate() {
                let at = match block.checked_sub(key_blocks) {
                    None => shape.key(block * BLOCK + i) + slot,
                    Some(block) => {
                        let d = block * BLOCK + i;
                        shape.value(d / shape.value_dim, slot) + d % shape.value_dim
                    }
                };
                Self::put(page, at, code);
            }
        }
    }
}
