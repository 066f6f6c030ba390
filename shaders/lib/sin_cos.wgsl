// A quotient to the last bit: a device's own may be 2.5 units off (Vulkan), and a position multiplies that. The remainder is
// exact in integers, since it is small: what wraps around in its two terms is the same.
fn quotient(a: f32, b: f32) -> f32 {
    let q = a / b;
    let bits = vec3(bitcast<u32>(a), bitcast<u32>(b), bitcast<u32>(q));
    let exponents = bits >> vec3(23u);
    let m = (bits & vec3(0x7fffffu)) | vec3(0x800000u);
    let shift = exponents.x + 150u - exponents.y - exponents.z;
    let remainder = bitcast<i32>((m.x << (shift & 31u)) - m.y * m.z);
    let better = bitcast<f32>(bits.z + bitcast<u32>(i32(round(f32(remainder) / f32(m.y)))));
    // Signs, infinities, NaN and subnormal numbers are left as they are.
    let normal = all(exponents > vec3(0u)) && all(exponents < vec3(255u)) && shift < 32u;
    return select(q, better, normal);
}

// Sine and cosine: those of a device may be off by 2^-11 (Vulkan), and by more at large angles.
fn sin_cos(x: f32) -> vec2<f32> {
    let quadrant = round(x * 0.63661977);
    // Half of pi in three parts (Cody & Waite).
    let r = ((x - quadrant * 1.5703125) - quadrant * 4.837513e-4) - quadrant * 7.54979e-8;
    let z = r * r;
    let sine = ((-1.9515296e-4 * z + 8.332161e-3) * z - 1.6666655e-1) * z * r + r;
    let cosine = ((2.4433157e-5 * z - 1.3887316e-3) * z + 4.1666646e-2) * z * z - 0.5 * z + 1.0;
    let n = i32(quadrant);
    let turned = select(vec2(sine, cosine), vec2(cosine, sine), (n & 1) != 0);
    return select(turned, -turned, vec2((n & 2) != 0, ((n + 1) & 2) != 0));
}
