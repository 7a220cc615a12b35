//! S19: cleaning up fails itself, and touches nothing that is not ours.

use super::case::{End, case, error, lost_after, lost_before, prove, says};
use super::fixture::{Ec2Fixture, options};
use oven::cloud::{Cloud, VolumeKind, VolumeSpec, Volumes, tag};
use oven::disk::DiskStrategy;
use oven::disk::attached_disk::AttachedDisks;
use oven::ids::RunId;

use oven_ec2_server::{Fault, Turn, What};
use std::rc::Rc;
use std::time::Duration;

fn deletes() -> impl Iterator<Item = What> {
    lost_before().into_iter().chain(lost_after())
}

/// Row 19.1: everything is removed although answers are lost.
#[tokio::test]
async fn r19_1_lost() {
    let volumes = deletes().map(|what| case("19.1", &[Fault::new("DeleteVolume", 1, what)], End::Baked));
    let failed = error("RegisterImage", 1, "UnauthorizedOperation");
    let snapshots = deletes().map(move |what| {
        let faults = [failed.clone(), Fault::new("DeleteSnapshot", 1, what)];
        case("19.1", &faults, End::Fails(&["RegisterImage", "UnauthorizedOperation"]))
    });
    prove(volumes.chain(snapshots)).await;
}

/// Row 19.1: throttled, it takes longer.
#[tokio::test]
async fn r19_1_throttled() {
    let busy = |action: &str| error(action, 1, "RequestLimitExceeded").times(4);
    let failed = error("CreateSnapshot", 1, "SnapshotLimitExceeded");
    let faults = [failed, busy("DetachVolume"), busy("DeleteVolume")];
    prove([case("19.1", &faults, End::Fails(&["SnapshotLimitExceeded"]))]).await;
}

/// Row 19.1: what cannot be removed is reported with its command, the first error stays the first, and `sweep` has it.
#[tokio::test]
async fn r19_1_left_behind() {
    for (action, fails) in
        [("DeleteVolume", false), ("DetachVolume", false), ("DeleteVolume", true), ("DeleteSnapshot", true)]
    {
        let mut faults = vec![error(action, 1, "UnauthorizedOperation").times(999)];
        faults.extend(fails.then(|| error("RegisterImage", 1, "InvalidParameterValue")));
        let what = format!("{faults:?}");
        let fixture = Ec2Fixture::with(&faults);
        let (ended, run) = fixture.bake().await;
        match &ended.result {
            Ok(image) => assert!(!fails && image.was_created_by(&run), "{what}"),
            Err(error) => {
                assert!(fails, "{what}: {error:#}");
                says(error, &["RegisterImage", "InvalidParameterValue"], &what);
                assert!(!format!("{error:#}").contains(action), "{error:#}");
            }
        }
        assert_eq!(ended.leftovers.len(), 1, "{what}: {:?}", ended.leftovers);
        let left = ended.leftovers[0].to_string();
        let texts = [&format!("oven sweep --run {run}"), action, "UnauthorizedOperation", "(request "];
        assert!(texts.iter().all(|text| left.contains(*text)), "{what}: {left}");
        let made = fixture.made();
        let rest = if action == "DeleteSnapshot" { &made.snapshots } else { &made.volumes };
        assert_eq!(rest.len(), 1, "{what}: {made:?}");
        assert!(left.contains(&rest[0].id), "{what}: {left}");
        assert_eq!(rest[0].tags.get(tag::RUN), Some(&run.0), "{what}");
        fixture.is_clean(&what);
        fixture.server.set(|o| o.faults.clear());
        AttachedDisks::new(Rc::new(fixture.ec2())).forget(&run).await.unwrap();
        match ended.result {
            Ok(image) => fixture.holds_one(&image, &what),
            Err(_) => fixture.holds_nothing(&what),
        }
    }
}

