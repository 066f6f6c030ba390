// Products of a quantised matrix, or of several, with few rows of activations. An invocation has GROUPS rows of the matrix, sixteen apart, of
// which neighbouring invocations have neighbouring ones; a workgroup has them SLICES times, and each slice every SLICES-th part
// of a row. In workgroups of one z are TOKENS rows of activations.

const PARTS: u32 = K / 32u;
const TURNS: u32 = (PARTS + SLICES - 1u) / SLICES;

struct Part {
    low: vec4<u32>,
    high: vec4<u32>,
    // Of the first and of the last sixteen values; then their minimums.
    scales: vec4<f32>,
}

fn load_part(matrix: u32, row: u32, part: u32) -> Part {
    locate(matrix, min(row, row_count() - 1u), part / (LEN / 32u));
    let p = part % (LEN / 32u);
    return Part(
        vec4(code(p, 0u), code(p, 1u), code(p, 2u), code(p, 3u)),
        vec4(code(p, 4u), code(p, 5u), code(p, 6u), code(p, 7u)),
        scales(p),
    );
}

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let lane = in.local % 16u;
    let slice = in.local / 16u;
    let row = 16u * GROUPS * choose(in.workgroup.x + in.workgroup.y * in.workgroups.x) + lane;
    let first = TOKENS * in.workgroup.z;
    let count = count_at(first);
    let matrix = matrix_of(first);
    let here = count > 0u && is_here(matrix);
    prepare(in.local, input_of(row_of(first)));
    var acc: array<Sums, TOKENS>;
    if here {
        // A constant number of turns, which compilers unroll.
        for (var turn = 0u; turn < TURNS; turn++) {
            let part = turn * SLICES + slice;
            if PARTS % SLICES == 0u || part < PARTS {
                let parts = load_parts(matrix - FIRST_MATRIX, row, part);
                for (var t = 0u; t < TOKENS; t++) {
                    if t < count { acc[t] += dot_parts(parts, load_input(input_of(row_of(first + t)), part)); }
                }
            }
        }
    }
    for (var t = 0u; t < TOKENS; t++) {
        let sums = add_slices(lane, slice, acc[t]);
        if here && t < count {
            for (var g = slice; g < GROUPS; g += SLICES) {
                if row + 16u * g < row_count() { store(row_of(first + t), row + 16u * g, matrix, sum_of(sums, g)); }
            }
        }
    }
}
