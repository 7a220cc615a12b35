//! What a bake and a plan find in a region, without a bake: images are registered by hand.

use oven::bake::options::{BakeOptions, Compat};
use oven::bake::target::{self, Target};
use oven::bake::{Bake, preflight};
use oven::cloud::local::Region;
use oven::cloud::{Base, BaseRef, Cloud, Image, Tags, VolumeSpec, Volumes, tag};
use oven::config::project::Settings;
use oven::definition::{BaseSource, Definition};
use oven::disk::DiskSpec;
use oven::error::{Kind, hint_of};
use oven::identity::fingerprint::Inputs;
use oven::ids::{Architecture, ImageId, RunId};
use oven::report::Report;
use oven::site::{Site, Use};
use oven::undo::Undo;
use std::path::Path;
use std::process::Command;

const PLAIN: BakeOptions =
    BakeOptions { force: false, replace_failed: false, compat: None, keep_on_failure: false, verify: false };

struct PreflightFixture {
    dir: tempfile::TempDir,
    region: Region,
    site: Site,
    image: Definition,
    base: Base,
    inputs: Inputs,
    from: BaseRef,
    run: RunId,
}

impl PreflightFixture {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (raw, web) = (dir.path().join("raw"), dir.path().join("web"));
        std::fs::write(&raw, [7; 4096]).unwrap();
        std::fs::create_dir(&web).unwrap();
        std::fs::write(web.join("image.toml"), "name = \"web\"\nfrom = { name = \"base\" }\n").unwrap();
        let settings = Settings { region_dir: Some(dir.path().join("region")), ..Settings::default() };
        let site = Site::new(settings, Report::silent(), Use::Imports).await.unwrap();
        let region = Region::open(&site.state).unwrap();
        region.import(&raw, "base", Architecture::HOST, &Tags::new(), &site.report).await.unwrap();
        let image = Definition::load(&web).unwrap();
        let BaseSource::Image(from) = &image.from else { panic!("{:?}", image.from) };
        let base = target::base(&site, &image, from).await.unwrap();
        let inputs = target::inputs(&site, &image, &base).unwrap();
        let (from, run) = (from.clone(), RunId::new());
        Self { dir, region, site, image, base, inputs, from, run }
    }

    fn bake<'a>(&'a self, options: &'a BakeOptions, run: &'a RunId) -> Bake<'a> {
        Bake { site: &self.site, image: &self.image, from: &self.from, options, run }
    }

    fn target(&self) -> Target {
        let attributes = target::attributes(&self.image, &self.base).unwrap();
        Target { base: self.base.clone(), attributes, inputs: self.inputs.clone() }
    }

    /// As a bake ends. `without`: a tag that it loses.
    async fn register(&self, options: &BakeOptions, without: &str) -> Image {
        let (run, undo, region) = (RunId::new(), Undo::default(), &self.region);
        let volume = VolumeSpec {
            snapshot: self.base.snapshot.clone(),
            size_gib: self.base.size_gib,
            kind: Default::default(),
            run: run.clone(),
            tags: Tags::new(),
        };
        let volume = region.create(&volume).await.unwrap();
        let snapshot = region.snapshot(&volume, &run, &Tags::new()).await.unwrap();
        region.ensure_no_volumes(&run).await.unwrap();
        let mut spec = target::image_spec(&self.bake(options, &run), self.target(), Default::default());
        spec.tags.remove(without);
        region.register(&snapshot, &spec, &undo).await.unwrap()
    }

    /// As a bake begins.
    async fn find(&self, options: &BakeOptions) -> Result<Option<ImageId>, (Kind, String)> {
        let (bake, target) = (self.bake(options, &self.run), self.target());
        let found = match target::existing(&bake, &target).await {
            Ok(None) => preflight::check(&bake, &target).await.map(|()| None),
            found => found,
        };
        found.map(|image| image.map(|image| image.id)).map_err(|e| {
            let hint = hint_of(&e).unwrap_or_default();
            (Kind::of(&e), format!("{e:#} {hint}"))
        })
    }

    fn plan(&self) -> (String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
        let dir: &Path = self.dir.path();
        let output =
            command.current_dir(dir).args(["--region-dir", "region", "plan", "web"]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    }
}

