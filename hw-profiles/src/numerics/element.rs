//! Formats of single numbers: `encode` rounds an f32 to a code, `decode` returns a code's value.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A number format of at most 32 bits: one of the constants below. Codes lie in the low bits of a `u32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Element {
    /// Sign, exponent, fraction. With e the exponent field and f the fraction, the value is
    /// `2^(e - bias) * 1.f`, or `2^(1 - bias) * 0.f` where e is 0.
    #[non_exhaustive]
    Float {
        /// Bits of the exponent, at most 8.
        exponent_bits: u32,
        /// Bits of the fraction, at most 23.
        fraction_bits: u32,
        /// Exponent bias.
        bias: i32,
        /// The codes that are not numbers.
        specials: Specials,
    },
    /// Two's complement, times `2^-fraction_bits`. The most negative code has a value but is never produced,
    /// so that the range is symmetric.
    #[non_exhaustive]
    Fixed {
        /// Bits, including the sign.
        bits: u32,
        /// Bits after the binary point.
        fraction_bits: u32,
    },
}

/// The codes of a float that are not numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Specials {
    /// The largest exponent: infinity where the fraction is 0, else NaN.
    Ieee,
    /// All bits one except the sign: NaN. No infinity.
    AllOnes,
    /// The code of -0: NaN. No infinity, no -0 ("fnuz").
    NegativeZero,
    /// None: every code is a number.
    None,
}

/// Rounding of a value between two codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Rounding {
    /// To the nearest code, ties to even (IEEE 754 roundTiesToEven).
    #[default]
    NearestEven,
    /// To the nearest code, ties away from zero (IEEE 754 roundTiesToAway).
    NearestAway,
    /// Toward zero (IEEE 754 roundTowardZero).
    TowardZero,
}

/// The result for a value beyond the largest number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overflow {
    /// The largest number of its sign.
    Saturate,
    /// Infinity, else NaN, else the largest number, whichever the format has.
    Special,
}

const fn float(exponent_bits: u32, fraction_bits: u32, bias: i32, specials: Specials) -> Element {
    Element::Float { exponent_bits, fraction_bits, bias, specials }
}

/// IEEE 754 binary32.
pub const FP32: Element = float(8, 23, 127, Specials::Ieee);
/// The upper 19 bits of binary32 (NVIDIA TensorFloat-32).
pub const TF32: Element = float(8, 10, 127, Specials::Ieee);
/// The upper 16 bits of binary32.
pub const BF16: Element = float(8, 7, 127, Specials::Ieee);
/// IEEE 754 binary16.
pub const FP16: Element = float(5, 10, 15, Specials::Ieee);
/// OFP8 E4M3: largest 448, no infinity.
pub const E4M3: Element = float(4, 3, 7, Specials::AllOnes);
/// OFP8 E5M2: largest 57344.
pub const E5M2: Element = float(5, 2, 15, Specials::Ieee);
/// E4M3 of AMD and Graphcore: largest 240.
pub const E4M3FNUZ: Element = float(4, 3, 8, Specials::NegativeZero);
/// E5M2 of AMD and Graphcore: largest 57344.
pub const E5M2FNUZ: Element = float(5, 2, 16, Specials::NegativeZero);
/// MX E3M2: largest 28.
pub const E3M2: Element = float(3, 2, 3, Specials::None);
/// MX E2M3: largest 7.5.
pub const E2M3: Element = float(2, 3, 1, Specials::None);
/// MX E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6.
pub const E2M1: Element = float(2, 1, 1, Specials::None);
/// Integers of 32 bits; encoding an f32 keeps 24.
pub const INT32: Element = Element::Fixed { bits: 32, fraction_bits: 0 };
/// Integers from -32767 to 32767.
pub const INT16: Element = Element::Fixed { bits: 16, fraction_bits: 0 };
/// Integers from -127 to 127.
pub const INT8: Element = Element::Fixed { bits: 8, fraction_bits: 0 };
/// Integers from -7 to 7.
pub const INT4: Element = Element::Fixed { bits: 4, fraction_bits: 0 };

