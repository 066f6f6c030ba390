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
