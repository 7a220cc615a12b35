//! A lab for tests with dnf, zypper and rpm: a small root file system that is created once, and an image over it. A
//! test's changes are removed when the test ends.
//!
//! The root file system is Debian's. The programs are real, and so are transactions, scriptlets, keys and downloads.
//! Three things are not real: the distribution (`os-release` has another name), the packages (see `rpm_packages.rs`),
//! and the package `platform`, by which rpm knows that there is a shell.

use super::mirror::Mirror;
use super::overlay::Overlay;
use super::rpm_packages::{self, run};
use super::{LabBake, provision_and_seal};
use crate::programs::{cache_dir, oven};
use oven::bake::target;
use oven::config::project::NetworkSettings;
use oven::definition::Definition;
use oven::distros;
use oven::ids::Architecture;

use oven::image::tree::ImageTree;
use oven::provision::context::MountedImage;
use oven::provision::context::{EgressGuard, ProvisionContext};
use oven::provision::package_cache;
use oven::provision::package_cache::{CacheStore, PackageCache};
use oven::report::{Level, Report, Style};

use oven::secrets::Secrets;
use oven_distro::{Distro, OsRelease, Plan};
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

const SUITE: &str = "bookworm";
const FILE_CONTEXTS: &str = "/etc/selinux/default/contexts/files/file_contexts";
/// The version of the changes that `base` makes. It is raised when they change.
const BASE: u32 = 1;
const INCLUDED: &str = "dnf,policycoreutils,rpm,selinux-policy-default,zypper";

/// Returns the base. mmdebstrap creates it once, in the directory for build results.
pub fn base() -> PathBuf {
    static MAKING: Mutex<()> = Mutex::new(());
    let packages = rpm_packages::built();
    let _turn = MAKING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = cache_dir().join(format!("rpm-{SUITE}-{BASE}"));
    if dir.exists() {
        return dir;
    }
    let part = dir.with_extension("part");
    _ = Command::new("rm").args(["-rf", "--one-file-system"]).arg(&part).status();
    run(Command::new("unshare")
        .args(["--mount", "--mount-proc", "--pid", "--fork", "--kill-child", "mmdebstrap", "--quiet"])
        .args(["--mode=root", "--format=directory", "--variant=apt", &format!("--include={INCLUDED}"), SUITE])
        .arg(&part));
    let write = |path: &str, text: &str| {
        fs::create_dir_all(part.join(path).parent().unwrap()).unwrap();
        fs::write(part.join(path), text).unwrap();
    };
    write("etc/resolv.conf", "nameserver 192.0.2.53\n");
    // Debian's rpm has its database in the user's home directory. Other distributions have it in the system.
    write("etc/rpm/macros", "%_dbpath /var/lib/rpm\n");
    write("etc/selinux/config", "SELINUX=disabled\nSELINUXTYPE=default\n");
    for dir in ["etc/yum.repos.d", "etc/zypp/repos.d"] {
        fs::create_dir_all(part.join(dir)).unwrap();
    }
    // These files are apt's, which these tests do not use.
    for dir in ["var/lib/apt/lists", "var/cache/apt"] {
        run(Command::new("find").arg(part.join(dir)).args(["-type", "f", "-delete"]));
    }
    fs::copy(packages.join("plain/platform-9-1.noarch.rpm"), part.join("tmp/platform.rpm")).unwrap();
    run(Command::new("chroot").arg(&part).args(["rpm", "--force-debian", "-i", "/tmp/platform.rpm"]));
    fs::remove_file(part.join("tmp/platform.rpm")).unwrap();
    // All files get labels, as in images that enforce SELinux.
    run(Command::new("unshare")
        .args(["--mount", "--pid", "--fork", &format!("--mount-proc={}/proc", part.display()), "chroot"])
        .arg(&part)
        .args(["setfiles", "-m", "-e", "/proc", "-e", "/dev", FILE_CONTEXTS, "/"]));
    fs::rename(&part, &dir).unwrap();
    dir
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum System {
    Dnf,
    Zypper,
}
pub use System::{Dnf, Zypper};

impl System {
    pub fn os_release(self) -> &'static str {
        match self {
            Dnf => "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\n",
            Zypper => "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\nVERSION_ID=\"15.6\"\n",
        }
    }

    fn plugin(self) -> Box<dyn Distro> {
        match self {
            Dnf => Box::new(oven_redhat::RedHat),
            Zypper => Box::new(oven_suse::Suse),
        }
    }

    pub fn repositories(self) -> &'static str {
        match self {
            Dnf => "etc/yum.repos.d",
            Zypper => "etc/zypp/repos.d",
        }
    }
}

/// An image over the base, a definition, and a mirror of the packages.
pub struct RpmLab {
    overlay: Overlay,
    pub system: System,
    pub mirror: Mirror,
}

/// Paths in the lab and in its image.
impl Deref for RpmLab {
    type Target = Overlay;

    fn deref(&self) -> &Overlay {
        &self.overlay
    }
}

impl RpmLab {
    /// Creates an image with one repository, which is the repository without signatures.
    pub fn new(system: System) -> Self {
        let lab = Self::without_repository(system, "rw");
        lab.write_repository();
        lab
    }

