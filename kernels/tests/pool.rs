//! The pool: what a task does wrong stays with the call that ran it.
#![cfg(feature = "std")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use halite_kernels::panel::PanelMut;
use halite_kernels::pool::Pool;

#[test]
fn a_panic_in_any_task_reaches_the_caller_and_the_pool_lives() {
    for threads in 1..=4 {
        let pool = Pool::new(threads).unwrap();
        for bad in [0, 1, 50, 99] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|n| {
                    std::thread::yield_now();
                    assert!(n != bad, "task {n} fails");
                });
            }));
            let panic = caught.expect_err("a lost panic");
            assert_eq!(panic.downcast_ref::<String>().unwrap(), &format!("task {bad} fails"));
            let done = AtomicUsize::new(0);
            pool.run(100, &|_| _ = done.fetch_add(1, Ordering::Relaxed));
            assert_eq!(done.into_inner(), 100, "after a panic on {threads} threads");
        }
    }
}

#[test]
fn every_worker_may_panic_at_once() {
    let pool = Pool::new(4).unwrap();
    for _ in 0..50 {
        assert!(catch_unwind(AssertUnwindSafe(|| pool.run(64, &|n| panic!("{n}")))).is_err());
    }
    let done = AtomicUsize::new(0);
    pool.run(64, &|_| _ = done.fetch_add(1, Ordering::Relaxed));
    assert_eq!(done.into_inner(), 64);
}

#[test]
fn a_task_may_use_the_pool() {
    let pool = Pool::new(3).unwrap();
    let done = AtomicUsize::new(0);
    pool.run(8, &|_| {
        pool.run(8, &|_| {
            pool.run(2, &|_| _ = done.fetch_add(1, Ordering::Relaxed));
        });
    });
    assert_eq!(done.into_inner(), 128);
}

/// A panel without rows has columns to cut, and no memory.
#[test]
fn panels_without_rows_are_cut() {
    let pool = Pool::new(2).unwrap();
    let called = AtomicUsize::new(0);
    pool.panels(&mut [PanelMut::new(&mut [], 1000)], 10, &|_, _, mut columns| {
        assert!(columns.row(0).is_empty());
        called.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(called.into_inner(), 100);
}
