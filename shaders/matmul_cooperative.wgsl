// Products of a quantised matrix with many rows of activations, in halves with sums in floats, by matrices of SIDE rows and
// columns that subgroups have together. A workgroup has a tile of TILE by TILE products, each of eight subgroups an eighth of it,
// as four by two matrices; should there be more subgroups, they do the same again. What a step needs is read while the matrices
// of the step before are multiplied.

const TILE: u32 = 8u * SIDE;
const STEPS: u32 = K / 32u;
// From row to row in workgroup memory; more than the values of a step, so that rows start in different banks.
const STRIDE: u32 = 40u;
// Sixteen values of a row of the matrix, and four of a row of activations, that an invocation has in a step.
const LOADS: u32 = (2u * TILE + WORKGROUP - 1u) / WORKGROUP;
const INPUTS: u32 = (8u * TILE + WORKGROUP - 1u) / WORKGROUP;

// By row, then by value.
var<workgroup> weights: array<f16, TILE * STRIDE>;
var<workgroup> inputs: array<f16, TILE * STRIDE>;
// For each subgroup a matrix, by activation, then by row.
var<workgroup> products: array<f32, 8u * SIDE * SIDE>;

var<private> next_weights: array<Sixteen, LOADS>;
var<private> next_inputs: array<vec4<f16>, INPUTS>;

struct Sixteen {
    codes: vec4<u32>,
    scale: f32,
    least: f32,
}

fn load_weights(row: u32, step: u32, half: u32) -> Sixteen {
    locate(0u, row, step / (LEN / 32u));
    let part = step % (LEN / 32u);
    let s = scales(part);
    let k = 4u * half;
    let codes = vec4(code(part, k), code(part, k + 1u), code(part, k + 2u), code(part, k + 3u));
    return Sixteen(codes, select(s.x, s.y, half == 1u), select(s.z, s.w, half == 1u));
}

fn keep_weights(w: Sixteen, at: u32) {
    for (var k = 0u; k < 4u; k++) {
        let codes = vec4<f32>(unpack4xI8(w.codes[k]) - vec4(OFFSET));
        let values = vec4<f16>(w.scale * codes + w.least);
        for (var j = 0u; j < 4u; j++) { weights[at + 4u * k + j] = values[j]; }
    }
}

// Reads what a step needs.
fn load(local: u32, row0: u32, token0: u32, step: u32) {
    for (var i = 0u; i < LOADS; i++) {
        let at = local + i * WORKGROUP;
        if at < 2u * TILE { next_weights[i] = load_weights(min(row0 + at % TILE, ROWS - 1u), step, at / TILE); }
    }
    for (var i = 0u; i < INPUTS; i++) {
        let at = local + i * WORKGROUP;
        if at < 8u * TILE { next_inputs[i] = halves[min(token0 + at / 8u, rows() - 1u) * (K / 4u) + 8u * step + at % 8u]; }
    }
}

// Puts it where subgroups see it.
fn keep(local: u32) {
    for (var i = 0u; i < LOADS; i++) {
        let at = local + i * WORKGROUP;
        if at < 2u * TILE { keep_weights(next_weights[i], at % TILE * STRIDE + at / TILE * 16u); }
    }
    for (var i = 0u; i < INPUTS; i++) {
        let at = local + i * WORKGROUP;
        if at < 8u * TILE {
            for (var j = 0u; j < 4u; j++) { inputs[at / 8u * STRIDE + at % 8u * 4u + j] = next_inputs[i][j]; }
        }
    }
}

// Stores one matrix of each subgroup: of four by two, the one at a row and a column.
fn finish(local: u32, row0: u32, token0: u32, row_matrix: u32, token_matrix: u32) {
    workgroupBarrier();
    for (var j = local; j < 8u * SIDE * SIDE; j += WORKGROUP) {
        let subgroup = j / (SIDE * SIDE);
        let token = token0 + (subgroup / 2u * 2u + token_matrix) * SIDE + j / SIDE % SIDE;
        let row = row0 + (subgroup % 2u * 4u + row_matrix) * SIDE + j % SIDE;
        if token < rows() && row < ROWS { store(token, row, 0u, products[j] * factors[token]); }
    }
    workgroupBarrier();
}

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let row0 = TILE * in.workgroup.x;
    let token0 = TILE * in.workgroup.y;
    let r = in.subgroup % 2u * 4u * SIDE;
    let t = in.subgroup / 2u % 4u * 2u * SIDE;
    var sum00 = Sums();
    var sum01 = Sums();
    var sum10 = Sums();
    var sum11 = Sums();
    var sum20 = Sums();
    var sum21 = Sums();
    var sum30 = Sums();
    var sum31 = Sums();
    load(in.local, row0, token0, 0u);
    for (var step = 0u; step < STEPS; step++) {
        keep(in.local);
        workgroupBarrier();
        if step + 1u < STEPS { load(in.local, row0, token0, step + 1u); }
        for (var k = 0u; k < 32u; k += SIDE) {
            let x0 = coopLoad<Right>(&inputs[t * STRIDE + k], STRIDE);
            let x1 = coopLoad<Right>(&inputs[(t + SIDE) * STRIDE + k], STRIDE);
            let w0 = coopLoadT<Left>(&weights[r * STRIDE + k], STRIDE);
            let w1 = coopLoadT<Left>(&weights[(r + SIDE) * STRIDE + k], STRIDE);
            let w2 = coopLoadT<Left>(&weights[(r + 2u * SIDE) * STRIDE + k], STRIDE);
            let w3 = coopLoadT<Left>(&weights[(r + 3u * SIDE) * STRIDE + k], STRIDE);
            sum00 = coopMultiplyAdd(w0, x0, sum00);
            sum01 = coopMultiplyAdd(w0, x1, sum01);
            sum10 = coopMultiplyAdd(w1, x0, sum10);
            sum11 = coopMultiplyAdd(w1, x1, sum11);
            sum20 = coopMultiplyAdd(w2, x0, sum20);
            sum21 = coopMultiplyAdd(w2, x1, sum21);
            sum30 = coopMultiplyAdd(w3, x0, sum30);
            sum31 = coopMultiplyAdd(w3, x1, sum31);
        }
        workgroupBarrier();
    }
    let place = in.subgroup % 8u * SIDE * SIDE;
    coopStore(sum00, &products[place], SIDE);
    finish(in.local, row0, token0, 0u, 0u);
    coopStore(sum01, &products[place], SIDE);
    finish(in.local, row0, token0, 0u, 1u);
    coopStore(sum10, &products[place], SIDE);
    finish(in.local, row0, token0, 1u, 0u);
    coopStore(sum11, &products[place], SIDE);
    finish(in.local, row0, token0, 1u, 1u);
    coopStore(sum20, &products[place], SIDE);
    finish(in.local, row0, token0, 2u, 0u);
    coopStore(sum21, &products[place], SIDE);
    finish(in.local, row0, token0, 2u, 1u);
    coopStore(sum30, &products[place], SIDE);
    finish(in.local, row0, token0, 3u, 0u);
    coopStore(sum31, &products[place], SIDE);
    finish(in.local, row0, token0, 3u, 1u);
}