#[tokio::test]
async fn both_tags_and_the_newest_decide() {
    let f = PreflightFixture::new().await;
    assert_eq!(f.find(&PLAIN).await, Ok(None));
    assert!(f.plan().0.contains("no image of the definition `web` exists yet"));
    let first = f.register(&PLAIN, "").await;
    assert_eq!(f.find(&PLAIN).await, Ok(Some(first.id.clone())));
    assert!(f.plan().0.contains(&format!("already baked as {}", first.id)));

    assert_eq!(first.name, format!("web-{}", &f.inputs.fingerprint()[..12]));
    assert_eq!(first.tags[tag::BASE], f.base.id.0);
    assert!(!first.tags.contains_key(tag::FORCED));

    let forced = BakeOptions { force: true, ..PLAIN };
    assert_eq!(f.find(&forced).await, Ok(None));
    let second = f.register(&forced, "").await;
    assert!(second.tags.contains_key(tag::FORCED));
    assert_eq!(second.name, format!("{}-{}", first.name, &second.tags[tag::RUN][..8]));
    assert_eq!(f.find(&PLAIN).await, Ok(Some(second.id.clone())));
    // What failed since does not count, and the one before it does.
    f.region.fail(&second.id, "broken").await.unwrap();
    assert_eq!(f.find(&PLAIN).await, Ok(Some(first.id.clone())));

    // Another base: the checksum is the same, and the fingerprint is not.
    let snapshot = oven::ids::SnapshotId("snap-0123456789abcdef0".into());
    let base = Base { snapshot, ..f.base.clone() };
    let inputs = target::inputs(&f.site, &f.image, &base).unwrap();
    let find = async |options: &BakeOptions| {
        target::find(&f.site, &inputs, options).await.unwrap().map(|image| image.id)
    };
    assert_eq!(find(&PLAIN).await, None);
    assert_eq!(find(&BakeOptions { compat: Some(Compat::Gumgum), ..PLAIN }).await, Some(first.id));
}

#[tokio::test]
async fn a_failed_or_incomplete_image_is_refused_before_any_work_and_replaced_if_asked() {
    for without in ["", tag::FINGERPRINT, tag::CHECKSUM] {
        let f = PreflightFixture::new().await;
        let image = f.register(&PLAIN, without).await;
        if without.is_empty() {
            f.region.fail(&image.id, "broken").await.unwrap();
        }
        let (kind, text) = f.find(&PLAIN).await.unwrap_err();
        assert_eq!(kind, Kind::Cloud);
        assert!(text.contains(&image.id.0) && text.contains("--replace-failed"), "{text}");
        let (plan, _) = f.plan();
        assert!(plan.contains("to be baked") && plan.contains("--replace-failed"), "{plan}");
        assert_eq!(f.find(&BakeOptions { replace_failed: true, ..PLAIN }).await, Ok(None));
        assert!(f.site.cloud.images(Some("web")).await.unwrap().is_empty());
        assert_eq!(f.find(&PLAIN).await, Ok(None));
    }
}

#[tokio::test]
async fn a_failed_image_of_another_name_is_no_reason() {
    let f = PreflightFixture::new().await;
    let forced = f.register(&BakeOptions { force: true, ..PLAIN }, "").await;
    f.region.fail(&forced.id, "broken").await.unwrap();
    assert_eq!(f.find(&PLAIN).await, Ok(None));
    assert!(f.plan().0.contains("nothing differs, but that image is failed"), "{}", f.plan().0);
}

#[tokio::test]
async fn a_git_directory_inside_is_warned_about() {
    let f = PreflightFixture::new().await;
    assert!(!f.plan().1.contains(".git"));
    std::fs::create_dir(f.dir.path().join("web/.git")).unwrap();
    std::fs::write(f.dir.path().join("web/.git/HEAD"), "x").unwrap();
    let (_, told) = f.plan();
    assert!(told.contains("web/.git is in the definition"), "{told}");
}

#[tokio::test]
async fn a_disk_that_would_shrink_is_the_definitions_mistake() {
    let f = PreflightFixture::new().await;
    let (base, run) = (Base { size_gib: 2, ..f.base.clone() }, RunId::new());
    let spec = DiskSpec { size_gib: Some(1), ..DiskSpec::default() };
    let error = f.site.disks.checkout(&base, &spec, &run, &Undo::default()).await.err().unwrap();
    assert_eq!(Kind::of(&error), Kind::Definition);
    assert!(error.to_string().contains("size_gib = 1"), "{error:#}");
}
