//! Calls the parsers of files, texts and JSON with an input, and checks what callers rely on.

use oven::cloud::Cloud;
use oven::cloud::local::Region;
use oven::config::project::Settings;
use oven::config::template;
use oven::definition::Definition;
use oven::device::DeviceNode;
use oven::formats::fstab::{self, PartitionIds};
use oven::formats::initramfs;
use oven::formats::initramfs::lz4::Lz4LegacyReader;
use oven::formats::package;
use oven::identity::fingerprint::{PreviousInputs, explain};
use oven::ids::ImageId;
use oven::image::accounts::Accounts;
use oven::image::tree::ImageTree;
use oven::provision::diagnose::Diagnoser;
use oven::provision::packages;
use oven::sandbox::output::OutputLines;
use oven::seal::bootable::device_names::{BootTextKind, DiskNames, lint};
use oven::secrets::Secrets;
use oven_distro::wire::{ClaimsAnswer, PlanAnswer, answer};
use oven_distro::{Distro, Expect, Job, OsRelease, Wanted, faults_of_claims, faults_of_plan};
use std::cell::Cell;
use std::fs::{self, File};
use std::io::Read;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The files and values that targets need, and create only once.
pub struct World {
    dir: tempfile::TempDir,
    /// A file in memory, for parsers that read a file.
    file: File,
    secrets: Secrets,
    troubles: Vec<oven_distro::Trouble>,
    distros: Vec<Box<dyn Distro>>,
    runtime: tokio::runtime::Runtime,
    region: Option<Region>,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = |path: &str, content: &[u8], mode: u32| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        // The files that the seeds of image.toml and oven.toml name.
        let deb = fs::read(repository().join("tests/data/fuzz/deb/gzip")).unwrap();
        file("web/files/nginx.conf", b"events {}\n", 0o644);
        file("web/setup.sh", b"#!/bin/sh\n", 0o755);
        file("web/site.deb", &deb, 0o644);
        file("common/tool", b"#!/bin/sh\n", 0o755);
        file("ca.pem", b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", 0o644);
        file("base/image.toml", b"from = \"ami-0123456789abcdef0\"\n", 0o644);
        fs::create_dir(dir.path().join("image")).unwrap();
        fs::create_dir(dir.path().join("image/etc")).unwrap();
        let distros: Vec<Box<dyn Distro>> =
            vec![Box::new(oven_debian::Debian), Box::new(oven_redhat::RedHat), Box::new(oven_suse::Suse)];
        let job = fs::read(repository().join("tests/data/fuzz/plugin-request/debian.json")).unwrap();
        let plan = answer(&*distros[0], "plan", &String::from_utf8(job).unwrap());
        let troubles = PlanAnswer::read(&plan).unwrap().unwrap().troubles;
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        Self {
            dir,
            file: rustix::fs::memfd_create("input", flags).unwrap().into(),
            secrets: Secrets::new([("TOKEN".to_owned(), SECRET.to_owned())].into()),
            troubles,
            distros,
            runtime: tokio::runtime::Builder::new_current_thread().build().unwrap(),
            region: None,
        }
    }

    /// Writes the input to a new file, because writing to a truncated file may wait for the disk.
    fn write(&self, path: &str, input: &[u8]) -> PathBuf {
        let path = self.dir.path().join(path);
        _ = fs::remove_file(&path);
        fs::write(&path, input).unwrap();
        path
    }

