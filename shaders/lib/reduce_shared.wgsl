// Sums over a workgroup of WORKGROUP invocations, in workgroup memory. Every invocation gets the result.

struct In {
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
}

var<workgroup> reduced: array<f32, WORKGROUP>;

fn sum_all(in: In, x: f32) -> f32 {
    reduced[in.local] = x;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half = half / 2u) {
        if in.local < half { reduced[in.local] += reduced[in.local + half]; }
        workgroupBarrier();
    }
    let sum = reduced[0];
    workgroupBarrier();
    return sum;
}
