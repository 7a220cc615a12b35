//! A lab for tests with apt: a small Debian that is created once, and an image over it. A test's changes are removed
//! when the test ends.

use super::overlay::Overlay;
use super::{LabBake, provision_and_seal};
use crate::programs::{cache_dir, oven};
use oven::bake::target;
use oven::bake::{download, secrets};
use oven::config::project::NetworkSettings;
use oven::definition::{Definition, GivenVars};
use oven::ids::Architecture;

use oven::image::tree::ImageTree;
use oven::provision::context::MountedImage;
use oven::provision::context::{EgressGuard, ProvisionContext};
use oven::provision::package_cache;
use oven::provision::package_cache::{CacheStore, PackageCache};
use oven::report::{Level, Report, Style};

use oven_debian::Debian;
use oven_distro::{Distro, OsRelease, Plan};
use std::collections::BTreeMap;
use std::fs;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

const SUITE: &str = "bookworm";

/// Returns the base. mmdebstrap creates it once, in the directory for build results.
fn base() -> PathBuf {
    static MAKING: Mutex<()> = Mutex::new(());
    let _turn = MAKING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = cache_dir().join(format!("provision-{SUITE}"));
    if !dir.exists() {
        let part = dir.with_extension("part");
        _ = Command::new("rm").args(["-rf", "--one-file-system"]).arg(&part).status();
        let made = Command::new("unshare")
            .args(["--mount", "--mount-proc", "--pid", "--fork", "--kill-child", "mmdebstrap", "--quiet"])
            .args(["--mode=root", "--format=directory", "--variant=apt", SUITE])
            .arg(&part)
            .status()
            .expect("these tests need unshare and mmdebstrap: run scripts/setup");
        assert!(made.success(), "mmdebstrap failed: is there a network?");
        // mmdebstrap copies this machine's file, but an image has its own.
        fs::write(part.join("etc/resolv.conf"), RESOLV_CONF).unwrap();
        fs::rename(&part, &dir).unwrap();
    }
    dir
}

pub const RESOLV_CONF: &str = "nameserver 192.0.2.53\n";

/// An image over the base, a definition, and files of this machine that must not change.
pub struct PackageLab {
    overlay: Overlay,
    pub network: NetworkSettings,
    /// The variables of `--var`.
    pub given: GivenVars,
    /// The id of the image's base.
    pub base: String,
    /// The store of the package cache.
    pub store: CacheStore,
    /// The environment from which secrets are read.
    pub environment: BTreeMap<String, String>,
}

/// Paths in the lab and in its image.
impl Deref for PackageLab {
    type Target = Overlay;

    fn deref(&self) -> &Overlay {
        &self.overlay
    }
}

impl PackageLab {
    #[allow(clippy::new_without_default, reason = "it makes files and mounts")]
    pub fn new() -> Self {
        Self::on("rw")
    }

    /// `options` has the mount options of the file system for the image's changes.
    pub fn on(options: &str) -> Self {
        let overlay = Overlay::new(base(), options, "");
        fs::create_dir(overlay.path("host")).unwrap();
        fs::write(overlay.path("host/canary"), "host").unwrap();
        let store = CacheStore::new(&overlay.path("state").join(package_cache::DIR), package_cache::LIMIT);
        Self {
            overlay,
            network: NetworkSettings::default(),
            given: GivenVars::new(),
            base: "snap-1".into(),
            store,
            environment: BTreeMap::new(),
        }
    }

    /// Writes image.toml: the keys that every definition needs, and then `toml`.
    pub fn define(&self, toml: &str) {
        let text = format!("name = \"web\"\nfrom = \"ami-0123456789abcdef0\"\n{toml}");
        fs::write(self.path("web/image.toml"), text).unwrap();
    }

    /// Writes a script of the definition.
    pub fn script(&self, name: &str, text: &str) {
        fs::write(self.path("web").join(name), format!("#!/bin/sh -e\n{text}\n")).unwrap();
    }

