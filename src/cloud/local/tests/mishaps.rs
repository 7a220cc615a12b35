//! Tests what happens if the clock jumps, the power fails, or processes start at the same time.

use super::*;
use std::os::unix::fs::PermissionsExt;

#[tokio::test]
async fn the_newest_image_is_the_last_whatever_the_clock_did() {
    let f = Fixture::new();
    let (base, run, undo) = (f.import("base-1").await, RunId::new(), Undo::default());
    let snapshot = f.snapshot(&base, &run).await;
    let first = f.region.register(&snapshot, &spec("web-f", "f"), &undo).await.unwrap();
    // The first image was registered while the clock was years ahead. Then the clock was corrected.
    let record = f.region.dir().join(format!("images/{}.json", first.id));
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace(&first.created, "2199-01-01T00:00:00.000Z")).unwrap();
    let second = f.region.register(&snapshot, &spec("web-f2", "f"), &undo).await.unwrap();
    assert_eq!(f.region.find(&key(Some("f"))).await.unwrap(), Some(second));
}

/// There is a file at the path of the region's directory, or at the path of a directory above it.
#[test]
fn a_region_dir_that_is_a_file_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk.raw");
    std::fs::write(&file, "").unwrap();
    let hint = format!("{} is a file, not a directory; pass another --region-dir.", file.display());
    for region in [file.clone(), file.join("region")] {
        let error = RegionStore::open(&region, RegionAccess::Create).err().unwrap();
        assert_eq!((Kind::of(&error), hint_of(&error)), (Kind::Machine, Some(hint.clone())), "{error:#}");
    }
}

#[tokio::test]
async fn pending_resources_cannot_be_used() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let volume = f.volume(&base, &run).await;
    let slow = f.region.with_delays(Duration::from_secs(60));
    let tags = Tags::new();
    let begun = async {
        loop {
            match f.region.store().tagged::<SnapshotRecord>(tag::RUN, &run.0).unwrap().pop() {
                Some(record) => return record.id,
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    let pending = tokio::select! {
        _ = slow.snapshot(&volume, &run, &tags) => panic!("it is not complete yet"),
        pending = begun => pending,
    };
    let registered = f.region.register(&pending, &spec("web-f", "f"), &Undo::default()).await;
    refuses(registered, Kind::Cloud, "IncorrectState");
    let of_it = VolumeSpec { snapshot: pending, ..volume_of(&base, &run) };
    refuses(f.region.create(&of_it).await, Kind::Cloud, "IncorrectState");
}

#[tokio::test]
async fn an_image_that_lost_a_tag_is_rejected() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let snapshot = f.snapshot(&base, &run).await;
    let slow = f.region.with_delays(Duration::from_secs(1));
    let (web, undo) = (spec("web-f", "f"), Undo::default());
    let lose_it = async {
        f.appears().await;
        let lose = |region: &LockedRegion| {
            let mut image = region.tagged::<ImageRecord>(tag::NAME, "web")?.remove(0);
            image.tags.remove(tag::FINGERPRINT);
            region.write(&image, false)
        };
        f.region.store().locked(lose).await.unwrap();
    };
    let (result, ()) = tokio::join!(slow.register(&snapshot, &web, &undo), lose_it);
    refuses(result, Kind::Cloud, "lacks tags");
}

#[test]
fn many_processes_create_a_region_at_once() {
    for _ in 0..50 {
        let dir = tempfile::tempdir().unwrap();
        let open = || Region::open(&dir.path().join("region")).map(drop);
        let all: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        all.into_iter().for_each(Result::unwrap);
        let names = dir.path().join("region").read_dir().unwrap().map(|e| e.unwrap().file_name());
        assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with('.')));
    }
}

#[tokio::test]
async fn a_record_without_content_counts_as_absent() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let volume = f.region.create(&volume_of(&base, &run)).await.unwrap();
    let record = f.region.dir().join(format!("volumes/{volume}.json"));
    std::fs::write(&record, "").unwrap();
    std::fs::write(f.region.dir().join("region.json"), "").unwrap();
    let region = Region::open(f.region.dir()).unwrap();
    region.ensure_no_volumes(&run).await.unwrap();
    region.tidy().await.unwrap();
    region.stale_runs(None).await.unwrap();
    assert_eq!(f.files("volumes"), 0);

    let record = f.region.dir().join(format!("images/{}.json", base.id));
    std::fs::write(&record, "{").unwrap();
    refuses(region.images(None).await, Kind::Cloud, &format!("{}.json is not a valid record", base.id));
}

#[tokio::test]
async fn a_directory_without_a_format_is_a_region_only_if_it_has_a_record() {
    let f = Fixture::new();
    let stranger = f.region.dir().with_file_name("stranger");
    for part in ["images", "snapshots", "volumes"] {
        std::fs::create_dir_all(stranger.join(part)).unwrap();
        std::fs::set_permissions(stranger.join(part), PermissionsExt::from_mode(0o755)).unwrap();
    }
    std::fs::write(stranger.join("images/cat.json"), "{}").unwrap();
    std::fs::write(stranger.join("images/ami-0123456789abcdef0.json"), "{}").unwrap();
    for access in [RegionAccess::Look, RegionAccess::Change] {
        refuses(Region::open_for(&stranger, access), Kind::NotFound, "the directory is not a region");
    }
    refuses(Region::open(&stranger), Kind::Definition, "neither empty nor a region: it has \"images\"");
    for part in ["images", "snapshots", "volumes"] {
        assert_eq!(stranger.join(part).metadata().unwrap().mode() & 0o777, 0o755, "{part}");
    }
    assert_eq!(stranger.read_dir().unwrap().count(), 3, "nothing was made there");

    // A region of the first versions of oven.
    let base = f.import("base-1").await;
    std::fs::remove_file(f.region.dir().join("region.json")).unwrap();
    let region = Region::open_for(f.region.dir(), RegionAccess::Change).unwrap();
    assert_eq!(region.images(None).await.unwrap().len(), 1, "{}", base.id);
    assert!(f.region.dir().join("region.json").is_file());
}
