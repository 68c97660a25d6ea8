//! Makes a failing history small: drops steps and lines as long as it still fails.
//!
//! Delta debugging (Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input",
//! 2002), without its complements: pieces of half the history, then of a quarter, down to single
//! steps, over and over until nothing can go. Messages keep their positions and times, so what is
//! left means the same.

use std::panic::{AssertUnwindSafe, catch_unwind};

use meterr_operators::histories::Step;

use crate::run::panic_text;

/// Runs after which the smallest history found so far must do.
const RUNS_MAX: usize = 3_000;

/// What is wrong with a history; a panic counts as a failure.
pub fn failure(steps: &[Step], law: impl Fn(&[Step]) -> Result<(), String>) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(|| law(steps))) {
        Ok(result) => result.err(),
        Err(panic) => Some(panic_text(panic)),
    }
}

/// A small part of a failing history that fails still.
pub fn shrink(steps: &[Step], fails: impl Fn(&[Step]) -> bool) -> Vec<Step> {
    let mut runs = 0;
    let mut fails = |steps: &[Step]| {
        runs += 1;
        runs <= RUNS_MAX && fails(steps)
    };
    let mut steps = steps.to_vec();
    loop {
        let size = size(&steps);
        steps = without_pieces(steps, &mut fails);
        for at in 0..steps.len() {
            let Step::Message(message) = &steps[at] else { continue };
            let lines = without_pieces(message.lines.clone(), &mut |lines| {
                fails(&with_lines(&steps, at, lines.to_vec()))
            });
            steps = with_lines(&steps, at, lines);
        }
        if self::size(&steps) == size {
            return steps;
        }
    }
}

fn size(steps: &[Step]) -> usize {
    let lines = |step: &Step| if let Step::Message(m) = step { m.lines.len() } else { 0 };
    steps.iter().map(|step| 1 + lines(step)).sum()
}

fn with_lines(
    steps: &[Step],
    at: usize,
    lines: Vec<meterr_operators::histories::Line>,
) -> Vec<Step> {
    let mut steps = steps.to_vec();
    if let Step::Message(message) = &mut steps[at] {
        message.lines = lines;
    }
    steps
}

/// Drops every piece without which it still fails, larger pieces first.
fn without_pieces<T: Clone>(mut list: Vec<T>, fails: &mut impl FnMut(&[T]) -> bool) -> Vec<T> {
    let mut piece = list.len().div_ceil(2);
    while piece > 0 {
        let mut at = 0;
        while at < list.len() {
            let mut fewer = list.clone();
            fewer.drain(at..(at + piece).min(list.len()));
            if fails(&fewer) {
                list = fewer;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    list
}
