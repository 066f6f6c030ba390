//! Cycles of matrix products on a matrix unit.
//!
//! An array of `R x C` cells computes a product in *folds*. Two dimensions of the product are mapped to the
//! rows and columns of the array; the folds cover them in pieces of `R x C`. In each fold the third dimension
//! streams through the array, one value per cycle. The dataflow defines the mapping:
//!
//! | dataflow          | over rows | over columns | streams | skew of a fold |
//! |-------------------|-----------|--------------|---------|----------------|
//! | output stationary | `m`       | `n`          | `k`     | `R + C - 2`    |
//! | weight stationary | `k`       | `n`          | `m`     | `2R + C - 2`   |
//! | input stationary  | `k`       | `m`          | `n`     | `2R + C - 2`   |
//!
//! The skew is the number of cycles until operands reach the farthest cell, plus the cycles to load a
//! stationary operand. A unit without pipelining pays the skew in each fold. This gives the closed forms of
//! SCALE-Sim (Samajdar et al., ISPASS 2020); its version 3 reports the index of the last cycle, which is one
//! less than the number of cycles. A pipelined unit starts a fold while the previous one drains, and pays the
//! skew once.

use halite_profiles::profile::{Dataflow, Matrix, MatrixRate};

/// A product of `m x k` activations with `k x n` weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Rows of the activations and of the result.
    pub m: u64,
    /// Columns of the weights and of the result.
    pub n: u64,
    /// Columns of the activations and rows of the weights: the dimension of the sums.
    pub k: u64,
}

/// The cycles of a product on one unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cycles {
    /// Cycles until the unit can start the next product.
    pub busy: f64,
    /// Cycles from there to the last result. A command that reads the result waits for them. Zero without
    /// pipelining, because then the unit is busy until the end.
    pub drain: f64,
}

impl Cycles {
    /// Returns the cycles from the first operand to the last result.
    pub fn total(self) -> f64 {
        self.busy + self.drain
    }
}

/// Returns the cycles of a product on one unit, at `rate`.
///
/// A cell that computes `d >= 1` products per cycle shortens `k` to `ceil(k / d)`. With `d < 1`, each
/// streamed value takes `ceil(1 / d)` cycles. The profile's `fill_cycles` replaces the skew, and a fold takes
/// at least `min_issue_cycles`.
pub fn cycles(unit: &Matrix, rate: &MatrixRate, product: Product) -> Cycles {
    let Product { m, n, k } = product;
    let (rows, columns) = (unit.rows.value, unit.columns.value);
    let depth = rate.depth_per_cycle.value;
    let k = (k as f64 / depth.max(1.0)).ceil();
    let cycles_per_value = (1.0 / depth).max(1.0).ceil();
    let (m, n) = (m as f64, n as f64);
    let (over_rows, over_columns, streamed, load) = match unit.dataflow {
        Dataflow::OutputStationary => (m, n, k, 0.0),
        Dataflow::WeightStationary => (k, n, m, rows),
        Dataflow::InputStationary => (k, m, n, rows),
    };
    let folds = (over_rows / rows).ceil() * (over_columns / columns).ceil();
    if folds == 0.0 || streamed == 0.0 {
        return Cycles { busy: 0.0, drain: 0.0 };
    }
    let fill = unit.fill_cycles.as_ref().map_or(load + rows + columns - 2.0, |fill| fill.value);
    let least = unit.min_issue_cycles.as_ref().map_or(0.0, |least| least.value);
    let stream = streamed * cycles_per_value;
    if unit.pipelined {
        Cycles { busy: folds * stream.max(least), drain: fill }
    } else {
        Cycles { busy: folds * (stream + fill).max(least), drain: 0.0 }
    }
}