    fn write_repository(&self) {
        let own = format!("[own]\nname=own\nbaseurl={}plain/\ngpgcheck=0\n", self.mirror.address);
        self.write(&format!("{}/own.repo", self.system.repositories()), &own);
    }

    /// `options` has the mount options of the file system for the image's changes.
    pub fn without_repository(system: System, options: &str) -> Self {
        // With xino, all files have the same device number, as on a disk. This is needed because setfiles does not
        // cross file systems.
        let overlay = Overlay::new(base(), options, ",xino=on");
        let lab = Self { overlay, system, mirror: Mirror::of(rpm_packages::built()) };
        lab.write_system();
        lab
    }

    /// Writes the parts of the system that the base does not have.
    fn write_system(&self) {
        self.write("usr/lib/os-release", self.system.os_release());
        // In real distributions, the package managers' packages have these directories. Debian's zypper creates its
        // directory when it is missing.
        for dir in ["var/cache/dnf", "var/cache/zypp"] {
            fs::create_dir_all(self.image(dir)).unwrap();
        }
    }

    /// Restores the image as [`RpmLab::new`] created it.
    pub fn renew(&self) {
        self.overlay.renew();
        self.write_system();
        self.write_repository();
    }

    pub fn write(&self, path: &str, text: &str) {
        fs::write(self.image(path), text).unwrap();
    }

    /// Writes image.toml: the keys that every definition needs, and then `toml`. Also copies the keys for signatures.
    pub fn define(&self, toml: &str) {
        let text = format!("name = \"web\"\nfrom = \"ami-0123456789abcdef0\"\n{toml}");
        fs::write(self.path("web/image.toml"), text).unwrap();
        for key in ["right.asc", "wrong.asc"] {
            fs::copy(rpm_packages::built().join(key), self.path("web").join(key)).unwrap();
        }
    }

    /// Returns the text of a `[[repository]]`.
    pub fn repository(&self, key: &str, keep: bool) -> String {
        let address = &self.mirror.address;
        format!(
            "[[repository]]\nname = \"more\"\nurl = \"{address}signed/\"\nkey = \"{key}\"\nkeep = {keep}\n"
        )
    }

    /// Copies a package's file to the definition's directory.
    pub fn bring(&self, file: &Path) {
        fs::copy(file, self.path("web").join(file.file_name().unwrap())).unwrap();
    }

    /// Installs a package's file in the image, as if the base had it.
    pub fn base_has(&self, file: &Path) {
        fs::copy(file, self.image("tmp/x.rpm")).unwrap();
        run(Command::new("chroot").arg(self.image("")).args(["rpm", "--force-debian", "-i", "/tmp/x.rpm"]));
        fs::remove_file(self.image("tmp/x.rpm")).unwrap();
    }

    /// Returns the SELinux label of an object in the image.
    pub fn label_of(&self, path: &str) -> Option<String> {
        let mut label = vec![0; 4096];
        let length = rustix::fs::lgetxattr(self.image(path), "security.selinux", &mut label).ok()?;
        Some(String::from_utf8_lossy(&label[..length]).trim_end_matches('\0').to_owned())
    }

    pub fn label(&self, path: &str, label: &str) {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::lsetxattr(self.image(path), "security.selinux", label.as_bytes(), flags).unwrap();
    }

    pub fn plan(&self) -> Result<Plan, anyhow::Error> {
        let image = Definition::load(&self.path("web"))?;
        let inside = ImageTree::open_dir(&self.path("image"))?;
        let os_release = OsRelease::parse(&self.read("usr/lib/os-release"));
        let distro = self.system.plugin();
        let mut job =
            target::job::from_definition(&image, os_release, Architecture::HOST, &NetworkSettings::default());
        let claims = distro.claims(&job.os_release);
        target::job::add_image_facts(&mut job, &claims, &inside)?;
        distro.plan(&job).map_err(distros::refused)
    }

    /// Loads the definition, plans, and executes.
    pub fn bake(&self) -> LabBake {
        let plan = match self.plan() {
            Ok(plan) => plan,
            Err(error) => return LabBake { result: Err(error), log: String::new() },
        };
        let image = Definition::load(&self.path("web")).unwrap();
        let inside = ImageTree::open_dir(&self.path("image")).unwrap();
        let report = Report::new(Style::Silent, Level::Verbose);
        let log = self.path("log");
        report.log_to(&log, "a test");
        let place = MountedImage { root: &self.path("image"), inside: &inside, nodes: &[], unmounted: &[] };
        let store = CacheStore::new(&self.path("state").join(package_cache::DIR), package_cache::LIMIT);
        let kept = PackageCache { store, base: "snap-1".into() };
        let work = ProvisionContext {
            image: &image,
            plan: &plan,
            network: &NetworkSettings::default(),
            secrets: &Secrets::default(),
            guard: EgressGuard::Wanted,
            limits: oven::config::project::StepLimits::default(),
            helper: &oven(),
            package_cache: Some(&kept),
            report: &report,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(provision_and_seal(&place, &work));
        // The log file is created at the first step. If an error occurs before that, there is no log.
        let begun = result.is_ok() || !report.phases().is_empty();
        let log = if begun || log.exists() { fs::read_to_string(log).unwrap() } else { String::new() };
        self.assert_nothing_is_mounted();
        LabBake { result, log }
    }
}
