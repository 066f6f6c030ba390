//! Block formats, in which numbers share a scale: the OCP MX formats (blocks of 32) and shared
//! micro-exponents (blocks of 16, with a bit per pair).
//!
//! Value i of a block is `2^(E - 127 - s) * element(code i)`, where E is the scale's byte and s the shift of
//! the value's pair (0 in formats without).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::element::{self, Element, Overflow, Rounding, exponent, power_of_two};
use halite::{Error, Result};

/// A block format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockFormat {
    /// Format of each value divided by its scale.
    pub element: Element,
    /// Values per block.
    pub len: usize,
    /// Whether each pair of values has its own one-bit shift.
    pub pairs: bool,
}

/// OCP MXFP8 of E4M3.
pub const MXFP8_E4M3: BlockFormat = mx(element::E4M3);
/// OCP MXFP8 of E5M2.
pub const MXFP8_E5M2: BlockFormat = mx(element::E5M2);
/// OCP MXFP6 of E3M2.
pub const MXFP6_E3M2: BlockFormat = mx(element::E3M2);
/// OCP MXFP6 of E2M3.
pub const MXFP6_E2M3: BlockFormat = mx(element::E2M3);
/// OCP MXFP4.
pub const MXFP4: BlockFormat = mx(element::E2M1);
/// OCP MXINT8: elements of 1/64, from -127/64 to 127/64.
pub const MXINT8: BlockFormat = mx(Element::Fixed { bits: 8, fraction_bits: 6 });
/// MX9: sign and 7 bits, 9 bits per value.
pub const MX9: BlockFormat = shared_micro_exponents(8);
/// MX6: sign and 4 bits, 6 bits per value.
pub const MX6: BlockFormat = shared_micro_exponents(5);
/// MX4: sign and 2 bits, 4 bits per value.
pub const MX4: BlockFormat = shared_micro_exponents(3);

const fn mx(element: Element) -> BlockFormat {
    BlockFormat { element, len: 32, pairs: false }
}

const fn shared_micro_exponents(bits: u32) -> BlockFormat {
    BlockFormat { element: Element::Fixed { bits, fraction_bits: bits - 2 }, len: 16, pairs: true }
}

/// A block format with the values of its codes, where these are not integers.
#[derive(Debug, Clone)]
pub struct Decoder {
    format: BlockFormat,
    values: Vec<f32>,
}

impl Decoder {
    /// As [`BlockFormat::dequantize`].
    // A scale is a power of two that f32 has, so a product rounds once. Compiled where it is called, as `quantize`.
    #[inline]
    pub fn dequantize(&self, scales: &[Scale], codes: &[u8], values: &mut [f32]) -> Result<()> {
        let BlockFormat { element, len, .. } = self.format;
        self.format.check(values.len(), scales.len(), codes.len())?;
        let blocks = values.chunks_exact_mut(len).zip(codes.chunks_exact(len));
        for ((values, codes), scale) in blocks.zip(scales) {
            let factors = [0, 1].map(|shifts| Scale { shifts, ..*scale }.value(0));
            if let Element::Fixed { bits, fraction_bits } = element {
                let one = power_of_two(-(fraction_bits as i32));
                let factors = factors.map(|factor| (factor * one) as f32);
                // In 32 bits, which all vectors can shift.
                let unused = 32 - bits;
                let integer = |code: u8| ((u32::from(code) << unused).cast_signed() >> unused) as f32;
                let (values, codes) = (values.as_chunks_mut::<16>(), codes.as_chunks::<16>());
                let whole = values.0.len();
                for (n, (values, codes)) in values.0.iter_mut().zip(codes.0).enumerate() {
                    let factor = |i| factors[usize::from(scale.shift(16 * n + i))];
                    let factors: [f32; 16] = std::array::from_fn(factor);
                    *values = std::array::from_fn(|i| integer(codes[i]) * factors[i]);
                }
                for (i, (value, &code)) in values.1.iter_mut().zip(codes.1).enumerate() {
                    *value = integer(code) * factors[usize::from(scale.shift(16 * whole + i))];
                }
                continue;
            }
            for (i, (value, &code)) in values.iter_mut().zip(codes).enumerate() {
                *value = self.values[usize::from(code)] * factors[usize::from(scale.shift(i))] as f32;
            }
        }
        Ok(())
    }
}

