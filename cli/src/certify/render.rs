//! A certificate as text, as JUnit XML and as a page.

use std::collections::BTreeMap;

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use serde::Serialize;

use super::data::{BehaviourRow, CaseRow, Certificate};
use crate::Failure;

const PAGE: &str = include_str!("../../templates/certificate.html");

/// A summary for a terminal: what is wrong, and the counts.
pub fn text(c: &Certificate) -> String {
    let mut text = String::new();
    for row in c.cases.iter().filter(|row| row.outcome.contains("fail") || row.outcome.contains("unexpected"))
    {
        text += &format!("{}: {}\n", row.name, row.reason.as_deref().unwrap_or(&row.outcome));
    }
    for row in c.behaviours.iter().filter(|row| row.verdict == "broken") {
        text += &format!("{}, {}: {}\n", row.behaviour, row.with, row.detail);
    }
    for row in &c.models {
        let reason = row.reason.as_deref().unwrap_or("");
        let nmse = row.nmse.map(|nmse| format!(", error {nmse:.1e}")).unwrap_or_default();
        let same = row.same_tokens.zip(row.tokens);
        let same =
            same.map(|(same, (_, all))| format!(", {same} of {all} tokens the same")).unwrap_or_default();
        text += &format!("model {}: {}{nmse}{same} {reason}\n", row.name, row.outcome);
    }
    let s = &c.summary;
    text += &format!(
        "{} ({}, contract {}), level {}: {} passed, {} failed, {} declared gaps; behaviour: {} held, {} allowed to differ, \
         {} broken\n",
        c.device.backend,
        c.device.description,
        c.device.contract,
        c.level,
        s.passed,
        s.failed,
        s.gaps,
        s.held,
        s.allowed,
        s.broken
    );
    text
}

/// Removes what XML cannot hold.
fn xml(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').collect()
}

pub fn junit(c: &Certificate) -> Result<String, Failure> {
    let mut report = Report::new(format!("halite certify {}", xml(&c.device.backend)));
    let failed = |reason: &str| {
        let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
        status.set_message(xml(reason));
        status
    };
    let skipped = |reason: &str| {
        let mut status = TestCaseStatus::skipped();
        status.set_message(xml(reason));
        status
    };
    let status = |outcome: &str, reason: &str| match outcome {
        "pass" | "held" => TestCaseStatus::success(),
        "gap" | "allowed" => skipped(reason),
        _ => failed(reason),
    };
    let mut suites: BTreeMap<String, TestSuite> = BTreeMap::new();
    let mut add = |suite: &str, name: &str, status| {
        let suite = suites.entry(suite.into()).or_insert_with(|| TestSuite::new(xml(suite)));
        suite.add_test_case(TestCase::new(xml(name), status));
    };
    for row in &c.cases {
        add(&row.op, &row.name, status(&row.outcome, row.reason.as_deref().unwrap_or("")));
    }
    for row in &c.behaviours {
        add(&row.behaviour, &row.with, status(&row.verdict, &row.detail));
    }
    for row in &c.models {
        add("models", &row.name, status(&row.outcome, row.reason.as_deref().unwrap_or("")));
    }
    report.add_test_suites(suites.into_values());
    Ok(report.to_string()?)
}

/// What the page shows of cases with the same op and format.
#[derive(Default, Serialize)]
struct Cell {
    passed: usize,
    failed: usize,
    gaps: usize,
    reason: String,
}

/// A row of the coverage table: a format, or no format, and a cell for each op.
#[derive(Serialize)]
struct Coverage<'a> {
    format: &'a str,
    cells: Vec<Cell>,
}

#[derive(Serialize)]
struct Behaviour<'a> {
    name: &'a str,
    held: usize,
    allowed: usize,
    broken: usize,
    details: Vec<&'a BehaviourRow>,
}

/// Errors of all cases of an op: elements by their magnitude.
#[derive(Serialize)]
struct Errors<'a> {
    op: &'a str,
    /// Share of the elements in each class, in percent.
    shares: Vec<f64>,
    elements: usize,
    worst_nmse: f64,
    /// Of that case.
    bound: Option<f64>,
    case: &'a str,
}

