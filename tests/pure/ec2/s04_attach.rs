//! S4 and S5: attached once, here, under a name that is free, and found on this machine.

use super::case::{End, case, error, is_of, lost_after, lost_before, prove, says};
use super::fixture::{Ec2Fixture, INSTANCE, MILLI, OTHER_INSTANCE, options, timeouts};
use oven::cloud::aws::ec2::Timeouts;
use oven::cloud::{Cloud, VolumeKind, VolumeSpec, Volumes};
use oven::error::Kind;
use oven::ids::{RunId, VolumeId};

use oven_ec2_server::world::{Attachment, Phase};
use oven_ec2_server::{Fault, Turn, What};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// The builder's own devices, which DescribeVolumes does not list: all names but so many.
fn taken(fixture: &Ec2Fixture, but: usize) {
    let sd = ('f'..='p').map(|c| format!("/dev/sd{c}"));
    let xvd = ["b", "c"].into_iter().flat_map(|a| ('a'..='z').map(move |b| format!("/dev/xvd{a}{b}")));
    fixture.server.with_world(|world| {
        let own = &mut world.instances.get_mut(INSTANCE).unwrap().devices;
        own.extend(sd.chain(xvd).skip(but).map(|name| (name, "vol-0bbbbbbbbbbbbbbbb".to_owned())));
    });
    fixture.server.set(|o| o.limits.attachments = 1000);
}

/// Row 4.1: the next name, and no name twice.
#[tokio::test]
async fn r4_1_names_in_use() {
    for (free, baked) in [(1, true), (0, false)] {
        let fixture = Ec2Fixture::new(options(Vec::new()));
        taken(&fixture, free);
        let (ended, _) = fixture.bake().await;
        assert_eq!(ended.leftovers, []);
        let mut names = fixture.sent("AttachVolume", "Device");
        let tried = names.len();
        names.sort();
        names.dedup();
        assert!(names.len() == tried && tried <= 63, "{tried} tries");
        match ended.result {
            Ok(image) => {
                assert!(baked);
                fixture.holds_one(&image, "4.1");
            }
            Err(error) => {
                assert!(!baked && tried == 63, "{error:#}");
                says(&error, &["no device name is free", INSTANCE], "4.1");
                fixture.holds_nothing("4.1");
            }
        }
    }
}

/// Row 4.1: a name that was just freed leaves the next volume `attaching`: it comes last.
#[tokio::test]
async fn r4_1_freed_names_come_last() {
    let mut sticky = options(Vec::new());
    sticky.sticky_names = Duration::from_secs(3600);
    let fixture = Ec2Fixture::new(sticky);
    let ec2 = fixture.ec2();
    for n in 0..5 {
        let image = fixture.bake_by(&ec2, &RunId::new()).await.result.unwrap();
        fixture
            .server
            .with_world(|world| world.images.get_mut(&image.id.0).unwrap().name = format!("before-{n}"));
    }
    let mut names = fixture.sent("AttachVolume", "Device");
    names.sort();
    names.dedup();
    assert_eq!((names.len(), fixture.count("DetachVolume")), (5, 5));
}

/// Row 4.2: looked up, and sent again only if it did nothing.
#[tokio::test]
async fn r4_2_lost() {
    let attach = |what: What| [Fault::new("AttachVolume", 1, what)];
    let before =
        lost_before().map(|what| case("4.2 before", &attach(what), End::Baked).count("AttachVolume", 2));
    let after =
        lost_after().map(|what| case("4.2 after", &attach(what), End::Baked).count("AttachVolume", 1));
    prove(before.into_iter().chain(after)).await;
}

/// Row 4.2: attached to another instance meanwhile: it is reported, and our volume is deleted.
#[tokio::test]
async fn r4_2_attached_elsewhere() {
    let mut slow = options(Vec::new());
    slow.delays.creating = 60 * MILLI;
    let fixture = Ec2Fixture::new(slow);
    let thief = async {
        loop {
            tokio::time::sleep(MILLI).await;
            let stolen = fixture.server.with_world(|world| {
                let volume = world.volumes.values_mut().find(|v| !v.common.seeded)?;
                volume.attachment = Some(Attachment {
                    instance: OTHER_INSTANCE.into(),
                    device: "/dev/sdf".into(),
                    since: volume.common.created,
                    phase: Phase::Attached,
                    delete_on_termination: false,
                    turn: None,
                    number: 999,
                });
                Some(())
            });
            if stolen.is_some() {
                return;
            }
        }
    };
    let ((ended, _), ()) = tokio::join!(fixture.bake(), thief);
    says(&ended.result.unwrap_err(), &["VolumeInUse", OTHER_INSTANCE, "/dev/sdf"], "4.2");
    assert_eq!(ended.leftovers, []);
    fixture.holds_nothing("4.2");
}

/// Row 4.3: detached, and attached again under another name.
#[tokio::test]
async fn r4_3_stuck_attaching() {
    let stuck = |times| Fault::new("AttachVolume", 1, What::Turns(Turn::Stuck)).times(times);
    prove([
        case("4.3", &[stuck(1)], End::Baked).count("AttachVolume", 2),
        case("4.3 again", &[stuck(9)], End::Fails(&["stuck", "attaching"])).count("AttachVolume", 2),
    ])
    .await;
    let fixture = Ec2Fixture::with(&[stuck(1)]);
    fixture.bake().await.0.result.unwrap();
    let names = fixture.sent("AttachVolume", "Device");
    assert_ne!(names[0], names[1]);
}

