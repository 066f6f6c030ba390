//! Halite's compute shaders, and the code that assembles them from constants, bindings, libraries, a format
//! and an op.
//!
//! [`FILES`] has the source files. A [`Shader`] is a complete shader, for any API that takes WGSL.
#![deny(unsafe_code)]

use std::fmt::Write;
use std::ops::Range;

use halite_kernels::formats::{
    E2M1_DOUBLED, Format, IQ1_GRID, IQ2_S_GRID, IQ2_XS_GRID, IQ2_XXS_GRID, IQ3_S_GRID, IQ3_XXS_GRID,
    IQ4_VALUES, Kind,
};
use halite_kernels::rows::{Gate, Unary};

/// A buffer that a dispatch binds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Resource {
    /// Bytes of a weight.
    Weight(u32, Range<u64>),
    /// A KV state.
    State(u32),
    /// An input or output of a step.
    Io(u32),
    /// A place of scratch tensors.
    Place(usize),
    /// A buffer that lowering adds.
    Extra(Extra),
    /// A lookup table of formats.
    Grid(Grid),
    /// The description of a step: spans, page tables and tokens.
    Step,
}

/// Buffers between the dispatches of one op.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Extra {
    /// Activations quantised in blocks of 32.
    Codes32,
    /// Activations quantised in blocks of 256.
    Codes256,
    /// Products of a gate, until the up products are computed.
    Gates,
    /// Gated products of experts.
    Hidden,
    /// Products of experts, to mix.
    Mixed,
    /// Activations in half precision, by rows.
    Halves,
    /// Scale factors of those activations.
    Factors,
    /// Partial results of split attention.
    Splits,
    /// Rows sorted by expert.
    Order,
    /// The largest elements of parts of rows.
    Ranked,
    /// The largest elements of those parts.
    Reranked,
}

impl Extra {
    /// All of them.
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

/// The adapter's features that shaders use. Each can be switched off, to test the other paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paths {
    /// Reductions within subgroups.
    pub subgroups: bool,
    /// Integer products of quantised weights, by `dot4I8Packed`; else float products.
    pub integer: bool,
    /// f16 storage; without it, two values share a u32.
    pub f16: bool,
    /// Cooperative-matrix products, with the size of a subgroup's matrix.
    pub cooperative: Option<Cooperative>,
}

/// Shapes that an adapter's matrix units multiply: square f16 matrices with f32 sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cooperative {
    /// Rows and columns of the matrices.
    pub side: u32,
    /// Invocations of the largest subgroup.
    pub subgroup: u32,
}

macro_rules! files {
    ($($name:literal)*) => {
        /// All WGSL files, by name: the path without the extension.
        pub static FILES: &[(&str, &str)] = &[$(($name, include_str!(concat!("../", $name, ".wgsl")))),*];
    };
}

