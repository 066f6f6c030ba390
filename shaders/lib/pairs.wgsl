// An invocation has the same two rows of two matrices, gates and what they gate.
const GROUPS: u32 = 2u;
alias Sums = vec4<f32>;

struct Parts {
    gate0: Part,
    gate1: Part,
    up0: Part,
    up1: Part,
}

fn load_parts(matrix: u32, row: u32, part: u32) -> Parts {
    which = 0u;
    let gate0 = load_part(matrix, row, part);
    let gate1 = load_part(matrix, row + 16u, part);
    which = 1u;
    return Parts(gate0, gate1, load_part(matrix, row, part), load_part(matrix, row + 16u, part));
}

fn dot_parts(p: Parts, x: Input) -> Sums {
    return vec4(dot_part(p.gate0, x), dot_part(p.gate1, x), dot_part(p.up0, x), dot_part(p.up1, x));
}

fn sum_of(s: Sums, group: u32) -> f32 { return gated(s[group], s[2u + group]); }
