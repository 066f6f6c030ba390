//! Mixtures of experts: one product per expert, with the tokens that chose it. And products of blocks of columns, one per block.

use super::product::{Costs, product_programs};
use super::units::{units_closed, units_programs};
use super::{Ahead, Closed};
use crate::chip::{Chip, form_bytes};
use crate::shape::{Blocks, Epilogue, Experts, Part, Product, RowIndex, Rows, Units, X};
use crate::tile::{Lowered, Operand};
use halite::Result;

/// Operands besides the activations.
mod expert {
    use super::Operand;
    pub const WEIGHTS: [Operand; 3] = [Operand::In(1), Operand::In(2), Operand::In(3)];
    pub const BIASES: [Operand; 3] = [Operand::In(4), Operand::In(5), Operand::In(6)];
    pub const ROUTER_WEIGHTS: Operand = Operand::In(7);
    pub const HIDDEN: Operand = Operand::Temp(0);
    pub const OUTPUTS: Operand = Operand::Temp(1);
}

/// Experts that run at the same time, each on an equal share of the tiles. The first stage has the gate and
/// up products, the second the down products.
struct Wave {
    tiles: u32,
    stages: [Vec<Product>; 2],
}

/// Rows of a list.
fn listed(operand: Operand, elements: u32, list: Vec<u32>) -> Rows {
    Rows { index: RowIndex::Gather(list), ..Rows::own(operand, elements) }
}

fn experts_waves(chip: &Chip, e: &Experts) -> Vec<Wave> {
    let mut rows_of = vec![Vec::new(); e.experts as usize];
    for (pair, &id) in e.ids.iter().enumerate() {
        if let Some(rows) = rows_of.get_mut(id as usize) {
            rows.push(pair as u32);
        }
    }
    let chosen: Vec<(u32, &Vec<u32>)> = (0..).zip(&rows_of).filter(|(_, rows)| !rows.is_empty()).collect();
    let part = |which: usize, expert: u32, out: Operand| {
        let (n, k) = if which == 2 { (e.cols, e.hidden) } else { (e.hidden, e.cols) };
        let bytes = form_bytes(chip.stored(e.formats[which]), n, k);
        let bias = e.biases.then_some((expert::BIASES[which], 4 * u64::from(expert) * u64::from(n)));
        let weight = (expert::WEIGHTS[which], u64::from(expert) * bytes);
        Part { n, format: e.formats[which], weight, bias, out }
    };
    let wave = |experts: &[(u32, &Vec<u32>)]| {
        let gates = experts.iter().map(|&(i, rows)| Product {
            m: rows.len() as u32,
            k: e.cols,
            x: listed(X, e.cols, rows.iter().map(|pair| pair / e.used).collect()),
            parts: vec![part(0, i, expert::HIDDEN), part(1, i, expert::HIDDEN)],
            epilogue: Epilogue::Glu,
            out_rows: Some(rows.clone()),
        });
        let downs = experts.iter().map(|&(i, rows)| Product {
            m: rows.len() as u32,
            k: e.hidden,
            x: listed(expert::HIDDEN, e.hidden, rows.clone()),
            parts: vec![part(2, i, expert::OUTPUTS)],
            epilogue: Epilogue::None,
            out_rows: Some(rows.clone()),
        });
        Wave { tiles: chip.tiles / experts.len() as u32, stages: [gates.collect(), downs.collect()] }
    };
    chosen.chunks(chip.tiles.max(1) as usize).map(wave).collect()
}

/// Returns the weighted sum of each token's experts.
fn experts_sum(e: &Experts) -> Units {
    Units {
        count: e.tokens,
        pieces: 1,
        reads: vec![Rows::own(expert::OUTPUTS, e.used * e.cols), Rows::own(expert::ROUTER_WEIGHTS, e.used)],
        writes: vec![Rows::own(Operand::Out(0), e.cols)],
        work: [u64::from(e.used) * u64::from(e.cols), 0, 0, 0, 0],
    }
}

/// Returns the time of a mixture of experts by the closed form.
pub fn experts_closed(chip: &Chip, experts: &Experts) -> Result<Closed> {
    let mut all = Closed::none(chip);
    for wave in experts_waves(chip, experts) {
        for products in &wave.stages {
            all = all.then(stage_closed(chip, products, wave.tiles)?);
        }
    }
    Ok(all.then(units_closed(chip, &experts_sum(experts))?.after(chip.barrier_s())))
}

/// Returns the time of products on `tiles` tiles each. They share the memory bandwidth, and the stage ends with the last one.
fn stage_closed(chip: &Chip, products: &[Product], tiles: u32) -> Result<Closed> {
    let mut slowest = Closed::none(chip);
    for p in products {
        let closed = Costs::new(chip, p, tiles).closed(&mut None)?;
        if closed.seconds > slowest.seconds {
            slowest = closed;
        }
    }
    // Which experts run is known when the router has run.
    Ok(Closed { ahead: Ahead::default(), ..slowest.after(chip.barrier_s()) })
}

fn stage_phase(chip: &Chip, products: &[Product], tiles: u32, lowered: &mut Lowered) -> Result<()> {
    let programs: Result<Vec<_>> = products.iter().map(|p| product_programs(chip, p, tiles)).collect();
    lowered.phases.push(programs?.into_iter().flatten().collect());
    Ok(())
}

/// Returns the products of blocks that run at the same time, each on an equal share of the tiles.
fn blocks_waves(chip: &Chip, b: &Blocks) -> Vec<(u32, Vec<Product>)> {
    let bytes = form_bytes(chip.stored(b.format), b.n, b.k);
    let product = |block: u32| {
        let rows: Vec<u32> = (0..b.m).map(|row| row * b.blocks + block).collect();
        let weight = (expert::WEIGHTS[0], u64::from(block) * bytes);
        Product {
            m: b.m,
            k: b.k,
            x: listed(X, b.k, rows.clone()),
            parts: vec![Part { n: b.n, format: b.format, weight, bias: None, out: Operand::Out(0) }],
            epilogue: Epilogue::None,
            out_rows: Some(rows),
        }
    };
    let products: Vec<Product> = (0..b.blocks).map(product).collect();
    let waves = products.chunks(chip.tiles.max(1) as usize);
    waves.map(|wave| (chip.tiles / wave.len() as u32, wave.to_vec())).collect()
}

/// Returns the time of products of blocks by the closed form.
pub fn blocks_closed(chip: &Chip, blocks: &Blocks) -> Result<Closed> {
    let waves = blocks_waves(chip, blocks);
    let wave = |all: Closed, (tiles, products): &(u32, Vec<Product>)| {
        Ok(all.then(stage_closed(chip, products, *tiles)?))
    };
    waves.iter().try_fold(Closed::none(chip), wave)
}

pub fn blocks_phases(chip: &Chip, blocks: &Blocks, lowered: &mut Lowered) -> Result<()> {
    let waves = blocks_waves(chip, blocks);
    waves.iter().try_for_each(|(tiles, products)| stage_phase(chip, products, *tiles, lowered))
}

pub fn experts_phases(chip: &Chip, e: &Experts, lowered: &mut Lowered) -> Result<()> {
    let pairs = u64::from(e.tokens * e.used);
    lowered.temps.extend([4 * pairs * u64::from(e.hidden), 4 * pairs * u64::from(e.cols)]);
    for wave in experts_waves(chip, e) {
        for products in &wave.stages {
            stage_phase(chip, products, wave.tiles, lowered)?;
        }
    }
    lowered.phases.push(units_programs(chip, &experts_sum(e), 0)?);
    Ok(())
}
