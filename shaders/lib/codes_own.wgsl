// Codes that each workgroup makes itself, of its one row of activations: where there are few rows of activations and many
// workgroups, that is less than a dispatch and a wait for it.

const PARTS: u32 = K / 32u;
var<workgroup> own_codes: array<vec4<u32>, 2u * PARTS>;
// Scale, and sums.
var<workgroup> own_about: array<vec2<u32>, PARTS>;
var<workgroup> own_largest: array<u32, PARTS>;

fn activations(four: u32) -> vec4<f32> { return x[four]; }

fn prepare(local: u32, row: u32) {
    for (var part = local; part < PARTS; part += 16u * SLICES) { own_largest[part] = largest(row * PARTS + part); }
    workgroupBarrier();
    for (var part = local; part < PARTS; part += 16u * SLICES) {
        var most = 0u;
        let first = part - part % (BLOCK / 32u);
        for (var i = 0u; i < BLOCK / 32u; i++) { most = max(most, own_largest[first + i]); }
        let made = to_codes(row * PARTS + part, most);
        own_codes[2u * part] = made.low;
        own_codes[2u * part + 1u] = made.high;
        own_about[part] = vec2(bitcast<u32>(made.scale), pack_sums(made.sums));
    }
    workgroupBarrier();
}

fn load_input(row: u32, part: u32) -> Codes {
    let about = own_about[part];
    return Codes(own_codes[2u * part], own_codes[2u * part + 1u], bitcast<f32>(about.x), unpack_sums(about.y));
}
