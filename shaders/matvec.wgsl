// Products of a quantised matrix with few rows of activations. A workgroup has sixteen rows of the matrix, one in each of
// sixteen invocations, SLICES times: each slice has every SLICES-th part of a row. In workgroups of one z are TOKENS rows of
// activations.

var<workgroup> sums: array<f32, 16u * SLICES * TOKENS>;

@compute @workgroup_size(16u * SLICES)
fn main(in: In) {
    let lane = in.local % 16u;
    let slice = in.local / 16u;
    let row = 16u * (in.workgroup.x + in.workgroup.y * in.workgroups.x) + lane;
    let first = TOKENS * in.workgroup.z;
    let count = min(results() - min(first, results()), TOKENS);
    let matrix = matrix_of(first);
    let here = row < ROWS && is_here(matrix);
    var acc: array<f32, TOKENS>;
    if here {
        for (var part = slice; part < K / 32u; part += SLICES) {
            locate(matrix - FIRST_MATRIX, row, part / (LEN / 32u));
            let p = load_part(part % (LEN / 32u));
            for (var t = 0u; t < count; t++) {
                acc[t] += dot_part(p, input_of(first + t), part);
            }
        }
    }
    for (var t = 0u; t < TOKENS; t++) { sums[(t * SLICES + slice) * 16u + lane] = acc[t]; }
    workgroupBarrier();
    for (var t = slice; t < count; t += SLICES) {
        if here {
            var sum = 0.0;
            for (var s = 0u; s < SLICES; s++) { sum += sums[(t * SLICES + s) * 16u + lane]; }
            store(first + t, row, matrix, sum);
        }
    }
}
