//! The ops of an image. Operands are numbers of tensors and states; what an op computes is defined in `halite`'s
//! `Op` of the same name.

use halite_kernels::rows::{Gate, Unary};

use crate::record::{Field, Gating, Index, Span};

/// Defines [`Op`] from its numbers, names and operands.
macro_rules! ops {
    ($($number:literal $name:ident { $($field:ident: $type:ty),+ $(,)? })+) => {
        /// An op. Its fields are those of `halite`'s op of the same name.
        #[derive(Debug, Clone, Copy, PartialEq)]
        #[allow(missing_docs)]
        #[non_exhaustive]
        pub enum Op {
            $($name { $($field: $type),+ },)+
        }

        impl Op {
            /// Takes an op from the front of `words`; `None` if there is none.
            pub fn read(words: &mut &[u32]) -> Option<Op> {
                match u32::read(words)? {
                    $($number => Some(Op::$name { $($field: <$type>::read(words)?),+ }),)+
                    _ => None,
                }
            }

            /// Passes its words on; `None` if it has a value that images do not have.
            pub fn write(&self, to: &mut dyn FnMut(u32)) -> Option<()> {
                match self {
                    $(Op::$name { $($field),+ } => {
                        ($number as u32).write(to)?;
                        $($field.write(to)?;)+
                    })+
                }
                Some(())
            }
        }
    };
}

ops! {
    1 Embed { table: u32, index: Index, out: u32, scale: f32 }
    2 Gather { x: u32, out: u32 }
    3 Norm { x: u32, weight: Option<u32>, bias: Option<u32>, out: u32, centred: bool, eps: f32, group: u32 }
    4 MatMul { x: u32, weight: u32, bias: Option<u32>, out: u32 }
    5 Rope {
        x: u32, out: u32, head_dim: u32, frequencies: Span, factors: Option<u32>, magnitude: f32, adjacent: bool,
    }
    6 KvWrite { k: u32, v: u32, state: u32 }
    7 Attend {
        q: u32, state: u32, out: u32, heads: u32, scale: f32, softcap: Option<f32>, slopes: Span,
        sinks: Option<u32>,
    }
    8 Glu { gate: u32, up: u32, out: u32, act: Gate }
    9 Add { a: u32, b: u32, out: u32 }
    10 Unary { x: u32, out: u32, f: Unary }
    11 Route { logits: u32, ids: u32, weights: u32, gating: Gating, normalise: bool, scale: f32 }
    12 Experts {
        x: u32, ids: u32, weights: u32, gate: u32, up: u32, down: u32, gate_bias: Option<u32>, up_bias: Option<u32>,
        down_bias: Option<u32>, out: u32, act: Gate,
    }
}
