//! The configuration of apt while oven bakes.
//!
//! apt first reads the file that `APT_CONFIG` names, then `/etc/apt/apt.conf.d`, then its main file. The image's own
//! settings have to apply, because its repositories may need them. But they must not override oven's settings. So
//! `APT_CONFIG` names a file of oven. This file sets another file of oven as the main file, so that apt reads oven's
//! settings last.

use crate::{caches, verify};
use oven_distro::{Conffiles, Job, Shim};

/// The file that `APT_CONFIG` names.
pub const APT_CONFIG: &str = "/run/oven/apt.conf";
/// The file that `APT_CONFIG` names when `apt-get update` runs.
pub const UPDATE_CONFIG: &str = "/run/oven/apt-update.conf";
const MAIN_CONFIG: &str = "/run/oven/apt-last.conf";
/// The image's own main file, if it has one.
pub const IMAGE_MAIN_CONFIG: &str = "/etc/apt/apt.conf";
/// The list of sources that replaces the image's `sources.list` if the job has a mirror.
pub const MIRROR_SOURCES: &str = "/run/oven/sources.list";

pub fn apt_configs() -> [Shim; 2] {
    let main = format!("Dir::Etc::main \"{MAIN_CONFIG}\";\n");
    // By default, `update` rebuilds apt's binary cache of the indexes even if they did not change. This is turned off.
    // The next command of apt builds the cache if it needs it.
    let update =
        format!("{main}pkgCacheFile::Generate \"false\";\nDir::Bin::apt-key \"{}\";\n", verify::APT_KEY);
    [(APT_CONFIG, main), (UPDATE_CONFIG, update)].map(|(path, content)| Shim {
        path: path.into(),
        content,
        mode: 0o644,
    })
}

/// The main file. `has_main` is true if the image has its own main file.
pub fn main_config(job: &Job, has_main: bool) -> Shim {
    let mut text = String::new();
    if has_main {
        text += &format!("#include \"{IMAGE_MAIN_CONFIG}\";\n");
    }
    text += BEHAVIOUR;
    text += &format!("DPkg::Path \"{}\";\n", caches::PATH);
    text += &format!("APT::Install-Recommends \"{}\";\n", job.recommends);
    // With this setting, a version or a package file of the definition can replace a newer installed version.
    text += "APT::Get::allow-downgrades \"true\";\n";
    text += match job.conffiles {
        Conffiles::Keep => "DPkg::Options { \"--force-confdef\"; \"--force-confold\"; };\n",
        Conffiles::Replace => "DPkg::Options { \"--force-confnew\"; };\n",
    };
    if let Some(path) = &job.ca_file {
        text += &format!("Acquire::https::CAInfo \"{path}\";\n");
    }
    if job.mirror.is_some() {
        text += &format!("Dir::Etc::sourcelist \"{MIRROR_SOURCES}\";\n");
    }
    Shim { path: MAIN_CONFIG.into(), content: text, mode: 0o644 }
}

const BEHAVIOUR: &str = r##"// Hooks are for the machine's administrator: they ask questions, list changes, restart services,
// or delete downloaded packages.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
// An index that cannot be fetched is an error, not a warning.
APT::Update::Error-Mode "any";
Acquire::Retries "3";
Acquire::http::Timeout "60";
Acquire::https::Timeout "60";
// Indexes are read once or twice and then removed: download as few as possible, and do not compress them again.
#clear Acquire::Languages;
Acquire::Languages "none";
Acquire::PDiffs "false";
Acquire::GzipIndexes "false";
#clear Acquire::IndexTargets::deb-src;
#clear Acquire::IndexTargets::deb::CNF;
#clear Acquire::IndexTargets::deb::Contents-deb;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
Dir::Log::Planner "";
// One binary cache of the indexes is enough: the other one is for later changes of installed packages.
Dir::Cache::srcpkgcache "";
// The next step needs the downloaded packages. Phased updates are the same for every bake of a definition.
APT::Keep-Downloaded-Packages "true";
APT::Get::Always-Include-Phased-Updates "true";
APT::Get::Assume-Yes "true";
APT::Get::AutomaticRemove "false";
APT::Install-Suggests "false";
Dpkg::Use-Pty "false";
// The disk is flushed as a whole at the end, or thrown away.
#clear DPkg::Options;
DPkg::Options { "--force-unsafe-io"; };
"##;
