//! From a program to dispatches: which shader with which constants, bindings and numbers of workgroups. Pure: nothing here
//! needs a device.

use std::ops::Range;

use halite_kernels::formats::{Activation, Format, Kind, Layout, ROWS};

use super::shader::{
    Cooperative, Extra, Paths, Resource, Shader, WORKGROUP, after, gated, knows_format, unary, wgsl,
};
use crate::backend::Limits;
use crate::passes;
use crate::program::{
    Dim, Epilogue, Gate, Gating, Index, NormKind, Op, Part, Program, RopePairs, Slot, State, StateId, Tensor,
    TensorId,
};

impl Extra {
    pub const ALL: [Extra; 11] = [
        Extra::Codes32,
        Extra::Codes256,
        Extra::Gates,
        Extra::Hidden,
        Extra::Mixed,
        Extra::Halves,
        Extra::Factors,
        Extra::Splits,
        Extra::Order,
        Extra::Ranked,
        Extra::Reranked,
    ];
}

/// What a number of workgroups depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Rows(Dim),
    /// Tiles of at most so many tokens of one sequence.
    Tiles(u32),
    /// Splits of attention over long caches; 1 where it is whole.
    Splits,
}

/// A number of workgroups: `ceil(of * times / per) + plus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    pub of: Of,
    pub times: u32,
    pub per: u32,
    pub plus: u32,
}

const ONE: Count = fixed(1);

const fn count(of: Of, times: u32, per: u32) -> Count {
    Count { of, times, per, plus: 0 }
}

const fn fixed(n: u32) -> Count {
    count(Of::Rows(Dim::Fixed(n)), 1, 1)
}

const fn each(of: Dim) -> Count {
    count(Of::Rows(of), 1, 1)
}

/// One run of a shader.
#[derive(Debug, Clone)]
pub(super) struct Dispatch {
    pub shader: Shader,
    /// Along x and y, of which x may be folded into both, and z.
    pub groups: [Count; 3],
    /// Run only for so many of these.
    pub when: (Of, Range<u32>),
}

/// Rows of activations up to which a product is one of vectors.
const VECTORS: u32 = 8;
/// Rows of activations that share what a workgroup of `matvec.wgsl` reads of the matrix, where there are several.
const GROUP: u32 = 4;
/// Rows in a tile of attention.
const ATTEND_ROWS: u32 = 8;
/// Elements of a row that a workgroup sorts to find the largest.
const TOP_K_PIECE: u32 = 1024;
/// The least positions of a split of the cache.
const SPLIT_POSITIONS: u32 = 256;

/// A program as dispatches.
#[derive(Debug)]
pub(super) struct Lowered {
    /// Those of each segment.
    pub segments: Vec<Vec<Dispatch>>,
    /// The program's scratch tensors.
    pub layout: passes::Layout,
    /// Bytes of each of [`Extra::ALL`].
    pub extra_bytes: [u64; Extra::ALL.len()],
    /// Sizes of tiles that a step must list.
    pub tile_sizes: Vec<u32>,
    /// Most splits of attention over long caches, for a single token.
    most_splits: u32,
    /// Where things are in the step's buffer.
    pub step: StepLayout,
}

impl Lowered {
    /// Into how many splits a step of so many tokens cuts its caches, of which the longest has so many positions.
    pub fn splits(&self, tokens: u32, longest: u32) -> u32 {
        (longest / SPLIT_POSITIONS).min(self.most_splits / tokens.max(1)).max(1)
    }
}

/// Where things are in the step's buffer, in words; see `step.wgsl`.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepLayout {
    pub ids: u32,
    pub positions: u32,
    /// Of each KV group in turn.
    pub tables: u32,
    /// Tokens of each of these lists.
    pub tokens: u32,
    pub outputs: u32,
    pub tiles: u32,
    /// Words of the list of each tile size.
    pub tile_words: u32,
}

impl StepLayout {
    fn new(program: &Program, limits: Limits) -> StepLayout {
        let (tokens, ids) = (limits.tokens, 3);
        let (positions, tables) = (ids + tokens, ids + 2 * tokens);
        let outputs = tables + program.windows.len() as u32 * tokens;
        let tiles = outputs + limits.outputs;
        StepLayout { ids, positions, tables, tokens, outputs, tiles, tile_words: 3 * tokens }
    }

    /// Where page tables start, after the lists of so many tile sizes.
    pub fn pages(&self, tile_sizes: usize) -> u32 {
        self.tiles + self.tile_words * tile_sizes as u32
    }
}

/// What a device allows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub paths: Paths,
    /// Bytes of a binding.
    pub binding_bytes: u64,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
    pub tuning: Tuning,
}

/// Sizes that are better for one kind of device than for another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tuning {
    /// Rows of a matrix of an invocation of `matvec.wgsl`: 1 or 4.
    pub groups: u32,
    /// Slices of a row of the matrix in its workgroups.
    pub slices: u32,
    /// Workgroups of attention that keep the device busy.
    pub attend: u32,
}

impl Tuning {
    /// Many invocations, each with little to do.
    pub const GPU: Tuning = Tuning { groups: 1, slices: 8, attend: 256 };
    /// Shaders on a CPU: a load costs more than arithmetic, and barriers most of all.
    pub const CPU: Tuning = Tuning { groups: 4, slices: 1, attend: 16 };
}

/// Why an op cannot run, if it cannot.
pub(super) fn missing(program: &Program, op: &Op, bounds: &Bounds) -> Option<String> {
    let mut why = None;
    let mut weights = Vec::new();
    op.inputs(&mut |id| weights.push(id));
    for id in weights {
        let t = program.tensor(id);
        if !matches!(t.slot, Slot::Weight(_)) {
            continue;
        }
        if !knows_format(t.format) {
            why = Some(format!("format {}", t.format.name()));
        }
        if shards(t, bounds.binding_bytes).is_none() {
            let limit = bounds.binding_bytes;
            why = Some(format!("`{}` cannot be divided into bindings of {limit} bytes", t.name));
        }
    }
    match op {
        Op::Attend { state, .. } => {
            let state = &program.states[state.0 as usize];
            let bytes = 16 * (2 * state.key_dim + 4 * 64);
            if bytes > bounds.workgroup_bytes {
                why = Some(format!(
                    "keys of {} elements need {bytes} bytes of workgroup memory",
                    state.key_dim
                ));
            }
        }
        Op::Glu { act, .. } | Op::Experts { act, .. } | Op::MatMul { epilogue: Epilogue::Glu(act), .. }
            if gated(*act).is_none() =>
        {
            why = Some(format!("{act:?}"));
        }
        // A piece must leave less than it has.
        Op::TopK { ids, .. } if program.tensor(*ids).cols > TOP_K_PIECE / 2 => {
            why = Some(format!("more than {} of the largest", TOP_K_PIECE / 2));
        }
        Op::Map { f, .. } if unary(*f).is_none() => why = Some(format!("{f:?}")),
        _ => {}
    }
    why
}

