//! Formats of one value a block: floats and integers, little-endian.

use super::bytes::layout;
use super::{Block, Format, Plain};

/// Declares a plain format by the primitive that its bytes are, and what each method does with it.
macro_rules! plain {
    ($name:ident($bits:ty): $doc:literal, value: $value:expr, is_finite: $is_finite:expr,
     set_scale: $set_scale:expr, quantize: $quantize:expr) => {
        layout! {
            #[doc = $doc]
            pub struct $name {
                /// The value, little-endian.
                le: [u8; size_of::<$bits>()],
            }
        }

        impl $name {
            /// The block of these bits.
            #[inline(always)]
            pub const fn from_bits(bits: $bits) -> Self {
                $name { le: bits.to_le_bytes() }
            }

            /// The bits of the value.
            #[inline(always)]
            pub const fn to_bits(self) -> $bits {
                <$bits>::from_le_bytes(self.le)
            }
        }

        impl Block for $name {
            const FORMAT: Format = Format::$name;
            const LEN: usize = 1;

            #[inline]
            fn is_finite(&self) -> bool {
                let is_finite: fn($bits) -> bool = $is_finite;
                is_finite(self.to_bits())
            }

            fn set_scale(&mut self, scale: f32) {
                let set_scale: fn($bits, f32) -> $bits = $set_scale;
                *self = Self::from_bits(set_scale(self.to_bits(), scale));
            }

            #[inline]
            fn quantize(values: &[f32]) -> Option<Self> {
                let quantize: Option<fn(f32) -> $bits> = $quantize;
                let &[value] = values else { return None };
                quantize.map(|quantize| Self::from_bits(quantize(value)))
            }
        }

        impl Plain for $name {
            #[inline(always)]
            fn value(&self) -> f32 {
                let value: fn($bits) -> f32 = $value;
                value(self.to_bits())
            }
        }
    };
}

plain! { F32(u32): "An IEEE binary32.",
    value: f32::from_bits,
    is_finite: |bits| f32::from_bits(bits).is_finite(),
    set_scale: |bits, scale| (bits & 0x807f_ffff) | (scale.to_bits() & 0x7f80_0000),
    quantize: Some(f32::to_bits)
}
plain! { F16(u16): "An IEEE binary16: a value, or the scale of most quantised formats.",
    value: f16_value,
    is_finite: |bits| bits & 0x7c00 != 0x7c00,
    set_scale: |bits, scale| (bits & 0x83ff) | (f16_bits(scale) & 0x7c00),
    quantize: Some(f16_bits)
}
plain! { BF16(u16): "A bfloat16: the upper half of an IEEE binary32.",
    value: |bits| f32::from_bits(u32::from(bits) << 16),
    is_finite: |bits| bits & 0x7f80 != 0x7f80,
    set_scale: |bits, scale| (bits & 0x807f) | (bf16_bits(scale) & 0x7f80),
    quantize: Some(bf16_bits)
}
plain! { F64(u64): "An IEEE binary64.",
    value: |bits| f64::from_bits(bits) as f32,
    is_finite: |bits| f64::from_bits(bits).is_finite(),
    set_scale: |bits, scale| (bits & !(0x7ff << 52)) | (f64::from(scale).to_bits() & (0x7ff << 52)),
    quantize: Some(|value| f64::from(value).to_bits())
}
plain! { I8(u8): "A signed 8-bit integer.",
    value: |bits| bits as i8 as f32, is_finite: |_| true, set_scale: |bits, _| bits, quantize: None
}
plain! { I16(u16): "A signed 16-bit integer.",
    value: |bits| bits as i16 as f32, is_finite: |_| true, set_scale: |bits, _| bits, quantize: None
}
plain! { I32(u32): "A signed 32-bit integer.",
    value: |bits| bits as i32 as f32, is_finite: |_| true, set_scale: |bits, _| bits, quantize: None
}
plain! { I64(u64): "A signed 64-bit integer.",
    value: |bits| bits as i64 as f32, is_finite: |_| true, set_scale: |bits, _| bits, quantize: None
}

impl F16 {
    /// 0.
    pub const ZERO: F16 = F16::from_bits(0);

    /// The nearest binary16, ties to even; infinite from 65520 up.
    #[inline]
    pub fn from_f32(value: f32) -> F16 {
        F16::from_bits(f16_bits(value))
    }
}

/// The value of a binary16, without a branch and without the CPU's conversion, so that loops over scales
/// vectorise; and in any floating-point environment, as no subnormal is added or multiplied and nothing is
/// rounded.
#[inline(always)]
const fn f16_value(bits: u16) -> f32 {
    /// 2^-14: below it are the subnormals.
    const NORMAL: u32 = (127 - 14) << 23;
    let (sign, magnitude) = ((bits as u32 & 0x8000) << 16, (bits as u32 & 0x7fff) << 13);
    // The exponent field is 112 too small, and 112 more where it was all ones and stays so.
    let special = if magnitude >= 0x1f << 23 { 112 << 23 } else { 0 };
    let normal = magnitude + (112 << 23) + special;
    // A subnormal is what its fraction adds to 2^-14. Rounding down, the difference of equals is -0.
    let difference = f32::from_bits(NORMAL + magnitude) - f32::from_bits(NORMAL);
    let subnormal = difference.to_bits() & 0x7fff_ffff;
    f32::from_bits(sign | if magnitude < 1 << 23 { subnormal } else { normal })
}

/// The nearest binary16, ties to even.
const fn f16_bits(value: f32) -> u16 {
    let (sign, magnitude) = ((value.to_bits() >> 16) as u16 & 0x8000, value.to_bits() & 0x7fff_ffff);
    let bits = if magnitude > 0xff << 23 {
        // A quiet NaN with the upper part of its payload.
        0x7e00 | ((magnitude >> 13) & 0x3ff)
    } else if magnitude >= (127 + 16) << 23 {
        0x7c00
    } else if magnitude < (127 - 14) << 23 {
        // The fraction with its leading one, in steps of 2^-24, those of subnormals. Below half a step
        // nothing is left.
        let (exponent, fraction) = (magnitude >> 23, magnitude & 0x7f_ffff | 0x80_0000);
        let shift = if exponent < 126 - 25 { 25 } else { 126 - exponent };
        (fraction + (1 << (shift - 1)) - 1 + ((fraction >> shift) & 1)) >> shift
    } else {
        let rebiased = magnitude - ((127 - 15) << 23);
        // A carry out of the fraction raises the exponent, at the top to infinity: both are right.
        (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13
    };
    bits as u16 | sign
}

/// The nearest bfloat16, ties to even.
const fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        // A quiet NaN with the upper part of its payload.
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}
