// Tiles of codes: 32 values of each row a step. Memory is by word, then by row.

const STEPS: u32 = K / 32u;
var<workgroup> weight_codes: array<vec4<u32>, 8u * 16u>;
var<workgroup> weight_scales: array<vec4<f32>, 64>;
var<workgroup> input_codes: array<vec4<u32>, 8u * 16u>;
// Scale, and scale times the sums of the first and of the last sixteen codes.
var<workgroup> input_meta: array<vec4<f32>, 64>;

fn load_tiles(local: u32, row0: u32, token0: u32, step: u32) {
    let i = local % 64u;
    let k = 2u * (local / 64u);
    let row = min(row0 + i, ROWS - 1u);
    locate(0u, row, step / (LEN / 32u));
    let part = step % (LEN / 32u);
    weight_codes[16u * k + i / 4u][i % 4u] = code(part, k);
    weight_codes[16u * k + 16u + i / 4u][i % 4u] = code(part, k + 1u);
    let at = min(token0 + i, rows() - 1u) * STEPS + step;
    input_codes[16u * k + i / 4u][i % 4u] = codes[3u * at + k / 4u][k % 4u];
    input_codes[16u * k + 16u + i / 4u][i % 4u] = codes[3u * at + k / 4u][k % 4u + 1u];
    if k == 0u { weight_scales[i] = scales(part); }
    if k == 2u {
        let about = codes[3u * at + 2u];
        let scale = bitcast<f32>(about.x);
        let sums = unpack_sums(about.y);
        input_meta[i] = vec4(scale, scale * f32(sums.x), scale * f32(sums.y), 0.0);
    }
}

fn dots(w: u32, x: vec4<u32>) -> vec4<i32> {
    return vec4(dot4I8Packed(w, x.x), dot4I8Packed(w, x.y), dot4I8Packed(w, x.z), dot4I8Packed(w, x.w));
}

// Products of a row's scaled sums with four activations.
fn scaled(s: vec4<f32>, low: vec4<i32>, high: vec4<i32>, scale: vec4<f32>, sums: mat2x4<f32>) -> vec4<f32> {
    let offsets = s.zw - f32(OFFSET) * s.xy;
    return scale * (s.x * vec4<f32>(low) + s.y * vec4<f32>(high)) + offsets.x * sums[0] + offsets.y * sums[1];
}

fn multiply(r: u32, t: u32) -> mat4x4<f32> {
    var a0 = vec4<i32>(); var a1 = vec4<i32>(); var a2 = vec4<i32>(); var a3 = vec4<i32>();
    var b0 = vec4<i32>(); var b1 = vec4<i32>(); var b2 = vec4<i32>(); var b3 = vec4<i32>();
    for (var k = 0u; k < 4u; k++) {
        let w = weight_codes[16u * k + r];
        let x = input_codes[16u * k + t];
        a0 += dots(w.x, x); a1 += dots(w.y, x); a2 += dots(w.z, x); a3 += dots(w.w, x);
        let v = weight_codes[16u * k + 64u + r];
        let y = input_codes[16u * k + 64u + t];
        b0 += dots(v.x, y); b1 += dots(v.y, y); b2 += dots(v.z, y); b3 += dots(v.w, y);
    }
    let m0 = input_meta[4u * t];
    let m1 = input_meta[4u * t + 1u];
    let m2 = input_meta[4u * t + 2u];
    let m3 = input_meta[4u * t + 3u];
    let scale = vec4(m0.x, m1.x, m2.x, m3.x);
    let sums = mat2x4(vec4(m0.y, m1.y, m2.y, m3.y), vec4(m0.z, m1.z, m2.z, m3.z));
    return mat4x4(
        scaled(weight_scales[4u * r], a0, b0, scale, sums),
        scaled(weight_scales[4u * r + 1u], a1, b1, scale, sums),
        scaled(weight_scales[4u * r + 2u], a2, b2, scale, sums),
        scaled(weight_scales[4u * r + 3u], a3, b3, scale, sums),
    );
}
