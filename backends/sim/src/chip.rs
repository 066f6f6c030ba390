//! The simulated chip: its shape, and the time of each command.

use std::sync::Arc;

use halite_kernels::formats::{Activation, Format, Kind};

use super::matrix::{self, Product};
use super::places::{Amounts, Data, Places, Tier, Traffic, dma_bytes_per_s};
use super::tile::{Form, Piece, VectorWork, Work};
use halite::{Error, Result};
use halite_profiles::numerics::{self, Dtype};
use halite_profiles::profile::{Dataflow, Dma, MatrixRate, Memory, Profile, Quantity, Scope};

/// The numerics of the simulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Numerics {
    /// The bits of the numeric contract; times are those of the chip's formats.
    #[default]
    Exact,
    /// The chip's formats.
    Native,
}

/// A chip, as lowering needs it.
#[derive(Debug, Clone)]
pub struct Chip {
    pub(crate) profile: Arc<Profile>,
    /// Numerics.
    pub numerics: Numerics,
    /// Format of all products; `None`: the nearest to each weight's.
    pub products: Option<Dtype>,
    /// Format of activations in device memory, for times. Results always use 32-bit floats.
    pub activations: Dtype,
    /// Format of the weights of products in device memory, for times; `None`: that of the file.
    pub stored: Option<Dtype>,
    /// Bytes that the KV cache takes in device memory per byte here, for times.
    pub cache_fraction: f64,
    /// Whether half of each four weights of products are zeros, which are neither stored nor multiplied.
    pub sparse: bool,
    /// Tiles.
    pub tiles: u32,
    /// Bytes of a tile's scratchpad.
    pub scratch_bytes: u64,
    pub(crate) scratch: usize,
    places: Places,
    /// The rate of the vector unit's widest format.
    vector_rate: usize,
    /// The engines nearest to tiles.
    nearest_dma: Option<usize>,
    queue_entries: usize,
}

/// How a weight is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Multiplication {
    /// The rate of the matrix unit.
    pub rate: usize,
    /// Form of activations in the scratchpad.
    pub x: Form,
    /// Form of weights for the unit.
    pub w: Form,
    /// Whether the vector unit converts activations for the matrix unit.
    pub converts: bool,
    /// Whether the vector unit converts the stored weights.
    pub unpacks: bool,
}

/// Maximum number of tiles: each has commands of its own, and takes time to simulate.
const MOST_TILES: u32 = 16_384;

impl Chip {
    /// Creates the chip of a profile.
    ///
    /// # Errors
    /// [`Error::Argument`] if the profile has no tile memory, or no `products` of that format.
    pub fn new(
        profile: impl Into<Arc<Profile>>,
        numerics: Numerics,
        products: Option<Dtype>,
    ) -> Result<Chip> {
        let profile = profile.into();
        let of_tile = |m: &(usize, &Memory)| m.1.scope == Scope::Tile;
        let size = |m: &(usize, &Memory)| m.1.capacity_bytes.value;
        let tile_memories = profile.memory.iter().enumerate().filter(of_tile);
        let scratch = tile_memories.max_by(|a, b| size(a).total_cmp(&size(b))).map(|(i, _)| i);
        let Some(scratch) = scratch.filter(|&i| i + 1 < profile.memory.len()) else {
            let expected = "a memory of each tile, and one behind it";
            return Err(Error::argument("profile", expected, format!("`{}` without", profile.name)));
        };
        let scratch_bytes = profile.memory[scratch].capacity_bytes.value as u64;
        let tiles = profile.tiles() as u32;
        if tiles > MOST_TILES {
            let found = format!("{tiles} in `{}`", profile.name);
            return Err(Error::argument(
                "number of tiles to simulate",
                format!("at most {MOST_TILES}"),
                found,
            ));
        }
        let rates = profile.vector.rate.iter().enumerate();
        let widest = rates.max_by(|a, b| a.1.dtype.bits().total_cmp(&b.1.dtype.bits()));
        let engines = profile.dma.iter().enumerate();
        let nearest_dma = engines.min_by_key(|(_, dma)| dma.scope).map(|(i, _)| i);
        let entries = |i: usize| profile.dma[i].queue_entries.as_ref().map_or(1.0, |entries| entries.value);
        let places = places(&profile, nearest_dma, Amounts::default());
        let chip = Chip {
            // Caches prefetch.
            queue_entries: nearest_dma.map_or(16, |i| entries(i) as usize).max(1),
            vector_rate: widest.map_or(0, |(rate, _)| rate),
            nearest_dma,
            profile,
            numerics,
            products,
            activations: Dtype::Fp32,
            stored: None,
            cache_fraction: 1.0,
            sparse: false,
            tiles,
            scratch_bytes,
            scratch,
            places,
        };
        if let Some(dtype) = products
            && !chip.rates().any(|(_, _, weights)| weights == dtype)
        {
            let have: Vec<_> = chip.rates().map(|(_, _, weights)| weights.name()).collect();
            return Err(Error::argument("product format", have.join(", "), dtype.name()));
        }
        Ok(chip)
    }