/// The rule for a block's scale, given its largest magnitude and the element's `max_exponent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ScaleRule {
    /// `floor(log2(largest)) - max_exponent`: the rule of OCP MX 1.0, section 6.3. The largest may saturate.
    #[default]
    Floor,
    /// `ceil(log2(largest)) - max_exponent`.
    Ceil,
    /// As `Floor`, after rounding the largest magnitude to the element's fraction bits (ties away from zero).
    Even,
    /// The smallest scale at which the largest magnitude does not exceed the element's:
    /// `ceil(log2(largest / max))`.
    Rceil,
}

/// A chip's choices where a format leaves them open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rules {
    /// Rule for the scale.
    pub scale: ScaleRule,
    /// Rounding of elements. They saturate.
    pub rounding: Rounding,
}

/// The scale of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scale {
    /// E8M0: the exponent plus 127; 255 makes every value of the block NaN.
    pub exponent: u8,
    /// Bit j is the shift of values 2j and 2j + 1.
    pub shifts: u8,
}

impl Scale {
    /// The byte for NaN.
    pub const NAN: u8 = 255;

    /// Returns the scale of value `index`: a power of two from 2^-128 to 2^127, or NaN.
    #[inline]
    pub fn value(self, index: usize) -> f64 {
        if self.exponent == Self::NAN { f64::NAN } else { power_of_two(self.exponent_at(index)) }
    }

    #[inline]
    fn exponent_at(self, index: usize) -> i32 {
        i32::from(self.exponent) - 127 - i32::from(self.shift(index))
    }

    #[inline]
    fn shift(self, index: usize) -> u8 {
        self.shifts.checked_shr(index as u32 / 2).unwrap_or(0) & 1
    }
}

impl ScaleRule {
    /// Returns the E8M0 byte for a positive finite `largest`; clamps exponents out of range.
    #[inline]
    pub fn exponent(self, largest: f32, element: Element) -> u8 {
        let floor = exponent(largest);
        let power = |e| power_of_two(e);
        let whole = f64::from(largest) == power(floor);
        let shared = match self {
            ScaleRule::Floor => floor - element.max_exponent(),
            ScaleRule::Ceil => floor + i32::from(!whole) - element.max_exponent(),
            ScaleRule::Even => {
                // Rounding reaches the next power of two from half a step below.
                let half_step = power(floor - element.fraction_bits() as i32 - 1);
                let up = f64::from(largest) >= power(floor + 1) - half_step;
                floor + i32::from(up) - element.max_exponent()
            }
            ScaleRule::Rceil => {
                let fits = floor - element.max_exponent();
                let up = f64::from(largest) > f64::from(element.max()) * power(fits);
                fits + i32::from(up)
            }
        };
        (shared + 127).clamp(0, 254) as u8
    }
}

impl BlockFormat {
    /// Returns the bits per value, its share of the scale included.
    pub const fn bits(self) -> f64 {
        let shift = if self.pairs { 0.5 } else { 0.0 };
        self.element.bits() as f64 + 8.0 / self.len as f64 + shift
    }

    /// Rounds values to blocks: a scale per `len` values, and a code per value, in the low bits of a byte.
    ///
    /// A block of zeros has scale byte 0. A block with a NaN or an infinity is all NaN, because not every
    /// element format has them. Formats with pairs treat values below 2^-126 as zero, by definition.
    ///
    /// Errors: lengths that do not match.
    // Compiled where it is called: simulated chips need it fast, and this crate is compiled for its size.
    #[inline]
    pub fn quantize(
        self,
        values: &[f32],
        rules: Rules,
        scales: &mut [Scale],
        codes: &mut [u8],
    ) -> Result<()> {
        self.check(values.len(), scales.len(), codes.len())?;
        let blocks = values.chunks_exact(self.len).zip(codes.chunks_exact_mut(self.len));
        for ((values, codes), scale) in blocks.zip(scales) {
            *scale = self.scale(values, rules.scale);
            if let (Element::Fixed { bits, fraction_bits }, Rounding::NearestEven) =
                (self.element, rules.rounding)
            {
                self.quantize_fixed(bits, fraction_bits, values, *scale, codes);
                continue;
            }
            // Scales are powers of two, so multiplying by the inverse is exact.
            let inverse =
                [1.0 / Scale { shifts: 0, ..*scale }.value(0), 1.0 / Scale { shifts: 1, ..*scale }.value(0)];
            for (i, (&value, code)) in values.iter().zip(codes).enumerate() {
                // A value too small for a normal f32 is too small for any element; zero and NaN give code 0.
                let scaled = (f64::from(self.flushed(value)) * inverse[scale.shift(i) as usize]) as f32;
                let scaled = if scaled.is_nan() { 0.0 } else { scaled };
                *code = self.element.encode(scaled, rules.rounding, Overflow::Saturate) as u8;
            }
        }
        Ok(())
    }

