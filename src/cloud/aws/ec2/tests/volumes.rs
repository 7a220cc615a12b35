//! Tests of creating, attaching, preserving and deleting volumes.

use super::*;

#[tokio::test]
async fn a_volume_is_created_attached_and_deleted() {
    let (dir, mut state) = (dir(), ("", ""));
    let (ec2, calls) = ec2(dir.path(), move |request, _| manners(request, &mut state)).await;
    let id = ec2.create(&spec()).await.unwrap();
    let device = ec2.attach(&id).await.unwrap();
    assert_eq!((id, device.serial.as_str()), (volume_id(), VOLUME));
    drop(device);
    ec2.ensure_no_volumes(&run()).await.unwrap();
    let expected = [
        "CreateVolume",
        "DescribeVolumes",
        "DescribeVolumes",
        "AttachVolume",
        "DescribeVolumes",
        "ModifyInstanceAttribute",
        "DescribeVolumes",
        "DetachVolume",
        "DescribeVolumes",
        "DeleteVolume",
    ];
    assert_eq!(calls.names(), expected);
    let created = &calls.of("CreateVolume")[0];
    assert_eq!((created.get("AvailabilityZone"), created.get("Size")), ("eu-test-1a", "8"));
    assert_eq!(created.get("TagSpecification.1.ResourceType"), "volume");
    assert_eq!(created.get("ClientToken").len(), 64);
    let owner = created.params.values().find(|value| value.starts_with(INSTANCE)).expect("the owner's tag");
    assert!(owner.parse::<Owner>().is_ok());
    let ends = &calls.of("ModifyInstanceAttribute")[0];
    assert_eq!(ends.get("BlockDeviceMapping.1.Ebs.DeleteOnTermination"), "true");
    // When this is called again, no volume exists any more, so DeleteVolume is not sent.
    ec2.ensure_no_volumes(&run()).await.unwrap();
    assert_eq!(count(&calls, "DeleteVolume"), 1);
}

#[tokio::test]
async fn a_lost_create_is_sent_again_with_its_token() {
    let (dir, mut state) = (dir(), ("", ""));
    let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
        ("CreateVolume", 0) => Reply::Drop,
        ("CreateVolume", 1) => Reply::Error(500, "InternalError", "oops".into()),
        ("CreateVolume", 2) => Reply::Error(503, "RequestLimitExceeded", "slow down".into()),
        ("CreateVolume", 3) => Reply::Hang,
        _ => manners(request, &mut state),
    })
    .await;
    ec2.create(&spec()).await.unwrap();
    let tokens: std::collections::BTreeSet<String> =
        calls.of("CreateVolume").iter().map(|request| request.get("ClientToken").to_owned()).collect();
    assert_eq!((count(&calls, "CreateVolume"), tokens.len()), (5, 1));
}

#[tokio::test]
async fn a_used_token_is_replaced_once() {
    let dir = dir();
    let (ec2, calls) =
        ec2(dir.path(), |_, _| refuse("IdempotentParameterMismatch", "other parameters")).await;
    let error = ec2.create(&spec()).await.unwrap_err();
    assert!(error.to_string().contains("IdempotentParameterMismatch"), "{error:#}");
    let tokens: Vec<String> =
        calls.all().iter().map(|request| request.get("ClientToken").to_owned()).collect();
    assert_eq!((tokens.len(), tokens[0] == tokens[1]), (2, false));
}

#[tokio::test]
async fn at_the_volume_limit_the_volume_is_looked_up_by_tag() {
    for there in [true, false] {
        let dir = dir();
        let (ec2, calls) = ec2(dir.path(), move |request, _| match request.action.as_str() {
            "CreateVolume" => refuse("VolumeLimitExceeded", "limit of 20 TiB"),
            _ if there => ok(volume("available", "")),
            _ => ok("<volumeSet/>"),
        })
        .await;
        let result = ec2.create(&spec()).await;
        assert_eq!(count(&calls, "CreateVolume"), 1);
        match result {
            Ok(id) => assert!(there && id == volume_id()),
            Err(error) => {
                assert!(!there && hint_of(&error).unwrap().contains("quota"), "{error:#}");
                assert!(error.to_string().contains("(request req-1)"), "{error:#}");
            }
        }
    }
}

