// An invocation has the same row of two matrices, a gate and what it gates.
const GROUPS: u32 = 1u;
alias Sums = vec2<f32>;

struct Parts {
    gate: Part,
    up: Part,
}

fn load_parts(matrix: u32, row: u32, part: u32) -> Parts {
    which = 0u;
    let gate = load_part(matrix, row, part);
    which = 1u;
    return Parts(gate, load_part(matrix, row, part));
}

fn dot_parts(p: Parts, x: Input) -> Sums { return vec2(dot_part(p.gate, x), dot_part(p.up, x)); }
fn sum_of(s: Sums, group: u32) -> f32 { return gated(s.x, s.y); }