files! {
    "arg_max"
    "attend"
    "conv"
    "elementwise"
    "embed"
    "formats/bf16"
    "formats/f16"
    "formats/f32"
    "formats/f64"
    "formats/i16"
    "formats/i32"
    "formats/i64"
    "formats/i8"
    "formats/iq1_m"
    "formats/iq1_s"
    "formats/iq2_s"
    "formats/iq2_xs"
    "formats/iq2_xxs"
    "formats/iq3_s"
    "formats/iq3_xxs"
    "formats/iq4_nl"
    "formats/iq4_xs"
    "formats/mxfp4"
    "formats/nvfp4"
    "formats/q1_0"
    "formats/q2_0"
    "formats/q2_k"
    "formats/q3_k"
    "formats/q4_0"
    "formats/q4_1"
    "formats/q4_k"
    "formats/q5_0"
    "formats/q5_1"
    "formats/q5_k"
    "formats/q6_k"
    "formats/q8_0"
    "formats/q8_1"
    "formats/q8_k"
    "formats/tq1_0"
    "formats/tq2_0"
    "gather"
    "group"
    "halve"
    "kv/coded"
    "kv/coded_read"
    "kv/coded_write"
    "kv/f16"
    "kv/f16_write"
    "kv/f32"
    "kv/f32_write"
    "kv/half_at"
    "kv/page"
    "kv/put"
    "kv/put_half"
    "kv/q4_0"
    "kv/q4_0_write"
    "kv/q8_0"
    "kv/q8_0_write"
    "kv/write_elements"
    "kv_write"
    "lib/attend_split"
    "lib/attend_whole"
    "lib/attended"
    "lib/codes"
    "lib/codes_own"
    "lib/codes_stored"
    "lib/four_plain"
    "lib/four_quantised"
    "lib/group"
    "lib/groups"
    "lib/joined"
    "lib/math"
    "lib/mix_parts"
    "lib/norm_quantise"
    "lib/output"
    "lib/pair"
    "lib/pairs"
    "lib/part_float"
    "lib/part_integer"
    "lib/quantise"
    "lib/rank"
    "lib/recurrent"
    "lib/reduce_shared"
    "lib/reduce_subgroup"
    "lib/rows_blocks"
    "lib/rows_each"
    "lib/rows_grouped"
    "lib/sin_cos"
    "lib/six_bits"
    "lib/slice"
    "lib/slices"
    "lib/split_place"
    "lib/step"
    "lib/table16"
    "lib/tiles_float"
    "lib/tiles_integer"
    "lib/to_codes"
    "lib/words"
    "lib/words_interleaved"
    "lib/words_mixed"
    "lib/words_plain"
    "matmul"
    "matmul_cooperative"
    "matvec"
    "matvec_plain"
    "merge"
    "mix"
    "norm"
    "quantise"
    "recur"
    "rope"
    "rope_kv"
    "route"
    "spread"
    "top_k"
}

/// Returns the text of a file by name, if it exists.
pub const fn file(name: &str) -> Option<&'static str> {
    let mut i = 0;
    while i < FILES.len() {
        if same(FILES[i].0.as_bytes(), name.as_bytes()) {
            return Some(FILES[i].1);
        }
        i += 1;
    }
    None
}

/// `a == b` for constants, where the operator is not available.
const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

/// The text of a file by name. A missing file is a compile error.
#[macro_export]
macro_rules! wgsl {
    ($name:literal) => {
        const { $crate::file($name).expect("a file of WGSL") }
    };
}

/// Default number of invocations per workgroup.
pub const WORKGROUP: u32 = 64;

/// A shader under construction: its text and its bindings.
#[derive(Debug, Clone)]
pub struct Shader {
    /// Name, for people.
    pub name: &'static str,
    declarations: String,
    body: String,
    /// The buffer of each binding, and whether the shader writes it.
    pub bindings: Vec<(Resource, bool)>,
    paths: Paths,
    workgroup: u32,
    cooperative: bool,
}

impl Shader {
    /// An empty shader.
    pub fn new(name: &'static str, paths: Paths) -> Shader {
        let (declarations, body) = Default::default();
        Shader {
            name,
            declarations,
            body,
            bindings: Vec::new(),
            paths,
            workgroup: WORKGROUP,
            cooperative: false,
        }
    }

    /// Sets the invocations of a workgroup.
    pub fn workgroup(mut self, invocations: u32) -> Shader {
        self.workgroup = invocations;
        self
    }

    /// Declares cooperative matrices of eight subgroups: `Left` times `Right` gives `Sums`, of `SIDE` rows
    /// and columns.
    pub fn cooperative(mut self, units: Cooperative) -> Shader {
        let side = units.side;
        for (name, of) in [("Left", "f16, A"), ("Right", "f16, B"), ("Sums", "f32, C")] {
            let _ = writeln!(self.declarations, "alias {name} = coop_mat{side}x{side}<{of}>;");
        }
        self.cooperative = true;
        self.u32("SIDE", side).workgroup(8 * units.subgroup)
    }

    /// Declares a constant.
    pub fn u32(mut self, name: &str, value: u32) -> Shader {
        let _ = writeln!(self.declarations, "const {name}: u32 = {value}u;");
        self
    }

    /// Declares a constant.
    pub fn f32(mut self, name: &str, value: f32) -> Shader {
        // The shortest digits that parse to the same number.
        let _ = writeln!(self.declarations, "const {name}: f32 = {value:e};");
        self
    }

