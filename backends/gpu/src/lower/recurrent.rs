//! Lowering of recurrent ops: an invocation computes a part of a state for all tokens of a span, in order.

use halite::program::{Dim, Op, Rule, StateId};
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

    pub(super) fn recur(&mut self, op: &Op) {
        let Op::Recur { q, k, v, decay, a, rule, state: id, out } = op else { return };
        let state = &self.program.states[id.0 as usize];
        let (heads, key_heads) = (state.kv_heads, self.cols(*k) / state.key_dim);
        let shader = self
            .recurrent("recur", *id)
            .read("q", "f32", self.tensor(*q))
            .read("k", "f32", self.tensor(*k))
            .read("v", "f32", self.tensor(*v))
            .read("decay", "f32", self.tensor(*decay))
            .read("a", "f32", self.tensor(*a))
            .write("out", "f32", self.tensor(*out))
            .u32("HEADS", heads)
            .u32("KEY_HEADS", key_heads)
            .u32("RATES", self.cols(*decay) / heads)
            .u32("FACTORS", self.cols(*a) / heads)
            .u32("KEY_DIM", state.key_dim)
            .u32("VALUE_DIM", state.value_dim)
            .with(wgsl!("lib/math"));
        let key_head = match rule {
            Rule::Delta { neighbours: false, .. } => "head % KEY_HEADS",
            _ => "head * KEY_HEADS / HEADS",
        };
        let shader = shader.with(&format!("fn key_head(head: u32) -> u32 {{ return {key_head}; }}"));
        let shader = match rule {
            Rule::Delta { beta, scale, .. } => shader
                .read("beta", "f32", self.tensor(*beta))
                .f32("SCALE", *scale)
                .with("fn update(at: u32, v: f32, known: f32, rate: f32) -> f32 { return sigmoid(beta[at]) * (v - known); }")
                .with("fn result(head: u32, sum: f32, v: f32) -> f32 { return SCALE * sum; }"),
            Rule::Scan { d } => shader
                .read("d", "f32", self.tensor(*d))
                .with("fn update(at: u32, v: f32, known: f32, rate: f32) -> f32 { return rate * v; }")
                .with("fn result(head: u32, sum: f32, v: f32) -> f32 { return sum + d[head] * v; }"),
            // `missing` rejects it.
            _ => return,
        };
        let columns = heads * state.value_dim;
        let groups = [fixed(columns.div_ceil(WORKGROUP)), each(Dim::Tokens), ONE];
        self.push(shader.with(wgsl!("recur")), groups);
    }
}
