//! What a step costs. These measure: nobody else may be at work.

use super::{HELPER, output};
use oven_testing::BusyboxImage;
use oven_testing::ring;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn syncs_cost_nothing() {
    let _ring = ring::exclusive();
    let image = BusyboxImage::new();
    let best = |option: &str| {
        let spec = image.shell(&format!("i=0; while [ $i -lt 50 ]; do dd if=/dev/zero of=/tmp/x bs=64k count=1 {option} 2>/dev/null; i=$((i+1)); done"));
        let times = (0..3).map(|_| {
            let started = Instant::now();
            output(&spec);
            started.elapsed()
        });
        times.min().unwrap()
    };
    let (with, without) = (best("conv=fsync"), best(""));
    assert!(with < 2 * without + Duration::from_secs(1), "{with:?} with syncs, {without:?} without");
}

#[test]
fn a_step_costs_little() {
    let _ring = ring::exclusive();
    let image = BusyboxImage::new();
    let spec = image.spec(&["true"]);
    output(&spec);
    let times = |what: &dyn Fn()| {
        let time = |_| {
            let started = Instant::now();
            what();
            started.elapsed()
        };
        let mut times: Vec<_> = (0..30).map(time).collect();
        times.sort();
        times
    };
    let times_of_step = times(&|| _ = output(&spec));
    // What a process costs here and now.
    let plain = times(&|| _ = Command::new(HELPER).arg("--version").output().unwrap())[0];
    let (best, median) = (times_of_step[0], times_of_step[15]);
    println!("a step of `true`: median {median:?}, best {best:?}; a process {plain:?}");
    assert!(best < Duration::from_millis(50).max(8 * plain), "{times_of_step:?}, a process {plain:?}");
}
