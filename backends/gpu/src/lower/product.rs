//! Products of matrices with activations, in tiles or for a few rows at a time.

use std::ops::Range;

use halite_kernels::formats::{Format, Kind, Layout, ROWS};

use super::activation::Input;
use super::experts::Routed;
use super::{Count, GROUP, Lowering, ONE, Of, VECTORS, count, fixed};
use halite::passes;
use halite::program::{Dim, Epilogue, Gate, Part, Slot, Tensor, TensorId};
use halite_shaders::{Extra, Resource, Shader, after, gated, wgsl};

pub(super) fn fixed_rows(t: &Tensor) -> u32 {
    if let Dim::Fixed(rows) = t.rows { rows } else { 0 }
}

/// Returns the bytes of `rows` rows of a weight.
pub(super) fn matrix_bytes(t: &Tensor, rows: u32) -> u64 {
    t.format.row_bytes(t.cols as usize).unwrap_or(0) as u64 * u64::from(rows)
}

/// A part of a weight that fits a binding.
#[derive(Debug, PartialEq)]
pub(super) struct Shard {
    /// Bytes of the weight.
    pub bytes: Range<u64>,
    /// First row, or first expert.
    pub first: u32,
    /// Rows of each matrix in the part.
    pub rows: u32,
    /// Matrices in the part.
    pub matrices: u32,
}

/// Splits a weight into as few parts as bindings allow, of whole experts or whole groups of interleaved rows,
/// each at a multiple of 256 bytes. `None` if that is impossible.
pub(super) fn shards(t: &Tensor, binding_bytes: u64) -> Option<Vec<Shard>> {
    let of_experts = t.experts > 1;
    // Experts or rows.
    let (total, unit_bytes, whole) = match of_experts {
        true => (t.experts, matrix_bytes(t, fixed_rows(t)), 1),
        false => (fixed_rows(t), matrix_bytes(t, 1), ROWS as u32),
    };
    let fit = (binding_bytes / unit_bytes.max(1)).min(total.into()) as u32;
    let granule = (256 >> unit_bytes.trailing_zeros().min(8)).max(whole);
    let max = if fit == total { total } else { fit / granule * granule };
    if max == 0 && total > 0 {
        return None;
    }
    let part = |first: u32| {
        let n = max.min(total - first);
        let bytes = u64::from(first) * unit_bytes..u64::from(first + n) * unit_bytes;
        let (rows, matrices) = if of_experts { (fixed_rows(t), n) } else { (n, 1) };
        Shard { bytes, first, rows, matrices }
    };
    Some((0..total).step_by(max.max(1) as usize).map(part).collect())
}

/// A product, without its weight's parts.
pub(super) struct Product<'a> {
    pub weight: TensorId,
    pub bias: Option<TensorId>,
    pub input: Input<'a>,
    pub out: Resource,
    /// Rows of activations, each with `times` rows of outputs.
    pub rows: Dim,
    pub gate: Option<(Gate, Resource)>,
    pub residual: Option<Resource>,
    pub experts: Option<Routed<'a>>,
}