    /// The profile.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Whether products can be computed in all of the chip's formats.
    ///
    /// # Errors
    /// [`Error::Argument`] with the unsupported accumulator format.
    pub fn check_native(&self) -> Result<()> {
        let sums = |rate: &(usize, Dtype, Dtype)| self.formats(rate.0).2;
        let bad = self.rates().map(|rate| sums(&rate)).find(|d| !matches!(d, Dtype::Fp32 | Dtype::Int32));
        match bad {
            Some(dtype) => {
                Err(Error::argument("accumulator", "fp32 or int32, for native numerics", dtype.name()))
            }
            None => Ok(()),
        }
    }

    /// Gives data their places: activations, weights and the cache each in the nearest memory with room. Until then, all of them lie in the
    /// last one.
    pub fn place(&mut self, amounts: Amounts) {
        self.places = places(&self.profile, self.nearest_dma, amounts);
    }

    /// Where data lie.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Bytes of weights per second that all tiles together read, from all memories that hold a part of them.
    pub fn weights_bytes_per_s(&self) -> f64 {
        let holds = |tier: &&Tier| tier.share(Data::Weights) > 0.0;
        let held =
            self.places.tiers.iter().filter(holds).map(|tier| tier.bytes_per_s / tier.share(Data::Weights));
        held.fold(f64::INFINITY, f64::min)
    }

    /// Returns the seconds that the memories outside of the tiles need for some bytes of all tiles.
    pub fn memory_s(&self, traffic: &Traffic) -> f64 {
        self.places.seconds(traffic)
    }

    /// The tiles' memory.
    pub fn scratchpad(&self) -> &Memory {
        &self.profile.memory[self.scratch]
    }

    /// Rates of products by number: activations, weights. Without a matrix unit they are those of the vector
    /// unit.
    fn rates(&self) -> impl Iterator<Item = (usize, Dtype, Dtype)> {
        let matrix = self.profile.matrix.iter().flat_map(|m| &m.rate).map(|r| (r.activations, r.weights));
        let vector = self.profile.vector.rate.iter().map(|r| (r.dtype, r.dtype));
        let without = self.profile.matrix.is_none();
        matrix.chain(vector.filter(move |_| without)).enumerate().map(|(i, (x, w))| (i, x, w))
    }

    /// Returns the form of a product's weight in device memory.
    pub fn stored(&self, weight: Format) -> Form {
        match (self.stored, self.sparse) {
            (None, false) => Form::File(weight),
            _ => Form::Packed((PACKED_BITS * stored_bits(weight, self.stored, self.sparse)).ceil() as u32),
        }
    }