impl Element {
    /// Returns the bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Element::Float { exponent_bits, fraction_bits, .. } => 1 + exponent_bits + fraction_bits,
            Element::Fixed { bits, .. } => bits,
        }
    }

    /// Returns the fraction bits of the largest numbers.
    pub const fn fraction_bits(self) -> u32 {
        match self {
            Element::Float { fraction_bits, .. } => fraction_bits,
            Element::Fixed { bits, .. } => bits.saturating_sub(2),
        }
    }

    /// Returns the code of the largest number.
    pub const fn max_code(self) -> u32 {
        let ones = (1 << (self.bits() - 1)) - 1;
        match self {
            Element::Float { fraction_bits, specials: Specials::Ieee, .. } => ones - (1 << fraction_bits),
            Element::Float { specials: Specials::AllOnes, .. } => ones - 1,
            _ => ones,
        }
    }

    /// The largest number.
    pub fn max(self) -> f32 {
        self.decode(self.max_code())
    }

    /// Returns `floor(log2(max))`: the exponent of the largest element under a block's scale.
    pub fn max_exponent(self) -> i32 {
        exponent(self.max())
    }

    /// Returns the value of a code. It is exact, except that an int32 of more than 24 bits is rounded to f32.
    /// Bits above the code's are ignored.
    pub fn decode(self, code: u32) -> f32 {
        let sign_bit = 1u32 << (self.bits() - 1);
        match self {
            Element::Fixed { bits, fraction_bits } => {
                let integer = ((code << (32 - bits)) as i32) >> (32 - bits);
                integer as f32 * power_of_two(-(fraction_bits as i32)) as f32
            }
            Element::Float { fraction_bits, bias, specials, .. } => {
                let magnitude = code & (sign_bit - 1);
                let negative = code & sign_bit != 0;
                let sign = if negative { -1.0 } else { 1.0 };
                if magnitude > self.max_code() {
                    let infinite = specials == Specials::Ieee && magnitude == self.max_code() + 1;
                    return if infinite { sign * f32::INFINITY } else { f32::NAN };
                }
                if specials == Specials::NegativeZero && negative && magnitude == 0 {
                    return f32::NAN;
                }
                let exponent = magnitude >> fraction_bits;
                let leading = if exponent > 0 { 1 << fraction_bits } else { 0 };
                let significand = leading | (magnitude & ((1 << fraction_bits) - 1));
                let scale = power_of_two(exponent.max(1) as i32 - bias - fraction_bits as i32);
                (f64::from(significand) * scale) as f32 * sign
            }
        }
    }

    /// Rounds a value to a code. NaN becomes a NaN of the same sign, or 0 in formats without NaN.
    pub fn encode(self, value: f32, rounding: Rounding, overflow: Overflow) -> u32 {
        let sign_bit = 1u32 << (self.bits() - 1);
        let negative = value.is_sign_negative();
        match self {
            Element::Fixed { fraction_bits, .. } => {
                if value.is_nan() {
                    return 0;
                }
                let scaled = f64::from(value.abs()) * power_of_two(fraction_bits as i32);
                let rounded = match rounding {
                    // Adding a number beyond which f64 has no fraction bits rounds: much faster than a call.
                    Rounding::NearestEven if scaled < WHOLE => (scaled + WHOLE) - WHOLE,
                    Rounding::NearestEven => scaled,
                    Rounding::NearestAway => scaled.round(),
                    Rounding::TowardZero => scaled.trunc(),
                };
                // `as` saturates.
                let magnitude = (rounded as u32).min(self.max_code());
                let code = if negative { magnitude.wrapping_neg() } else { magnitude };
                code & (sign_bit | (sign_bit - 1))
            }
            Element::Float { fraction_bits, bias, specials, .. } => {
                let sign = if negative { sign_bit } else { 0 };
                if value.is_nan() {
                    return match specials {
                        Specials::Ieee => sign | (self.max_code() + 1) | (1 << (fraction_bits - 1)),
                        Specials::AllOnes => sign | (sign_bit - 1),
                        Specials::NegativeZero => sign_bit,
                        Specials::None => 0,
                    };
                }
                let magnitude = if value.is_infinite() {
                    u32::MAX
                } else {
                    let field = (value.to_bits() >> 23) & 0xff;
                    let fraction = value.to_bits() & 0x7f_ffff;
                    let significand = if field > 0 { fraction | 0x80_0000 } else { fraction };
                    let exponent = field.max(1) as i32 - 127;
                    // Below the smallest normal number the spacing of codes no longer shrinks.
                    let least = 1 - bias;
                    let at = exponent.max(least);
                    let shift = (at - exponent) as u32 + 23 - fraction_bits;
                    // A carry out of the fraction correctly increments the exponent.
                    (((at - least) as u32) << fraction_bits) + shift_right(significand, shift, rounding)
                };
                if magnitude > self.max_code() {
                    return match (overflow, specials) {
                        (Overflow::Saturate, _) | (_, Specials::None) => sign | self.max_code(),
                        (Overflow::Special, Specials::Ieee) => sign | (self.max_code() + 1),
                        (Overflow::Special, Specials::AllOnes) => sign | (sign_bit - 1),
                        (Overflow::Special, Specials::NegativeZero) => sign_bit,
                    };
                }
                if magnitude == 0 && specials == Specials::NegativeZero { 0 } else { sign | magnitude }
            }
        }
    }
}

/// Every f64 from here on is an integer.
const WHOLE: f64 = (1u64 << 52) as f64;

/// `significand / 2^shift`, rounded to an integer.
fn shift_right(significand: u32, shift: u32, rounding: Rounding) -> u32 {
    // The significand has 24 bits: shifted by 26 or more, it is less than a quarter.
    let shift = shift.min(26);
    if shift == 0 {
        return significand;
    }
    let (quotient, rest, half) = (significand >> shift, significand & ((1 << shift) - 1), 1 << (shift - 1));
    let up = match rounding {
        Rounding::NearestEven => rest > half || (rest == half && quotient & 1 == 1),
        Rounding::NearestAway => rest >= half,
        Rounding::TowardZero => false,
    };
    quotient + u32::from(up)
}

/// `2^exponent`, for exponents of normal f64.
#[inline]
pub(super) fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((1023 + exponent.clamp(-1022, 1023)) as u64) << 52)
}

/// `floor(log2(value))` of a positive finite value.
#[inline]
pub(super) fn exponent(value: f32) -> i32 {
    // Every f32 is a normal f64.
    (f64::from(value).to_bits() >> 52) as i32 - 1023
}
