//! Finds numbers of a profile by their paths.

use super::*;

/// A part of a profile that has numbers.
pub(super) trait Numbers {
    /// Returns the number at a path below this part, such as `hbm.latency_ns` below the memories.
    fn number(&mut self, path: &str) -> Option<&mut Quantity>;

    /// Returns the name in a list; parts without one go by their number.
    fn name(&self) -> Option<&str> {
        None
    }
}

impl Numbers for Quantity {
    fn number(&mut self, path: &str) -> Option<&mut Quantity> {
        path.is_empty().then_some(self)
    }
}

impl<T: Numbers> Numbers for Option<T> {
    fn number(&mut self, path: &str) -> Option<&mut Quantity> {
        self.as_mut()?.number(path)
    }
}

impl<T: Numbers> Numbers for Vec<T> {
    fn number(&mut self, path: &str) -> Option<&mut Quantity> {
        self.iter_mut().enumerate().find_map(|(i, item)| {
            let rest = match item.name() {
                Some(name) => below(path, name)?,
                None => below(path, &i.to_string())?,
            };
            item.number(rest)
        })
    }
}

/// Returns what follows a name at the start of a path. The name may have dots.
fn below<'a>(path: &'a str, name: &str) -> Option<&'a str> {
    let rest = path.strip_prefix(name)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('.') }
}

/// Lists the fields of each table that have numbers, and the name of those that have one.
macro_rules! numbers {
    ($($table:ident $(($name:ident))?: $($field:ident)*;)*) => {$(
        impl Numbers for $table {
            fn number(&mut self, path: &str) -> Option<&mut Quantity> {
                let (key, rest) = path.split_once('.').unwrap_or((path, ""));
                match key {
                    $(stringify!($field) => self.$field.number(rest),)*
                    _ => None,
                }
            }

            $(fn name(&self) -> Option<&str> {
                Some(&self.$name)
            })?
        }
    )*};
}

numbers! {
    Profile: chip matrix vector memory dma noc sync launch interconnect power price calibration;
    Chip: clock_hz clusters tiles_per_cluster;
    Matrix: units_per_tile rows columns clock_hz fill_cycles min_issue_cycles accumulator_bytes rate;
    MatrixRate: depth_per_cycle dense_ops_per_s sparse_ops_per_s achievable_fraction pj_per_op;
    Vector: units_per_tile clock_hz open_cycles dependent_cycles exp_cycles rsqrt_cycles divide_cycles quantize_cycles rate;
    VectorRate: ops_per_cycle dense_ops_per_s achievable_fraction pj_per_op;
    Memory(name): capacity_bytes read_bytes_per_s write_bytes_per_s latency_ns banks line_bytes achievable_fraction pj_per_byte;
    Dma(name): engines bytes_per_s setup_ns descriptor_ns half_rate_run_bytes max_dimensions queue_entries;
    Noc: link_bytes_per_cycle hop_cycles;
    Sync: semaphore_ns barrier_ns;
    Launch: kernel_ns graph_kernel_ns step_ns host_bytes_per_s;
    Interconnect(name): chips links link_bytes_per_s latency_ns pj_per_byte;
    Power: tdp_w provisioned_w idle_w;
    Price: usd_per_hour chip_usd lifetime_years usd_per_kwh utilisation_fraction;
    Calibration: matmul attention prefill experts host collective;
    HostRates: threads op_ns integer_ops_per_s float_ops_per_s row_bytes_per_s attend_bytes_per_s attend_ops_per_s level product;
    HostLevel(name): read_bytes_per_s copy_bytes_per_s;
    HostProduct: weight_bytes_per_s product_ops_per_s;
    MatMulFit: compute_fraction memory_fraction overhead_ns wave_ns split_ns overlap_exponent errors;
    CollectiveFit: overhead_ns hop_ns small_fraction bulk_ns bulk_fraction direct_ns direct_fraction errors;
    AttentionFit: memory_fraction cache_fraction resident_fraction overhead_ns item_ns tile_bytes_per_s split_ns overlap_exponent errors;
    PrefillFit: compute_fraction memory_fraction overhead_ns item_ns block_ns overlap_exponent errors;
    FitErrors: points mean_error_fraction worst_error_fraction small_error_fraction memory_error_fraction compute_error_fraction interval;
    FitInterval: low_ratio high_ratio coverage_fraction;
}
