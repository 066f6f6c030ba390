// Tiles of floats: 16 values of each row a step. Memory is by value, then by row.

const STEPS: u32 = (K + 15u) / 16u;
var<workgroup> weights: array<vec4<f32>, 16u * 16u>;
var<workgroup> inputs: array<vec4<f32>, 16u * 16u>;

fn load_tiles(local: u32, row0: u32, token0: u32, step: u32) {
    let i = local % 64u;
    // Four values for each invocation.
    let k = 4u * (local / 64u);
    let w4 = four_weights(min(row0 + i, ROWS - 1u), 16u * step + k);
    let at = min(token0 + i, rows() - 1u) * K + 16u * step + k;
    for (var j = 0u; j < 4u; j++) {
        let inside = 16u * step + k + j < K;
        weights[16u * (k + j) + i / 4u][i % 4u] = select(0.0, w4[j], inside);
        inputs[16u * (k + j) + i / 4u][i % 4u] = select(0.0, x_at(at + j), inside);
    }
}

fn multiply(r: u32, t: u32) -> mat4x4<f32> {
    var acc = mat4x4<f32>();
    for (var k = 0u; k < 16u; k++) {
        let w = weights[16u * k + r];
        let x = inputs[16u * k + t];
        acc += mat4x4(w.x * x, w.y * x, w.z * x, w.w * x);
    }
    return acc;
}
