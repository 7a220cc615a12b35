//! Stopped anywhere: nothing is left, or an image that the next bake finds.

use super::case::all;
use super::fixture::{Ec2Fixture, MILLI, options};
use oven::ids::RunId;
use oven_ec2_server::{Fault, Turn, What};

async fn stopped(faults: Vec<Fault>, after: u32, lag: u32) {
    let what = format!("stopped after {after} ms, lag {lag} ms, {faults:?}");
    let mut options = options(faults);
    options.visibility_lag = MILLI * lag;
    let fixture = Ec2Fixture::new(options);
    let (ec2, run) = (fixture.ec2(), RunId::new());
    let ended = fixture.bake_until(&ec2, &run, tokio::time::sleep(MILLI * after)).await;
    assert_eq!(ended.leftovers, [], "{what}");
    let made = fixture.made();
    assert_eq!(made.volumes, [], "{what}: {:?}", fixture.calls());
    assert_eq!(made.snapshots.len(), made.images.len(), "{what}: {made:#?}");
    fixture.is_clean(&what);
    fixture.server.set(|o| o.faults.clear());
    let (ended, _) = fixture.bake().await;
    let image = ended.result.unwrap_or_else(|error| panic!("{what}: {error:#}"));
    fixture.holds_one(&image, &what);
}

#[tokio::test]
async fn anywhere() {
    all((0..40).map(|n| stopped(Vec::new(), 3 * n, 0))).await;
}

/// A volume that vanished just before nobody waits for it any more is not reported as a leftover.
#[tokio::test]
async fn while_the_volume_vanishes() {
    let vanishes = || vec![Fault::new("CreateVolume", 1, What::Turns(Turn::Vanishes))];
    let lags = [0, 40].into_iter();
    all(lags.flat_map(|lag| (0..12).map(move |n| stopped(vanishes(), 4 + 4 * n, lag)))).await;
}

/// The call took effect, its answer was lost, the next one was throttled, and nothing shows yet.
#[tokio::test]
async fn in_doubt() {
    let mut cases = Vec::new();
    for action in ["CreateVolume", "CreateSnapshot", "RegisterImage"] {
        for n in 0..10 {
            let throttled = What::Error("RequestLimitExceeded".into());
            let faults =
                vec![Fault::new(action, 1, What::DropAfter), Fault::new(action, 2, throttled).times(15)];
            cases.push(stopped(faults, 10 + 12 * n, 150));
        }
    }
    all(cases).await;
}
