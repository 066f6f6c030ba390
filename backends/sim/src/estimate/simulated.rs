//! The interval of simulated chips.

use crate::Report;

/// Ratios measured / simulated between which 8 of 10 times lie: of 61 products in three formats on 13 x 10 and 11 x 10 cores of a p150, the
/// one measured chip with scratchpads (`tests/silicon.rs`). For other chips, and other ops, it is extrapolated.
pub const RATIOS: [f64; 2] = [0.93, 1.06];

/// Returns the seconds between which a step's ops are expected to lie in 8 of 10 cases, if the chip differs from its simulation as
/// the measured one does, and all ops in the same way. The profile's own numbers may be wrong besides.
pub(super) fn interval_s(report: &Report) -> [f64; 2] {
    RATIOS.map(|ratio| ratio * report.total().seconds)
}