    /// Declares a constant.
    pub fn bool(mut self, name: &str, value: bool) -> Shader {
        let _ = writeln!(self.declarations, "const {name}: bool = {value};");
        self
    }

    fn binding(mut self, name: &str, ty: &str, resource: Resource, written: bool) -> Shader {
        let (n, access) = (self.bindings.len(), if written { "read_write" } else { "read" });
        let _ = writeln!(
            self.declarations,
            "@group(0) @binding({n}) var<storage, {access}> {name}: array<{ty}>;"
        );
        self.bindings.push((resource, written));
        self
    }

    /// Adds a buffer to read.
    pub fn read(self, name: &str, ty: &str, resource: Resource) -> Shader {
        self.binding(name, ty, resource, false)
    }

    /// Adds a buffer to write.
    pub fn write(self, name: &str, ty: &str, resource: Resource) -> Shader {
        self.binding(name, ty, resource, true)
    }

    /// Appends text: a file, or a generated function.
    pub fn with(mut self, text: &str) -> Shader {
        self.body.push_str(text);
        self.body.push('\n');
        self
    }

    /// Adds the matrix `w` of a quantised format or of plain numbers; see `words.wgsl`. Its rows may be
    /// interleaved.
    pub fn matrix(self, format: Format, resource: Resource, interleaved: u32, rows: u32) -> Shader {
        if format == Format::F16 && self.paths.f16 {
            return self.read("w", "f16", resource).with("fn value(i: u32) -> f32 { return f32(w[i]); }");
        }
        let shader = self.read("w", "u32", resource).with("fn weight_word(i: u32) -> u32 { return w[i]; }");
        shader.format(format, interleaved, rows)
    }

    /// Adds the unpacking of a matrix, whose words `weight_word` returns.
    pub fn format(mut self, format: Format, interleaved: u32, rows: u32) -> Shader {
        let Some(parts) = parts(format) else { return self.with(text(format)) };
        self = self.u32("LEN", format.block_len() as u32);
        let has_min = matches!(format.kind(), Kind::Quantised { has_min: true, .. });
        self = self
            .bool("HAS_MIN", has_min)
            .u32("HEAD", parts.head)
            .u32("WORDS", parts.words)
            .u32("TAIL", parts.tail);
        if let Some(grid) = parts.grid {
            self = self.read("grid", "u32", Resource::Grid(grid));
        }
        self = self.with(wgsl!("lib/words")).with(match interleaved {
            0 => wgsl!("lib/words_plain"),
            n if n == rows => wgsl!("lib/words_interleaved"),
            _ => wgsl!("lib/words_mixed"),
        });
        if interleaved > 0 && interleaved < rows {
            self = self.u32("INTERLEAVED", interleaved);
        }
        match format {
            Format::IQ4_NL | Format::IQ4_XS => self = self.table16(&IQ4_VALUES),
            Format::MXFP4 | Format::NVFP4 => self = self.table16(&E2M1_DOUBLED),
            Format::Q4_K | Format::Q5_K => self = self.with(wgsl!("lib/six_bits")),
            _ => {}
        }
        self.with(text(format))
    }

    fn table16(mut self, values: &[i8; 16]) -> Shader {
        let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|j| values[4 * i + j] as u8));
        let [a, b, c, d] = [0, 1, 2, 3].map(word);
        let _ = writeln!(self.declarations, "const TABLE: vec4<u32> = vec4<u32>({a}u, {b}u, {c}u, {d}u);");
        self.with(wgsl!("lib/table16"))
    }

    /// Returns the complete text.
    pub fn source(&self) -> String {
        let reduce =
            if self.paths.subgroups { wgsl!("lib/reduce_subgroup") } else { wgsl!("lib/reduce_shared") };
        let workgroup = self.workgroup;
        let halves = if self.paths.f16 { "enable f16;\n" } else { "" };
        let cooperative = if self.cooperative { "enable wgpu_cooperative_matrix;\n" } else { "" };
        format!(
            "{halves}{cooperative}const WORKGROUP: u32 = {workgroup}u;\n{}{reduce}\n{}",
            self.declarations, self.body
        )
    }
}

