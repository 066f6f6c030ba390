// Products of a matrix with many rows of activations, in tiles of 64 by 64: a workgroup unpacks a step of K of 64 rows of
// the matrix and of 64 activations into its memory; an invocation has 4 by 4 of the products.

@compute @workgroup_size(256)
fn main(in: In) {
    let row0 = 64u * in.workgroup.x;
    let token0 = 64u * in.workgroup.y;
    // Of the rows and of the activations an invocation has four each, sixteen apart.
    let r = in.local % 16u;
    let t = in.local / 16u;
    // A column for each of its rows.
    var acc = mat4x4<f32>();
    for (var step = 0u; step < STEPS; step++) {
        load_tiles(in.local, row0, token0, step);
        workgroupBarrier();
        acc += multiply(r, t);
        workgroupBarrier();
    }
    for (var j = 0u; j < 4u; j++) {
        let token = token0 + t + 16u * j;
        for (var i = 0u; i < 4u; i++) {
            let row = row0 + r + 16u * i;
            if token < rows() && row < ROWS { store(token, row, 0u, acc[i][j]); }
        }
    }
}
