// A workgroup's SLICES of each sum, added in its memory.
var<workgroup> partial: array<vec4<f32>, 16u * SLICES>;

fn add_slices(lane: u32, slice: u32, acc: vec4<f32>) -> vec4<f32> {
    partial[slice * 16u + lane] = acc;
    workgroupBarrier();
    var sum = vec4(0.0);
    for (var s = 0u; s < SLICES; s++) { sum += partial[s * 16u + lane]; }
    workgroupBarrier();
    return sum;
}
