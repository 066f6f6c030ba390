//! How values lie in an image: as little-endian words of 32 bits, fields in order.

use halite_kernels::formats::Format;
use halite_kernels::rows::{Gate, Unary};

/// A value of one or more words.
pub trait Field: Sized {
    /// How many.
    const WORDS: usize;
    /// Takes it from the front of `words`; `None` if it is not there.
    fn read(words: &mut &[u32]) -> Option<Self>;
    /// Passes its words on; `None` for a value that images do not have.
    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()>;
}

/// Stands for a number that is absent.
pub const NONE: u32 = u32::MAX;

impl Field for u32 {
    const WORDS: usize = 1;

    fn read(words: &mut &[u32]) -> Option<u32> {
        let (&first, rest) = words.split_first()?;
        *words = rest;
        Some(first)
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        to(*self);
        Some(())
    }
}

impl Field for f32 {
    const WORDS: usize = 1;

    fn read(words: &mut &[u32]) -> Option<f32> {
        u32::read(words).map(f32::from_bits)
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        self.to_bits().write(to)
    }
}

impl Field for Option<u32> {
    const WORDS: usize = 1;

    fn read(words: &mut &[u32]) -> Option<Option<u32>> {
        u32::read(words).map(|word| (word != NONE).then_some(word))
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        (*self != Some(NONE)).then(|| to(self.unwrap_or(NONE)))
    }
}

impl Field for Option<f32> {
    const WORDS: usize = 2;

    fn read(words: &mut &[u32]) -> Option<Option<f32>> {
        let present = bool::read(words)?;
        f32::read(words).map(|value| present.then_some(value))
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        self.is_some().write(to)?;
        self.unwrap_or(0.0).write(to)
    }
}

/// Defines fields that are one of a few values, each with its number.
macro_rules! choices {
    ($($type:ty { $($value:path = $number:literal),+ $(,)? })+) => {
        $(impl Field for $type {
            const WORDS: usize = 1;

            fn read(words: &mut &[u32]) -> Option<Self> {
                match u32::read(words)? {
                    $($number => Some($value),)+
                    _ => None,
                }
            }

            fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
                $(if *self == $value {
                    return ($number as u32).write(to);
                })+
                None
            }
        })+
    };
}

impl Field for bool {
    const WORDS: usize = 1;

    fn read(words: &mut &[u32]) -> Option<bool> {
        match u32::read(words)? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        u32::from(*self).write(to)
    }
}

choices! {
    Index { Index::Token = 0, Index::Position = 1, Index::First = 2 }
    Gating { Gating::Softmax = 0, Gating::SoftmaxOfTop = 1, Gating::Sigmoid = 2 }
}

/// Numbers of GGUF.
impl Field for Format {
    const WORDS: usize = 1;

    fn read(words: &mut &[u32]) -> Option<Format> {
        Format::from_id(u32::read(words)?).ok()
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        self.id().write(to)
    }
}

/// Three words: a number and its parameters.
impl Field for Gate {
    const WORDS: usize = 3;

    fn read(words: &mut &[u32]) -> Option<Gate> {
        let (number, alpha, limit) = (u32::read(words)?, f32::read(words)?, f32::read(words)?);
        Some(match number {
            0 => Gate::Silu,
            1 => Gate::Gelu,
            2 => Gate::GeluErf,
            3 => Gate::Relu,
            4 => Gate::SiluClamped { alpha, limit },
            5 => Gate::Sigmoid,
            6 => Gate::Identity,
            7 => Gate::Normal,
            _ => return None,
        })
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        let (number, alpha, limit) = match *self {
            Gate::Silu => (0u32, 0.0f32, 0.0f32),
            Gate::Gelu => (1, 0.0, 0.0),
            Gate::GeluErf => (2, 0.0, 0.0),
            Gate::Relu => (3, 0.0, 0.0),
            Gate::SiluClamped { alpha, limit } => (4, alpha, limit),
            Gate::Sigmoid => (5, 0.0, 0.0),
            Gate::Identity => (6, 0.0, 0.0),
            Gate::Normal => (7, 0.0, 0.0),
            _ => return None,
        };
        number.write(to)?;
        alpha.write(to)?;
        limit.write(to)
    }
}

