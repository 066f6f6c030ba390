// Quantises rows of activations; an invocation has 32 values.

fn activations(four: u32) -> vec4<f32> { return x[four]; }

@compute @workgroup_size(64)
fn main(in: In) {
    let part = 64u * in.workgroup.x + in.local;
    if part < K / 32u { quantise(in.workgroup.y, part); }
}