#[tokio::test]
async fn a_volume_in_error_fails_at_once_and_names_kms() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |request, _| match request.action.as_str() {
        "CreateVolume" => ok(format!("<volumeId>{VOLUME}</volumeId>")),
        _ => ok(volume("error", "")),
    })
    .await;
    let error = ec2.create(&spec()).await.unwrap_err();
    assert!(hint_of(&error).unwrap().contains("kms:CreateGrant"), "{error:#}");
    // The volume is polled once. The other calls of DescribeVolumes look up device names.
    let looks = calls.of("DescribeVolumes").into_iter().filter(|call| call.filter("volume-id").is_some());
    assert_eq!(looks.count(), 1);
}

#[tokio::test]
async fn a_new_volume_may_be_invisible_but_not_vanish() {
    for vanishes in [false, true] {
        let dir = dir();
        let (ec2, _) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
            ("CreateVolume", 1..) if vanishes => refuse("IdempotentParameterMismatch", "burned"),
            ("CreateVolume", _) => ok(format!("<volumeId>{VOLUME}</volumeId>")),
            (_, 0 | 1) => ok("<volumeSet/>"),
            (_, 2) => ok(volume("creating", "")),
            _ if vanishes => ok("<volumeSet/>"),
            _ => ok(volume("available", "")),
        })
        .await;
        match ec2.create(&spec()).await {
            Ok(_) => assert!(!vanishes),
            Err(error) => assert!(vanishes && format!("{error:#}").contains("vanished"), "{error:#}"),
        }
    }
}

#[tokio::test]
async fn a_volume_that_stays_creating_ends_at_the_deadline() {
    let dir = dir();
    let (ec2, _) = ec2(dir.path(), |request, _| match request.action.as_str() {
        "CreateVolume" => ok(format!("<volumeId>{VOLUME}</volumeId>")),
        _ => ok(volume("creating", "")),
    })
    .await;
    let error = format!("{:#}", ec2.create(&spec()).await.unwrap_err());
    assert!(error.contains("still creating") && error.contains(VOLUME), "{error}");
}

#[tokio::test]
async fn the_debt_knows_the_volume_of_a_cancelled_create() {
    // The bake is cancelled during CreateVolume, and the answer to that call is lost.
    let (dir, mut state) = (dir(), ("", ""));
    let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
        ("CreateVolume", 0) => {
            state = ("available", "");
            Reply::Drop
        }
        // The volume's tag is not visible yet, so this search does not find the volume.
        ("DescribeVolumes", 0) => ok("<volumeSet/>"),
        _ => manners(request, &mut state),
    })
    .await;
    let spec = spec();
    tokio::select! {
        biased;
        _ = ec2.create(&spec) => panic!("it cannot end so soon"),
        () = tokio::task::yield_now() => {}
    }
    ec2.ensure_no_volumes(&run()).await.unwrap();
    let tokens: Vec<String> =
        calls.of("CreateVolume").iter().map(|request| request.get("ClientToken").to_owned()).collect();
    assert_eq!((tokens.len(), tokens[0] == tokens[1]), (2, true));
    assert_eq!(count(&calls, "DeleteVolume"), 1);
}

#[tokio::test]
async fn names_in_use_are_skipped() {
    let (dir, mut state) = (dir(), ("available", ""));
    let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
        ("AttachVolume", 0..3) => {
            let name = request.get("Device");
            let text =
                format!("Invalid value '{name}' for unixDevice. Attachment point {name} is already in use");
            refuse("InvalidParameterValue", text)
        }
        _ => manners(request, &mut state),
    })
    .await;
    ec2.attach(&volume_id()).await.unwrap();
    let names: std::collections::BTreeSet<String> =
        calls.of("AttachVolume").iter().map(|request| request.get("Device").to_owned()).collect();
    assert_eq!(names.len(), 4, "each call uses another name");
}

