// Activations to codes of eight bits with a scale for each BLOCK values, by the formulas of the CPU's `activation.rs`. A workgroup
// of WORKGROUP invocations has a run of at most SPAN values, from a multiple of BLOCK on; an invocation has sixteen at a time.
// `activations` gives four values, `keep_codes` and `keep_about` take the results.

var<workgroup> magnitudes: array<atomic<u32>, (SPAN + BLOCK - 1u) / BLOCK>;
// Of the first and of the last sixteen codes of 32.
var<workgroup> sums: array<atomic<u32>, (SPAN + 31u) / 32u>;

fn largest(x: vec4<f32>) -> u32 {
    let m = bitcast<vec4<u32>>(x) & vec4(0x7fffffffu);
    return max(max(m.x, m.y), max(m.z, m.w));
}

// Halves of 32 values are counted over all rows.
fn to_codes(local: u32, first: u32, halves: u32) {
    for (var i = local; i < SPAN / 32u; i += WORKGROUP) { atomicStore(&sums[i], 0u); }
    for (var i = local; i < SPAN / BLOCK; i += WORKGROUP) { atomicStore(&magnitudes[i], 0u); }
    workgroupBarrier();
    for (var i = local; i < halves; i += WORKGROUP) {
        let at = 4u * (first + i);
        let a = max(largest(activations(at)), largest(activations(at + 1u)));
        let b = max(largest(activations(at + 2u)), largest(activations(at + 3u)));
        atomicMax(&magnitudes[16u * i / BLOCK], max(a, b));
    }
    workgroupBarrier();
    for (var i = local; i < halves; i += WORKGROUP) {
        let at = 4u * (first + i);
        let most = bitcast<f32>(atomicLoad(&magnitudes[16u * i / BLOCK]));
        let factor = select(0.0, 127.0 / most, most > 0.0);
        var codes = vec4(0u);
        var sum = 0;
        for (var j = 0u; j < 4u; j++) {
            let four = vec4<i32>(round(activations(at + j) * factor));
            codes[j] = pack4xI8(four);
            sum += four.x + four.y + four.z + four.w;
        }
        keep_codes(first + i, codes);
        atomicOr(&sums[i / 2u], (u32(sum) & 0xffffu) << (16u * (i % 2u)));
    }
    workgroupBarrier();
    for (var i = local; i < halves / 2u; i += WORKGROUP) {
        let bits = atomicLoad(&magnitudes[32u * i / BLOCK]);
        let scale = bitcast<f32>(bits) / 127.0;
        let finite = select(scale, round_f16(min(scale, 65504.0)), BLOCK == 32u);
        keep_about(first / 2u + i, bitcast<u32>(poisoned(finite, bits)), atomicLoad(&sums[i]));
    }
}