    /// Returns how a weight is multiplied: in the chip's format nearest to the weight's, or in the requested
    /// one.
    pub fn multiplication(&self, weight: Format, k: u32) -> Multiplication {
        let preferences = match self.products {
            Some(dtype) => vec![dtype],
            None => self.stored.into_iter().chain(preferences(weight)).collect(),
        };
        let fits = |d: Dtype| (k as usize).is_multiple_of(d.block_len());
        let find = |dtype: Dtype| self.rates().find(|&(_, x, w)| w == dtype && fits(w) && fits(x));
        let any = || self.rates().find(|&(_, x, w)| fits(w) && fits(x)).or(self.rates().next());
        let found = preferences.into_iter().find_map(find).or_else(any);
        let (rate, x, w) = found.unwrap_or((0, Dtype::Fp32, Dtype::Fp32));
        let unpacks =
            !self.dma().is_some_and(|dma| dma.unpacks) && self.stored.or(stored_as(weight)) != Some(w);
        let converts = self.activations != x;
        let (x, w) = match (self.numerics, weight.kind()) {
            (Numerics::Native, _) => (Form::Chip(x), Form::Chip(w)),
            (Numerics::Exact, Kind::Float) => (Form::F32, self.stored(weight)),
            (Numerics::Exact, Kind::Quantised { activation, .. }) => {
                (Form::Quantised(activation), self.stored(weight))
            }
        };
        Multiplication { rate, x, w, converts, unpacks }
    }

    /// The rate of attention's products: the fastest float format of at least half precision, or the fastest
    /// of all.
    pub fn attention_rate(&self) -> usize {
        let keeps = [Dtype::Bf16, Dtype::Fp16, Dtype::Tf32, Dtype::Fp32];
        let float = keeps.iter().find_map(|d| self.rates().find(|&(_, x, w)| x == *d && w == *d));
        float.or_else(|| self.rates().next()).map_or(0, |(rate, ..)| rate)
    }

    /// The format in which the vector unit computes.
    pub fn vector_dtype(&self) -> Dtype {
        self.profile.vector.rate.get(self.vector_rate).map_or(Dtype::Fp32, |rate| rate.dtype)
    }

    /// The formats of a rate: of activations, weights and sums.
    pub fn formats(&self, rate: usize) -> (Dtype, Dtype, Dtype) {
        match self.profile.matrix.as_ref().and_then(|m| m.rate.get(rate)) {
            Some(rate) => (rate.activations, rate.weights, rate.accumulator),
            None => {
                let dtype = self.profile.vector.rate.get(rate).map_or(Dtype::Fp32, |rate| rate.dtype);
                (dtype, dtype, Dtype::Fp32)
            }
        }
    }

    /// Returns the seconds that a unit is busy with work, and the seconds from then to its last result.
    pub fn compute_s(&self, work: Work) -> (f64, f64) {
        match work {
            Work::Matrix { rate, m, n, k, sums_bytes, sparse } => {
                let Some(unit) = &self.profile.matrix else {
                    let all = u64::from(m) * u64::from(n) * u64::from(k);
                    return self.vector_s(VectorWork { simple: all, ..Default::default() }, rate);
                };
                let Some(rate) = unit.rate.get(rate) else { return (0.0, 0.0) };
                let clock_hz = unit.clock_hz.as_ref().unwrap_or(&self.profile.chip.clock_hz).value;
                let product = Product { m: m.into(), n: n.into(), k: k.into() };
                let cycles = matrix::cycles(unit, rate, product);
                let sums_s = sums_bytes as f64 / self.scratchpad().read_bytes_per_s.value;
                let gain = if sparse { self.sparse_gain(rate) } else { 1.0 };
                let busy =
                    cycles.busy / unit.units_per_tile.value / achieved(&rate.achievable_fraction) / gain;
                (busy / clock_hz + sums_s, cycles.drain / clock_hz)
            }
            Work::Vector(work) => self.vector_s(work, self.vector_rate),
        }
    }

    /// How many times as fast as others products with sparse weights are; 1 if the profile does not say.
    fn sparse_gain(&self, rate: &MatrixRate) -> f64 {
        let sparse = rate.sparse_ops_per_s.as_ref().zip(self.profile.matrix.as_ref());
        sparse.map_or(1.0, |(sparse, unit)| sparse.value / self.profile.matrix_ops_per_s(unit, rate))
    }

    /// Lanes of a tile's vector units at a rate.
    fn lanes(&self, rate: usize) -> f64 {
        let unit = &self.profile.vector;
        // A fused multiply-add counts as two operations, and a lane does one per cycle.
        unit.rate.get(rate).map_or(1.0, |r| r.ops_per_cycle.value / 2.0) * unit.units_per_tile.value
    }

