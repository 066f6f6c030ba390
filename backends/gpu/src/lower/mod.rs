//! Lowers a program to dispatches: shaders with constants, bindings and numbers of workgroups. This needs no
//! device. Row ops are here; products, attention and experts have their own files.

mod activation;
mod attend;
mod experts;
mod product;
mod recurrent;

use std::ops::Range;

use halite_kernels::formats::Kind;

use self::experts::gating_code;
use halite::backend::Limits;
use halite::passes;
use halite::program::{
    Dim, Epilogue, Index, NormKind, Op, Program, RopePairs, Rotation, Rule, Slot, TensorId,
};
use halite_shaders::{
    Extra, Paths, Resource, Shader, WORKGROUP, gated, knows_format, knows_kv_format, unary, wgsl,
};
use product::shards;

/// The quantity that a number of workgroups depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Rows(Dim),
    /// Tiles of at most this many tokens of one sequence.
    Tiles(u32),
    /// Splits of attention over long caches; 1: not split.
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
    /// Along x, y and z; a large x may be folded into x and y.
    pub groups: [Count; 3],
    /// Runs only if the quantity is in this range.
    pub when: (Of, Range<u32>),
}

/// Most factors of positions of an attention.
const MAX_FACTORS: usize = 4096;

/// Maximum rows of activations of a vector product.
const VECTORS: u32 = 8;
/// Rows of activations that share a workgroup's reads of the matrix in `matvec.wgsl`.
const GROUP: u32 = 4;
/// Elements that a workgroup sorts to find the largest.
const TOP_K_PIECE: u32 = 1024;
/// Minimum positions of a split of the cache.
const SPLIT_POSITIONS: u32 = 64;

/// A program as dispatches.
#[derive(Debug)]
pub(super) struct Lowered {
    /// Dispatches of each segment.
    pub segments: Vec<Vec<Dispatch>>,
    /// The program's scratch tensors.
    pub layout: passes::Layout,
    /// Bytes of each of [`Extra::ALL`].
    pub extra_bytes: [u64; Extra::ALL.len()],
    /// Sizes of tiles that a step must list.
    pub tile_sizes: Vec<u32>,
    /// Maximum splits of attention over long caches, for a single token.
    most_splits: u32,
    /// Layout of the step's buffer.
    pub step: StepLayout,
}

impl Lowered {
    /// Returns the number of splits for a step of `tokens` tokens whose longest cache has `positions`
    /// positions.
    pub fn splits(&self, tokens: u32, longest: u32) -> u32 {
        (longest / SPLIT_POSITIONS).min(self.most_splits / tokens.max(1)).max(1)
    }
}

/// Offsets in the step's buffer, in words; see `step.wgsl`.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepLayout {
    pub ids: u32,
    pub positions: u32,
    /// One per KV group.
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

    /// Returns the offset of page tables, after the lists of `tile_sizes` tile sizes.
    pub fn pages(&self, tile_sizes: usize) -> u32 {
        self.tiles + self.tile_words * tile_sizes as u32
    }
}

/// Limits of a device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub paths: Paths,
    /// Maximum bytes of a binding.
    pub binding_bytes: u64,
    /// Maximum bytes of workgroup memory.
    pub workgroup_bytes: u32,
    /// Maximum invocations of a workgroup.
    pub workgroup: u32,
    pub tuning: Tuning,
}

/// Tuning sizes of a kind of device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tuning {
    /// Matrix rows per invocation of `matvec.wgsl`: 1 or 4.
    pub groups: u32,
    /// Invocations of a product of vectors that keep the device busy.
    pub invocations: u32,
    /// Invocations that share a row of a norm or of logits.
    pub row: u32,
    /// Workgroups of attention that keep the device busy.
    pub attend: u32,
}

impl Tuning {
    /// Some hundred thousand parallel invocations: each has little work, and their number hides memory
    /// latency.
    pub const DISCRETE: Tuning = Tuning { groups: 1, invocations: 1 << 17, row: 512, attend: 256 };
    /// Some ten thousand parallel invocations.
    pub const INTEGRATED: Tuning = Tuning { groups: 1, invocations: 1 << 14, row: 256, attend: 256 };
    /// Shaders on a CPU: a load costs more than arithmetic, and barriers most of all.
    pub const CPU: Tuning = Tuning { groups: 4, invocations: 1, row: 256, attend: 16 };
}

