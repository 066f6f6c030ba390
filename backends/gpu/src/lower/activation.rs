//! Activations in the form that products read: f32, 8-bit codes or f16.

use halite_kernels::formats::{Activation, Format, Kind};

use super::{Lowering, ONE, Of, VECTORS, count, each, fixed};
use halite::passes;
use halite::program::{Dim, TensorId};
use halite_shaders::{Cooperative, Extra, Resource, Shader, WORKGROUP, wgsl};

/// The buffer of activations, and the program's tensor in it, if it is one.
pub(super) type Input<'a> = (&'a Resource, Option<TensorId>);

/// Activations that a workgroup of a separate dispatch quantises.
const QUANTISED: u32 = 16 * WORKGROUP;

impl Lowering<'_> {
    /// The form in which a product reads activations: f32, codes in a buffer, or codes that each workgroup
    /// computes.
    pub(super) fn activations(&self, shader: Shader, format: Format, input: &Resource, own: bool) -> Shader {
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

    /// Minimum rows for codes in a buffer. Products quantise fewer rows themselves.
    pub(super) fn codes_from(&self, codes: Extra, x: Option<TensorId>, k: u32) -> u32 {
        let there = self.quantised.iter().find(|q| q.0 == codes && Some(q.1) == x);
        // For each 32 values codes, their scale and sums twice, and their largest; and what `slices.wgsl` and
        // sums over workgroups may take.
        let bytes = k / 32 * (32 + 4 + 8 + 4) + 16 * self.most_slices(k) * (16 + 4);
        there.map_or(if bytes <= self.bounds.workgroup_bytes { 2 } else { 1 }, |q| q.2.start)
    }

    /// The quantised form of activations for products with a format, if those use integers.
    pub(super) fn codes(&self, format: Format) -> Option<Extra> {
        match format.kind() {
            Kind::Quantised { activation, .. } if self.bounds.paths.integer => Some(match activation {
                Activation::Q8_0 => Extra::Codes32,
                Activation::Q8_K => Extra::Codes256,
            }),
            _ => None,
        }
    }

    /// What products of a format with many activations are made of, if matrix units make them.
    pub(super) fn cooperative(&self, format: Format) -> Option<Cooperative> {
        self.bounds.paths.cooperative.filter(|_| format.kind() != Kind::Float)
    }

    /// Rounds many rows of activations to f16, if products with a format read f16.
    pub(super) fn halve(&mut self, formats: &[Format], (x, id): Input<'_>, rows: Dim, k: u32) {
        let max_rows = passes::rows(rows, self.limits.tokens, self.limits.outputs) as u32;
        let there = self.quantised.iter().any(|q| q.0 == Extra::Halves && Some(q.1) == id);
        if there || max_rows <= VECTORS || !formats.iter().any(|&f| self.cooperative(f).is_some()) {
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

    /// The part of a shader that computes codes.
    pub(super) fn coder(shader: Shader, codes: Extra) -> Shader {
        shader
            .u32("BLOCK", if codes == Extra::Codes256 { 256 } else { 32 })
            .with(wgsl!("lib/codes"))
            .with(wgsl!("lib/to_codes"))
    }

    /// The part of a shader that quantises `times` rows of `k` activations for each row.
    pub(super) fn quantiser(
        &mut self,
        shader: Shader,
        codes: Extra,
        rows: Dim,
        times: u32,
        k: u32,
    ) -> Shader {
        // For each 32 values twelve words.
        let buffer = self.extra(codes, rows, u64::from(times) * u64::from(k) / 32 * 12);
        Self::coder(shader.write("codes", "vec4<u32>", buffer).u32("K", k), codes)
            .with(wgsl!("lib/math"))
            .with(wgsl!("lib/quantise"))
    }

    /// Quantises `times` rows of activations for each row, of which there are fewer than `end`, in all the
    /// ways that formats need, unless they already are or the products do it.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn quantise(
        &mut self,
        formats: &[Format],
        (x, id): Input<'_>,
        rows: Dim,
        times: u32,
        k: u32,
        end: u32,
    ) {
        let max_rows = passes::rows(rows, self.limits.tokens, self.limits.outputs) as u32;
        for codes in [Extra::Codes32, Extra::Codes256] {
            let needed = formats.iter().any(|&f| self.codes(f) == Some(codes));
            let there = self.quantised.iter().any(|q| q.0 == codes && Some(q.1) == id && q.2.end >= end);
            let from = self.codes_from(codes, id, k);
            if !needed || there || from > max_rows {
                continue;
            }
            self.quantised.retain(|q| q.0 != codes);
            self.quantised.extend(id.map(|id| (codes, id, from..end)));
            let shader = self.shader("quantise").read("x", "vec4<f32>", x.clone());
            let span = QUANTISED.min(k);
            let shader =
                self.quantiser(shader.u32("SPAN", span), codes, rows, times, k).with(wgsl!("quantise"));
            let groups = [fixed(k.div_ceil(span)), count(Of::Rows(rows), times, 1), ONE];
            self.push_when(shader, groups, (Of::Rows(rows), from..end));
        }
    }
}