#[tokio::test]
async fn a_lost_attach_is_looked_up() {
    for acted in [true, false] {
        let (dir, mut state) = (dir(), ("available", ""));
        let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
            ("AttachVolume", 0) => {
                if acted {
                    manners(request, &mut state);
                }
                Reply::Drop
            }
            _ => manners(request, &mut state),
        })
        .await;
        ec2.attach(&volume_id()).await.unwrap();
        assert_eq!(count(&calls, "AttachVolume"), if acted { 1 } else { 2 });
    }
}

#[tokio::test]
async fn a_stuck_attach_is_retried_once_with_another_name() {
    for heals in [true, false] {
        let (dir, mut state) = (dir(), ("available", ""));
        let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
            ("AttachVolume", 1) if heals => manners(request, &mut state),
            ("AttachVolume", _) => {
                state = ("in-use", "attaching");
                ok("<status>attaching</status>")
            }
            _ => manners(request, &mut state),
        })
        .await;
        let result = ec2.attach(&volume_id()).await;
        let names: Vec<String> =
            calls.of("AttachVolume").iter().map(|request| request.get("Device").to_owned()).collect();
        assert_eq!((names.len(), names[0] == names[1]), (2, false));
        assert_eq!(count(&calls, "DetachVolume"), 1);
        match result {
            Ok(_) => assert!(heals),
            Err(error) => assert!(!heals && format!("{error:#}").contains("is stuck"), "{error:#}"),
        }
    }
}

#[tokio::test]
async fn a_volume_of_another_instance_is_rejected() {
    let dir = dir();
    let elsewhere = volume("in-use", "attached").replace(INSTANCE, "i-0ffffffffffffffff");
    let (ec2, calls) = ec2(dir.path(), move |request, _| match request.action.as_str() {
        "AttachVolume" => Reply::Drop,
        _ if request.filter("attachment.instance-id").is_some() => ok("<volumeSet/>"),
        _ => ok(elsewhere.clone()),
    })
    .await;
    let error = format!("{:#}", ec2.attach(&volume_id()).await.unwrap_err());
    assert!(error.contains("attached to i-0fff"), "{error}");
    assert_eq!(count(&calls, "AttachVolume"), 0);
}

#[tokio::test]
async fn a_full_instance_is_reported() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |request, _| match request.action.as_str() {
        "AttachVolume" => refuse("AttachmentLimitExceeded", "Too many attachments"),
        _ if request.filter("attachment.instance-id").is_some() => ok(volume("in-use", "attached")),
        _ => ok(volume("available", "")),
    })
    .await;
    let error = ec2.attach(&volume_id()).await.unwrap_err();
    assert!(format!("{error:#}").contains("has 1 volumes attached"), "{error:#}");
    assert!(hint_of(&error).unwrap().contains("--jobs"));
    assert_eq!(count(&calls, "AttachVolume"), 1);
}

#[tokio::test]
async fn operations_that_need_an_instance_say_so() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |_, _| ok("")).await;
    let options = Ec2Options { instance_id: None, zone: None, ..ec2.0.options.clone() };
    let nowhere = Ec2::with_config(ec2.0.config.borrow().clone(), options);
    for error in [nowhere.create(&spec()).await.unwrap_err(), nowhere.attach(&volume_id()).await.unwrap_err()]
    {
        assert_eq!(Kind::of(&error), Kind::Machine);
        assert!(hint_of(&error).unwrap().contains("--instance-id"));
    }
    assert!(calls.all().is_empty());
}

#[tokio::test]
async fn preserved_volumes_are_detached_and_found_again() {
    let (dir, mut state) = (dir(), ("in-use", "attached"));
    let (ec2, calls) = ec2(dir.path(), move |request, _| manners(request, &mut state)).await;
    assert_eq!(ec2.keep(&run()).await.unwrap(), [volume_id()]);
    assert_eq!(calls.names(), ["DescribeVolumes", "CreateTags", "DetachVolume"]);
    assert_eq!(ec2.kept(&run()).await.unwrap(), Some(volume_id()));
    ec2.attach(&volume_id()).await.unwrap();
    // The volume is attached to this instance already, so it is not attached again.
    let before = count(&calls, "AttachVolume");
    ec2.attach(&volume_id()).await.unwrap();
    assert_eq!((before, count(&calls, "AttachVolume")), (1, 1));
}
