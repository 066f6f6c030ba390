// Quantises rows of activations; a workgroup has SPAN values.

fn activations(four: u32) -> vec4<f32> { return x[four]; }

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let start = in.workgroup.x * (SPAN / 16u);
    to_codes(in.local, in.workgroup.y * (K / 16u) + start, min(SPAN, K - 16u * start) / 16u);
}
