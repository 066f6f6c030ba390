//! Cycles of products on a matrix unit.
//!
//! An array of `R x C` cells works on a product in *folds*, as many as it takes to cover the two dimensions
//! that are laid over its rows and columns; through each fold the third dimension streams, one value a cycle.
//! Which is which is the dataflow:
//!
//! | dataflow          | over rows | over columns | streams | skew of a fold |
//! |-------------------|-----------|--------------|---------|----------------|
//! | output stationary | `m`       | `n`          | `k`     | `R + C - 2`    |
//! | weight stationary | `k`       | `n`          | `m`     | `2R + C - 2`   |
//! | input stationary  | `k`       | `m`          | `n`     | `2R + C - 2`   |
//!
//! The skew is what operands take to reach the farthest cell, and with a stationary operand also what it
//! takes to load it. A unit that is not pipelined pays it in each fold, which gives the closed forms of
//! SCALE-Sim (Samajdar et al., ISPASS 2020, as its version 3 counts: it reports the index of the last cycle,
//! one less than the cycles). A pipelined unit starts a fold while the one before drains, and pays once.

use halite_profiles::profile::{Dataflow, Matrix, MatrixRate};

/// A product of `m x k` activations with `k x n` weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// Rows of the activations and of the result.
    pub m: u64,
    /// Columns of the weights and of the result.
    pub n: u64,
    /// What is summed over.
    pub k: u64,
}

/// What a product takes on one unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cycles {
    /// Until the unit can take the next product.
    pub busy: f64,
    /// From then until the last result is out. A product that waits for the result waits for this too; none
    /// where the unit is not pipelined, which is busy until the end.
    pub drain: f64,
}

impl Cycles {
    /// From the first operand to the last result.
    pub fn total(self) -> f64 {
        self.busy + self.drain
    }
}

/// The cycles of a product on one unit, at `rate`.
///
/// A depth of `d >= 1` products a cycle shortens `k` to `ceil(k / d)`; one of `d < 1` makes each streamed
/// value take `ceil(1 / d)` cycles. `fill_cycles` of the profile takes the place of the skew; a fold takes
/// `min_issue_cycles` at least.
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