/// Returns the function `after(at, y)`, which applies the epilogue to a product.
pub fn after(gate: Option<Gate>, residual: bool) -> String {
    match (gate, residual) {
        (Some(gate), _) => {
            format!(
                "{}\nfn after(at: u32, y: f32) -> f32 {{ return gated(gates[at], y); }}",
                gated(gate).unwrap_or_default()
            )
        }
        (None, true) => "fn after(at: u32, y: f32) -> f32 { return residual[at] + y; }".into(),
        (None, false) => "fn after(at: u32, y: f32) -> f32 { return y; }".into(),
    }
}

/// Returns the function `gated(g, u)`, a gated linear unit; `None` if it is not supported.
pub fn gated(gate: Gate) -> Option<String> {
    let body = match gate {
        Gate::Silu => "return silu(g) * u;".into(),
        Gate::Gelu => "return gelu(g) * u;".into(),
        Gate::GeluErf => "return gelu_erf(g) * u;".into(),
        Gate::Relu => "return relu(g) * u;".into(),
        Gate::Sigmoid => "return sigmoid(g) * u;".into(),
        Gate::Identity => "return g * u;".into(),
        Gate::Normal => "return 0.5 * (1.0 + erf(g * 0.70710678)) * u;".into(),
        Gate::SiluClamped { alpha, limit } => format!(
            "let s = min(g, {limit:e}) * sigmoid({alpha:e} * min(g, {limit:e}));
             return or_nan(or_nan(s * clamp(u, -{limit:e}, {limit:e}) + s, g), u);"
        ),
        _ => return None,
    };
    Some(format!("fn gated(g: f32, u: f32) -> f32 {{ {body} }}"))
}

/// Returns the element-wise function `f(x)`; `None` if it is not supported.
pub fn unary(f: Unary) -> Option<String> {
    let body = match f {
        Unary::Silu => "silu(x)".into(),
        Unary::Gelu => "gelu(x)".into(),
        Unary::GeluErf => "gelu_erf(x)".into(),
        Unary::Relu => "relu(x)".into(),
        Unary::ReluSquared => "relu(x) * relu(x)".into(),
        Unary::Scale(factor) => format!("{factor:e} * x"),
        Unary::SoftCap(cap) => format!("{cap:e} * tanh_safe(x / {cap:e})"),
        Unary::Shift(term) => format!("x + {term:e}"),
        Unary::Clamp(limit) => format!("or_nan(clamp(x, -{limit:e}, {limit:e}), x)"),
        _ => return None,
    };
    Some(format!("fn f(x: f32) -> f32 {{ return {body}; }}"))
}

/// Lookup tables (grids) of formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grid {
    /// IQ2_XXS.
    Iq2Xxs,
    /// IQ2_XS.
    Iq2Xs,
    /// IQ2_S.
    Iq2S,
    /// IQ3_XXS.
    Iq3Xxs,
    /// IQ3_S.
    Iq3S,
    /// IQ1_S and IQ1_M.
    Iq1,
}

impl Grid {
    /// Returns its points in little-endian words.
    pub fn words(self) -> Vec<u32> {
        let halves = |points: &[u64]| points.iter().flat_map(|&p| [p as u32, (p >> 32) as u32]).collect();
        match self {
            Grid::Iq2Xxs => halves(&IQ2_XXS_GRID),
            Grid::Iq2Xs => halves(&IQ2_XS_GRID),
            Grid::Iq2S => halves(&IQ2_S_GRID),
            Grid::Iq3Xxs => IQ3_XXS_GRID.to_vec(),
            Grid::Iq3S => IQ3_S_GRID.to_vec(),
            Grid::Iq1 => halves(&IQ1_GRID),
        }
    }
}

/// The parts of a quantised block: bytes before its words, words, bytes after them, and its grid.
struct Parts {
    head: u32,
    words: u32,
    tail: u32,
    grid: Option<Grid>,
}

