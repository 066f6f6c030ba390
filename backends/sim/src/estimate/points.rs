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

/// The columns of measured kernels.
const COLUMNS: [&str; 18] = [
    "op",
    "activations",
    "weights",
    "seconds",
    "m",
    "n",
    "k",
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "kv_len",
    "tokens",
    "seen",
    "experts",
    "rows",
    "columns",
    "hidden",
];
/// Maximum characters of a cell in an error.
const MAX_SHOWN: usize = 64;

/// A CSV table of measurements. Lines that begin with `#` are comments.
pub(super) struct Table<'a> {
    origin: &'a str,
    names: Vec<&'a str>,
    lines: Vec<(usize, &'a str)>,
}

/// A row of a [`Table`].
pub(super) struct Row<'a> {
    place: String,
    names: &'a [&'a str],
    fields: Vec<&'a str>,
}

impl<'a> Table<'a> {
    /// `origin` names the table in errors.
    pub fn new(origin: &'a str, text: &'a str) -> Table<'a> {
        let mut lines =
            text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let names = lines.next().map_or(Vec::new(), |(_, names)| names.split(',').map(str::trim).collect());
        Table { origin, names, lines: lines.collect() }
    }

    /// Whether it has a column.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains(&name)
    }

    /// Reads each row of a table that has each column once, and none but those known.
    pub fn rows<T>(&self, known: &[&str], read: impl Fn(&Row<'_>) -> Result<T>) -> Result<Vec<T>> {
        for (i, name) in self.names.iter().enumerate() {
            let got = format!("{}: `{}`", self.origin, shown(name));
            if !known.contains(name) {
                let expected = format!("columns of {}", known.join(", "));
                return Err(Error::argument("measurements", expected, got));
            }
            if self.names[..i].contains(name) {
                return Err(Error::argument("measurements", "each column once", format!("{got} twice")));
            }
        }
        let row = |&(i, line): &(usize, &'a str)| {
            let fields: Vec<&str> = line.split(',').map(str::trim).collect();
            let row = Row { place: format!("{}, line {}", self.origin, i + 1), names: &self.names, fields };
            if row.fields.len() != self.names.len() {
                return Err(row.fail(&format!("{} fields", self.names.len()), &row.fields.len().to_string()));
            }
            read(&row)
        };
        self.lines.iter().map(row).collect()
    }
}

/// A cell, cut to a length.
fn shown(cell: &str) -> String {
    let cut: String = cell.chars().take(MAX_SHOWN).collect();
    if cut.len() < cell.len() { cut + "…" } else { cut }
}

impl Row<'_> {
    /// An error in this row.
    pub fn fail(&self, expected: &str, got: &str) -> Error {
        Error::argument("measurements", expected, format!("{}: {}", self.place, shown(got)))
    }

    /// The text of a column.
    pub fn text(&self, name: &str) -> Result<&str> {
        let index = self.names.iter().position(|n| *n == name);
        index
            .map(|i| self.fields[i])
            .ok_or_else(|| self.fail(&format!("a column `{name}`"), &self.names.join(",")))
    }

    /// A whole number above 0.
    pub fn count(&self, name: &str) -> Result<u64> {
        let field = self.text(name)?;
        let value = field.parse().ok().filter(|v| (1..=1 << 40).contains(v));
        value.ok_or_else(|| self.fail(&format!("{name} from 1 to 2^40"), field))
    }

    /// The column `seconds`.
    pub fn seconds(&self) -> Result<f64> {
        let field = self.text("seconds")?;
        let seconds = field.parse().ok().filter(|s: &f64| *s > 0.0 && s.is_finite());
        seconds.ok_or_else(|| self.fail("seconds above 0", field))
    }

    fn dtype(&self, name: &str) -> Result<Dtype> {
        let field = self.text(name)?;
        let dtype = Dtype::ALL.iter().find(|d| d.name() == field).copied();
        dtype.ok_or_else(|| self.fail(&format!("{name} as in profiles, such as bf16"), field))
    }
}

/// Parses the points of a CSV file; `origin` names it in errors.
///
/// # Errors
/// `Error::Argument` with the line that cannot be read, and the reason.
pub fn parse(origin: &str, text: &str) -> Result<Vec<Point>> {
    Table::new(origin, text).rows(&COLUMNS, point)
}

fn point(row: &Row<'_>) -> Result<Point> {
    let count = |name| row.count(name);
    let kernel = match row.text("op")? {
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
        other => return Err(row.fail("op matmul, attention, prefill or experts", other)),
    };
    let seconds = row.seconds()?;
    let formats = Formats { activations: row.dtype("activations")?, weights: row.dtype("weights")? };
    Ok(Point { kernel, formats, seconds })
}
