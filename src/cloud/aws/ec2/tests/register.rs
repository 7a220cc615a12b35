//! Tests of registering. Two images of an account cannot have the same name in a region.

use super::*;

/// Registers an image. `register` answers RegisterImage, and `describe` answers DescribeImages. Returns the result, the
/// calls, and whether the directory for the images' documents is empty at the end.
async fn registering(
    register: impl Fn(usize) -> Reply + Send + 'static,
    describe: impl Fn(&Request, usize) -> Reply + Send + 'static,
) -> (Result<Image>, Calls, bool) {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), move |request, nth| match request.action.as_str() {
        "RegisterImage" => register(nth),
        "DescribeImages" => describe(request, nth),
        _ => ok("<return>true</return>"),
    })
    .await;
    let undo = Undo::default();
    snapshot_debt(&undo);
    let image = ec2.register(&SnapshotId(SNAPSHOT.into()), &image_spec(), &undo).await;
    if let Ok(image) = &image {
        let (again, documents) = ec2.image(&image.id).await.unwrap();
        assert_eq!(again.id, image.id);
        assert_eq!(documents.is_empty(), image.id.0 != IMAGE);
    }
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    (image, calls, left == 0)
}

#[tokio::test]
async fn a_new_image_is_polled_three_times_in_a_row() {
    let describe = |_: &Request, nth: usize| match nth {
        0 => ok("<imagesSet/>"),
        1 => ok(ours("available")),
        2 => ok(ours("pending")),
        _ => ok(ours("available")),
    };
    let (image, calls, _) = registering(|_| ok(format!("<imageId>{IMAGE}</imageId>")), describe).await;
    assert_eq!(image.unwrap().state, ImageState::Available);
    // The last of these calls is made by `registering`.
    assert_eq!(count(&calls, "DescribeImages"), 3 + 3 + 1);
    let sent = &calls.of("RegisterImage")[0];
    assert_eq!((sent.get("Architecture"), sent.get("VirtualizationType")), ("x86_64", "hvm"));
    assert_eq!(sent.get("BlockDeviceMapping.1.Ebs.SnapshotId"), SNAPSHOT);
    assert_eq!(sent.get("TagSpecification.1.ResourceType"), "image");
}

#[tokio::test]
async fn a_lost_register_is_looked_up_by_name() {
    let (image, calls, _) = registering(|_| Reply::Drop, |_, _| ok(ours("available"))).await;
    assert_eq!(image.unwrap().id.0, IMAGE);
    assert_eq!(count(&calls, "RegisterImage"), 1);
    // If the call whose answer was lost had no effect, a search shows that the name is free. Then the call is sent
    // again.
    let register = |nth| if nth == 0 { Reply::Drop } else { ok(format!("<imageId>{IMAGE}</imageId>")) };
    let describe = |request: &Request, _| match request.filter("name") {
        Some(_) => ok("<imagesSet/>"),
        None => ok(ours("available")),
    };
    let (image, calls, _) = registering(register, describe).await;
    assert_eq!(image.unwrap().id.0, IMAGE);
    assert_eq!(count(&calls, "RegisterImage"), 2);
}

#[tokio::test]
async fn another_builders_image_of_the_same_bake_is_adopted() {
    let duplicate = |_| {
        refuse("InvalidAMIName.Duplicate", format!("AMI name web-1 is already in use by AMI {OTHER_IMAGE}"))
    };
    let theirs = [(tag::FINGERPRINT, "f"), (tag::CHECKSUM, "c"), (tag::RUN, "other")];
    let describe = move |_: &Request, nth: usize| match nth {
        0 => ok("<imagesSet/>"),
        1 | 2 => ok(image(OTHER_IMAGE, BASE_SNAPSHOT, "pending", &theirs)),
        _ => ok(image(OTHER_IMAGE, BASE_SNAPSHOT, "available", &theirs)),
    };
    let (adopted, calls, clean) = registering(duplicate, describe).await;
    let adopted = adopted.unwrap();
    assert_eq!((adopted.id.0.as_str(), adopted.was_created_by(&run())), (OTHER_IMAGE, false));
    assert_eq!(count(&calls, "RegisterImage"), 1);
    assert!(clean, "our documents are gone");
    // Another definition's image is refused, and no other name is tried.
    let others = [(tag::FINGERPRINT, "g"), (tag::CHECKSUM, "c"), (tag::RUN, "other")];
    let describe = move |_: &Request, _| ok(image(OTHER_IMAGE, BASE_SNAPSHOT, "available", &others));
    let (refused, calls, _) = registering(duplicate, describe).await;
    let error = format!("{:#}", refused.unwrap_err());
    assert!(error.contains("is used by"), "{error}");
    assert_eq!((count(&calls, "RegisterImage"), count(&calls, "DeregisterImage")), (1, 0));
}

#[tokio::test]
async fn lost_tags_are_set_again_and_a_wrong_image_is_deregistered() {
    let register = |_| ok(format!("<imageId>{IMAGE}</imageId>"));
    let describe = |_: &Request, nth: usize| {
        if nth == 0 { ok(image(IMAGE, SNAPSHOT, "available", &[])) } else { ok(ours("available")) }
    };
    let (image_, calls, _) = registering(register, describe).await;
    image_.unwrap();
    assert_eq!(count(&calls, "CreateTags"), 1);
    // If the tags never appear, the image is deregistered.
    let (result, calls, _) = registering(register, |_, _| ok(image(IMAGE, SNAPSHOT, "available", &[]))).await;
    assert!(format!("{:#}", result.unwrap_err()).contains("lacks the tags"));
    assert_eq!((count(&calls, "CreateTags"), count(&calls, "DeregisterImage")), (3, 1));
    // An image with another snapshot, with other billing or in the state `failed` is deregistered.
    for (from, to, text) in [
        (SNAPSHOT, BASE_SNAPSHOT, "the snapshot of /dev/xvda"),
        ("Linux/UNIX", "SUSE Linux", "billed as SUSE Linux"),
        ("available", "failed", "it is failed"),
    ] {
        let (result, calls, clean) =
            registering(register, move |_, _| ok(ours("available").replace(from, to))).await;
        let error = format!("{:#}", result.unwrap_err());
        assert!(error.contains(text) && error.contains("deregistered again"), "{error}");
        assert_eq!(count(&calls, "DeregisterImage"), 1);
        assert!(clean);
    }
}

#[tokio::test]
async fn only_failed_images_of_oven_are_replaced() {
    let seen = Arc::new(Mutex::new(ours("failed")));
    let (dir, now) = (dir(), seen.clone());
    let (ec2, calls) = ec2(dir.path(), move |request, _| match request.action.as_str() {
        "DescribeImages" => ok(now.lock().unwrap().clone()),
        "DescribeSnapshots" => ok(snapshots(&[(SNAPSHOT, "completed")])),
        _ => ok("<return>true</return>"),
    })
    .await;
    assert_eq!(ec2.replace_failed("web-1").await.unwrap(), Some(ImageId(IMAGE.into())));
    assert_eq!((count(&calls, "DeregisterImage"), count(&calls, "DeleteSnapshot")), (1, 1));
    assert_eq!(ec2.replace_failed("web-2").await.unwrap(), None);
    *seen.lock().unwrap() = ours("available");
    assert!(ec2.replace_failed("web-1").await.is_err());
    assert_eq!(count(&calls, "DeregisterImage"), 1);
}