    /// Lanes of a tile's vector units, in the format in which they compute.
    pub fn vector_lanes(&self) -> u32 {
        self.lanes(self.vector_rate).max(1.0) as u32
    }

    /// Columns of the matrix unit's array, and whether they hold rows of results instead of columns.
    pub fn matrix_lanes(&self) -> Option<(u32, bool)> {
        let unit = self.profile.matrix.as_ref()?;
        Some((unit.columns.value.max(1.0) as u32, unit.dataflow == Dataflow::InputStationary))
    }

    /// Whether a tile's matrix units keep this many bytes of sums. A profile that does not say how many they keep sets no limit.
    pub fn keeps_sums(&self, bytes: u64) -> bool {
        let unit = self.profile.matrix.as_ref();
        let of_unit = unit.and_then(|unit| Some((unit, unit.accumulator_bytes.as_ref()?)));
        of_unit.is_none_or(|(unit, each)| bytes as f64 <= each.value * unit.units_per_tile.value)
    }

    fn vector_s(&self, work: VectorWork, rate: usize) -> (f64, f64) {
        let unit = &self.profile.vector;
        let clock_hz = unit.clock_hz.as_ref().unwrap_or(&self.profile.chip.clock_hz).value;
        let lanes = self.lanes(rate);
        let cycles =
            |n: u64, of: &Option<Quantity>| n as f64 * of.as_ref().map_or(1.0, |cycles| cycles.value);
        let elements = work.simple as f64
            + cycles(work.exp, &unit.exp_cycles)
            + cycles(work.rsqrt, &unit.rsqrt_cycles)
            + cycles(work.divide, &unit.divide_cycles)
            + cycles(work.quantize, &unit.quantize_cycles);
        let of_peak = unit.rate.get(rate).map_or(1.0, |rate| achieved(&rate.achievable_fraction));
        let open = unit.open_cycles.as_ref().map_or(0.0, |open| open.value);
        let dependent = unit.dependent_cycles.as_ref().map_or(0.0, |cycles| cycles.value);
        if elements == 0.0 {
            return (0.0, 0.0);
        }
        (((elements / lanes / of_peak).ceil() + open) / clock_hz, dependent / clock_hz)
    }

    /// Returns the picojoules of work, if the profile has them.
    pub fn compute_pj(&self, work: Work) -> Option<f64> {
        match (work, &self.profile.matrix) {
            (Work::Matrix { rate, m, n, k, sparse, .. }, Some(unit)) => {
                let ops = 2.0 * f64::from(m) * f64::from(n) * f64::from(k);
                let ops = if sparse { ops / 2.0 } else { ops };
                Some(ops * unit.rate.get(rate)?.pj_per_op.as_ref()?.value)
            }
            (Work::Matrix { rate, m, n, k, .. }, None) => {
                let ops = 2.0 * f64::from(m) * f64::from(n) * f64::from(k);
                Some(ops * self.profile.vector.rate.get(rate)?.pj_per_op.as_ref()?.value)
            }
            // Small compared with the rest, and often unknown: ignored if the profile does not have it.
            (Work::Vector(work), _) => {
                let ops = work.simple + work.exp + work.rsqrt + work.divide + work.quantize;
                let dtype = self.vector_dtype();
                let rate = self.profile.vector.rate.iter().find(|r| r.dtype == dtype)?;
                Some(ops as f64 * rate.pj_per_op.as_ref().map_or(0.0, |pj| pj.value))
            }
        }
    }

    /// The engines that serve tiles: the ones nearest to them.
    pub fn dma(&self) -> Option<&Dma> {
        self.profile.dma.get(self.nearest_dma?)
    }

