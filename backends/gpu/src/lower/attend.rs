//! Rotary embedding, the KV cache, and attention over it.

use halite_kernels::formats::Format;

use super::{Lowering, ONE, Of, SPLIT_POSITIONS, count, each, fixed};
use halite::program::{Dim, Growth, Op, RopePairs, Rotation, State, StateId, StateKind, TensorId};
use halite_shaders::{Extra, Resource, Shader, WORKGROUP, kv_text, wgsl};

/// Rows in a tile of attention.
const ATTEND_ROWS: u32 = 8;

impl Lowering<'_> {
    /// Adds the angles of a rotary embedding to a shader.
    pub(super) fn rotation(&self, shader: Shader, rotation: &Rotation) -> Shader {
        let Rotation { frequencies, factors, magnitude, pairs, .. } = rotation;
        let n = frequencies.len() as u32;
        let shader = shader
            .u32("PAIRS", n)
            .f32("MAGNITUDE", *magnitude)
            .bool("ADJACENT", *pairs == RopePairs::Adjacent)
            .with(wgsl!("lib/sin_cos"))
            .with(&numbers("FREQUENCIES", frequencies));
        match factors {
            Some(factors) => shader
                .read("factors", "f32", self.tensor(*factors))
                .with("fn frequency(i: u32) -> f32 { return quotient(FREQUENCIES[i], factors[i]); }"),
            None => shader.with("fn frequency(i: u32) -> f32 { return FREQUENCIES[i]; }"),
        }
    }

    pub(super) fn rope(&mut self, op: &Op) {
        let Op::Rope { x, out, rotation } = op else { return };
        let cols = self.cols(*x);
        let shader = self
            .step_shader("rope")
            .read("x", "f32", self.tensor(*x))
            .write("out", "f32", self.tensor(*out))
            .u32("COLUMNS", cols)
            .u32("HEAD_DIM", rotation.head_dim);
        let shader = self.rotation(shader, rotation).with(wgsl!("rope"));
        let lanes = cols / rotation.head_dim * (rotation.head_dim - rotation.frequencies.len() as u32);
        self.push(shader, [fixed(lanes.div_ceil(WORKGROUP)), each(Dim::Tokens), ONE]);
    }

    /// Queries and keys are rotated, the keys into the cache, and the values follow.
    pub(super) fn rope_kv(&mut self, op: &Op) {
        let Op::RopeKv { q, k, v, out, state: id, rotation } = op else { return };
        let state = &self.program.states[id.0 as usize];
        let shader = self
            .kv_writer("rope_kv", *id)
            .read("x", "f32", self.tensor(*q))
            .read("k", "f32", self.tensor(*k))
            .read("v", "f32", self.tensor(*v))
            .write("out", "f32", self.tensor(*out))
            .u32("COLUMNS", self.cols(*q));
        let shader = self.rotation(shader, rotation).with(wgsl!("rope_kv"));
        let heads = self.cols(*q) / rotation.head_dim + state.kv_heads;
        let stays = rotation.head_dim - rotation.frequencies.len() as u32;
        let lanes = heads * stays + state.kv_heads * state.value_dim;
        self.push(shader, [fixed(lanes.div_ceil(WORKGROUP)), each(Dim::Tokens), ONE]);
    }

    /// A shader that reads the page tables of a cache.
    pub(super) fn kv_shader(&self, name: &'static str, state: &State) -> Shader {
        self.step_shader(name)
            .u32("KV_HEADS", state.kv_heads)
            .u32("KEY_DIM", state.key_dim)
            .u32("VALUE_DIM", state.value_dim)
            .u32("KEY_ONLY", state.kv_heads * state.key_only())
            .bool("LATENT", state.kind == StateKind::Latent)
            .u32("STEP_TABLES", self.step.tables + self.program.kv_group(state) as u32 * self.step.tokens)
            .with(wgsl!("kv/page"))
    }

    /// Whether a cache is in f16 and shaders have f16 storage.
    pub(super) fn kv_halves(&self, state: &State) -> bool {
        state.format == Format::F16 && self.bounds.paths.f16
    }

    /// Adds a cache format to a shader, by the format's own source. `coded` is the common part of quantised
    /// formats.
    fn cached(shader: Shader, state: &State, format: &str, coded: &str) -> Shader {
        if state.format.block_len() == 1 {
            return shader.with(format);
        }
        shader
            .u32("BLOCK_BYTES", state.format.block_bytes() as u32)
            .with(format)
            .with(wgsl!("kv/coded"))
            .with(coded)
    }

    /// A shader that writes to a cache.
    pub(super) fn kv_writer(&self, name: &'static str, id: StateId) -> Shader {
        let state = &self.program.states[id.0 as usize];
        let shader = self
            .kv_shader(name, state)
            .write("kv", if self.kv_halves(state) { "f16" } else { "atomic<u32>" }, Resource::State(id.0))
            .with(wgsl!("lib/math"));
        if self.kv_halves(state) {
            return shader.with(wgsl!("kv/put_half")).with(wgsl!("kv/f16_write"));
        }
        Self::cached(shader.with(wgsl!("kv/put")), state, kv_text(state.format).1, wgsl!("kv/coded_write"))
    }

    pub(super) fn kv_write(&mut self, k: TensorId, v: TensorId, id: StateId) {
        let state = &self.program.states[id.0 as usize];
        let elements = state.kv_heads * (state.key_only() + state.value_dim);
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

    pub(super) fn attend(&mut self, op: &Op) {
        let Op::Attend { q, state: id, out, heads, scale, growth, softcap, slopes, sinks } = op else {
            return;
        };
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
        // The shader that stores results applies the sinks.
        let stores = |shader: Shader| {
            let shader = shader.write("out", "f32", self.tensor(*out)).bool("HAS_SINK", sinks.is_some());
            self.optional(shader, *sinks, "sinks", "sink", "-0x1.fffffep127").with(wgsl!("lib/attended"))
        };
        let mut shader = self
            .kv_shader("attend", state)
            .read("x", "f32", self.tensor(*q))
            .read("kv", if self.kv_halves(state) { "f16" } else { "u32" }, Resource::State(id.0))
            .u32("STEP_TILES", self.step.tiles + self.step.tile_words * list as u32)
            .u32("HEADS", *heads)
            .u32("ROW_TILES", row_tiles)
            .u32("WINDOW", state.window.unwrap_or(u32::MAX))
            .u32("AFTER", state.after)
            .bool("ALIGNED", state.aligned)
            .f32("SCALE", *scale)
            .f32("SOFTCAP", softcap.unwrap_or(0.0))
            .with(&match growth {
                Some(Growth { factors, period, ahead }) => {
                    let (array, last) = (numbers("GROWTHS", factors), factors.len() - 1);
                    format!(
                        "const GROWN = true;\n{array}\nfn growth_of(position: u32) -> f32 {{\n\
                         return GROWTHS[min((position + {ahead}u) / {period}u, {last}u)];\n}}"
                    )
                }
                None => "const GROWN = false;\nfn growth_of(position: u32) -> f32 { return 1.0; }".to_owned(),
            })
            .with(&match slopes {
                Some(slopes) => {
                    let array = numbers("SLOPES", slopes);
                    format!("const SLOPED = true;\n{array}\nfn slope_of(head: u32) -> f32 {{ return SLOPES[head]; }}")
                }
                None => "const SLOPED = false;\nfn slope_of(head: u32) -> f32 { return 0.0; }".to_owned(),
            });
        shader = Self::cached(shader, state, kv_text(state.format).0, wgsl!("kv/coded_read"));
        if state.format == Format::F16 {
            shader = shader.with(match self.kv_halves(state) {
                true => "fn half_at(at: u32) -> f32 { return f32(kv[at]); }",
                false => wgsl!("kv/half_at"),
            });
        }
        shader = shader.with(wgsl!("lib/math")).with(wgsl!("attend"));
        let whole = stores(shader.clone()).with(wgsl!("lib/attend_whole"));
        let tiles = count(Of::Tiles(tile), row_tiles, 1);
        // With a window, the visible part of a long cache is short.
        if self.most_splits < 2
            || state.window.is_some_and(|window| window.saturating_add(state.after) < 2 * SPLIT_POSITIONS)
        {
            return self.push(whole, [fixed(state.kv_heads), tiles, ONE]);
        }
        let merge = stores(self.step_shader("merge").u32("HEADS", *heads).u32("VALUE_DIM", state.value_dim));
        self.push_when(whole, [fixed(state.kv_heads), tiles, ONE], (Of::Splits, 1..2));
        // Splits times tokens are at most the useful splits of one token.
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
}

/// An array of numbers in a shader.
fn numbers(name: &str, numbers: &[f32]) -> String {
    let (list, len) =
        (numbers.iter().map(|x| format!("{x:e}")).collect::<Vec<_>>().join(", "), numbers.len());
    format!("var<private> {name}: array<f32, {len}> = array<f32, {len}>({list});")
}
