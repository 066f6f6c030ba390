// An invocation has four rows of the matrix.
const GROUPS: u32 = 4u;
alias Sums = vec4<f32>;

struct Parts {
    a: Part,
    b: Part,
    c: Part,
    d: Part,
}

fn load_parts(matrix: u32, row: u32, part: u32) -> Parts {
    return Parts(
        load_part(matrix, row, part),
        load_part(matrix, row + 16u, part),
        load_part(matrix, row + 32u, part),
        load_part(matrix, row + 48u, part),
    );
}

fn dot_parts(p: Parts, x: Input) -> Sums {
    return vec4(dot_part(p.a, x), dot_part(p.b, x), dot_part(p.c, x), dot_part(p.d, x));
}

fn sum_of(s: Sums, group: u32) -> f32 { return s[group]; }
