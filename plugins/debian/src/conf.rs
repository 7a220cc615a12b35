//! How apt behaves while oven bakes.
//!
//! apt reads the file that `APT_CONFIG` names first, then `/etc/apt/apt.conf.d`, then its main file. The image's own
//! settings must count (its repositories may need them) and must not win: so the first file makes a second one the
//! main file, which is read last.

use crate::{caches, verify};
use oven_distro::{Conffiles, Job, Shim};

pub const FIRST: &str = "/run/oven/apt.conf";
/// The same for `apt-get update`.
pub const UPDATE: &str = "/run/oven/apt-update.conf";
const LAST: &str = "/run/oven/apt-last.conf";
/// The main file of the image's own, where it has one.
pub const IMAGES_MAIN: &str = "/etc/apt/apt.conf";
pub const SOURCES: &str = "/run/oven/sources.list";

pub fn first() -> [Shim; 2] {
    let main = format!("Dir::Etc::main \"{LAST}\";\n");
    // apt makes one of the indexes each time they were refreshed, even if they are as before. Whoever reads them next
    // makes it if they are not.
    let update =
        format!("{main}pkgCacheFile::Generate \"false\";\nDir::Bin::apt-key \"{}\";\n", verify::APT_KEY);
    [(FIRST, main), (UPDATE, update)].map(|(path, content)| Shim { path: path.into(), content, mode: 0o644 })
}

/// `main`: the image has a main file of its own.
pub fn last(job: &Job, main: bool) -> Shim {
    let mut text = String::new();
    if main {
        text += &format!("#include \"{IMAGES_MAIN}\";\n");
    }
    text += BEHAVIOUR;
    text += &format!("DPkg::Path \"{}\";\n", caches::PATH);
    text += &format!("APT::Install-Recommends \"{}\";\n", job.recommends);
    // Whoever names a version, or hands a package over, means that one.
    text += "APT::Get::allow-downgrades \"true\";\n";
    text += match job.conffiles {
        Conffiles::Keep => "DPkg::Options { \"--force-confdef\"; \"--force-confold\"; };\n",
        Conffiles::Replace => "DPkg::Options { \"--force-confnew\"; };\n",
    };
    if let Some(path) = &job.ca_file {
        text += &format!("Acquire::https::CAInfo \"{path}\";\n");
    }
    if job.mirror.is_some() {
        text += &format!("Dir::Etc::sourcelist \"{SOURCES}\";\n");
    }
    Shim { path: LAST.into(), content: text, mode: 0o644 }
}

const BEHAVIOUR: &str = r##"// Hooks are for the machine's administrator: they ask, list changes, restart services,
// or delete what was downloaded.
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
// Indexes are read once or twice and then removed: as few as can be, and not compressed again.
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
// One cache of what the indexes say is enough: the other one is for changes of what is installed.
Dir::Cache::srcpkgcache "";
// What one step downloads is there for the next; the same for every bake of a definition.
APT::Keep-Downloaded-Packages "true";
APT::Get::Always-Include-Phased-Updates "true";
APT::Get::Assume-Yes "true";
APT::Get::AutomaticRemove "false";
APT::Install-Suggests "false";
Dpkg::Use-Pty "false";
// The disk is written out as a whole at the end, or thrown away.
#clear DPkg::Options;
DPkg::Options { "--force-unsafe-io"; };
"##;
