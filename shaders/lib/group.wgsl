// An invocation has one row of the matrix.
const GROUPS: u32 = 1u;
alias Sums = f32;
alias Parts = Part;
fn load_parts(matrix: u32, row: u32, part: u32) -> Parts { return load_part(matrix, row, part); }
fn dot_parts(p: Parts, x: Input) -> Sums { return dot_part(p, x); }
fn sum_of(s: Sums, group: u32) -> f32 { return s; }