pub fn html(c: &Certificate) -> Result<String, Failure> {
    let distinct = |of: &dyn Fn(&CaseRow) -> Option<String>| {
        let mut all: Vec<String> = Vec::new();
        for name in c.cases.iter().filter_map(of) {
            if !all.contains(&name) {
                all.push(name);
            }
        }
        all
    };
    let ops = distinct(&|row| Some(row.op.clone()));
    let formats = distinct(&|row| row.format.clone());
    let cell = |op: &str, format: Option<&str>| {
        let mut cell = Cell::default();
        for row in c.cases.iter().filter(|row| row.op == op && row.format.as_deref() == format) {
            match row.outcome.as_str() {
                "pass" => cell.passed += 1,
                "gap" => cell.gaps += 1,
                _ => cell.failed += 1,
            }
            if let Some(reason) = &row.reason {
                cell.reason = format!("{}: {reason}", row.name);
            }
        }
        cell
    };
    let with_format: Vec<&String> =
        ops.iter().filter(|op| c.cases.iter().any(|row| row.op == **op && row.format.is_some())).collect();
    let by_format: Vec<Coverage<'_>> = formats
        .iter()
        .map(|format| Coverage {
            format,
            cells: with_format.iter().map(|op| cell(op, Some(format))).collect(),
        })
        .collect();
    let plain: Vec<(&String, Cell)> = ops
        .iter()
        .filter(|op| c.cases.iter().any(|row| row.op == **op && row.format.is_none()))
        .map(|op| (op, cell(op, None)))
        .collect();
    let mut behaviours: Vec<Behaviour<'_>> = Vec::new();
    for row in &c.behaviours {
        if !behaviours.iter().any(|b| b.name == row.behaviour) {
            behaviours.push(Behaviour {
                name: &row.behaviour,
                held: 0,
                allowed: 0,
                broken: 0,
                details: Vec::new(),
            });
        }
        let Some(b) = behaviours.iter_mut().find(|b| b.name == row.behaviour) else { continue };
        match row.verdict.as_str() {
            "held" => b.held += 1,
            "allowed" => b.allowed += 1,
            _ => b.broken += 1,
        }
        let tells = row.verdict == "broken" || !row.detail.is_empty() && b.details.len() < 3;
        if tells {
            b.details.push(row);
        }
    }
    let errors = ops.iter().filter_map(|op| {
        let of_op = || c.cases.iter().filter(|row| row.op == *op);
        let differences = of_op().filter_map(|row| Some((row, row.difference.as_ref()?)));
        let mut total: Vec<usize> = Vec::new();
        let mut worst: Option<(&CaseRow, f64, Option<f64>)> = None;
        for (row, d) in differences {
            total.resize(total.len().max(d.histogram.len()), 0);
            total.iter_mut().zip(&d.histogram).for_each(|(sum, n)| *sum += n);
            let nmse = d.nmse.unwrap_or(f64::INFINITY);
            if worst.is_none_or(|(_, most, _)| nmse > most) {
                worst = Some((row, nmse, d.bound));
            }
        }
        let elements: usize = total.iter().sum();
        let shares = total.iter().map(|&n| 100.0 * n as f64 / elements.max(1) as f64).collect();
        let (case, worst_nmse, bound) = worst?;
        Some(Errors { op, shares, elements, worst_nmse, bound, case: &case.name })
    });
    let errors: Vec<Errors<'_>> = errors.collect();
    let failures: Vec<&CaseRow> =
        c.cases.iter().filter(|row| !matches!(&row.outcome[..], "pass" | "gap")).collect();
    let mut environment = minijinja::Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.add_filter("exp", |x: f64| format!("{x:.1e}"));
    environment.add_filter("fixed", |x: f64| format!("{x:.1}"));
    // The height of a bar: one element in a million still shows.
    environment.add_filter("bar", |share: f64| {
        if share > 0.0 { (100.0 + 14.0 * (share / 100.0).log10()).max(6.0) } else { 0.0 }
    });
    environment.add_filter("share", |share: f64| format!("{share:.4} %"));
    environment.add_template("certificate.html", PAGE)?;
    let gaps: Vec<&CaseRow> = c.cases.iter().filter(|row| row.outcome == "gap").collect();
    Ok(environment.get_template("certificate.html")?.render(minijinja::context! {
        c, with_format, by_format, plain, behaviours, errors, failures, gaps,
        certified => !c.summary.broken(),
    })?)
}