/// Row 19.1: one volume that is stuck does not stop the removal of the others.
#[tokio::test]
async fn r19_1_one_of_several() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let (ec2, run) = (fixture.ec2(), RunId::new());
    let base = ec2.base(&fixture.base).await.unwrap();
    let spec = VolumeSpec {
        snapshot: base.snapshot,
        size_gib: base.size_gib,
        kind: VolumeKind::default(),
        run: run.clone(),
        tags: Default::default(),
    };
    // As by two processes of one run.
    fixture.server.set(|o| o.faults = vec![error("CreateVolume", 2, "IdempotentParameterMismatch")]);
    ec2.create(&spec).await.unwrap();
    ec2.create(&spec).await.unwrap();
    assert_eq!(fixture.ever().0, 2);
    fixture.server.set(|o| o.faults = vec![error("DeleteVolume", 1, "UnauthorizedOperation")]);
    let refused = fixture.ec2().ensure_no_volumes(&run).await.unwrap_err();
    let left = fixture.made().volumes;
    assert_eq!(left.len(), 1);
    says(&refused, &[&left[0].id, "UnauthorizedOperation"], "19.1");
    fixture.ec2().ensure_no_volumes(&run).await.unwrap();
    fixture.holds_nothing("19.1");
}

/// Row 19.2: a run's things are those with its tag, and no others, whoever asks.
#[tokio::test]
async fn r19_2_what_is_not_ours_stays() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let image = fixture.bake().await.0.result.unwrap();
    let disks = AttachedDisks::new(Rc::new(fixture.ec2()));
    for run in ["*", "?", "of-somebody-els*", "of-somebody-els?", "", "\\"] {
        disks.forget(&RunId(run.into())).await.unwrap();
    }
    // A run whose image is registered: the snapshot is a result.
    let run = RunId(image.tags[tag::RUN].clone());
    disks.forget(&run).await.unwrap();
    fixture.holds_one(&image, "19.2");
    // Results are no leftovers; a run of oven's on an instance that is no more is one, and is only reported.
    for older_than in [None, Some(Duration::ZERO)] {
        let stale = fixture.ec2().stale_runs(older_than).await.unwrap();
        assert_eq!(stale.iter().map(|stale| stale.run.0.as_str()).collect::<Vec<_>>(), ["of-somebody-else"]);
    }
    fixture.holds_one(&image, "19.2");
}

/// Row 19.2: EC2 answers with more than was asked for: it is not believed.
#[tokio::test]
async fn r19_2_a_tag_that_changed() {
    let fixture = Ec2Fixture::with(&[
        error("CreateSnapshot", 1, "SnapshotLimitExceeded"),
        error("DeleteVolume", 1, "UnauthorizedOperation").times(99),
    ]);
    let (ended, run) = fixture.bake().await;
    assert_eq!(ended.leftovers.len(), 1);
    // Somebody takes it over: it carries another run's tag now. A stale list still has it.
    fixture.server.set(|o| o.faults = vec![Fault::new("DescribeVolumes", 1, What::Stale)]);
    let id = fixture.made().volumes[0].id.clone();
    fixture.server.forget_calls();
    fixture.server.with_world(|world| {
        world.volumes.get_mut(&id).unwrap().common.tags.insert(tag::RUN.into(), "another".into());
    });
    AttachedDisks::new(Rc::new(fixture.ec2())).forget(&run).await.unwrap();
    assert_eq!((fixture.made().volumes.len(), fixture.count("DeleteVolume")), (1, 0));
}

/// Row 19.3: never by force, and the volume is reported.
#[tokio::test]
async fn r19_3_never_by_force() {
    let faults = [
        Fault::new("DetachVolume", 1, What::Turns(Turn::Stuck)),
        error("CreateSnapshot", 1, "SnapshotLimitExceeded"),
    ];
    let fixture = Ec2Fixture::with(&faults);
    let (ended, _) = fixture.bake().await;
    says(&ended.result.unwrap_err(), &["SnapshotLimitExceeded"], "19.3");
    assert_eq!(ended.leftovers.len(), 1);
    let left = ended.leftovers[0].to_string();
    assert!(left.contains("detaching"), "{left}");
    fixture.is_clean("19.3");
}
