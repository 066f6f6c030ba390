// Quantises the row that this workgroup has written.

const SPAN: u32 = K;

fn activations(four: u32) -> vec4<f32> {
    return vec4(out[4u * four], out[4u * four + 1u], out[4u * four + 2u], out[4u * four + 3u]);
}

fn after(in: In) {
    storageBarrier();
    workgroupBarrier();
    to_codes(in.local, in.workgroup.y * (K / 16u), K / 16u);
}
