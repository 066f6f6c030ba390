//! Cycles of matrix units: without pipelining against SCALE-Sim (`tests/scripts/systolic.py`), with it against the profile's numbers.

use halite_profiles::profile::{Dataflow, Matrix, Profile};
use halite_sim::matrix::{Product, cycles};

const REPORTS: &str = include_str!("data/systolic.csv");

/// The teaching chip's array, of another size.
fn array(rows: f64, columns: f64, dataflow: Dataflow) -> Matrix {
    let mut unit = Profile::open("teaching-16x16").unwrap().matrix.unwrap();
    (unit.rows.value, unit.columns.value, unit.dataflow) = (rows, columns, dataflow);
    unit
}

#[test]
fn arrays_take_the_cycles_that_scale_sim_counts() {
    let lines = REPORTS.lines().filter(|line| !line.starts_with('#')).skip(1);
    let mut checked = [0; 3];
    for line in lines {
        let fields: Vec<&str> = line.split(',').collect();
        let numbers: Vec<u64> = fields[1..].iter().map(|f| f.parse().unwrap()).collect();
        let [rows, columns, m, n, k, last_cycle] = numbers[..] else { panic!("{line}") };
        let (index, dataflow) = match fields[0] {
            "output_stationary" => (0, Dataflow::OutputStationary),
            "weight_stationary" => (1, Dataflow::WeightStationary),
            "input_stationary" => (2, Dataflow::InputStationary),
            other => panic!("{other}"),
        };
        let unit = array(rows as f64, columns as f64, dataflow);
        let cycles = cycles(&unit, &unit.rate[0], Product { m, n, k });
        assert_eq!(cycles.total(), (last_cycle + 1) as f64, "{line}");
        assert_eq!(cycles.drain, 0.0, "{line}: a unit that is not pipelined is busy to the end");
        checked[index] += 1;
    }
    assert_eq!(checked, [200; 3]);
}

#[test]
fn depth_shortens_or_stretches_what_streams() {
    let unit = array(16.0, 16.0, Dataflow::OutputStationary);
    let product = Product { m: 16, n: 16, k: 100 };
    // The second rate of the teaching chip takes two cycles a product.
    assert_eq!(cycles(&unit, &unit.rate[0], product).total(), 100.0 + 30.0);
    assert_eq!(cycles(&unit, &unit.rate[1], product).total(), 200.0 + 30.0);
    let mut deep = unit.rate[0].clone();
    deep.depth_per_cycle.value = 32.0;
    assert_eq!(cycles(&unit, &deep, product).total(), 4.0 + 30.0);
    // With weights in the array, its rows hold 32 values of `k` each: one fold, through which `m` streams.
    let unit = array(16.0, 16.0, Dataflow::WeightStationary);
    assert_eq!(cycles(&unit, &deep, product).total(), 16.0 + 46.0);
    assert_eq!(cycles(&unit, &unit.rate[1], product).total(), 7.0 * (32.0 + 46.0));
}

#[test]
fn pipelined_units_fill_once() {
    let mut unit = array(16.0, 16.0, Dataflow::OutputStationary);
    unit.pipelined = true;
    let product = Product { m: 40, n: 20, k: 50 };
    let both = cycles(&unit, &unit.rate[0], product);
    assert_eq!((both.busy, both.drain), (6.0 * 50.0, 30.0));
    unit.fill_cycles = Some(unit.rows.clone());
    unit.min_issue_cycles = Some(unit.rows.clone());
    unit.min_issue_cycles.as_mut().unwrap().value = 64.0;
    let both = cycles(&unit, &unit.rate[0], product);
    assert_eq!((both.busy, both.drain), (6.0 * 64.0, 16.0));
    assert_eq!(cycles(&unit, &unit.rate[0], Product { k: 0, ..product }).total(), 0.0);
}
