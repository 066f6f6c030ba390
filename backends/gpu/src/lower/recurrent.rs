//! Lowering of recurrent ops: an invocation computes a part of a state for all tokens of a span, in order.

use halite::program::{Dim, Op, StateId};
use halite_shaders::{Resource, Shader, WORKGROUP, wgsl};

use super::{Lowering, ONE, each, fixed};

impl Lowering<'_> {
    /// A shader that reads and writes a recurrent state.
    fn recurrent(&self, name: &'static str, id: StateId) -> Shader {
        let group = self.program.kv_group(&self.program.states[id.0 as usize]) as u32;
        self.step_shader(name)
            .u32("STEP_TABLES", self.step.tables + group * self.step.tokens)
            .with(wgsl!("lib/recurrent"))
            .write("state", "f32", Resource::State(id.0))
    }

    pub(super) fn conv(&mut self, op: &Op) {
        let Op::Conv { x, weight, bias, state, out } = op else { return };
        let channels = self.cols(*x);
        let shader = self
            .recurrent("conv", *state)
            .read("x", "f32", self.tensor(*x))
            .read("weight", "f32", self.tensor(*weight))
            .write("out", "f32", self.tensor(*out))
            .u32("COLUMNS", channels)
            .u32("TAPS", self.cols(*weight));
        let shader = self.optional(shader, *bias, "bias", "bias_of", "0.0").with(wgsl!("conv"));
        self.push(shader, [fixed(channels.div_ceil(WORKGROUP)), each(Dim::Tokens), ONE]);
    }

    pub(super) fn delta_rule(&mut self, op: &Op) {
        let Op::DeltaRule { q, k, v, decay, beta, a, state: id, out, scale } = op else { return };
        let state = &self.program.states[id.0 as usize];
        let shader = self
            .recurrent("delta_rule", *id)
            .read("q", "f32", self.tensor(*q))
            .read("k", "f32", self.tensor(*k))
            .read("v", "f32", self.tensor(*v))
            .read("decay", "f32", self.tensor(*decay))
            .read("beta", "f32", self.tensor(*beta))
            .read("a", "f32", self.tensor(*a))
            .write("out", "f32", self.tensor(*out))
            .u32("HEADS", state.kv_heads)
            .u32("KEYS", self.cols(*k))
            .u32("KEY_DIM", state.key_dim)
            .u32("VALUE_DIM", state.value_dim)
            .f32("SCALE", *scale)
            .with(wgsl!("lib/math"))
            .with(wgsl!("delta_rule"));
        let columns = state.kv_heads * state.value_dim;
        self.push(shader, [fixed(columns.div_ceil(WORKGROUP)), each(Dim::Tokens), ONE]);
    }
}
