//! IQ4_NL: `value = d * TABLE[q]`, 4-bit q. Byte j holds q of values j (low nibble) and j + 16.

use super::bytes::layout;
use super::lanes::{Lanes, Words};
use super::{Block, F16, Format, Groups, Interleaved, Plain, Quantised, Signed, Unpacked};
#[cfg(feature = "quantize")]
use super::{Importance, search};
use crate::isa::Isa;

/// The value of each code of IQ4_NL and IQ4_XS, before scaling.
pub static IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

layout! {
    /// 32 values in 18 bytes.
    pub struct IQ4_NL {
        /// Scale.
        d: F16,
        /// Indices into the table, 4 bits each.
        qs: [u8; 16],
    }
}

impl Block for IQ4_NL {
    const FORMAT: Format = Format::IQ4_NL;
    const LEN: usize = 32;

    fn is_finite(&self) -> bool {
        self.d.is_finite()
    }

    fn set_scale(&mut self, scale: f32) {
        self.d = F16::from_f32(scale);
    }

    #[cfg(feature = "quantize")]
    fn quantize(values: &[f32]) -> Option<Self> {
        Self::quantize_weights(values, None)
    }

    #[cfg(feature = "quantize")]
    fn quantize_weights(values: &[f32], importance: Option<Importance>) -> Option<Self> {
        let values: &[f32; 32] = values.try_into().ok()?;
        let mean_square = values.iter().fold(0.0, |sum, x| sum + x * x) * (2.0 / 32.0);
        let scale = scale(values, importance.map(|importance| (importance.columns, mean_square)));
        let q = values.map(|x| index(super::inverse(scale) * x));
        Some(IQ4_NL { d: F16::from_f32(scale), qs: core::array::from_fn(|j| q[j] | q[j + 16] << 4) })
    }
}

impl Quantised for IQ4_NL {
    type Shape = Groups<32, Signed>;

    #[inline(always)]
    fn unpack(&self, out: &mut Unpacked) {
        out.d[0] = self.d.value();
        out.sub[..2].fill(1);
        for j in 0..16 {
            out.codes[j] = IQ4_VALUES[usize::from(self.qs[j] & 15)];
            out.codes[j + 16] = IQ4_VALUES[usize::from(self.qs[j] >> 4)];
        }
    }
}

impl Interleaved for IQ4_NL {
    type Lanes = Lanes<2, 4, 0>;

    #[inline(always)]
    fn code<I: Isa>(isa: I, lanes: &impl Words<I>, _part: usize, k: usize) -> I::I {
        isa.lookup_signed(&IQ4_VALUES, lanes.split_nibbles(isa, 0, k))
    }

    #[inline(always)]
    fn d<I: Isa>(isa: I, lanes: &impl Words<I>, _: usize) -> I::F {
        lanes.head_f16(isa)
    }
}

/// The code of the nearest value of the table.
#[cfg(feature = "quantize")]
pub(super) fn index(x: f32) -> u8 {
    let above = IQ4_VALUES.iter().take_while(|&&value| f32::from(value) <= x).count();
    if above == 0 || above == 16 {
        return above.saturating_sub(1) as u8;
    }
    let [low, high] = [above - 1, above].map(|i| f32::from(IQ4_VALUES[i]));
    (if x - low < high - x { above - 1 } else { above }) as u8
}

/// The scale with which 32 values come closest to the table, given the importance of columns and a mean square.
#[cfg(feature = "quantize")]
pub(super) fn scale(values: &[f32], importance: Option<(&[f32], f32)>) -> f32 {
    let mut weights = [0.0; 32];
    match importance {
        Some((columns, mean_square)) => search::weigh(values, columns, mean_square, &mut weights),
        None => weights.iter_mut().zip(values).for_each(|(weight, x)| *weight = x * x),
    }
    let max = search::extreme(values);
    if max.abs() < search::LEAST {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut products, mut squares) = (0.0, 0.0);
        for (&x, &w) in values.iter().zip(&weights) {
            let q = f32::from(IQ4_VALUES[usize::from(index(inverse * x))]);
            products += w * q * x;
            squares += w * q * q;
        }
        (products, squares)
    };
    let least = f32::from(IQ4_VALUES[0]);
    let (products, squares) = sums(1.0 / (-max / least));
    let mut d = if squares > 0.0 { products / squares } else { 0.0 };
    let mut best = d * products;
    for step in -7..=7 {
        let (products, squares) = sums((step as f32 + least) / max);
        if squares > 0.0 && products * products > best * squares {
            d = products / squares;
            best = d * products;
        }
    }
    d
}
