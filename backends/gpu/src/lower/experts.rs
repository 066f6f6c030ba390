//! Mixtures of experts.

use super::product::Product;
use super::{GROUP, Lowering, ONE, Of, count, each, fixed};
use halite::passes;
use halite::program::{Dim, Gating, Op, TensorId};
use halite_shaders::{Extra, Resource, WORKGROUP, wgsl};

/// The routing of rows of activations to experts.
#[derive(Clone, Copy)]
pub(super) struct Routed<'a> {
    /// The experts of each token; `None`: each row of results has its number, modulo that of the experts.
    pub ids: Option<&'a Resource>,
    /// Number of experts.
    pub of: u32,
    /// Experts per token.
    pub used: u32,
    /// Whether activations have one row per token, or already one per token and expert.
    pub per_token: bool,
}

impl Routed<'_> {
    /// Minimum rows of activations per expert to group results by expert.
    pub fn grouped_from(&self) -> u32 {
        (2 * self.of).div_ceil(self.used.max(1)).max(2)
    }
}

/// Returns the number of a gating in the shader; `None` if it is not supported.
pub(super) fn gating_code(gating: Gating) -> Option<u32> {
    match gating {
        Gating::Softmax => Some(0),
        Gating::SoftmaxOfTop => Some(1),
        Gating::Sigmoid => Some(2),
        _ => None,
    }
}

impl Lowering<'_> {
    pub(super) fn route(&mut self, op: &Op) {
        let Op::Route { logits, bias, groups, ids, weights, gating, normalise, scale, scales } = op else {
            return;
        };
        let rows = self.program.tensor(*logits).rows;
        let shader = Self::rows(self.step_shader("route"), rows)
            .read("x", "f32", self.tensor(*logits))
            .write("ids", "u32", self.tensor(*ids))
            .write("out", "f32", self.tensor(*weights))
            .u32("EXPERTS", self.cols(*logits))
            .u32("USED", self.cols(*ids))
            .u32("GATING", gating_code(*gating).unwrap_or_default())
            .bool("NORMALISE", *normalise)
            .u32("GROUPS", groups.map_or(1, |groups| groups.count))
            .u32("GROUPS_USED", groups.map_or(1, |groups| groups.used))
            .f32("SCALE", *scale)
            .with(wgsl!("lib/math"));
        let shader = self.optional(shader, *bias, "bias", "bias_of", "0.0");
        let shader = self.optional(shader, *scales, "scales", "scale_of", "1.0").with(wgsl!("route"));
        self.push(shader, [count(Of::Rows(rows), 1, WORKGROUP), ONE, ONE]);
    }

    /// Groups results by expert, in steps of enough rows.
    pub(super) fn group(&mut self, rows: Dim, routed: Routed<'_>) {
        let Some(ids) = routed.ids else { return };
        let max_rows = passes::rows(rows, self.limits.tokens, self.limits.outputs);
        if u64::from(routed.grouped_from()) > max_rows {
            return;
        }
        let groups = (max_rows * u64::from(routed.used)).div_ceil(GROUP.into()) + u64::from(routed.of);
        let order = self.extra(Extra::Order, Dim::Fixed(1), groups * u64::from(GROUP + 1));
        let shader = Self::rows(self.step_shader("group"), rows)
            .workgroup(256)
            .read("ids", "u32", ids.clone())
            .write("order", "u32", order)
            .u32("EXPERTS", routed.of)
            .u32("TOKENS", GROUP)
            .with("const NONE: u32 = 0xffffffffu;")
            .with(&format!("fn results() -> u32 {{ return {}u * rows(); }}", routed.used))
            .with(wgsl!("group"));
        self.push_when(shader, [ONE; 3], (Of::Rows(rows), routed.grouped_from()..u32::MAX));
    }

    /// Products of blocks of columns, each with a matrix of its own: experts that every row has, in order.
    pub(super) fn block_matmul(&mut self, x: TensorId, weight: TensorId, out: TensorId) {
        let t = self.program.tensor(weight);
        let (rows, format, blocks, k) = (self.program.tensor(x).rows, t.format, t.experts, t.cols);
        let (x, out) = (self.tensor(x), self.tensor(out));
        self.quantise(&[format], (&x, None), rows, blocks, k, u32::MAX);
        let routed = Routed { ids: None, of: blocks, used: blocks, per_token: false };
        let experts = Some(routed);
        let (bias, gate, residual) = (None, None, None);
        self.product(&Product { weight, bias, input: (&x, None), out, rows, gate, residual, experts }, true);
    }

    pub(super) fn experts(&mut self, op: &Op) {
        let Op::Experts { x, ids, weights, gate, up, down, biases, out, act } = op else { return };
        let (rows, cols) = (self.program.tensor(*x).rows, self.cols(*x));
        let (used, hidden_cols) = (self.cols(*ids), self.cols(*down));
        let (input, ids) = (self.tensor(*x), self.tensor(*ids));
        let format = |id: TensorId| self.program.tensor(id).format;
        let (in_formats, down_format) = ([format(*gate), format(*up)], format(*down));
        let hidden_floats = u64::from(used) * u64::from(hidden_cols);
        let gates = self.extra(Extra::Gates, rows, hidden_floats);
        let hidden = self.extra(Extra::Hidden, rows, hidden_floats);
        let mixed = self.extra(Extra::Mixed, rows, u64::from(used) * u64::from(cols));
        let bias = |n: usize| biases.map(|b| b[n]);
        let of = self.program.tensor(*gate).experts;
        let routed = Routed { ids: Some(&ids), of, used, per_token: true };
        self.group(rows, routed);
        let product = |weight: TensorId, bias, input, out: &Resource, routed| Product {
            weight,
            bias,
            input,
            out: out.clone(),
            rows,
            gate: None,
            residual: None,
            experts: Some(routed),
        };
        let x = (&input, Some(*x));
        self.quantise(&in_formats, x, rows, 1, cols, u32::MAX);
        self.product(&product(*gate, bias(0), x, &gates, routed), true);
        let gated_up = Product { gate: Some((*act, gates)), ..product(*up, bias(1), x, &hidden, routed) };
        self.product(&gated_up, true);
        self.quantise(&[down_format], (&hidden, None), rows, used, hidden_cols, u32::MAX);
        let routed = Routed { per_token: false, ..routed };
        self.product(&product(*down, bias(2), (&hidden, None), &mixed, routed), true);
        let shader = self
            .shader("mix")
            .read("x", "f32", mixed)
            .read("expert_weights", "f32", self.tensor(*weights))
            .write("out", "f32", self.tensor(*out))
            .u32("COLUMNS", cols)
            .u32("USED", used)
            .with(wgsl!("mix"));
        self.push(shader, [fixed(cols.div_ceil(WORKGROUP)), each(rows), ONE]);
    }
}
