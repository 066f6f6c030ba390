// Tiles of floats: 16 values of each row a step. Memory is by four values, then by row.

const STEPS: u32 = (K + 15u) / 16u;
var<workgroup> weights: array<vec4<f32>, 4u * 64u>;
var<workgroup> inputs: array<vec4<f32>, 4u * 64u>;

fn load_tiles(local: u32, row0: u32, token0: u32, step: u32) {
    let i = local % 64u;
    let k = 16u * step + 4u * (local / 64u);
    let at = min(token0 + i, rows() - 1u) * K + k;
    // Past the end of a row is another row, or nothing.
    let inside = vec4(k, k + 1u, k + 2u, k + 3u) < vec4(K);
    weights[local] = select(vec4(0.0), four_weights(min(row0 + i, ROWS - 1u), k), inside);
    inputs[local] = select(vec4(0.0), vec4(x_at(at), x_at(at + 1u), x_at(at + 2u), x_at(at + 3u)), inside);
}

fn multiply(r: u32, t: u32) -> mat4x4<f32> {
    var acc = mat4x4<f32>();
    for (var k = 0u; k < 256u; k += 64u) {
        let w = mat4x4(weights[k + r], weights[k + r + 16u], weights[k + r + 32u], weights[k + r + 48u]);
        let x = transpose(mat4x4(inputs[k + t], inputs[k + t + 16u], inputs[k + t + 32u], inputs[k + t + 48u]));
        acc += x * w;
    }
    return acc;
}
