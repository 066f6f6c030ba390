// Products of a quantised matrix with many rows of activations, in halves with sums in floats, by matrices of SIDE rows and
// columns that subgroups have together. A workgroup has a tile of TILE by TILE products, each of four subgroups a quarter of it,
// as two by two matrices; should there be more subgroups, they do the same again.

const TILE: u32 = 4u * SIDE;
const STEPS: u32 = K / 32u;
// From row to row in workgroup memory; more than the values of a step, so that rows start in different banks.
const STRIDE: u32 = 40u;

// By row, then by value.
var<workgroup> weights: array<f16, TILE * STRIDE>;
var<workgroup> inputs: array<f16, TILE * STRIDE>;
// By activation, then by row of the matrix.
var<workgroup> products: array<f32, TILE * TILE>;

// Sixteen values of a row of the matrix.
fn load_weights(row: u32, step: u32, i: u32, half: u32) {
    locate(0u, row, step / (LEN / 32u));
    let part = step % (LEN / 32u);
    let s = scales(part);
    let scale = select(s.x, s.y, half == 1u);
    let least = select(s.z, s.w, half == 1u);
    for (var k = 0u; k < 4u; k++) {
        let codes = vec4<f32>(unpack4xI8(code(part, 4u * half + k)) - vec4(OFFSET));
        let values = vec4<f16>(scale * codes + least);
        for (var j = 0u; j < 4u; j++) { weights[i * STRIDE + 16u * half + 4u * k + j] = values[j]; }
    }
}

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let row0 = TILE * in.workgroup.x;
    let token0 = TILE * in.workgroup.y;
    let r = in.subgroup % 2u * 2u * SIDE;
    let t = in.subgroup / 2u % 2u * 2u * SIDE;
    var sum00 = Sums();
    var sum01 = Sums();
    var sum10 = Sums();
    var sum11 = Sums();
    for (var step = 0u; step < STEPS; step++) {
        for (var i = in.local; i < 2u * TILE; i += WORKGROUP) {
            load_weights(min(row0 + i % TILE, ROWS - 1u), step, i % TILE, i / TILE);
        }
        for (var i = in.local; i < 8u * TILE; i += WORKGROUP) {
            let values = halves[min(token0 + i / 8u, rows() - 1u) * (K / 4u) + 8u * step + i % 8u];
            for (var j = 0u; j < 4u; j++) { inputs[i / 8u * STRIDE + i % 8u * 4u + j] = values[j]; }
        }
        workgroupBarrier();
        for (var k = 0u; k < 32u; k += SIDE) {
            let w0 = coopLoadT<Left>(&weights[r * STRIDE + k], STRIDE);
            let w1 = coopLoadT<Left>(&weights[(r + SIDE) * STRIDE + k], STRIDE);
            let x0 = coopLoad<Right>(&inputs[t * STRIDE + k], STRIDE);
            let x1 = coopLoad<Right>(&inputs[(t + SIDE) * STRIDE + k], STRIDE);
            sum00 = coopMultiplyAdd(w0, x0, sum00);
            sum01 = coopMultiplyAdd(w0, x1, sum01);
            sum10 = coopMultiplyAdd(w1, x0, sum10);
            sum11 = coopMultiplyAdd(w1, x1, sum11);
        }
        workgroupBarrier();
    }
    coopStore(sum00, &products[t * TILE + r], TILE);
    coopStore(sum01, &products[(t + SIDE) * TILE + r], TILE);
    coopStore(sum10, &products[t * TILE + r + SIDE], TILE);
    coopStore(sum11, &products[(t + SIDE) * TILE + r + SIDE], TILE);
    workgroupBarrier();
    for (var i = in.local; i < TILE * TILE; i += WORKGROUP) {
        let token = token0 + i / TILE;
        let row = row0 + i % TILE;
        if token < rows() && row < ROWS { store(token, row, 0u, products[i] * factors[token]); }
    }
}