    /// Returns the maximum bytes per second of a tile's engine for one direction.
    pub fn engine_bytes_per_s(&self) -> f64 {
        let clock_hz = self.profile.chip.clock_hz.value;
        let port = self.profile.noc.as_ref().map(|noc| noc.link_bytes_per_cycle.value * clock_hz);
        let most = self.scratchpad().read_bytes_per_s.value.min(port.unwrap_or(f64::INFINITY));
        match self.dma() {
            // One engine stores, and the others load.
            Some(dma) if dma.scope == Scope::Tile => {
                let loading = (dma.engines.value - 1.0).max(1.0);
                (dma.bytes_per_s.value * loading).min(most)
            }
            Some(dma) => dma.bytes_per_s.value.min(most),
            None => most,
        }
    }

    /// Returns the maximum requests in flight of an engine; many for caches, which prefetch.
    pub fn queue_entries(&self) -> usize {
        self.queue_entries
    }

    /// Returns the seconds from a request to its first byte.
    pub fn setup_s(&self, piece: &Piece) -> f64 {
        let dma = self.dma();
        let setup_ns = dma.map_or(0.0, |dma| dma.setup_ns.value);
        let descriptor_ns = dma.and_then(|dma| dma.descriptor_ns.as_ref()).map_or(0.0, |ns| ns.value);
        let dimensions = dma.and_then(|dma| dma.max_dimensions.as_ref()).map_or(1.0, |n| n.value);
        // With two dimensions, one descriptor covers all runs of a piece.
        let descriptors = if dimensions >= 2.0 { 1.0 } else { f64::from(piece.runs) };
        1e-9 * (setup_ns + descriptors * descriptor_ns) + self.places.latency_s(piece.data)
    }

    /// Bytes that a 32-bit activation takes in device memory.
    pub fn activation_bytes(&self) -> f64 {
        self.activations.bits() / 8.0
    }

    /// Fraction of its bytes that a piece takes in device memory.
    fn kept(&self, data: Data) -> f64 {
        match data {
            Data::Activations => self.activation_bytes() / 4.0,
            Data::Cache => self.cache_fraction,
            Data::Weights | Data::States | Data::Partial => 1.0,
        }
    }

    /// Bytes of a piece in device memory.
    pub fn memory_bytes(&self, piece: &Piece) -> f64 {
        piece.bytes() as f64 * self.kept(piece.data)
    }

    /// Effective bytes of a piece: short runs are slower.
    pub fn transfer_bytes(&self, piece: &Piece) -> f64 {
        self.memory_bytes(piece) * self.slowed(piece)
    }

    /// How many times as long as at the engine's rate a piece takes because of its short runs.
    pub fn slowed(&self, piece: &Piece) -> f64 {
        let half = self.dma().and_then(|dma| dma.half_rate_run_bytes.as_ref()).map_or(0.0, |half| half.value);
        let run = (f64::from(piece.run_bytes) * self.kept(piece.data)).max(1.0);
        (run + half) / run
    }

    /// Number of tiles that share one read of device memory, if `sharers` tiles load the same bytes.
    pub fn multicast(&self, sharers: u32) -> u32 {
        let between = &self.profile.memory[self.scratch + 1..self.profile.memory.len() - 1];
        let shared = |scope| between.iter().any(|m| m.scope == scope);
        let broadcast = self.profile.noc.as_ref().is_some_and(|noc| noc.broadcast);
        if broadcast || shared(Scope::Chip) {
            sharers.max(1)
        } else if shared(Scope::Cluster) {
            sharers.clamp(1, self.profile.chip.tiles_per_cluster.value as u32)
        } else {
            1
        }
    }

    /// Returns the seconds from a signal to the end of the wait.
    pub fn semaphore_s(&self) -> f64 {
        self.profile.sync.as_ref().map_or(0.0, |sync| 1e-9 * sync.semaphore_ns.value)
    }

    /// Returns the seconds of a barrier of all tiles; 0 for a single tile.
    pub fn barrier_s(&self) -> f64 {
        let barrier = self.profile.sync.as_ref().and_then(|sync| sync.barrier_ns.as_ref());
        if self.tiles > 1 { barrier.map_or(0.0, |ns| 1e-9 * ns.value) } else { 0.0 }
    }

    /// Whether the first weights of an op are loaded while the op before it runs.
    pub fn loads_ahead(&self) -> bool {
        self.profile.launch.loads_ahead
    }

