//! The number formats of chips, bit for bit.
//!
//! An [`Element`] is one number: sign, exponent and fraction, or fixed point. A [`Block`](block::BlockFormat)
//! is elements that share a scale. Both are data, with one `encode` and one `decode` for all; [`Dtype`] names
//! them.
//!
//! Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0; OCP Microscaling Formats (MX) 1.0; Rouhani et
//! al. 2023, "With Shared Microexponents, A Little Shifting Goes a Long Way" (MX9, MX6, MX4); IEEE 754-2019
//! (fp16, fp32).

pub mod block;
pub mod element;

use halite::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use block::{BlockFormat, Rules, Scale, ScaleRule};
pub use element::{Element, Overflow, Rounding};

/// The definition of a [`Dtype`].
// Exhaustive: whoever stores numbers needs the layout of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Single numbers.
    Element(Element),
    /// Numbers that share a scale.
    Block(BlockFormat),
}

macro_rules! dtypes {
    ($($variant:ident $name:literal = $kind:ident($format:path);)*) => {
        /// A number format by name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
        #[non_exhaustive]
        pub enum Dtype {
            $(#[doc = concat!("[`", stringify!($format), "`]")] #[serde(rename = $name)] $variant,)*
        }

        impl Dtype {
            /// All formats.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant),*];

            /// Name in profiles.
            pub const fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Finds a format by name.
            ///
            /// # Errors
            /// [`Error::Argument`] with a list of all formats, if none has the name.
            pub fn named(name: &str) -> Result<Dtype> {
                let found = Dtype::ALL.iter().find(|dtype| dtype.name() == name);
                let names = || Dtype::ALL.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(", ");
                let unknown = || Error::argument("format", format!("one of {}", names()), format!("`{name}`"));
                found.copied().ok_or_else(unknown)
            }

            /// Returns the definition.
            pub const fn format(self) -> Format {
                match self { $(Dtype::$variant => Format::$kind($format),)* }
            }
        }
    };
}

dtypes! {
    Fp32 "fp32" = Element(element::FP32);
    Tf32 "tf32" = Element(element::TF32);
    Bf16 "bf16" = Element(element::BF16);
    Fp16 "fp16" = Element(element::FP16);
    Fp8E4m3 "fp8_e4m3" = Element(element::E4M3);
    Fp8E5m2 "fp8_e5m2" = Element(element::E5M2);
    Fp8E4m3Fnuz "fp8_e4m3fnuz" = Element(element::E4M3FNUZ);
    Fp8E5m2Fnuz "fp8_e5m2fnuz" = Element(element::E5M2FNUZ);
    Fp6E3m2 "fp6_e3m2" = Element(element::E3M2);
    Fp6E2m3 "fp6_e2m3" = Element(element::E2M3);
    Fp4E2m1 "fp4_e2m1" = Element(element::E2M1);
    Int32 "int32" = Element(element::INT32);
    Int16 "int16" = Element(element::INT16);
    Int8 "int8" = Element(element::INT8);
    Int4 "int4" = Element(element::INT4);
    Mxfp8E4m3 "mxfp8_e4m3" = Block(block::MXFP8_E4M3);
    Mxfp8E5m2 "mxfp8_e5m2" = Block(block::MXFP8_E5M2);
    Mxfp6E3m2 "mxfp6_e3m2" = Block(block::MXFP6_E3M2);
    Mxfp6E2m3 "mxfp6_e2m3" = Block(block::MXFP6_E2M3);
    Mxfp4 "mxfp4" = Block(block::MXFP4);
    Mxint8 "mxint8" = Block(block::MXINT8);
    Mx9 "mx9" = Block(block::MX9);
    Mx6 "mx6" = Block(block::MX6);
    Mx4 "mx4" = Block(block::MX4);
}

impl Dtype {
    /// Returns the bits per number in memory, its share of the scale included.
    pub const fn bits(self) -> f64 {
        match self.format() {
            Format::Element(element) => element.bits() as f64,
            Format::Block(block) => block.bits(),
        }
    }

    /// Returns the numbers that share a scale; 1 for single numbers.
    pub const fn block_len(self) -> usize {
        match self.format() {
            Format::Element(_) => 1,
            Format::Block(block) => block.len,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