/// Returns the parts of a format's blocks; `None` for plain numbers.
fn parts(format: Format) -> Option<Parts> {
    use Format::*;
    if format.kind() == Kind::Float {
        return None;
    }
    let (head, tail) = match format {
        Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ1_S | Q1_0 | Q2_0 => {
            (2, 0)
        }
        Q3_K | Q6_K | TQ2_0 | TQ1_0 => (0, 2),
        MXFP4 => (1, 0),
        Q8_1 => (4, 0),
        _ => (0, 0),
    };
    let grid = match format {
        IQ2_XXS => Some(Grid::Iq2Xxs),
        IQ2_XS => Some(Grid::Iq2Xs),
        IQ2_S => Some(Grid::Iq2S),
        IQ3_XXS => Some(Grid::Iq3Xxs),
        IQ3_S => Some(Grid::Iq3S),
        IQ1_S | IQ1_M => Some(Grid::Iq1),
        _ => None,
    };
    Some(Parts { head, words: (format.block_bytes() as u32 - head - tail) / 4, tail, grid })
}

/// Whether the shaders support a format.
pub fn knows_format(format: Format) -> bool {
    !text(format).is_empty()
}

/// Whether the shaders support a cache format.
pub fn knows_kv_format(format: Format) -> bool {
    !kv_text(format).0.is_empty()
}

/// Returns the files to read and to write a cache format; empty for other formats.
pub fn kv_text(format: Format) -> (&'static str, &'static str) {
    match format {
        Format::F32 => (wgsl!("kv/f32"), wgsl!("kv/f32_write")),
        Format::F16 => (wgsl!("kv/f16"), wgsl!("kv/f16_write")),
        Format::Q8_0 => (wgsl!("kv/q8_0"), wgsl!("kv/q8_0_write")),
        Format::Q4_0 => (wgsl!("kv/q4_0"), wgsl!("kv/q4_0_write")),
        _ => ("", ""),
    }
}

/// Returns a format's file.
fn text(format: Format) -> &'static str {
    use Format::*;
    match format {
        F32 => wgsl!("formats/f32"),
        F16 => wgsl!("formats/f16"),
        BF16 => wgsl!("formats/bf16"),
        F64 => wgsl!("formats/f64"),
        I8 => wgsl!("formats/i8"),
        I16 => wgsl!("formats/i16"),
        I32 => wgsl!("formats/i32"),
        I64 => wgsl!("formats/i64"),
        Q4_0 => wgsl!("formats/q4_0"),
        Q4_1 => wgsl!("formats/q4_1"),
        Q5_0 => wgsl!("formats/q5_0"),
        Q5_1 => wgsl!("formats/q5_1"),
        Q8_0 => wgsl!("formats/q8_0"),
        Q8_1 => wgsl!("formats/q8_1"),
        Q8_K => wgsl!("formats/q8_k"),
        Q2_K => wgsl!("formats/q2_k"),
        Q3_K => wgsl!("formats/q3_k"),
        Q4_K => wgsl!("formats/q4_k"),
        Q5_K => wgsl!("formats/q5_k"),
        Q6_K => wgsl!("formats/q6_k"),
        IQ1_S => wgsl!("formats/iq1_s"),
        IQ1_M => wgsl!("formats/iq1_m"),
        IQ2_XXS => wgsl!("formats/iq2_xxs"),
        IQ2_XS => wgsl!("formats/iq2_xs"),
        IQ2_S => wgsl!("formats/iq2_s"),
        IQ3_XXS => wgsl!("formats/iq3_xxs"),
        IQ3_S => wgsl!("formats/iq3_s"),
        IQ4_NL => wgsl!("formats/iq4_nl"),
        IQ4_XS => wgsl!("formats/iq4_xs"),
        MXFP4 => wgsl!("formats/mxfp4"),
        NVFP4 => wgsl!("formats/nvfp4"),
        TQ1_0 => wgsl!("formats/tq1_0"),
        TQ2_0 => wgsl!("formats/tq2_0"),
        Q1_0 => wgsl!("formats/q1_0"),
        Q2_0 => wgsl!("formats/q2_0"),
        _ => "",
    }
}
