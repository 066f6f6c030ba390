// Rows of activations in half precision, for matmul_cooperative.wgsl: each times a power of two that takes its largest magnitude
// to 2^13 and more, far from what overflows. A workgroup has a row.

// Bits of magnitudes.
var<workgroup> largest: array<u32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let first = in.workgroup.y * K;
    var most = 0u;
    for (var k = in.local; k < K; k += WORKGROUP) { most = max(most, magnitude(x[first + k])); }
    largest[in.local] = most;
    workgroupBarrier();
    for (var i = 0u; i < WORKGROUP; i++) { most = max(most, largest[i]); }
    // Exponents as floats have them, 127 more than they are; the factor must have an inverse.
    let exponent = 127u + 13u + 127u - (most >> 23u);
    let factor = bitcast<f32>(clamp(exponent, 1u, 227u) << 23u);
    for (var k = in.local; k < K; k += WORKGROUP) { halves[first + k] = f16(x[first + k] * factor); }
    if in.local == 0u { factors[in.workgroup.y] = poisoned(1.0 / factor, most); }
}