fn fixed_rows(t: &Tensor) -> u32 {
    if let Dim::Fixed(rows) = t.rows { rows } else { 0 }
}

/// Bytes of so many rows of a weight.
fn matrix_bytes(t: &Tensor, rows: u32) -> u64 {
    t.format.row_bytes(t.cols as usize).unwrap_or(0) as u64 * u64::from(rows)
}

/// Lowers a program whose ops are all supported.
pub(super) fn lower(program: &Program, limits: Limits, bounds: &Bounds) -> Lowered {
    let layout = passes::liveness(program);
    let mut lowering = Lowering {
        program,
        limits,
        bounds,
        layout: &layout,
        out: Vec::new(),
        extra_bytes: [0; Extra::ALL.len()],
        tile_sizes: Vec::new(),
        most_splits: most_splits(program, bounds),
        step: StepLayout::new(program, limits),
        quantised: Vec::new(),
        uses: passes::uses(program),
    };
    let mut segments = Vec::new();
    for segment in &program.segments {
        let mut ops = &segment.ops[..];
        while let Some(op) = ops.first() {
            let fused = lowering.fused(ops);
            if fused == 0 {
                lowering.op(op);
            }
            ops = &ops[fused.max(1)..];
        }
        segments.push(std::mem::take(&mut lowering.out));
    }
    let Lowering { extra_bytes, tile_sizes, most_splits, step, .. } = lowering;
    Lowered { segments, layout, extra_bytes, tile_sizes, most_splits, step }
}

/// The most splits of attention that are of use: those that with its KV heads make enough workgroups.
fn most_splits(program: &Program, bounds: &Bounds) -> u32 {
    program.states.iter().map(|s| bounds.tuning.attend / s.kv_heads).max().unwrap_or(0).max(1)
}

struct Lowering<'a> {
    program: &'a Program,
    limits: Limits,
    bounds: &'a Bounds,
    layout: &'a passes::Layout,
    out: Vec<Dispatch>,
    extra_bytes: [u64; Extra::ALL.len()],
    tile_sizes: Vec<u32>,
    most_splits: u32,
    step: StepLayout,
    /// Which tensor's activations are in which buffer of codes or halves, and for how many rows.
    quantised: Vec<(Extra, TensorId, Range<u32>)>,
    /// How many ops read each tensor.
    uses: Vec<u32>,
}

/// A part of a weight that fits a binding.
#[derive(Debug, PartialEq)]
struct Shard {
    /// Bytes of the weight.
    bytes: Range<u64>,
    /// First row, or first expert.
    first: u32,
    /// Rows of each matrix in it.
    rows: u32,
    /// Matrices in it.
    matrices: u32,
}

/// A weight in as few parts as fit bindings, of whole experts or whole groups of interleaved rows, each from a multiple of 256
/// bytes on. `None` if there are no such parts.
fn shards(t: &Tensor, binding_bytes: u64) -> Option<Vec<Shard>> {
    let of_experts = t.experts > 1;
    // Experts or rows.
    let (total, unit_bytes, whole) = match of_experts {
        true => (t.experts, matrix_bytes(t, fixed_rows(t)), 1),
        false => (fixed_rows(t), matrix_bytes(t, 1), ROWS as u32),
    };
    let fit = (binding_bytes / unit_bytes.max(1)).min(total.into()) as u32;
    let together = (256 >> unit_bytes.trailing_zeros().min(8)).max(whole);
    let most = if fit == total { total } else { fit / together * together };
    if most == 0 && total > 0 {
        return None;
    }
    let part = |first: u32| {
        let n = most.min(total - first);
        let bytes = u64::from(first) * unit_bytes..u64::from(first + n) * unit_bytes;
        let (rows, matrices) = if of_experts { (fixed_rows(t), n) } else { (n, 1) };
        Shard { bytes, first, rows, matrices }
    };
    Some((0..total).step_by(most.max(1) as usize).map(part).collect())
}

/// Where activations are, and the tensor of the program that they are, if they are one.
type Input<'a> = (&'a Resource, Option<TensorId>);

/// What a product has besides its weight.
struct Product<'a> {
    weight: TensorId,
    bias: Option<TensorId>,
    input: Input<'a>,
    out: Resource,
    /// Rows of activations, each with `times` outputs.
    rows: Dim,
    gate: Option<(Gate, Resource)>,
    residual: Option<Resource>,
    experts: Option<Routed<'a>>,
}

/// Which expert each row of activations goes to.
#[derive(Clone, Copy)]
struct Routed<'a> {
    ids: &'a Resource,
    /// Experts that there are.
    of: u32,
    /// Experts for each token.
    used: u32,
    /// Whether rows of activations are those of tokens, or already one for each expert.
    per_token: bool,
}

impl Routed<'_> {
    /// Rows of activations from which on results are put in groups of one expert: about two of them have the same.
    fn grouped_from(&self) -> u32 {
        (2 * self.of).div_ceil(self.used.max(1)).max(2)
    }
}