/// Two words: a number and its parameter.
impl Field for Unary {
    const WORDS: usize = 2;

    fn read(words: &mut &[u32]) -> Option<Unary> {
        let (number, parameter) = (u32::read(words)?, f32::read(words)?);
        Some(match number {
            0 => Unary::Silu,
            1 => Unary::Gelu,
            2 => Unary::GeluErf,
            3 => Unary::Relu,
            4 => Unary::ReluSquared,
            5 => Unary::Scale(parameter),
            6 => Unary::SoftCap(parameter),
            7 => Unary::Clamp(parameter),
            _ => return None,
        })
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        let (number, parameter) = match *self {
            Unary::Silu => (0u32, 0.0f32),
            Unary::Gelu => (1, 0.0),
            Unary::GeluErf => (2, 0.0),
            Unary::Relu => (3, 0.0),
            Unary::ReluSquared => (4, 0.0),
            Unary::Scale(factor) => (5, factor),
            Unary::SoftCap(cap) => (6, cap),
            Unary::Clamp(limit) => (7, limit),
            _ => return None,
        };
        number.write(to)?;
        parameter.write(to)
    }
}

/// Consecutive words, bytes or records of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    /// The first one; words and records count from the image's first word, bytes from its first byte.
    pub first: u32,
    /// How many there are.
    pub len: u32,
}

impl Field for Span {
    const WORDS: usize = 2;

    fn read(words: &mut &[u32]) -> Option<Span> {
        Some(Span { first: u32::read(words)?, len: u32::read(words)? })
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        self.first.write(to)?;
        self.len.write(to)
    }
}

/// Rows of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// One for each token of a step.
    Tokens,
    /// One for each token of a step that has outputs.
    Outputs,
    /// A fixed number.
    Fixed(u32),
}

impl Field for Rows {
    const WORDS: usize = 2;

    fn read(words: &mut &[u32]) -> Option<Rows> {
        match (u32::read(words)?, u32::read(words)?) {
            (0, 0) => Some(Rows::Tokens),
            (1, 0) => Some(Rows::Outputs),
            (2, rows) => Some(Rows::Fixed(rows)),
            _ => None,
        }
    }

    fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
        let (kind, rows) = match *self {
            Rows::Tokens => (0u32, 0u32),
            Rows::Outputs => (1, 0),
            Rows::Fixed(rows) => (2, rows),
        };
        kind.write(to)?;
        rows.write(to)
    }
}

/// What selects a row of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    /// The token's id.
    Token,
    /// The token's position.
    Position,
    /// Row 0.
    First,
}

/// How logits of a router become weights of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all, then the largest.
    Softmax,
    /// The largest, then softmax over them.
    SoftmaxOfTop,
    /// Sigmoid of each, then the largest.
    Sigmoid,
}

/// Defines structs that are [`Field`]s: their fields in order.
macro_rules! records {
    ($($(#[doc = $doc:literal])+ $name:ident { $($(#[doc = $field_doc:literal])+ $field:ident: $type:ty,)+ })+) => {
        $(
            $(#[doc = $doc])+
            #[derive(Debug, Clone, Copy, PartialEq)]
            pub struct $name {
                $($(#[doc = $field_doc])+ pub $field: $type,)+
            }

            impl $crate::record::Field for $name {
                const WORDS: usize = 0 $(+ <$type as $crate::record::Field>::WORDS)+;

                fn read(words: &mut &[u32]) -> Option<Self> {
                    Some($name { $($field: <$type>::read(words)?,)+ })
                }

                fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
                    $(self.$field.write(to)?;)+
                    Some(())
                }
            }
        )+
    };
}
pub(crate) use records;
