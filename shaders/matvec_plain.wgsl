// Products of a matrix of plain numbers with rows of activations: a workgroup has one row of the matrix and one of the
// activations.

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let row = in.workgroup.x + in.workgroup.y * in.workgroups.x;
    let token = in.workgroup.z;
    let matrix = matrix_of(token);
    let here = row < ROWS && is_here(matrix);
    var sum = 0.0;
    if here {
        let weights = ((matrix - FIRST_MATRIX) * ROWS + row) * K;
        let inputs = input_of(token) * K;
        for (var k = in.local; k < K; k += WORKGROUP) { sum += value(weights + k) * x[inputs + k]; }
    }
    sum = sum_all(in, sum);
    if here && in.local == 0u { store(token, row, matrix, sum); }
}
