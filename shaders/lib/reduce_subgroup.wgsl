// Sums over a workgroup of WORKGROUP invocations: within subgroups, then over them in workgroup memory. Every
// invocation gets the result.

struct In {
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
}

var<workgroup> reduced: array<f32, WORKGROUP>;

fn sum_all(in: In, x: f32) -> f32 {
    let part = subgroupAdd(x);
    if in.lane == 0u { reduced[in.subgroup] = part; }
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < in.subgroups; i++) { sum += reduced[i]; }
    workgroupBarrier();
    return sum;
}