    /// Seconds to start an op of a recorded step.
    pub fn launch_s(&self) -> f64 {
        let launch = &self.profile.launch;
        1e-9 * launch.graph_kernel_ns.as_ref().unwrap_or(&launch.kernel_ns).value
    }
}

/// Returns the places of data on a chip. Engines that tiles share bound what all of them move.
fn places(profile: &Profile, nearest_dma: Option<usize>, amounts: Amounts) -> Places {
    let shared = nearest_dma.and_then(|i| profile.dma.get(i)).filter(|dma| dma.scope != Scope::Tile);
    Places::new(profile, shared.map(|dma| dma_bytes_per_s(profile, dma)), amounts)
}

/// Fractions of a bit in [`Form::Packed`].
const PACKED_BITS: f64 = 64.0;

/// Returns the bits of a value in a format of files, scales included.
pub fn file_bits(format: Format) -> f64 {
    8.0 * format.block_bytes() as f64 / format.block_len() as f64
}

/// Returns the bits of a product's weight in device memory, scales included: in the format of the file or in one of the chip. Of sparse
/// weights, two of each four are stored, and a bit for each of the four says which.
pub fn stored_bits(weight: Format, stored: Option<Dtype>, sparse: bool) -> f64 {
    let bits = stored.map_or_else(|| file_bits(weight), Dtype::bits);
    if sparse { bits / 2.0 + 1.0 } else { bits }
}

/// Returns the chip's format with the same bits as the weight's, if there is one.
pub(crate) fn stored_as(weight: Format) -> Option<Dtype> {
    match weight {
        Format::F32 => Some(Dtype::Fp32),
        Format::F16 => Some(Dtype::Fp16),
        Format::BF16 => Some(Dtype::Bf16),
        Format::MXFP4 => Some(Dtype::Mxfp4),
        _ => None,
    }
}

/// Ranks a chip's formats for a weight: the weight's own; else, for codes of up to 8 bits, 8-bit formats,
/// integers first; else floats from the narrowest with 8 bits of precision.
fn preferences(weight: Format) -> Vec<Dtype> {
    use Dtype::*;
    let own = stored_as(weight);
    let rest: &[Dtype] = match weight.kind() {
        Kind::Quantised { .. } => &[Mxint8, Mx9, Int8, Mxfp8E4m3, Fp8E4m3, Bf16, Fp16, Tf32, Fp32],
        Kind::Float => &[Bf16, Fp16, Tf32, Fp32, Mx9, Mxint8, Int8, Mxfp8E4m3, Fp8E4m3],
    };
    own.into_iter().chain(rest.iter().copied()).collect()
}

/// Bytes of `rows` rows of `k` elements in a form.
pub fn form_bytes(form: Form, rows: u32, k: u32) -> u64 {
    let (rows, k) = (u64::from(rows), u64::from(k));
    let row = match form {
        Form::F32 => 4 * k,
        Form::File(format) => format.row_bytes(k as usize).unwrap_or(0) as u64,
        Form::Packed(bits) => (u64::from(bits) * k).div_ceil(8 * PACKED_BITS as u64),
        Form::Quantised(activation) => {
            let [codes, scales, sums] = quantised_row(activation, k);
            codes + scales + sums
        }
        Form::Chip(dtype) => match dtype.format() {
            // A row of integers has a scale.
            numerics::Format::Element(element) => {
                let scale = if matches!(element, numerics::Element::Fixed { .. }) { 4 } else { 0 };
                k * u64::from(element.bits().div_ceil(8)) + scale
            }
            numerics::Format::Block(block) => k + 2 * k.div_ceil(block.len as u64),
        },
    };
    rows * row
}

/// Bytes of a row of quantised activations: codes, scales, sums.
pub fn quantised_row(activation: Activation, k: u64) -> [u64; 3] {
    use halite_kernels::activation::{PADDING, SUMS, padded};
    let padded = padded(k as usize) as u64;
    [padded, 4 * padded / activation.block_len() as u64, 4 * padded / PADDING as u64 * SUMS as u64]
}

fn achieved(fraction: &Option<Quantity>) -> f64 {
    fraction.as_ref().map_or(1.0, |fraction| fraction.value)
}