    /// Codes of a block of integers, in a loop without branches or calls.
    #[inline]
    fn quantize_fixed(self, bits: u32, fraction_bits: u32, values: &[f32], scale: Scale, codes: &mut [u8]) {
        if scale.exponent == Scale::NAN {
            return codes.fill(0);
        }
        /// Adding and subtracting it rounds numbers below 2^51 to integers, ties to even.
        const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
        let one = power_of_two(fraction_bits as i32);
        let factors = [0, 1].map(|shifts| one / Scale { shifts, ..scale }.value(0));
        let largest = f64::from(self.element.max()) * one;
        let mask = (u32::MAX >> (32 - bits)) as u8;
        for (j, (values, codes)) in values.chunks(2).zip(codes.chunks_mut(2)).enumerate() {
            let factor = factors[usize::from(scale.shift(2 * j))];
            for (&value, code) in values.iter().zip(codes) {
                let rounded = (f64::from(self.flushed(value)) * factor + ROUND) - ROUND;
                *code = (rounded.clamp(-largest, largest) as i32) as u8 & mask;
            }
        }
    }

    /// Decodes blocks to f32, rounding values that are subnormal or out of range.
    ///
    /// Errors: lengths that do not match.
    pub fn dequantize(self, scales: &[Scale], codes: &[u8], values: &mut [f32]) -> Result<()> {
        self.decoder().dequantize(scales, codes, values)
    }

    /// Prepares to decode many blocks.
    pub fn decoder(self) -> Decoder {
        let codes = if matches!(self.element, Element::Fixed { .. }) { 0..0 } else { 0..256 };
        Decoder { format: self, values: codes.map(|code| self.element.decode(code)).collect() }
    }

    fn check(self, values: usize, scales: usize, codes: usize) -> Result<()> {
        if self.len == 0 || !values.is_multiple_of(self.len) {
            return Err(Error::argument("values", format!("a multiple of {}", self.len), values));
        }
        if codes != values {
            return Err(Error::argument("codes", format!("{values} codes"), codes));
        }
        if scales != values / self.len {
            return Err(Error::argument("scales", format!("{} scales", values / self.len), scales));
        }
        Ok(())
    }

    #[inline]
    fn flushed(self, value: f32) -> f32 {
        if self.pairs && value.is_subnormal() { 0.0 } else { value }
    }

    #[inline]
    fn scale(self, values: &[f32], rule: ScaleRule) -> Scale {
        if !values.iter().all(|v| v.is_finite()) {
            return Scale { exponent: Scale::NAN, shifts: 0 };
        }
        let largest = values.iter().fold(0.0, |largest: f32, &v| largest.max(self.flushed(v).abs()));
        if largest == 0.0 {
            return Scale::default();
        }
        let mut scale = Scale { exponent: rule.exponent(largest, self.element), shifts: 0 };
        if self.pairs {
            let one = scale.value(0);
            let below = |v: &f32| f64::from(self.flushed(*v).abs()) < one;
            let shifts = values.chunks(2).enumerate().filter(|(_, pair)| pair.iter().all(below));
            scale.shifts = shifts.fold(0, |shifts, (j, _)| shifts | 1u8.checked_shl(j as u32).unwrap_or(0));
        }
        scale
    }
}