impl Lowering<'_> {
    fn tensor(&self, id: TensorId) -> Resource {
        match self.program.tensor(id).slot {
            Slot::Weight(n) => Resource::Weight(n, 0..self.program.fixed_bytes(id).unwrap_or(0)),
            Slot::Io(n) => Resource::Io(n),
            Slot::Scratch => {
                let place = self.layout.place.get(id.0 as usize).copied().flatten();
                Resource::Place(place.unwrap_or(usize::MAX))
            }
        }
    }

    fn cols(&self, id: TensorId) -> u32 {
        self.program.tensor(id).cols
    }

    /// One of the buffers between dispatches, large enough for so many floats for each row.
    fn extra(&mut self, extra: Extra, rows: Dim, floats: u64) -> Resource {
        let rows = passes::rows(rows, self.limits.tokens, self.limits.outputs);
        let bytes = &mut self.extra_bytes[extra as usize];
        *bytes = (*bytes).max(4 * floats * rows);
        Resource::Extra(extra)
    }

    fn shader(&self, name: &'static str) -> Shader {
        Shader::new(name, self.bounds.paths)
    }

    /// A shader that reads the step.
    fn step_shader(&self, name: &'static str) -> Shader {
        let s = self.step;
        self.shader(name)
            .read("step", "u32", Resource::Step)
            .u32("STEP_IDS", s.ids)
            .u32("STEP_POSITIONS", s.positions)
            .u32("STEP_OUTPUTS", s.outputs)
            .with(wgsl!("lib/step"))
    }

    /// `rows()`: how many there are in this step.
    fn rows(shader: Shader, rows: Dim) -> Shader {
        let body = match rows {
            Dim::Fixed(n) => format!("{n}u"),
            Dim::Tokens => "step_tokens()".into(),
            Dim::Outputs => "step_outputs()".into(),
        };
        shader.with(&format!("fn rows() -> u32 {{ return {body}; }}"))
    }

    fn push(&mut self, shader: Shader, groups: [Count; 3]) {
        self.push_when(shader, groups, (Of::Rows(Dim::Fixed(1)), 1..2));
    }

    fn push_when(&mut self, shader: Shader, groups: [Count; 3], when: (Of, Range<u32>)) {
        self.out.push(Dispatch { shader, groups, when });
    }

    /// A function of each element of `out`, `[rows, cols]`.
    fn elementwise(&mut self, shader: Shader, out: TensorId, element: &str) {
        let (rows, cols) = (self.program.tensor(out).rows, self.cols(out));
        let shader = shader
            .write("out", "f32", self.tensor(out))
            .u32("COLUMNS", cols)
            .with(wgsl!("lib/math"))
            .with(&format!("fn element(at: u32) -> f32 {{ return {element}; }}"))
            .with(wgsl!("elementwise"));
        self.push(shader, [fixed(cols.div_ceil(WORKGROUP)), each(rows), ONE]);
    }

    /// Lowers the first few ops as one, if they are such that can be; says how many.
    fn fused(&mut self, ops: &[Op]) -> usize {
        match ops {
            [norm @ Op::Norm { out, group, .. }, Op::MatMul { x, parts, .. }, ..]
                if out == x && *group == self.cols(*x) && group % 32 == 0 =>
            {
                let mut kinds: Vec<Extra> =
                    parts.iter().filter_map(|p| self.codes(self.program.tensor(p.weight).format)).collect();
                kinds.dedup();
                let [codes] = kinds[..] else { return 0 };
                self.norm(norm, Some(codes));
                1
            }
            [q @ Op::Rope { .. }, key @ Op::Rope { out, .. }, Op::KvWrite { k, v, state }, ..]
                if out == k && self.only_used_here(*k) && self.rope_kv(q, key, *v, *state) =>
            {
                3
            }
            _ => 0,
        }
    }

    /// Whether a tensor has one reader, in this program.
    fn only_used_here(&self, id: TensorId) -> bool {
        self.program.tensor(id).slot == Slot::Scratch && self.uses.get(id.0 as usize) == Some(&1)
    }

    fn op(&mut self, op: &Op) {
        match op {
            Op::Embed { table, index, out, scale } => self.embed(*table, *index, *out, *scale),
            Op::Select { x, out } => {
                let cols = self.cols(*x);
                let shader = self
                    .step_shader("select")
                    .read("x", "f32", self.tensor(*x))
                    .write("out", "f32", self.tensor(*out))
                    .u32("COLUMNS", cols)
                    .with(wgsl!("select"));
                self.push(shader, [fixed(cols.div_ceil(WORKGROUP)), each(Dim::Outputs), ONE]);
            }
            Op::Norm { .. } => self.norm(op, None),
            Op::MatMul { x, parts, epilogue } => self.matmul(*x, parts, *epilogue),
            Op::Rope { .. } => self.rope(op),
            Op::KvWrite { k, v, state } => self.kv_write(*k, *v, *state),
            Op::Attend { .. } => self.attend(op),
            Op::Glu { gate, up, out, act } => {
                let shader = self
                    .shader("glu")
                    .read("gate", "f32", self.tensor(*gate))
                    .read("up", "f32", self.tensor(*up))
                    .with(&gated(*act).unwrap_or_default());
                self.elementwise(shader, *out, "gated(gate[at], up[at])");
            }
            Op::Add { a, b, out } => {
                let shader =
                    self.shader("add").read("a", "f32", self.tensor(*a)).read("b", "f32", self.tensor(*b));
                self.elementwise(shader, *out, "a[at] + b[at]");
            }
            Op::Map { x, out, f } => {
                let shader =
                    self.shader("map").read("x", "f32", self.tensor(*x)).with(&unary(*f).unwrap_or_default());
                self.elementwise(shader, *out, "f(x[at])");
            }
            Op::Route { .. } => self.route(op),
            Op::Experts { .. } => self.experts(op),
            Op::TopK { x, ids, values } => self.top_k(*x, *ids, *values),
            Op::ArgMax { x, out } => {
                let t = self.program.tensor(*x);
                let shader = self
                    .shader("arg_max")
                    .workgroup(256)
                    .read("x", "f32", self.tensor(*x))
                    .write("out", "u32", self.tensor(*out))
                    .u32("COLUMNS", t.cols)
                    .with(wgsl!("arg_max"));
                self.push(shader, [ONE, each(t.rows), ONE]);
            }
        }
    }

    /// The largest of pieces of a row, then of the pieces of those, until one piece has them.
    fn top_k(&mut self, x: TensorId, ids: TensorId, values: TensorId) {
        let (rows, k) = (self.program.tensor(x).rows, self.cols(ids));
        let (mut count, mut from) = (self.cols(x), None);
        loop {
            let pieces = count.div_ceil(TOP_K_PIECE);
            let shader =
                self.shader("top_k").workgroup(256).u32("PIECE", TOP_K_PIECE).u32("COUNT", count).u32("K", k);
            let shader = match from.clone() {
                None => shader.read("x", "u32", self.tensor(x)).with(
                    "fn element(row: u32, i: u32) -> vec2<u32> { return vec2(rank(x[row * COUNT + i]), i); }",
                ),
                Some(from) => shader
                    .read("x", "vec2<u32>", from)
                    .with("fn element(row: u32, i: u32) -> vec2<u32> { return x[row * COUNT + i]; }"),
            };
            let groups = [fixed(pieces), each(rows), ONE];
            if pieces == 1 {
                let shader =
                    shader.write("ids", "u32", self.tensor(ids)).write("values", "u32", self.tensor(values));
                let keep = "fn keep(row: u32, i: u32, e: vec2<u32>) {
                    ids[row * K + i] = e.y;
                    values[row * K + i] = bits_of(e.x);
                }";
                return self.push(shader.with(keep).with(wgsl!("lib/rank")).with(wgsl!("top_k")), groups);
            }
            count = pieces * k;
            // A dispatch reads what the one before it wrote.
            let to =
                if from == Some(Resource::Extra(Extra::Ranked)) { Extra::Reranked } else { Extra::Ranked };
            let to = self.extra(to, rows, 2 * u64::from(count));
            let keep = format!("fn keep(row: u32, i: u32, e: vec2<u32>) {{ kept[row * {count}u + i] = e; }}");
            let shader = shader.write("kept", "vec2<u32>", to.clone()).with(&keep);
            self.push(shader.with(wgsl!("lib/rank")).with(wgsl!("top_k")), groups);
            from = Some(to);
        }
    }

    /// The parts of a weight; `missing` has seen to it that there are some.
    fn shards(&self, id: TensorId) -> Vec<Shard> {
        shards(self.program.tensor(id), self.bounds.binding_bytes).unwrap_or_default()
    }

    /// The weight `w` of a shard, with its constants.
    fn matrix(&self, shader: Shader, id: TensorId, shard: &Shard) -> Shader {
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

    fn embed(&mut self, table: TensorId, index: Index, out: TensorId, scale: f32) {
        let t = self.program.tensor(table);
        let four = match t.format.kind() {
            Kind::Float => wgsl!("lib/four_plain"),
            Kind::Quantised { .. } => wgsl!("lib/four_quantised"),
        };
        for shard in self.shards(table) {
            let shader = self.step_shader("embed");
            let shader = self
                .matrix(shader, table, &shard)
                .write("out", "f32", self.tensor(out))
                .u32("FIRST", shard.first)
                .with(match index {
                    Index::Token => "fn row_of(token: u32) -> u32 { return token_id(token); }",
                    Index::Position => "fn row_of(token: u32) -> u32 { return position(token); }",
                    Index::First => "fn row_of(token: u32) -> u32 { return 0u; }",
                })
                .f32("SCALE", scale)
                .with(four)
                .with(wgsl!("embed"));
            self.push(shader, [fixed(t.cols.div_ceil(4 * WORKGROUP)), each(Dim::Tokens), ONE]);
        }
    }

    /// A norm, whose results are quantised as well if so wished.
    fn norm(&mut self, op: &Op, codes: Option<Extra>) {
        let Op::Norm { x, add, sum, weight, bias, out, kind, eps, group } = op else { return };
        let (rows, cols) = (self.program.tensor(*x).rows, self.cols(*x));
        let mut shader = self
            .shader("norm")
            .read("x", "f32", self.tensor(*x))
            .write("out", "f32", self.tensor(*out))
            .u32("COLUMNS", cols)
            .u32("GROUP", *group)
            .f32("EPS", *eps)
            .bool("CENTRED", *kind == NormKind::Layer);
        shader = match (add, sum) {
            (Some(add), Some(sum)) => shader
                .read("addend", "f32", self.tensor(*add))
                .write("sum_out", "f32", self.tensor(*sum))
                .with("fn input(at: u32) -> f32 { return x[at] + addend[at]; }")
                .with("fn keep(at: u32, v: f32) { sum_out[at] = v; }"),
            _ => {
                shader.with("fn input(at: u32) -> f32 { return x[at]; }").with("fn keep(at: u32, v: f32) {}")
            }
        };
        shader = self.optional(shader, *weight, "weight", "weight_of", "1.0");
        shader = self.optional(shader, *bias, "bias", "bias_of", "0.0");
        shader = match codes {
            None => shader.with("fn after(in: In) {}"),
            Some(codes) => {
                self.quantised.retain(|q| q.0 != codes);
                self.quantised.push((codes, *out, 1..u32::MAX));
                self.quantiser(shader, codes, rows, 1, cols).with(wgsl!("lib/norm_quantise"))
            }
        };
        self.push(shader.with(wgsl!("norm")), [fixed(cols / group), each(rows), ONE]);
    }

    /// `function(i)`: element i of a weight, or a constant.
    fn optional(
        &self,
        shader: Shader,
        id: Option<TensorId>,
        name: &str,
        function: &str,
        otherwise: &str,
    ) -> Shader {
        let (shader, value) = match id {
            Some(id) => (shader.read(name, "f32", self.tensor(id)), format!("{name}[i]")),
            None => (shader, otherwise.into()),
        };
        shader.with(&format!("fn {function}(i: u32) -> f32 {{ return {value}; }}"))
    }

    fn matmul(&mut self, x: TensorId, parts: &[Part], epilogue: Epilogue) {
        let rows = self.program.tensor(x).rows;
        let input = self.tensor(x);
        let formats: Vec<Format> = parts.iter().map(|p| self.program.tensor(p.weight).format).collect();
        // Matrix units have halves instead of codes.
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
        // With few rows of activations, products that are alike go together.
        let merged = self.merged((&input, Some(x)), parts, epilogue, rows);
        match (epilogue, parts) {
            (Epilogue::Glu(act), [gate, up]) => {
                let gates = self.extra(Extra::Gates, rows, self.cols(up.out).into());
                self.product(&plain(gate, gates.clone()), !merged);
                let product = Product { gate: Some((act, gates)), ..plain(up, self.tensor(gate.out)) };
                self.product(&product, !merged);
            }
            (Epilogue::Add(residual), [part]) => {
                let residual = Some(self.tensor(residual));
                self.product(&Product { residual, ..plain(part, self.tensor(part.out)) }, true);
            }
            _ => parts.iter().for_each(|part| self.product(&plain(part, self.tensor(part.out)), !merged)),
        }
    }

    /// Products of several matrices of one format with up to [`VECTORS`] rows of activations, in one dispatch. Does nothing,
    /// and says so, if they are not such.
    fn merged(&mut self, input: Input<'_>, parts: &[Part], epilogue: Epilogue, rows: Dim) -> bool {
        let tensors: Vec<&Tensor> = parts.iter().map(|p| self.program.tensor(p.weight)).collect();
        let format = tensors[0].format;
        let gate = if let Epilogue::Glu(act) = epilogue { Some(act) } else { None };
        let biases = parts.iter().filter(|p| p.bias.is_some()).count();
        let outs = if gate.is_some() { 1 } else { parts.len() };
        let alike = tensors.iter().all(|t| {
            t.format == format
                && t.layout == Layout::Interleaved
                && fixed_rows(t).is_multiple_of(ROWS as u32)
                && matrix_bytes(t, fixed_rows(t)) <= self.bounds.binding_bytes
        });
        // Two more are the step and the activations.
        if parts.len() < 2 || !alike || 2 + parts.len() + outs + biases > 8 || (gate.is_some() && biases > 0)
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
        // For each matrix: its words, its rows, and where its results go.
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
            shader = shader.write(&format!("out{i}"), "f32", self.tensor(part.out));
            shader = self.optional(shader, part.bias, &format!("bias{i}"), &format!("bias_of{i}"), "0.0");
            stores +=
                &format!("case {i}u: {{ out{i}[row * {n}u + column] = product + bias_of{i}(column); }}\n");
        }
        if let Some(gate) = gate {
            shader = shader.with(&gated(gate).unwrap_or_default());
            // Loading leaves the second matrix chosen.
            stores = stores.replace("case 0u", "case 1u");
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

    /// Runs of `matvec.wgsl`: for one row of activations at a time, and, if they are all for one matrix, for some.
    #[allow(clippy::too_many_arguments)]
    fn vectors(
        &mut self,
        shader: &Shader,
        t: &Tensor,
        input: Input<'_>,
        groups: &str,
        workgroups: Count,
        rows: Dim,
        experts: Option<Routed<'_>>,
    ) {
        let tuning = self.bounds.tuning;
        let codes = self.codes(t.format);
        let most = passes::rows(rows, self.limits.tokens, self.limits.outputs) as u32;
        let variants = match experts {
            None => vec![(1, 0..2), (GROUP, 2..VECTORS + 1)],
            Some(routed) => {
                vec![(1, 0..2), (1, 2..routed.grouped_from()), (GROUP, routed.grouped_from()..u32::MAX)]
            }
        };
        for (tokens, when) in variants {
            if when.start > most || when.is_empty() {
                continue;
            }
            let own = codes.is_some_and(|codes| self.codes_from(codes, input.1, t.cols) > when.start.max(1));
            let shader = self
                .activations(shader.clone(), t.format, input.0, own)
                .u32("TOKENS", tokens)
                .u32("SLICES", tuning.slices)
                .with(groups)
                .with(if tuning.slices > 1 { wgsl!("lib/slices") } else { wgsl!("lib/slice") })
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

    /// How a product sees its activations: as they are, as codes in a buffer, or as codes that each workgroup makes of its own.
    fn activations(&self, shader: Shader, format: Format, input: &Resource, own: bool) -> Shader {
        match self.codes(format) {
            Some(codes) if own => {
                Self::coder(shader.read("x", "vec4<f32>", input.clone()), codes).with(wgsl!("lib/codes_own"))
            }
            Some(codes) => shader
                .read("codes", "vec4<u32>", Resource::Extra(codes))
                .with(wgsl!("lib/codes"))
                .with(wgsl!("lib/codes_stored")),
            None if format.kind() == Kind::Float => {
                shader.read("x", "f32", input.clone()).with("fn x_at(i: u32) -> f32 { return x[i]; }")
            }
            None => shader
                .read("x", "vec4<f32>", input.clone())
                .with("fn x_at(i: u32) -> f32 { return x[i / 4u][i % 4u]; }"),
        }
    }

    /// From how many rows on the codes of activations are in their buffer. Products quantise fewer rows themselves.
    fn codes_from(&self, codes: Extra, x: Option<TensorId>, k: u32) -> u32 {
        let there = self.quantised.iter().find(|q| q.0 == codes && Some(q.1) == x);
        // For each 32 values codes, their scale, sums and largest; and what `slices.wgsl` and sums over workgroups may take.
        let bytes = k / 32 * (32 + 4 + 4 + 4) + 16 * self.bounds.tuning.slices * (16 + 4);
        there.map_or(if bytes <= self.bounds.workgroup_bytes { 2 } else { 1 }, |q| q.2.start)
    }

    /// What activations are quantised to for products with a format, if those are computed in integers.
    fn codes(&self, format: Format) -> Option<Extra> {
        match format.kind() {
            Kind::Quantised { activation, .. } if self.bounds.paths.integer => Some(match activation {
                Activation::Q8_0 => Extra::Codes32,
                Activation::Q8_K => Extra::Codes256,
            }),
            _ => None,
        }
    }

    /// What products of a format with many activations are made of, if matrix units make them.
    fn cooperative(&self, format: Format) -> Option<Cooperative> {
        self.bounds.paths.cooperative.filter(|_| format.kind() != Kind::Float)
    }

    /// Rounds many rows of activations to halves, if products with a format are to have them so.
    fn halve(&mut self, formats: &[Format], (x, id): Input<'_>, rows: Dim, k: u32) {
        let most = passes::rows(rows, self.limits.tokens, self.limits.outputs) as u32;
        let there = self.quantised.iter().any(|q| q.0 == Extra::Halves && Some(q.1) == id);
        if there || most <= VECTORS || !formats.iter().any(|&f| self.cooperative(f).is_some()) {
            return;
        }
        self.quantised.retain(|q| q.0 != Extra::Halves);
        let many = VECTORS + 1..u32::MAX;
        self.quantised.extend(id.map(|id| (Extra::Halves, id, many.clone())));
        let halves = self.extra(Extra::Halves, rows, u64::from(k).div_ceil(2));
        let factors = self.extra(Extra::Factors, rows, 1);
        let shader = self
            .shader("halve")
            .read("x", "f32", x.clone())
            .write("halves", "f16", halves)
            .write("factors", "f32", factors)
            .u32("K", k)
            .with(wgsl!("lib/math"))
            .with(wgsl!("halve"));
        self.push_when(shader, [ONE, each(rows), ONE], (Of::Rows(rows), many));
    }

    /// The part of a shader that makes codes.
    fn coder(shader: Shader, codes: Extra) -> Shader {
        shader
            .u32("BLOCK", if codes == Extra::Codes256 { 256 } else { 32 })
            .with(wgsl!("lib/codes"))
            .with(wgsl!("lib/to_codes"))
    }

    /// The part of a shader that quantises `times` rows of `k` activations for each row.
    fn quantiser(&mut self, shader: Shader, codes: Extra, rows: Dim, times: u32, k: u32) -> Shader {
        // For each 32 values twelve words.
        let buffer = self.extra(codes, rows, u64::from(times) * u64::from(k) / 32 * 12);
        Self::coder(shader.write("codes", "vec4<u32>", buffer).u32("K", k), codes)
            .with(wgsl!("lib/math"))
            .with(wgsl!("lib/quantise"))
    }

    /// Quantises `times` rows of activations for each row, of which there are fewer than `end`, in all the ways that formats
    /// need, unless they already are or the products do it.
    #[allow(clippy::too_many_arguments)]
    fn quantise(&mut self, formats: &[Format], (x, id): Input<'_>, rows: Dim, times: u32, k: u32, end: u32) {
        let most = passes::rows(rows, self.limits.tokens, self.limits.outputs) as u32;
        for codes in [Extra::Codes32, Extra::Codes256] {
            let needed = formats.iter().any(|&f| self.codes(f) == Some(codes));
            let there = self.quantised.iter().any(|q| q.0 == codes && Some(q.1) == id && q.2.end >= end);
            let from = self.codes_from(codes, id, k);
            if !needed || there || from > most {
                continue;
            }
            self.quantised.retain(|q| q.0 != codes);
            self.quantised.extend(id.map(|id| (codes, id, from..end)));
            let shader = self.shader("quantise").read("x", "vec4<f32>", x.clone());
            let shader = self.quantiser(shader, codes, rows, times, k).with(wgsl!("quantise"));
            let groups = [fixed((k / 32).div_ceil(WORKGROUP)), count(Of::Rows(rows), times, 1), ONE];
            self.push_when(shader, groups, (Of::Rows(rows), from..end));
        }
    }

    /// The shader of a product, up to the part that does it.
    fn product_shader(&self, name: &'static str, p: &Product<'_>, shard: &Shard) -> Shader {
        let t = self.program.tensor(p.weight);
        let mut s = Self::rows(self.step_shader(name), p.rows);
        if let Some(routed) = p.experts {
            // A row of results for each token and expert.
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

    /// Which row of the results, and so which matrix and which row of activations, an invocation has: as they come, or in groups
    /// of one expert.
    fn rows_of_results(&self, shader: Shader, experts: Option<Routed<'_>>, grouped: bool) -> Shader {
        let Some(routed) = experts else {
            return shader
                .with("fn matrix_of(first: u32) -> u32 { return 0u; }")
                .with("fn input_of(row: u32) -> u32 { return row; }")
                .with(wgsl!("lib/rows_each"));
        };
        let of_token = if routed.per_token { routed.used } else { 1 };
        let shader = shader.with(&format!("fn input_of(row: u32) -> u32 {{ return row / {of_token}u; }}"));
        match grouped {
            true => {
                shader.read("order", "u32", Resource::Extra(Extra::Order)).with(wgsl!("lib/rows_grouped"))
            }
            false => shader
                .read("ids", "u32", routed.ids.clone())
                .with("fn matrix_of(first: u32) -> u32 { return ids[min(first, results() - 1u)]; }")
                .with(wgsl!("lib/rows_each")),
        }
    }

    /// A product. Without `vectors`, only for more rows of activations than [`VECTORS`].
    fn product(&mut self, p: &Product<'_>, vectors: bool) {
        let t = self.program.tensor(p.weight);
        let (integer, float) = (self.codes(t.format).is_some(), t.format.kind() == Kind::Float);
        let used = p.experts.map_or(1, |routed| routed.used);
        let most = passes::rows(p.rows, self.limits.tokens, self.limits.outputs) as u32;
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
            if p.experts.is_some() || most <= VECTORS {
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
                self.push_when(shader, tiles(4 * units.side), when);
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

    /// The part of a shader that knows the angles of an embedding.
    fn rotation(
        &self,
        shader: Shader,
        frequencies: &[f32],
        factors: Option<TensorId>,
        magnitude: f32,
        pairs: RopePairs,
    ) -> Shader {
        let n = frequencies.len() as u32;
        let list: Vec<String> = frequencies.iter().map(|f| format!("{f:e}")).collect();
        let shader = shader
            .u32("PAIRS", n)
            .f32("MAGNITUDE", magnitude)
            .bool("ADJACENT", pairs == RopePairs::Adjacent)
            .with(wgsl!("lib/sin_cos"))
            .with(&format!(
                "var<private> FREQUENCIES: array<f32, {n}> = array<f32, {n}>({});",
                list.join(", ")
            ));
        match factors {
            Some(factors) => shader
                .read("factors", "f32", self.tensor(factors))
                .with("fn frequency(i: u32) -> f32 { return FREQUENCIES[i] / factors[i]; }"),
            None => shader.with("fn frequency(i: u32) -> f32 { return FREQUENCIES[i]; }"),
        }
    }

    fn rope(&mut self, op: &Op) {
        let Op::Rope { x, out, head_dim, frequencies, factors, magnitude, pairs } = op else { return };
        let cols = self.cols(*x);
        let shader = self
            .step_shader("rope")
            .read("x", "f32", self.tensor(*x))
            .write("out", "f32", self.tensor(*out))
            .u32("COLUMNS", cols)
            .u32("HEAD_DIM", *head_dim);
        let shader = self.rotation(shader, frequencies, *factors, *magnitude, *pairs).with(wgsl!("rope"));
        let lanes = cols / head_dim * (head_dim - frequencies.len() as u32);
        self.push(shader, [fixed(lanes.div_ceil(WORKGROUP)), each(Dim::Tokens), ONE]);
    }

    /// Queries and keys rotated alike, the latter into the cache, and the values after them. Does nothing, and says so, if
    /// they are not alike or the cache wants whole blocks.
    fn rope_kv(&mut self, q: &Op, k: &Op, v: TensorId, id: StateId) -> bool {
        let Op::Rope { x: q, out, head_dim, frequencies, factors, magnitude, pairs } = q else {
            return false;
        };
        let Op::Rope { x: k, head_dim: d, frequencies: f, factors: b, magnitude: m, pairs: p, .. } = k else {
            return false;
        };
        let state = &self.program.states[id.0 as usize];
        let alike = (head_dim, frequencies, factors, magnitude, pairs) == (d, f, b, m, p);
        if !alike || *head_dim != state.key_dim || state.format.block_len() > 1 {
            return false;
        }
        let shader = self
            .kv_writer("rope_kv", id)
            .read("x", "f32", self.tensor(*q))
            .read("k", "f32", self.tensor(*k))
            .read("v", "f32", self.tensor(v))
            .write("out", "f32", self.tensor(*out))
            .u32("COLUMNS", self.cols(*q));
        let shader = self.rotation(shader, frequencies, *factors, *magnitude, *pairs).with(wgsl!("rope_kv"));
        let heads = self.cols(*q) / head_dim + state.kv_heads;
        let lanes = heads * (head_dim - frequencies.len() as u32) + state.kv_heads * state.value_dim;
        self.push(shader, [fixed(lanes.div_ceil(WORKGROUP)), each(Dim::Tokens), ONE]);
        true
    }

    /// A shader that knows the pages of a cache.
    fn kv_shader(&self, name: &'static str, state: &State) -> Shader {
        self.step_shader(name)
            .u32("KV_HEADS", state.kv_heads)
            .u32("KEY_DIM", state.key_dim)
            .u32("VALUE_DIM", state.value_dim)
            .u32("STEP_TABLES", self.step.tables + self.program.kv_group(state) as u32 * self.step.tokens)
            .with(wgsl!("kv/page"))
    }

    /// Whether a cache is one of halves, and shaders see them as such.
    fn kv_halves(&self, state: &State) -> bool {
        state.format == Format::F16 && self.bounds.paths.f16
    }

    /// A shader that knows the codes of a cache, by a format's own source.
    fn coded(shader: Shader, state: &State, format: &str) -> Shader {
        shader.u32("BLOCK_BYTES", state.format.block_bytes() as u32).with(format).with(wgsl!("kv/coded"))
    }

    /// A shader that writes to a cache.
    fn kv_writer(&self, name: &'static str, id: StateId) -> Shader {
        let state = &self.program.states[id.0 as usize];
        let shader = self
            .kv_shader(name, state)
            .write("kv", if self.kv_halves(state) { "f16" } else { "atomic<u32>" }, Resource::State(id.0))
            .with(wgsl!("lib/math"));
        if self.kv_halves(state) {
            return shader.with(wgsl!("kv/put_half")).with(wgsl!("kv/f16_write"));
        }
        let shader = shader.with(wgsl!("kv/put"));
        match state.format {
            Format::Q8_0 => Self::coded(shader, state, wgsl!("kv/q8_0_write")).with(wgsl!("kv/coded_write")),
            Format::Q4_0 => Self::coded(shader, state, wgsl!("kv/q4_0_write")).with(wgsl!("kv/coded_write")),
            Format::F16 => shader.with(wgsl!("kv/f16_write")),
            _ => shader.with(wgsl!("kv/f32_write")),
        }
    }

    fn kv_write(&mut self, k: TensorId, v: TensorId, id: StateId) {
        let state = &self.program.states[id.0 as usize];
        let elements = state.kv_heads * (state.key_dim + state.value_dim);
        let mut shader =
            self.kv_writer("kv_write", id).read("k", "f32", self.tensor(k)).read("v", "f32", self.tensor(v));
        let mut units = elements;
        if state.format.block_len() > 1 {
            units /= 32;
        } else {
            shader = shader.with(wgsl!("kv/write_elements"));
        }
        let shader = shader.with(wgsl!("kv_write"));
        self.push(shader, [fixed(units.div_ceil(WORKGROUP)), each(Dim::Tokens), ONE]);
    }

    fn attend(&mut self, op: &Op) {
        let Op::Attend { q, state: id, out, heads, scale, softcap, sinks } = op else { return };
        let state = &self.program.states[id.0 as usize];
        let group = heads / state.kv_heads;
        let tile = (ATTEND_ROWS / group).max(1);
        let list = match self.tile_sizes.iter().position(|&t| t == tile) {
            Some(list) => list,
            None => {
                self.tile_sizes.push(tile);
                self.tile_sizes.len() - 1
            }
        };
        let row_tiles = (tile * group).div_ceil(ATTEND_ROWS);
        // A shader that stores results knows the sinks, if there are some.
        let stores = |shader: Shader| {
            let shader = shader.write("out", "f32", self.tensor(*out)).bool("HAS_SINK", sinks.is_some());
            self.optional(shader, *sinks, "sinks", "sink", "-3.4028235e38").with(wgsl!("lib/attended"))
        };
        let mut shader = self
            .kv_shader("attend", state)
            .read("x", "f32", self.tensor(*q))
            .read("kv", if self.kv_halves(state) { "f16" } else { "u32" }, Resource::State(id.0))
            .u32("STEP_TILES", self.step.tiles + self.step.tile_words * list as u32)
            .u32("HEADS", *heads)
            .u32("ROW_TILES", row_tiles)
            .u32("WINDOW", state.window.unwrap_or(u32::MAX))
            .bool("CAUSAL", state.causal)
            .f32("SCALE", *scale)
            .f32("SOFTCAP", softcap.unwrap_or(0.0));
        shader = match state.format {
            Format::Q8_0 => Self::coded(shader, state, wgsl!("kv/q8_0")).with(wgsl!("kv/coded_read")),
            Format::Q4_0 => Self::coded(shader, state, wgsl!("kv/q4_0")).with(wgsl!("kv/coded_read")),
            Format::F16 => shader.with(wgsl!("kv/f16")).with(match self.kv_halves(state) {
                true => "fn half_at(at: u32) -> f32 { return f32(kv[at]); }",
                false => wgsl!("kv/half_at"),
            }),
            _ => shader.with(wgsl!("kv/f32")),
        };
        shader = shader.with(wgsl!("attend"));
        let whole = stores(shader.clone()).with(wgsl!("lib/attend_whole"));
        let tiles = count(Of::Tiles(tile), row_tiles, 1);
        // What a window leaves of a long cache is short.
        if self.most_splits < 2 || state.window.is_some_and(|window| window < 2 * SPLIT_POSITIONS) {
            return self.push(whole, [fixed(state.kv_heads), tiles, ONE]);
        }
        let merge = stores(self.step_shader("merge").u32("HEADS", *heads).u32("VALUE_DIM", state.value_dim));
        self.push_when(whole, [fixed(state.kv_heads), tiles, ONE], (Of::Splits, 1..2));
        // Splits times tokens are at most what is of use for a token.
        let floats = u64::from(self.most_splits) * u64::from(*heads) * (u64::from(state.value_dim) + 2);
        let splits = self.extra(Extra::Splits, Dim::Fixed(1), floats);
        let shader = shader
            .write("splits", "f32", splits.clone())
            .with(wgsl!("lib/split_place"))
            .with(wgsl!("lib/attend_split"));
        let split = count(Of::Splits, 1, 1);
        self.push_when(shader, [fixed(state.kv_heads), tiles, split], (Of::Splits, 2..u32::MAX));
        let merge = merge.read("splits", "f32", splits).with(wgsl!("lib/split_place")).with(wgsl!("merge"));
        self.push_when(merge, [fixed(*heads), each(Dim::Tokens), ONE], (Of::Splits, 2..u32::MAX));
    }

    fn route(&mut self, op: &Op) {
        let Op::Route { logits, ids, weights, gating, normalise, scale } = op else { return };
        let rows = self.program.tensor(*logits).rows;
        let shader = Self::rows(self.step_shader("route"), rows)
            .read("x", "f32", self.tensor(*logits))
            .write("ids", "u32", self.tensor(*ids))
            .write("out", "f32", self.tensor(*weights))
            .u32("EXPERTS", self.cols(*logits))
            .u32("USED", self.cols(*ids))
            .u32(
                "GATING",
                match gating {
                    Gating::Softmax => 0,
                    Gating::SoftmaxOfTop => 1,
                    Gating::Sigmoid => 2,
                },
            )
            .bool("NORMALISE", *normalise)
            .f32("SCALE", *scale)
            .with(wgsl!("lib/math"))
            .with(wgsl!("route"));
        self.push(shader, [count(Of::Rows(rows), 1, WORKGROUP), ONE, ONE]);
    }

    /// Puts the results of experts in groups, for steps of enough rows.
    fn group(&mut self, rows: Dim, routed: Routed<'_>) {
        let most = passes::rows(rows, self.limits.tokens, self.limits.outputs);
        if u64::from(routed.grouped_from()) > most {
            return;
        }
        let groups = (most * u64::from(routed.used)).div_ceil(GROUP.into()) + u64::from(routed.of);
        let order = self.extra(Extra::Order, Dim::Fixed(1), groups * u64::from(GROUP + 1));
        let shader = Self::rows(self.step_shader("group"), rows)
            .workgroup(256)
            .read("ids", "u32", routed.ids.clone())
            .write("order", "u32", order)
            .u32("EXPERTS", routed.of)
            .u32("TOKENS", GROUP)
            .with("const NONE: u32 = 0xffffffffu;")
            .with(&format!("fn results() -> u32 {{ return {}u * rows(); }}", routed.used))
            .with(wgsl!("group"));
        self.push_when(shader, [ONE; 3], (Of::Rows(rows), routed.grouped_from()..u32::MAX));
    }

    fn experts(&mut self, op: &Op) {
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
        let routed = Routed { ids: &ids, of, used, per_token: true };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Caps, Contract, Fusions, Rows};
    use crate::map::Source;
    use crate::model::{Model, ProgramOptions};

    /// Parts cover the weight in order, fit, and start where bindings may.
    #[test]
    fn weights_are_divided_into_bindings() {
        let tensor = |experts, rows, cols, format| Tensor {
            name: "w".into(),
            experts,
            rows: Dim::Fixed(rows),
            cols,
            format,
            layout: Layout::Rows,
            part: None,
            slot: Slot::Weight(0),
        };
        let (small, large) = (1 << 16, 1 << 18);
        for (t, limit, parts) in [
            (tensor(1, 1000, 64, Format::Q4_0), small, Some(1)),
            (tensor(1, 5000, 64, Format::Q4_0), small, Some(3)),
            // Sixteen rows do not fit; experts of 13,600 bytes start at a multiple of 256 only eight together.
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

    /// A dense llama layer is eight dispatches in decode while its cache is short: norm, Q/K/V, rotation, attention, output, norm, gates, down.
    #[test]
    fn a_dense_layer_is_eight_dispatches() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/models/austen/halite-austen.gguf");
        let model = Model::from_source(Source::open(file.as_ref()).unwrap()).unwrap();
        let caps = Caps {
            name: "test".into(),
            device: String::new(),
            memory_bytes: u64::MAX,
            rows: Rows::Interleaved,
            fusions: Fusions::ALL,
            contract: Contract::Close,
        };
        let program = passes::adapt(&model.program(ProgramOptions::default(), 256).unwrap(), &caps);
        for tuning in [Tuning::GPU, Tuning::CPU] {
            let bounds = Bounds {
                paths: Paths { subgroups: true, integer: true, f16: true, cooperative: None },
                binding_bytes: 128 << 20,
                workgroup_bytes: 16 << 10,
                tuning,
            };
            let lowered = lower(&program, Limits { tokens: 64, outputs: 1 }, &bounds);
            let runs = |tokens: u32, longest: u32| {
                let splits = lowered.splits(tokens, longest);
                let counts = super::super::plan::Counts { tokens, outputs: 1, tiles: &[], splits };
                lowered.segments[1]
                    .iter()
                    .filter(|d| counts.runs(d))
                    .map(|d| d.shader.name)
                    .collect::<Vec<_>>()
            };
            let expected = ["norm", "matvec", "rope_kv", "attend", "matvec", "norm", "matvec", "matvec"];
            assert_eq!(runs(1, 511), expected);
            // Attention over a long cache is split and merged.
            assert_eq!(runs(1, 512)[3..5], ["attend", "merge"]);
            assert_eq!(runs(1, 512).len(), 9);
            assert_eq!(runs(64, 5000).iter().filter(|&&name| name == "matmul").count(), 7);
        }
    }
}