/// Returns the function `row_of(token)`; `None` if it is not supported.
fn row_of(index: Index, rows: u32) -> Option<String> {
    let body = match index {
        Index::Token => "return token_id(token);".into(),
        Index::Position => "return position(token);".into(),
        Index::First => "return 0u;".into(),
        Index::Part { separator } => format!(
            "var part = 0u;
            for (var i = token - position(token); i < token; i++) {{ if token_id(i) == {separator}u {{ part++; }} }}
            return min(part, {}u);",
            rows.saturating_sub(1)
        ),
        _ => return None,
    };
    Some(format!("fn row_of(token: u32) -> u32 {{ {body} }}"))
}

/// Returns why an op cannot run, if it cannot.
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
    if let Op::KvWrite { state, .. } | Op::RopeKv { state, .. } | Op::Attend { state, .. } = op {
        let format = program.states[state.0 as usize].format;
        if !knows_kv_format(format) {
            why = Some(format!("a cache of {}", format.name()));
        }
    }
    match op {
        // They are in the shader.
        Op::Attend { growth: Some(growth), .. } if growth.factors.len() > MAX_FACTORS => {
            why = Some(format!("{} factors of positions: at most {MAX_FACTORS}", growth.factors.len()));
        }
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
        // A part must return fewer elements than it has.
        Op::TopK { ids, .. } if program.tensor(*ids).cols > TOP_K_PIECE / 2 => {
            why = Some(format!("more than the {} largest elements", TOP_K_PIECE / 2));
        }
        Op::Unary { f, .. } if unary(*f).is_none() => why = Some(format!("{f:?}")),
        Op::Embed { index, .. } if row_of(*index, 1).is_none() => why = Some(format!("index {index:?}")),
        Op::Norm { kind, .. } | Op::Spread { kind, .. }
            if !matches!(kind, NormKind::Rms | NormKind::Layer) =>
        {
            why = Some(format!("norm {kind:?}"));
        }
        Op::Rope { rotation: Rotation { pairs, .. }, .. }
        | Op::RopeKv { rotation: Rotation { pairs, .. }, .. }
            if !matches!(pairs, RopePairs::Adjacent | RopePairs::Halves) =>
        {
            why = Some(format!("pairs {pairs:?}"));
        }
        Op::Recur { rule, .. } if !matches!(rule, Rule::Delta { .. } | Rule::Scan { .. }) => {
            why = Some(format!("rule {rule:?}"));
        }
        Op::MatMul { epilogue, .. }
            if !matches!(epilogue, Epilogue::None | Epilogue::Glu(_) | Epilogue::Add(_)) =>
        {
            why = Some(format!("epilogue {epilogue:?}"));
        }
        Op::Route { gating, .. } if gating_code(*gating).is_none() => {
            why = Some(format!("gating {gating:?}"))
        }
        Op::Embed { .. }
        | Op::Gather { .. }
        | Op::Norm { .. }
        | Op::MatMul { .. }
        | Op::Rope { .. }
        | Op::KvWrite { .. }
        | Op::RopeKv { .. }
        | Op::Conv { .. }
        | Op::Recur { .. }
        | Op::Slice { .. }
        | Op::Join { .. }
        | Op::BlockMatMul { .. }
        | Op::Mul { .. }
        | Op::Spread { .. }
        | Op::Mix { .. }
        | Op::Glu { .. }
        | Op::Add { .. }
        | Op::Unary { .. }
        | Op::Route { .. }
        | Op::Experts { .. }
        | Op::TopK { .. }
        | Op::ArgMax { .. } => {}
        unknown => why = Some(format!("{} is not implemented", unknown.name())),
    }
    why
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

