// Quantises the row that this workgroup has written.

fn activations(four: u32) -> vec4<f32> {
    return vec4(out[4u * four], out[4u * four + 1u], out[4u * four + 2u], out[4u * four + 3u]);
}

fn after(in: In) {
    storageBarrier();
    workgroupBarrier();
    for (var part = in.local; part < K / 32u; part += WORKGROUP) { quantise(in.workgroup.y, part); }
}
