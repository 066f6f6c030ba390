// Codes that each workgroup makes itself, of its one row of activations: where there are few rows of activations and many
// workgroups, that is less than a dispatch and a wait for it.

const SPAN: u32 = K;
var<workgroup> own_codes: array<vec4<u32>, K / 16u>;
// Scale, and sums.
var<workgroup> own_about: array<vec2<u32>, K / 32u>;
// The first half of the row.
var<private> own_first: u32;

fn activations(four: u32) -> vec4<f32> { return x[four]; }
fn keep_codes(half: u32, codes: vec4<u32>) { own_codes[half - own_first] = codes; }
fn keep_about(part: u32, scale: u32, sums: u32) { own_about[part - own_first / 2u] = vec2(scale, sums); }

fn prepare(local: u32, row: u32) {
    own_first = row * (K / 16u);
    to_codes(local, own_first, K / 16u);
    workgroupBarrier();
}

fn load_input(row: u32, part: u32) -> Codes {
    let about = own_about[part];
    return Codes(own_codes[2u * part], own_codes[2u * part + 1u], bitcast<f32>(about.x), unpack_sums(about.y));
}