    /// Builds a package file `NAME.deb` in the definition's directory. `control` has more control fields. `files` has
    /// paths and contents. Files below `DEBIAN` are the package's scripts.
    pub fn package(&self, name: &str, version: &str, control: &str, files: &[(&str, &str)]) {
        let dir = self.path("package");
        let _ = Command::new("rm").args(["-rf", "--one-file-system"]).arg(&dir).status();
        let fields = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: Test <test@example.org>\n\
             Description: a test\n{control}"
        );
        for (path, content) in files.iter().chain([&("DEBIAN/control", fields.as_str())]) {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            let is_script = content.starts_with("#!");
            fs::set_permissions(&path, fs::Permissions::from_mode(if is_script { 0o755 } else { 0o644 }))
                .unwrap();
        }
        let built = Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Znone", "-b"])
            .arg(&dir)
            .arg(self.path(&format!("web/{name}.deb")))
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    }

    pub fn bake(&self) -> LabBake {
        self.bake_with(|_| ())
    }

    /// Loads the definition, plans, calls `change` with the plan, and executes it.
    pub fn bake_with(&self, change: impl FnOnce(&mut Plan)) -> LabBake {
        let image = Definition::load_with(&self.path("web"), &self.given).unwrap();
        let secrets =
            secrets::from_environment(&image, |name| self.environment.get(name).map(Into::into)).unwrap();
        let inside = ImageTree::open_dir(&self.path("image")).unwrap();
        let report = Report::new(Style::Silent, Level::Verbose);
        let log = self.path("log");
        report.mask_secrets(&secrets);
        report.log_to(&log, "a test");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let downloads = self.path("state").join(download::DIR);
        let image =
            match runtime.block_on(download::fetch_packages(&image, &downloads, &self.network, &report)) {
                Ok(image) => image,
                Err(error) => return LabBake { result: Err(error), log: fs::read_to_string(log).unwrap() },
            };
        let os_release = inside.read("/etc/os-release").unwrap().unwrap();
        let os_release = OsRelease::parse(&String::from_utf8(os_release).unwrap());
        let mut job = target::job::from_definition(&image, os_release, Architecture::HOST, &self.network);
        let claims = Debian.claims(&job.os_release);
        target::job::add_image_facts(&mut job, &claims, &inside).unwrap();
        let mut plan = match Debian.plan(&job) {
            Ok(plan) => plan,
            Err(refused) => {
                return LabBake { result: Err(oven::distros::refused(refused)), log: String::new() };
            }
        };
        change(&mut plan);
        let place = MountedImage { root: &self.path("image"), inside: &inside, nodes: &[], unmounted: &[] };
        let kept = PackageCache { store: self.store.clone(), base: self.base.clone() };
        let work = ProvisionContext {
            image: &image,
            plan: &plan,
            network: &self.network,
            secrets: &secrets,
            guard: EgressGuard::Wanted,
            limits: oven::config::project::StepLimits::default(),
            helper: &oven(),
            package_cache: Some(&kept),
            report: &report,
        };
        let result = runtime.block_on(provision_and_seal(&place, &work));
        // The log file is created at the first step. If an error occurs before that, there is no log.
        let begun = result.is_ok() || !report.phases().is_empty();
        let log = if begun || log.exists() { fs::read_to_string(log).unwrap() } else { String::new() };
        let baked = LabBake { result, log };
        self.ensure_nothing_stays();
        baked
    }

    /// Fails if a bake left something behind. It is called after every bake, whether the bake succeeded or not.
    fn ensure_nothing_stays(&self) {
        assert_eq!(fs::read_to_string(self.path("host/canary")).unwrap(), "host", "a file of this machine");
        assert!(!self.image("usr/sbin/policy-rc.d").exists(), "policy-rc.d stays");
        for dir in ["run", "proc", "sys", "dev"] {
            let left: Vec<_> =
                fs::read_dir(self.image(dir)).unwrap().map(|e| e.unwrap().file_name()).collect();
            let before: Vec<_> = fs::read_dir(self.overlay.base().join(dir))
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect();
            assert_eq!(left.len(), before.len(), "/{dir} holds {left:?}");
        }
        self.assert_nothing_is_mounted();
        let root = self.path("image");
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let its = fs::read_link(process.path().join("root"));
            assert!(its.is_err() || !its.unwrap().starts_with(&root), "{:?} stays", process.file_name());
        }
    }
}
