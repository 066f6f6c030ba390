//! Measured kernels as CSV, and the choice of held-out ones.
//!
//! The first line names the columns, in any order: `op` (`matmul`, `attention`, `prefill` or `experts`),
//! `activations`, `weights` (formats; of the KV cache for attention) and `seconds`, with the fields of
//! [`Kernel`]: `m`, `n`, `k` for products; `batch`, `heads`, `kv_heads`, `head_dim`, `kv_len` for decode
//! attention, and also `tokens` and `seen` for prefill attention; `experts`, `rows`, `columns`, `hidden` for
//! experts. Lines that begin with `#` are comments.

use super::kernel::{Formats, Kernel};
use halite::{Error, Result};
use halite_profiles::numerics::Dtype;

/// A measured kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// The kernel.
    pub kernel: Kernel,
    /// Its formats.
    pub formats: Formats,
    /// Its time in seconds.
    pub seconds: f64,
}

/// The sizes that a model's layers fix, independent of batch and length. Points of one shape are fitted or
/// held out together.
pub type Shape = [u64; 3];

/// The shape of a kernel: columns and depth of a product or an expert, heads, KV heads and head dimension of
/// attention.
pub fn shape(kernel: Kernel) -> Shape {
    match kernel {
        Kernel::MatMul { n, k, .. } => [n, k, 0],
        Kernel::Experts { columns, hidden, .. } => [columns, hidden, 0],
        Kernel::Attention { heads, kv_heads, head_dim, .. }
        | Kernel::Prefill { heads, kv_heads, head_dim, .. } => [heads, kv_heads, head_dim],
    }
}

/// Whether a shape is held out from a fit to many shapes: about a third are, by a rule that ignores
/// measurements.
pub fn held_out(kernel: Kernel) -> bool {
    match (kernel, shape(kernel)) {
        (Kernel::MatMul { .. } | Kernel::Experts { .. }, [n, k, _]) => (n / 32 + k / 32).is_multiple_of(3),
        (Kernel::Attention { .. } | Kernel::Prefill { .. }, [heads, kv_heads, head_dim]) => {
            (heads + kv_heads + head_dim / 64).is_multiple_of(3)
        }
    }
}

/// Parses the points of a CSV file; `origin` names it in errors.
///
/// # Errors
/// `Error::Argument` with the line that cannot be read, and the reason.
pub fn parse(origin: &str, text: &str) -> Result<Vec<Point>> {
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let names: Vec<&str> =
        lines.next().map_or(Vec::new(), |(_, names)| names.split(',').map(str::trim).collect());
    lines.map(|(i, line)| point(&format!("{origin}, line {}", i + 1), &names, line)).collect()
}

fn point(place: &str, names: &[&str], line: &str) -> Result<Point> {
    let fail =
        |expected: String, got: &str| Error::argument("measurements", expected, format!("{place}: {got}"));
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    if fields.len() != names.len() {
        return Err(fail(format!("{} fields", names.len()), &format!("{}", fields.len())));
    }
    let text = |name: &str| {
        let index = names.iter().position(|n| *n == name);
        index.map(|i| fields[i]).ok_or_else(|| fail(format!("a column `{name}`"), &names.join(",")))
    };
    let count = |name: &str| {
        let field = text(name)?;
        let value = field.parse().ok().filter(|v| (1..=1 << 40).contains(v));
        value.ok_or_else(|| fail(format!("{name} from 1 to 2^40"), field))
    };
    let dtype = |name: &str| {
        let field = text(name)?;
        let dtype = Dtype::ALL.iter().find(|d| d.name() == field).copied();
        dtype.ok_or_else(|| fail(format!("{name} as in profiles, such as bf16"), field))
    };
    let kernel = match text("op")? {
        "matmul" => Kernel::MatMul { m: count("m")?, n: count("n")?, k: count("k")? },
        "attention" => Kernel::Attention {
            batch: count("batch")?,
            heads: count("heads")?,
            kv_heads: count("kv_heads")?,
            head_dim: count("head_dim")?,
            kv_len: count("kv_len")?,
        },
        "prefill" => Kernel::Prefill {
            batch: count("batch")?,
            heads: count("heads")?,
            kv_heads: count("kv_heads")?,
            head_dim: count("head_dim")?,
            tokens: count("tokens")?,
            kv_len: count("kv_len")?,
            seen: count("seen")?,
        },
        "experts" => Kernel::Experts {
            experts: count("experts")?,
            rows: count("rows")?,
            columns: count("columns")?,
            hidden: count("hidden")?,
        },
        other => return Err(fail("op matmul, attention, prefill or experts".into(), other)),
    };
    let seconds = text("seconds")?;
    let seconds = seconds.parse().ok().filter(|s: &f64| *s > 0.0 && s.is_finite());
    let seconds = seconds.ok_or_else(|| fail("seconds above 0".into(), text("seconds").unwrap_or("")))?;
    let formats = Formats { activations: dtype("activations")?, weights: dtype("weights")? };
    Ok(Point { kernel, formats, seconds })
}
