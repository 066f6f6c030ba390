// Tiles of codes: 32 values of each row a step. Memory is by sixteen values, then by row.

const STEPS: u32 = K / 32u;
var<workgroup> weight_codes: array<vec4<u32>, 2u * 64u>;
var<workgroup> weight_scales: array<vec4<f32>, 64>;
var<workgroup> input_codes: array<vec4<u32>, 2u * 64u>;
// Scale, and scale times the sums of the first and of the last sixteen codes.
var<workgroup> input_meta: array<vec4<f32>, 64>;

fn load_tiles(local: u32, row0: u32, token0: u32, step: u32) {
    let i = local % 64u;
    let half = local / 64u % 2u;
    if local < 128u {
        locate(0u, min(row0 + i, ROWS - 1u), step / (LEN / 32u));
        let part = step % (LEN / 32u);
        let k = 4u * half;
        weight_codes[64u * half + i] = vec4(code(part, k), code(part, k + 1u), code(part, k + 2u), code(part, k + 3u));
        if half == 0u { weight_scales[i] = scales(part); }
    } else {
        let at = 3u * (min(token0 + i, rows() - 1u) * STEPS + step);
        input_codes[64u * half + i] = codes[at + half];
        if half == 0u {
            let about = codes[at + 2u];
            let scale = bitcast<f32>(about.x);
            let sums = unpack_sums(about.y);
            input_meta[i] = vec4(scale, scale * f32(sums.x), scale * f32(sums.y), 0.0);
        }
    }
}

fn dot16(w: vec4<u32>, x: vec4<u32>) -> i32 {
    return dot4I8Packed(w.x, x.x) + dot4I8Packed(w.y, x.y) + dot4I8Packed(w.z, x.z) + dot4I8Packed(w.w, x.w);
}

// Products of a row of the matrix with four activations.
fn dots(w: vec4<u32>, x0: vec4<u32>, x1: vec4<u32>, x2: vec4<u32>, x3: vec4<u32>) -> vec4<i32> {
    return vec4(dot16(w, x0), dot16(w, x1), dot16(w, x2), dot16(w, x3));
}

fn multiply(r: u32, t: u32) -> mat4x4<f32> {
    let w0 = weight_codes[r];
    let w1 = weight_codes[r + 16u];
    let w2 = weight_codes[r + 32u];
    let w3 = weight_codes[r + 48u];
    let x0 = input_codes[t];
    let x1 = input_codes[t + 16u];
    let x2 = input_codes[t + 32u];
    let x3 = input_codes[t + 48u];
    let a0 = dots(w0, x0, x1, x2, x3);
    let a1 = dots(w1, x0, x1, x2, x3);
    let a2 = dots(w2, x0, x1, x2, x3);
    let a3 = dots(w3, x0, x1, x2, x3);
    let v0 = weight_codes[r + 64u];
    let v1 = weight_codes[r + 80u];
    let v2 = weight_codes[r + 96u];
    let v3 = weight_codes[r + 112u];
    let y0 = input_codes[t + 64u];
    let y1 = input_codes[t + 80u];
    let y2 = input_codes[t + 96u];
    let y3 = input_codes[t + 112u];
    let b0 = dots(v0, y0, y1, y2, y3);
    let b1 = dots(v1, y0, y1, y2, y3);
    let b2 = dots(v2, y0, y1, y2, y3);
    let b3 = dots(v3, y0, y1, y2, y3);
    let m0 = input_meta[t];
    let m1 = input_meta[t + 16u];
    let m2 = input_meta[t + 32u];
    let m3 = input_meta[t + 48u];
    let scale = vec4(m0.x, m1.x, m2.x, m3.x);
    let sums = mat2x4(vec4(m0.y, m1.y, m2.y, m3.y), vec4(m0.z, m1.z, m2.z, m3.z));
    return mat4x4(
        scaled(weight_scales[r], a0, b0, scale, sums),
        scaled(weight_scales[r + 16u], a1, b1, scale, sums),
        scaled(weight_scales[r + 32u], a2, b2, scale, sums),
        scaled(weight_scales[r + 48u], a3, b3, scale, sums),
    );
}

// Products of a row's scaled sums with four activations.
fn scaled(s: vec4<f32>, low: vec4<i32>, high: vec4<i32>, scale: vec4<f32>, sums: mat2x4<f32>) -> vec4<f32> {
    let offsets = s.zw - f32(OFFSET) * s.xy;
    return scale * (s.x * vec4<f32>(low) + s.y * vec4<f32>(high)) + offsets.x * sums[0] + offsets.y * sums[1];
}
