//! Times that follow from a profile, and the measurements that their constants are fitted to.
//!
//! `docs/timing-model.md` has the formulas, their errors on chips that were measured, and what they cannot
//! say.

pub mod collective;
pub mod device;
pub mod explore;
pub mod figures;
pub mod fit;
pub mod host;
pub mod kernel;
pub mod links;
pub mod load;
pub mod measure;
pub mod points;
pub mod system;
pub mod work;
pub mod workload;
