//! The pool: what a task does wrong stays with the call that ran it.
#![cfg(feature = "std")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use halite_kernels::panel::PanelMut;
use halite_kernels::pool::{Executor, MOST_THREADS, Pool};

#[test]
fn threads_are_limited() {
    for threads in [MOST_THREADS + 1, usize::MAX] {
        let error = Pool::new(threads).err().unwrap().to_string();
        assert_eq!(error, format!("expected at most {MOST_THREADS}"));
    }
}

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

/// Every element of every panel belongs to one task, whatever the threads and grains.
#[test]
fn panels_and_blocks_are_cut_without_gaps() {
    for (threads, grain) in [(1, 7), (2, 1), (3, 7), (4, 64), (4, 1000)] {
        let pool = Pool::new(threads).unwrap();
        let (mut a, mut b) = (vec![0.0; 3 * 100], vec![0.0; 3 * 33]);
        pool.panels(
            &mut [PanelMut::new(&mut a, 100), PanelMut::new(&mut b, 33)],
            grain,
            &|i, first, mut panel| {
                assert!(first % grain == 0);
                for row in 0..3 {
                    for (c, x) in panel.row(row).iter_mut().enumerate() {
                        *x += (10_000 * i + 1000 * row + first + c + 1) as f32;
                    }
                }
            },
        );
        let want = |i, cols| -> Vec<f32> {
            (0..3 * cols).map(|n| (10_000 * i + 1000 * (n / cols) + n % cols + 1) as f32).collect()
        };
        assert_eq!((a, b), (want(0, 100), want(1, 33)), "{threads} threads, {grain} columns");

        // The second band is empty, and the last row is in none.
        let (mut a, mut b) = (vec![0.0; 5 * 70], vec![0.0; 5 * 70]);
        let panels = [PanelMut::new(&mut a, 70), PanelMut::new(&mut b, 70)];
        pool.blocks(panels, &[2, 2, 4], grain, &|band, first, blocks| {
            for (i, mut block) in blocks.into_iter().enumerate() {
                for row in 0..block.rows() {
                    for (c, x) in block.row(row).iter_mut().enumerate() {
                        *x += (100_000 * i + 10_000 * band + 1000 * row + first + c + 1) as f32;
                    }
                }
            }
        });
        let want = |i| -> Vec<f32> {
            let bands = [(0, 0), (0, 1), (2, 0), (2, 1)];
            let all = bands.iter().flat_map(|(band, row)| {
                (0..70).map(move |c| (100_000 * i + 10_000 * band + 1000 * row + c + 1) as f32)
            });
            all.chain([0.0; 70]).collect()
        };
        assert_eq!((a, b), (want(0), want(1)), "{threads} threads, {grain} columns");
    }
}

#[test]
fn bands_out_of_order_do_not_run() {
    let pool = Pool::new(2).unwrap();
    let mut x = vec![0.0; 50];
    pool.blocks([PanelMut::new(&mut x, 10)], &[5, 2, 4], 1, &|_, _, [mut block]| block.row(0).fill(1.0));
    assert_eq!(x, [0.0; 50]);
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
    assert!((1..=100).contains(&called.into_inner()));
}

/// Runs all calls, some twice and some that are none of its own, or only some.
struct Odd {
    threads: usize,
    calls: &'static [usize],
}

impl Executor for Odd {
    fn threads(&self) -> usize {
        self.threads
    }

    fn broadcast(&self, work: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for &call in self.calls {
                scope.spawn(move || work(call));
            }
        });
    }
}

#[test]
fn every_executor_runs_each_task_once() {
    for (threads, calls) in
        [(4, &[0, 1, 2, 3][..]), (4, &[]), (3, &[2]), (2, &[1, 1, 0, 7, usize::MAX]), (0, &[0]), (1, &[3])]
    {
        let pool = Pool::with_executor(std::sync::Arc::new(Odd { threads, calls }));
        for tasks in [0, 1, 2, 5, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                counts.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                "{threads} {calls:?} {tasks}"
            );
        }
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(100, &|i| assert!(i != 70, "task 70"));
        }));
        assert!(panicked.is_err(), "{threads} {calls:?}");
    }
}