/// Returns the maximum useful splits of attention: with the KV heads, they make enough workgroups.
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
    /// The activations in each buffer of codes or halves: their tensor and number of rows.
    quantised: Vec<(Extra, TensorId, Range<u32>)>,
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

    /// Returns a buffer between dispatches, large enough for `floats` floats per row.
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

    /// Adds `rows()`: the number of rows in this step.
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

    /// Lowers an element-wise function to `out`, `[rows, cols]`.
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

    /// Lowers the first ops as one dispatch if possible; returns their number.
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
            _ => 0,
        }
    }

    fn op(&mut self, op: &Op) {
        match op {
            Op::Embed { table, index, out, scale } => self.embed(*table, *index, *out, *scale),
            Op::Gather { x, out } => {
                let cols = self.cols(*x);
                let shader = self
                    .step_shader("gather")
                    .read("x", "f32", self.tensor(*x))
                    .write("out", "f32", self.tensor(*out))
                    .u32("COLUMNS", cols)
                    .with(wgsl!("gather"));
                self.push(shader, [fixed(cols.div_ceil(WORKGROUP)), each(Dim::Outputs), ONE]);
            }
            Op::Norm { .. } => self.norm(op, None),
            Op::MatMul { x, parts, epilogue, outs } => self.matmul(*x, parts, *epilogue, outs),
            Op::Rope { .. } => self.rope(op),
            Op::KvWrite { k, v, state } => self.kv_write(*k, *v, *state),
            Op::RopeKv { .. } => self.rope_kv(op),
            Op::Attend { .. } => self.attend(op),
            Op::Conv { .. } => self.conv(op),
            Op::Recur { .. } => self.recur(op),
            Op::Slice { x, out, group, first } => {
                let (x_cols, cols) = (self.cols(*x), self.cols(*out));
                let len = cols / (x_cols / group);
                let shader = self
                    .shader("slice")
                    .read("x", "f32", self.tensor(*x))
                    .u32("X_COLUMNS", x_cols)
                    .u32("LEN", len)
                    .u32("GROUP", *group)
                    .u32("FIRST", *first);
                let column = "at % COLUMNS";
                let element =
                    format!("x[at / COLUMNS * X_COLUMNS + {column} / LEN * GROUP + FIRST + {column} % LEN]");
                self.elementwise(shader, *out, &element);
            }
            Op::Join { a, b, out, group, first } => {
                let shader = self
                    .shader("join")
                    .read("a", "f32", self.tensor(*a))
                    .read("b", "f32", self.tensor(*b))
                    .u32("A_COLUMNS", self.cols(*a))
                    .u32("B_COLUMNS", self.cols(*b))
                    .u32("LAST", group - first)
                    .u32("GROUP", *group)
                    .u32("FIRST", *first)
                    .with(wgsl!("lib/joined"));
                self.elementwise(shader, *out, "joined(at / COLUMNS, at % COLUMNS)");
            }
            Op::BlockMatMul { x, weight, out } => self.block_matmul(*x, *weight, *out),
            Op::Mul { x, weight, out } => {
                let shader = self
                    .shader("mul")
                    .read("x", "f32", self.tensor(*x))
                    .read("weight", "f32", self.tensor(*weight))
                    .u32("FACTORS", self.cols(*weight));
                self.elementwise(shader, *out, "x[at] * weight[at % FACTORS]");
            }
            Op::Spread { x, out, kind, eps, group } => {
                let shader = self
                    .shader("spread")
                    .workgroup(self.row_workgroup(*group))
                    .read("x", "f32", self.tensor(*x))
                    .write("out", "f32", self.tensor(*out))
                    .u32("GROUPS", self.cols(*out))
                    .u32("GROUP", *group)
                    .f32("EPS", *eps)
                    .bool("CENTRED", *kind == NormKind::Layer)
                    .with(wgsl!("spread"));
                let rows = self.program.tensor(*x).rows;
                self.push(shader, [fixed(self.cols(*out)), each(rows), ONE]);
            }
            Op::Mix { x, factors, out, parts } => {
                let shader = self
                    .shader("mix_parts")
                    .read("x", "f32", self.tensor(*x))
                    .read("factors", "f32", self.tensor(*factors))
                    .u32("PARTS", *parts)
                    .u32("LEN", self.cols(*x) / parts)
                    .u32("FACTORS", self.cols(*factors))
                    .with(wgsl!("lib/mix_parts"));
                self.elementwise(shader, *out, "mixed(at)");
            }
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
            Op::Unary { x, out, f } => {
                let shader = self
                    .shader("unary")
                    .read("x", "f32", self.tensor(*x))
                    .with(&unary(*f).unwrap_or_default());
                self.elementwise(shader, *out, "f(x[at])");
            }
            Op::Route { .. } => self.route(op),
            Op::Experts { .. } => self.experts(op),
            Op::TopK { x, ids, values } => self.top_k(*x, *ids, *values),
            Op::ArgMax { x, out } => {
                let t = self.program.tensor(*x);
                let shader = self
                    .shader("arg_max")
                    .workgroup(self.row_workgroup(t.cols))
                    .read("x", "u32", self.tensor(*x))
                    .write("out", "u32", self.tensor(*out))
                    .u32("COLUMNS", t.cols)
                    .with(wgsl!("lib/rank"))
                    .with(wgsl!("arg_max"));
                self.push(shader, [ONE, each(t.rows), ONE]);
            }
            // `missing` rejects it.
            _ => {}
        }
    }

    /// Lowers the largest elements in stages: of parts of a row, then of parts of those, until one part
    /// remains.
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
            // A dispatch reads the previous one's results.
            let to =
                if from == Some(Resource::Extra(Extra::Ranked)) { Extra::Reranked } else { Extra::Ranked };
            let to = self.extra(to, rows, 2 * u64::from(count));
            let keep = format!("fn keep(row: u32, i: u32, e: vec2<u32>) {{ kept[row * {count}u + i] = e; }}");
            let shader = shader.write("kept", "vec2<u32>", to.clone()).with(&keep);
            self.push(shader.with(wgsl!("lib/rank")).with(wgsl!("top_k")), groups);
            from = Some(to);
        }
    }

    fn embed(&mut self, table: TensorId, index: Index, out: TensorId, scale: f32) {
        let t = self.program.tensor(table);
        let Dim::Fixed(rows) = t.rows else { return };
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
                .with(&row_of(index, rows).unwrap_or_default())
                .f32("SCALE", scale)
                .with(four)
                .with(wgsl!("embed"));
            self.push(shader, [fixed(t.cols.div_ceil(4 * WORKGROUP)), each(Dim::Tokens), ONE]);
        }
    }

    /// Returns the invocations for a row of `cols` elements: four elements each, if there are enough.
    fn row_workgroup(&self, elements: u32) -> u32 {
        let enough = (elements / 4).max(1).next_power_of_two().max(WORKGROUP);
        enough.min(self.bounds.tuning.row).min(self.bounds.workgroup)
    }

    /// Lowers a norm, and optionally the quantisation of its results.
    fn norm(&mut self, op: &Op, codes: Option<Extra>) {
        let Op::Norm { x, add, sum, weight, bias, out, kind, eps, group } = op else { return };
        let (rows, cols) = (self.program.tensor(*x).rows, self.cols(*x));
        let mut shader = self
            .shader("norm")
            .workgroup(self.row_workgroup(*group))
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

    /// Adds `function(i)`: element i of a weight, or a constant.
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use halite::backend::{Caps, Contract, Fusions, Rows};
    use halite::map::Source;
    use halite::model::{Model, ProgramOptions};

    /// A dense llama layer is eight dispatches in decode while its cache is short: norm, Q/K/V, rotation,
    /// attention, output, norm, gates, down.
    #[test]
    fn a_dense_layer_is_eight_dispatches() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen/halite-austen.gguf");
        let model = Model::from_source(Source::open(file.as_ref()).unwrap()).unwrap();
        let caps = Caps::new("test", String::new())
            .memory_bytes(u64::MAX)
            .rows(Rows::Interleaved)
            .fusions(Fusions::ALL)
            .contract(Contract::Close);
        let program = passes::for_backend(&model.program(ProgramOptions::default(), 256).unwrap(), &caps);
        for tuning in [Tuning::DISCRETE, Tuning::INTEGRATED, Tuning::CPU] {
            let bounds = Bounds {
                paths: Paths { subgroups: true, integer: true, f16: true, cooperative: None },
                binding_bytes: 128 << 20,
                workgroup_bytes: 16 << 10,
                workgroup: 256,
                tuning,
            };
            let lowered = lower(&program, Limits { tokens: 64, outputs: 1 }, &bounds);
            let runs = |tokens: u32, longest: u32| {
                let splits = lowered.splits(tokens, longest);
                let counts = crate::plan::Counts { tokens, outputs: 1, tiles: &[], splits };
                lowered.segments[1]
                    .iter()
                    .filter(|d| counts.runs(d))
                    .map(|d| d.shader.name)
                    .collect::<Vec<_>>()
            };
            let expected = ["norm", "matvec", "rope_kv", "attend", "matvec", "norm", "matvec", "matvec"];
            assert_eq!(runs(1, 127), expected);
            // Attention over a long cache is split and merged.
            assert_eq!(runs(1, 128)[3..5], ["attend", "merge"]);
            assert_eq!(runs(1, 128).len(), 9);
            assert_eq!(runs(64, 5000).iter().filter(|&&name| name == "matmul").count(), 7);
        }
    }
}