impl Lowering<'_> {
    /// The parts of a weight, which exist for every op that `missing` accepts.
    pub(super) fn shards(&self, id: TensorId) -> Vec<Shard> {
        shards(self.program.tensor(id), self.bounds.binding_bytes).unwrap_or_default()
    }

    /// Adds the weight `w` of a shard, with its constants.
    pub(super) fn matrix(&self, shader: Shader, id: TensorId, shard: &Shard) -> Shader {
        let t = self.program.tensor(id);
        let Slot::Weight(n) = t.slot else { return shader };
        let whole = fixed_rows(t) / ROWS as u32 * ROWS as u32;
        let interleaved = match t.layout {
            Layout::Interleaved if t.experts > 1 => whole,
            Layout::Interleaved => whole.saturating_sub(shard.first).min(shard.rows),
            Layout::Rows => 0,
        };
        shader
            .u32("K", t.cols)
            .u32("ROWS", shard.rows)
            .u32("BLOCKS", t.cols / t.format.block_len() as u32)
            .matrix(t.format, Resource::Weight(n, shard.bytes.clone()), interleaved, shard.rows)
    }

    pub(super) fn matmul(&mut self, x: TensorId, parts: &[Part], epilogue: Epilogue, outs: &[TensorId]) {
        let rows = self.program.tensor(x).rows;
        let input = self.tensor(x);
        let formats: Vec<Format> = parts.iter().map(|p| self.program.tensor(p.weight).format).collect();
        // Matrix units read f16 instead of codes.
        let end = if self.bounds.paths.cooperative.is_some() { VECTORS + 1 } else { u32::MAX };
        self.quantise(&formats, (&input, Some(x)), rows, 1, self.cols(x), end);
        self.halve(&formats, (&input, Some(x)), rows, self.cols(x));
        let plain = |part: &Part, out: Resource| Product {
            weight: part.weight,
            bias: part.bias,
            input: (&input, Some(x)),
            out,
            rows,
            gate: None,
            residual: None,
            experts: None,
        };
        // With few rows of activations, similar products share a dispatch.
        let merged = self.merged((&input, Some(x)), parts, epilogue, outs, rows);
        match (epilogue, parts, outs) {
            (Epilogue::Glu(act), [gate, up], &[out]) => {
                let gates = self.extra(Extra::Gates, rows, self.cols(out).into());
                self.product(&plain(gate, gates.clone()), !merged);
                let product = Product { gate: Some((act, gates)), ..plain(up, self.tensor(out)) };
                self.product(&product, !merged);
            }
            (Epilogue::Add(residual), [part], &[out]) => {
                let residual = Some(self.tensor(residual));
                self.product(&Product { residual, ..plain(part, self.tensor(out)) }, true);
            }
            _ => {
                for (part, &out) in parts.iter().zip(outs) {
                    self.product(&plain(part, self.tensor(out)), !merged);
                }
            }
        }
    }

    /// Lowers products of several matrices of one format with up to [`VECTORS`] rows of activations as one
    /// dispatch. Does nothing and returns false if that is impossible.
    pub(super) fn merged(
        &mut self,
        input: Input<'_>,
        parts: &[Part],
        epilogue: Epilogue,
        outs: &[TensorId],
        rows: Dim,
    ) -> bool {
        let tensors: Vec<&Tensor> = parts.iter().map(|p| self.program.tensor(p.weight)).collect();
        let format = tensors[0].format;
        let gate = if let Epilogue::Glu(act) = epilogue { Some(act) } else { None };
        let biases = parts.iter().filter(|p| p.bias.is_some()).count();
        let alike = tensors.iter().all(|t| {
            t.format == format
                && t.layout == Layout::Interleaved
                && fixed_rows(t).is_multiple_of(ROWS as u32)
                && matrix_bytes(t, fixed_rows(t)) <= self.bounds.binding_bytes
        });
        // Two more bindings are the step and the activations.
        if parts.len() < 2
            || !alike
            || 2 + parts.len() + outs.len() + biases > 8
            || (gate.is_some() && biases > 0)
        {
            return false;
        }
        let tuning = self.bounds.tuning;
        let (groups, lib) = match (gate.is_some(), tuning.groups > 1) {
            (false, false) => (1, wgsl!("lib/group")),
            (false, true) => (4, wgsl!("lib/groups")),
            (true, false) => (1, wgsl!("lib/pair")),
            (true, true) => (2, wgsl!("lib/pairs")),
        };
        // For each matrix: its words, its rows, and its output.
        let (mut words, mut counts, mut stores) = (String::new(), String::new(), String::new());
        let mut choose = String::from("which = 0u; var rest = group;");
        let mut shader = Self::rows(self.step_shader("matvec"), rows)
            .with("var<private> which: u32;")
            .with("fn results() -> u32 { return rows(); }")
            .with("fn is_here(matrix: u32) -> bool { return true; }")
            .u32("FIRST_MATRIX", 0)
            .u32("K", tensors[0].cols)
            .u32("ROWS", fixed_rows(tensors[0]))
            .u32("BLOCKS", tensors[0].cols / format.block_len() as u32);
        let mut workgroups = 0;
        for (i, (part, t)) in parts.iter().zip(&tensors).enumerate() {
            let (n, here) = (fixed_rows(t), fixed_rows(t).div_ceil(groups * ROWS as u32));
            shader = shader.read(&format!("w{i}"), "u32", self.tensor(part.weight));
            words += &format!("case {i}u: {{ return w{i}[i]; }}\n");
            counts += &format!("case {i}u: {{ return {n}u; }}\n");
            if gate.is_some() && i > 0 {
                continue;
            }
            workgroups += here;
            choose +=
                &format!("if which == {i}u && rest >= {here}u {{ rest -= {here}u; which = {}u; }}", i + 1);
            shader = shader.write(&format!("out{i}"), "f32", self.tensor(outs[i]));
            shader = self.optional(shader, part.bias, &format!("bias{i}"), &format!("bias_of{i}"), "0.0");
            // After loading a pair, the second matrix is still chosen.
            let chosen = if gate.is_some() { 1 } else { i };
            stores += &format!(
                "case {chosen}u: {{ out{i}[row * {n}u + column] = product + bias_of{i}(column); }}\n"
            );
        }
        if let Some(gate) = gate {
            shader = shader.with(&gated(gate).unwrap_or_default());
        }
        let switch =
            |cases: &str, otherwise: &str| format!("switch which {{ {cases} default: {{ {otherwise} }} }}");
        shader = shader
            .with(&format!("fn weight_word(i: u32) -> u32 {{ {} }}", switch(&words, "return 0u;")))
            .with(&format!("fn row_count() -> u32 {{ {} }}", switch(&counts, "return 1u;")))
            .with(&format!("fn choose(group: u32) -> u32 {{ {choose} return rest; }}"))
            .with(&format!(
                "fn store(row: u32, column: u32, matrix: u32, product: f32) {{ {} }}",
                switch(&stores, "")
            ))
            .with(wgsl!("lib/math"))
            .format(format, fixed_rows(tensors[0]), fixed_rows(tensors[0]));
        self.vectors(&shader, tensors[0], input, lib, fixed(workgroups), rows, None);
        true
    }

    /// Returns the maximum slices of a row of `k` in `matvec.wgsl`.
    pub(super) fn most_slices(&self, k: u32) -> u32 {
        let bounds = self.bounds;
        let fit = (bounds.workgroup / 16).min(bounds.workgroup_bytes / 4 / (16 * 20)).min(k / 32).max(1);
        1 << (fit.ilog2().min(bounds.tuning.invocations.ilog2()))
    }

    /// Returns the number of slices per row of `k` in `matvec.wgsl`, for `rows` parallel rows.
    fn slices(&self, rows: u32, k: u32) -> u32 {
        (self.bounds.tuning.invocations / rows.max(1)).max(1).next_power_of_two().min(self.most_slices(k))
    }

    /// Adds runs of `matvec.wgsl`: one for a single row of activations, and, if all rows use one matrix, one
    /// for several.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn vectors(
        &mut self,
        shader: &Shader,
        t: &Tensor,
        input: Input<'_>,
        groups: &str,
        workgroups: Count,
        rows: Dim,
        experts: Option<Routed<'_>>,
    ) {
        let codes = self.codes(t.format);
        let Count { of: Of::Rows(Dim::Fixed(groups_of_rows)), .. } = workgroups else { return };
        let slices = self.slices(16 * groups_of_rows, t.cols);
        let max_rows = passes::rows(rows, self.limits.tokens, self.limits.outputs) as u32;
        let variants = match experts {
            None => vec![(1, 0..2), (GROUP, 2..VECTORS + 1)],
            Some(routed) => {
                vec![(1, 0..2), (1, 2..routed.grouped_from()), (GROUP, routed.grouped_from()..u32::MAX)]
            }
        };
        for (tokens, when) in variants {
            if when.start > max_rows || when.is_empty() {
                continue;
            }
            let own = codes.is_some_and(|codes| self.codes_from(codes, input.1, t.cols) > when.start.max(1));
            let shader = self
                .activations(shader.clone(), t.format, input.0, own)
                .u32("TOKENS", tokens)
                .u32("SLICES", slices)
                .workgroup(slices * ROWS as u32)
                .with(groups)
                .with(if slices > 1 { wgsl!("lib/slices") } else { wgsl!("lib/slice") })
                .with(if codes.is_some() { wgsl!("lib/part_integer") } else { wgsl!("lib/part_float") });
            let grouped = experts.is_some() && tokens > 1;
            let shader = self.rows_of_results(shader, experts, grouped).with(wgsl!("matvec"));
            let mut results = count(Of::Rows(rows), experts.map_or(1, |e| e.used), tokens);
            if let Some(routed) = experts.filter(|_| grouped) {
                results.plus = routed.of;
            }
            self.push_when(shader, [workgroups, ONE, results], (Of::Rows(rows), when));
        }
    }

    /// The shader of a product, without the product itself.
    pub(super) fn product_shader(&self, name: &'static str, p: &Product<'_>, shard: &Shard) -> Shader {
        let t = self.program.tensor(p.weight);
        let mut s = Self::rows(self.step_shader(name), p.rows);
        if let Some(routed) = p.experts {
            // A row of results per token and expert.
            s = s.with(&format!("fn results() -> u32 {{ return {}u * rows(); }}", routed.used));
        } else {
            s = s.with("fn results() -> u32 { return rows(); }");
        }
        s = self.matrix(s, p.weight, shard).write("out", "f32", p.out.clone());
        let (first_row, first_matrix) = if p.experts.is_some() { (0, shard.first) } else { (shard.first, 0) };
        let columns = fixed_rows(t);
        s = s.u32("COLUMNS", columns).u32("FIRST", first_row).u32("FIRST_MATRIX", first_matrix);
        s = self.optional(s, p.bias, "bias", "bias_of", "0.0");
        if let Some((_, gates)) = &p.gate {
            s = s.read("gates", "f32", gates.clone());
        }
        if let Some(residual) = &p.residual {
            s = s.read("residual", "f32", residual.clone());
        }
        s = s.with(wgsl!("lib/math")).with(&after(p.gate.as_ref().map(|g| g.0), p.residual.is_some()));
        let here = match p.experts {
            None => "true".into(),
            Some(_) => format!("matrix - FIRST_MATRIX < {}u", shard.matrices),
        };
        s = s.with(&format!("fn is_here(matrix: u32) -> bool {{ return {here}; }}"));
        s.with(wgsl!("lib/output"))
    }

    /// Adds the mapping from an invocation to its row of results, matrix and row of activations: in order, or
    /// grouped by expert.
    pub(super) fn rows_of_results(
        &self,
        shader: Shader,
        experts: Option<Routed<'_>>,
        grouped: bool,
    ) -> Shader {
        let Some(routed) = experts else {
            return shader
                .with("fn matrix_of(first: u32) -> u32 { return 0u; }")
                .with("fn input_of(row: u32) -> u32 { return row; }")
                .with(wgsl!("lib/rows_each"));
        };
        let of_token = if routed.per_token { routed.used } else { 1 };
        let shader = shader.with(&format!("fn input_of(row: u32) -> u32 {{ return row / {of_token}u; }}"));
        match (grouped, routed.ids) {
            (true, Some(_)) => {
                shader.read("order", "u32", Resource::Extra(Extra::Order)).with(wgsl!("lib/rows_grouped"))
            }
            (true, None) => shader.u32("MATRICES", routed.of).with(wgsl!("lib/rows_blocks")),
            (false, Some(ids)) => shader
                .read("ids", "u32", ids.clone())
                .with("fn matrix_of(first: u32) -> u32 { return ids[min(first, results() - 1u)]; }")
                .with(wgsl!("lib/rows_each")),
            (false, None) => shader
                .u32("MATRICES", routed.of)
                .with("fn matrix_of(first: u32) -> u32 { return first % MATRICES; }")
                .with(wgsl!("lib/rows_each")),
        }
    }

    /// Lowers a product. Without `vectors`, it is only for more rows of activations than [`VECTORS`].
    pub(super) fn product(&mut self, p: &Product<'_>, vectors: bool) {
        let t = self.program.tensor(p.weight);
        let (integer, float) = (self.codes(t.format).is_some(), t.format.kind() == Kind::Float);
        let used = p.experts.map_or(1, |routed| routed.used);
        let max_rows = passes::rows(p.rows, self.limits.tokens, self.limits.outputs) as u32;
        for shard in self.shards(p.weight) {
            if !vectors {
            } else if float {
                let shader = self.product_shader("matvec_plain", p, &shard);
                let shader = self.activations(shader, t.format, p.input.0, false).u32("TOKENS", 1);
                let shader = self.rows_of_results(shader, p.experts, false).with(wgsl!("matvec_plain"));
                let when = if p.experts.is_some() { 0..u32::MAX } else { 0..VECTORS + 1 };
                let results = count(Of::Rows(p.rows), used, 1);
                self.push_when(shader, [fixed(shard.rows), ONE, results], (Of::Rows(p.rows), when));
            } else {
                let shader = self
                    .product_shader("matvec", p, &shard)
                    .with("fn choose(group: u32) -> u32 { return group; }")
                    .with("fn row_count() -> u32 { return ROWS; }");
                let groups = self.bounds.tuning.groups;
                let lib = if groups > 1 { wgsl!("lib/groups") } else { wgsl!("lib/group") };
                let workgroups = fixed(shard.rows.div_ceil(groups * ROWS as u32));
                self.vectors(&shader, t, p.input, lib, workgroups, p.rows, p.experts);
            }
            if p.experts.is_some() || max_rows <= VECTORS {
                continue;
            }
            let tiles = |side: u32| [fixed(shard.rows.div_ceil(side)), count(Of::Rows(p.rows), 1, side), ONE];
            let when = (Of::Rows(p.rows), VECTORS + 1..u32::MAX);
            if let Some(units) = self.cooperative(t.format) {
                let shader = self.product_shader("matmul_cooperative", p, &shard);
                let shader = shader
                    .cooperative(units)
                    .read("halves", "vec4<f16>", Resource::Extra(Extra::Halves))
                    .read("factors", "f32", Resource::Extra(Extra::Factors))
                    .with(wgsl!("matmul_cooperative"));
                self.push_when(shader, tiles(8 * units.side), when);
                continue;
            }
            let shader = self.product_shader("matmul", p, &shard).workgroup(256);
            let shader = self.activations(shader, t.format, p.input.0, false);
            let shader = match (integer, float) {
                (true, _) => shader.with(wgsl!("lib/tiles_integer")),
                (_, true) => shader.with(wgsl!("lib/four_plain")).with(wgsl!("lib/tiles_float")),
                _ => shader.with(wgsl!("lib/four_quantised")).with(wgsl!("lib/tiles_float")),
            };
            self.push_when(shader.with(wgsl!("matmul")), tiles(64), when);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halite::program::{Builder, WeightInfo};

    /// Parts cover the weight in order, fit, and start where bindings may.
    #[test]
    fn weights_are_divided_into_bindings() {
        let tensor = |experts: u32, rows: u32, cols: u32, format| {
            let dims = [cols, rows, experts].map(u64::from).to_vec();
            let find = |_: &str| Some(WeightInfo::new(dims.clone(), format));
            let mut builder = Builder::new("weights", &find);
            let weight = builder.expert_weight("w", experts, rows, cols);
            builder.finish().unwrap().tensor(weight).clone()
        };
        let (small, large) = (1 << 16, 1 << 18);
        for (t, limit, parts) in [
            (tensor(1, 1000, 64, Format::Q4_0), small, Some(1)),
            (tensor(1, 5000, 64, Format::Q4_0), small, Some(3)),
            // Sixteen rows do not fit; experts of 13,600 bytes start at a multiple of 256 only eight
            // together.
            (tensor(1, 5, 4096, Format::F32), small, None),
            (tensor(1, 100, 4096, Format::F32), large, Some(7)),
            (tensor(9, 50, 256, Format::Q8_0), small, None),
            (tensor(20, 50, 256, Format::Q8_0), large, Some(2)),
        ] {
            let shards = shards(&t, limit);
            assert_eq!(shards.as_ref().map(Vec::len), parts, "{t:?}");
            let mut end = 0;
            for shard in shards.unwrap_or_default() {
                assert!(
                    shard.bytes.start == end && end % 256 == 0 && shard.bytes.end - end <= limit,
                    "{shard:?}"
                );
                let matrices = u64::from(shard.matrices);
                assert_eq!(shard.bytes.end - end, matrix_bytes(&t, shard.rows) * matrices);
                end = shard.bytes.end;
            }
            let all = matrix_bytes(&t, fixed_rows(&t)) * u64::from(t.experts);
            assert_eq!(end, if parts.is_some() { all } else { 0 });
        }
    }
}