/// Row 4.4: attached, EC2 says, and this machine shows nothing: it retries, then an error that lists what there is.
#[tokio::test]
async fn r4_4_no_device() {
    for (absent, baked) in [(1, true), (9, false)] {
        let fixture = Rc::new(Ec2Fixture::new(options(Vec::new())));
        let (devices, at, deadline) = (fixture.devices(), fixture.clone(), 500 * MILLI);
        // The first so many attachments show nothing.
        let shown = move |volume: &VolumeId| {
            if at.count("AttachVolume") <= absent { Ok(None) } else { devices(volume) }
        };
        let ec2 = fixture.ec2_with(|o| {
            o.devices = Rc::new(shown);
            o.timeouts = Timeouts { device: deadline, ..timeouts() };
        });
        let ended = fixture.bake_by(&ec2, &RunId::new()).await;
        assert_eq!(ended.leftovers, []);
        match ended.result {
            Ok(image) => {
                assert!(baked);
                fixture.holds_one(&image, "4.4");
            }
            Err(error) => {
                assert!(!baked, "{error:#}");
                says(&error, &["does not show it", "500ms", "NVMe disk", "--instance-id"], "4.4");
                fixture.holds_nothing("4.4");
            }
        }
        assert_eq!((fixture.count("AttachVolume"), fixture.count("DetachVolume")), (2, 2));
    }
}

/// Row 4.5: the kernel is first: the disk is not handed out before EC2 says `attached`.
#[tokio::test]
async fn r4_5_the_kernel_is_first() {
    let mut slow = options(Vec::new());
    slow.delays.attaching = 150 * MILLI;
    let fixture = Ec2Fixture::new(slow);
    let (ec2, run) = (fixture.ec2(), RunId::new());
    let volume = volume(&fixture, &ec2, &run).await;
    let device = ec2.attach(&volume).await.unwrap();
    let (phase, ends) = fixture.server.with_world(|world| {
        let attachment = world.volumes[&volume.0].attachment.clone().unwrap();
        (attachment.phase, attachment.delete_on_termination)
    });
    assert_eq!(phase, Phase::Attached);
    // Row 4.8: AWS frees it with the instance.
    assert!(ends);
    drop(device);
    ec2.ensure_no_volumes(&run).await.unwrap();
    fixture.holds_nothing("4.5");
}

async fn volume(fixture: &Ec2Fixture, ec2: &oven::cloud::aws::ec2::Ec2, run: &RunId) -> VolumeId {
    let base = ec2.base(&fixture.base).await.unwrap();
    let spec = VolumeSpec {
        snapshot: base.snapshot,
        size_gib: base.size_gib,
        kind: VolumeKind::default(),
        run: run.clone(),
        tags: Default::default(),
    };
    ec2.create(&spec).await.unwrap()
}

/// Row 4.6: reported once, with what is attached.
#[tokio::test]
async fn r4_6_a_full_instance() {
    let full = &["AttachmentLimitExceeded", INSTANCE, "volumes attached", "--jobs", "(request "];
    prove([case("4.6", &[], End::Fails(full)).set(|o| o.limits.attachments = 1).count("AttachVolume", 1)])
        .await;
}

/// Row 4.7: the instance's view says in use, and the volume's own does not: its own counts, and it attaches again.
#[tokio::test]
async fn r4_7_views_that_differ() {
    let differ = |times| error("AttachVolume", 1, "VolumeInUse").times(times);
    prove([
        case("4.7", &[differ(1)], End::Baked).count("AttachVolume", 2),
        case("4.7 again", &[differ(9)], End::Fails(&["VolumeInUse", "(request "])).count("AttachVolume", 2),
    ])
    .await;
}

/// Row 4.8: that the volume ends with the instance is set, whatever becomes of the call.
#[tokio::test]
async fn r4_8_ends_with_the_instance() {
    let set = |what: What| [Fault::new("ModifyInstanceAttribute", 1, what)];
    let lost = lost_before().into_iter().chain(lost_after());
    prove(lost.map(|what| case("4.8", &set(what), End::Baked).count("ModifyInstanceAttribute", 2))).await;
    // The instance's view of its volumes comes after the volume's own.
    let late = What::ErrorSaying(
        "InvalidInstanceAttributeValue".into(),
        "No device is currently mapped at /dev/sdf".into(),
    );
    prove([case("4.8 late", &set(late), End::Baked).count("ModifyInstanceAttribute", 2)]).await;
}

/// Row 5.5: two disks with our serial, and 5.8, one that cannot be asked: refused, and not tried again.
#[tokio::test]
async fn r5_5_r5_8_no_guess() {
    for text in ["2 disks have the serial", "cannot verify that"] {
        let fixture = Ec2Fixture::new(options(Vec::new()));
        let ec2 = fixture.ec2_with(|o| {
            o.devices = Rc::new(move |_| Err(Kind::Machine.failure(text).hint("`nvme list`").into()))
        });
        let ended = fixture.bake_by(&ec2, &RunId::new()).await;
        let error = ended.result.unwrap_err();
        is_of(&error, Kind::Machine);
        says(&error, &[text, "attaching vol-", "nvme list"], "5.5");
        assert_eq!((ended.leftovers.len(), fixture.count("AttachVolume")), (0, 1));
        fixture.holds_nothing("5.5");
    }
}

/// Row 5.1: late, and within the deadline.
#[tokio::test]
async fn r5_1_a_late_device() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let (devices, looks) = (fixture.devices(), Cell::new(0));
    let late = move |volume: &VolumeId| {
        looks.set(looks.get() + 1);
        if looks.get() < 8 { Ok(None) } else { devices(volume) }
    };
    let ec2 = fixture.ec2_with(|o| o.devices = Rc::new(late));
    let ended = fixture.bake_by(&ec2, &RunId::new()).await;
    fixture.holds_one(&ended.result.unwrap(), "5.1");
    assert_eq!(fixture.count("AttachVolume"), 1);
}