    /// Writes the input to the file in memory. Returns its path.
    fn write_to_memory(&self, input: &[u8]) -> PathBuf {
        self.file.set_len(0).unwrap();
        self.file.write_all_at(input, 0).unwrap();
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The secret that steps must not print.
const SECRET: &str = "hunter2-hunter2";

const PARTITIONS: [PartitionIds<'static>; 4] = [
    PartitionIds { uuid: "root-id", label: "cloudimg-rootfs", partuuid: "p-1", partlabel: "" },
    PartitionIds { uuid: "ABCD-0123", label: "UEFI", partuuid: "p-15", partlabel: "EFI System" },
    PartitionIds { uuid: "boot-id", label: "BOOT", partuuid: "p-16", partlabel: "" },
    PartitionIds { uuid: "var-id", label: "same", partuuid: "p-2", partlabel: "" },
];

pub fn parse_fstab(_: &mut World, input: &[u8]) -> bool {
    let entries = fstab::parse(&String::from_utf8_lossy(input));
    for (root, ids) in PARTITIONS.iter().enumerate() {
        _ = fstab::is_root_by_fstab(&entries, ids);
        for mount in fstab::plan(&entries, root, &PARTITIONS).unwrap_or_default() {
            let parts: Vec<_> = mount.target.split('/').skip(1).collect();
            let is_plain = |part: &&str| !part.is_empty() && ![".", ".."].contains(part);
            assert!(mount.target.starts_with('/') && parts.iter().all(is_plain), "{mount:?}");
        }
    }
    !entries.is_empty()
}

pub fn list_initramfs(_: &mut World, input: &[u8]) -> bool {
    let see = &mut |name: &[u8]| {
        assert!(name.len() <= 4096);
        ControlFlow::Continue(())
    };
    let total = Cell::new(0_u64);
    let count = |bytes: u64| {
        total.set(total.get() + bytes);
        anyhow::ensure!(total.get() <= 256 << 20, "too large");
        Ok(())
    };
    initramfs::list_files(input, &count, see).is_ok()
}

pub fn unpack_lz4(_: &mut World, input: &[u8]) -> bool {
    // The reader has no limit, because its caller has one.
    let unpacked = std::io::copy(&mut Lz4LegacyReader::new(input).take(256 << 20), &mut std::io::sink());
    unpacked.is_ok_and(|length| length > 0)
}

pub fn read_package(world: &mut World, input: &[u8]) -> bool {
    let Ok(found) = package::read(&world.write_to_memory(input)) else { return false };
    for text in [&found.name, &found.version, &found.architecture] {
        // The texts become arguments of commands.
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._~:^".contains(&byte);
        assert!(
            text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.bytes().all(is_plain),
            "{found:?}"
        );
    }
    true
}

pub fn read_os_release(world: &mut World, input: &[u8]) -> bool {
    let found = OsRelease::parse(&String::from_utf8_lossy(input));
    for distro in &world.distros {
        let claims = distro.claims(&found);
        assert_eq!(faults_of_claims(&claims), [""; 0]);
    }
    !found.0.is_empty()
}

pub fn read_accounts(world: &mut World, input: &[u8]) -> bool {
    world.write("image/etc/passwd", input);
    world.write("image/etc/group", input);
    let accounts = Accounts::read(&ImageTree::open_dir(&world.dir.path().join("image")).unwrap()).unwrap();
    assert!(accounts.user("root").is_some());
    _ = (accounts.user("app"), accounts.group("www-data"));
    let homes = accounts.homes().unwrap_or_default();
    assert!(homes.iter().all(|home| home.starts_with('/')));
    !homes.is_empty()
}

pub fn load_definition(world: &mut World, input: &[u8]) -> bool {
    world.write("web/image.toml", input);
    let Ok(found) = Definition::load(&world.dir.path().join("web")) else { return false };
    _ = (
        found.place_of_package(None),
        found.place("packages", Some("nginx")),
        found.place("disk.iops", None),
    );
    true
}

pub fn load_settings(world: &mut World, input: &[u8]) -> bool {
    let path = world.write("oven.toml", input);
    Settings::load(&path).is_ok()
}

pub fn render_template(_: &mut World, input: &[u8]) -> bool {
    let vars = [("port", "8080"), ("name", "a & <b>"), ("debug", "")];
    let vars = vars.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    template::render(&String::from_utf8_lossy(input), Path::new("files/x"), &vars).is_ok()
}

pub fn read_plugin_answer(_: &mut World, input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let claims = ClaimsAnswer::read(&text);
    if let Ok(Ok(claims)) = &claims {
        _ = faults_of_claims(claims);
    }
    let plan = PlanAnswer::read(&text);
    if let Ok(Ok(plan)) = &plan {
        _ = faults_of_plan(plan, &Job::default());
    }
    claims.is_ok() || plan.is_ok()
}

pub fn answer_plugin_request(world: &mut World, input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let mut accepted = false;
    for distro in &world.distros {
        // An answer follows the contract, even if it refuses the request.
        _ = ClaimsAnswer::read(&answer(&**distro, "claims", &text)).unwrap();
        accepted |= PlanAnswer::read(&answer(&**distro, "plan", &text)).unwrap().is_ok();
    }
    accepted
}

pub fn list_packages(_: &mut World, input: &[u8]) -> bool {
    let wanted = |name: &str, version: Option<&str>| Wanted {
        name: name.to_owned(),
        architecture: None,
        version: version.map(str::to_owned),
    };
    let expect = Expect {
        sound: vec!["installed".to_owned()],
        absent: vec!["config-files".to_owned()],
        packages: vec![wanted("redis-server", Some("5:7.*")), wanted("awk", None)],
    };
    let Ok(found) = packages::parse(&String::from_utf8_lossy(input), &expect) else { return false };
    _ = (packages::document(&found), packages::difference(&[], &found));
    _ = packages::ensure_sound(&found, &expect, "the image");
    _ = packages::ensure_installed(&found, &expect);
    for line in packages::document(&found).lines() {
        let columns: Vec<_> = line.split('\t').collect();
        assert!(columns.len() == 3 && !columns[0].is_empty(), "{line:?}");
        assert!(!line.contains(|c: char| c != '\t' && (c.is_whitespace() || c.is_control())), "{line:?}");
    }
    !found.is_empty()
}

pub fn list_held_packages(_: &mut World, input: &[u8]) -> bool {
    let Ok(held) = packages::parse_held(&String::from_utf8_lossy(input)) else { return false };
    for name in &held {
        assert!(!name.is_empty() && !name.contains(char::is_whitespace), "{name:?}");
    }
    !held.is_empty()
}

pub fn read_step_output(world: &mut World, input: &[u8]) -> bool {
    let (mut lines, mut diagnoser) = (OutputLines::without(&world.secrets), Diagnoser::new(&world.troubles));
    let mut heard = |line: &str| {
        assert!(!line.contains(|c: char| c.is_control() && c != '\t'), "{line:?}");
        assert!(!line.contains(SECRET), "{line:?}");
        diagnoser.line(line);
    };
    // The output arrives in pieces, as from a pipe. The first byte of the input determines their length.
    let piece = 1 + usize::from(input.first().copied().unwrap_or_default()) * 16;
    input.chunks(piece).for_each(|piece| lines.add(piece, &mut heard));
    lines.finish(&mut heard);
    _ = (diagnoser.meaning(), diagnoser.all().count(), diagnoser.tail());
    diagnoser.lines > 0
}

pub fn lint_boot_text(_: &mut World, input: &[u8]) -> bool {
    let links = ["disk/by-uuid/11111111-2222-4333-8444-555555555555", "disk/by-label/root"];
    let node = DeviceNode { name: "loop0p1".to_owned(), rdev: 1, links: links.map(str::to_owned).to_vec() };
    let (own, text) = (DiskNames::of(&[node]), String::from_utf8_lossy(input));
    let found = [BootTextKind::Words, BootTextKind::Fstab].map(|kind| lint(kind, &text, &own));
    found.iter().flatten().count() > 0
}

pub fn explain_inputs(_: &mut World, input: &[u8]) -> bool {
    let stored = fs::read_to_string(repository().join("tests/data/fuzz/inputs/stored.json")).unwrap();
    let new = serde_json::from_str(&stored).unwrap();
    let text = String::from_utf8_lossy(input);
    let by_tag = explain(&PreviousInputs::of(None, Some(&text)).unwrap(), &new);
    let by_json = PreviousInputs::of(Some(&text), None).map(|old| explain(&old, &new));
    by_json.is_some() || !by_tag.iter().any(|line| line.contains("cannot be parsed"))
}

pub fn read_region(world: &mut World, input: &[u8]) -> bool {
    let dir = world.dir.path().join("region");
    let region = world.region.get_or_insert_with(|| Region::open(&dir).unwrap()).clone();
    let id = "0123456789abcdef0";
    // The input is one of the two records, and the other record is missing.
    let paths = [format!("region/images/ami-{id}.json"), format!("region/snapshots/snap-{id}.json")];
    let is_image = String::from_utf8_lossy(input).contains("\"root_device\"");
    let [record, other] = if is_image { [0, 1] } else { [1, 0] };
    _ = fs::remove_file(world.dir.path().join(&paths[other]));
    world.write(&paths[record], input);
    world.write(&format!("region/documents/ami-{id}.json"), input);
    world.runtime.block_on(async {
        let images = region.images(None).await;
        let image = region.image(&ImageId(format!("ami-{id}"))).await;
        let runs = region.stale_runs(None).await;
        drop(image);
        images.is_ok() && runs.is_ok()
    })
}
