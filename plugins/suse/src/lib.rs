//! SUSE Linux Enterprise and openSUSE: zypper and rpm.
//!
//! Packages are downloaded in one step, which has the network and runs no code of packages. They are installed from the
//! cache in another step, which has no network.

mod progress;
mod repository;
mod troubles;

use oven_distro::{Claim, Claims, Conffiles, Distro, Job, OsRelease, Phase, Plan, Refused, Step, Upgrade};
use oven_rpm::{
    CLEAN_TIMEOUT, DRACUT, PackageRequests, RPM, Spelling, UPDATE_TIMEOUT, count, fetch, step, words,
};
use std::collections::BTreeMap;

/// The plugin. It has no state.
#[derive(Debug, Clone, Copy, Default)]
pub struct Suse;

const ZYPPER: &str = "/usr/bin/zypper";
/// The directory of zypper's downloads.
const CACHE: &str = "/var/cache/zypp";
/// The `ID`s that this plugin was written for.
const IDS: [&str; 8] = [
    "opensuse",
    "opensuse-leap",
    "opensuse-microos",
    "opensuse-slowroll",
    "opensuse-tumbleweed",
    "sle-micro",
    "sled",
    "sles",
];
/// Rolling releases. They have to be upgraded as a whole, with `dist-upgrade`.
const ROLLING: [&str; 3] = ["opensuse-microos", "opensuse-slowroll", "opensuse-tumbleweed"];
/// The exit status for "done, and a reboot is advised". It is a success, because an instance boots the image later.
const REBOOT_ADVISED: u8 = 102;

impl Distro for Suse {
    fn id(&self) -> &str {
        "suse"
    }

    fn claims(&self, os: &OsRelease) -> Claims {
        let claim = match os.id() {
            id if IDS.contains(&id) => Claim::Exact,
            _ if os.id_like().any(|id| id == "suse" || IDS.contains(&id)) => Claim::Family,
            _ => return Claims::default(),
        };
        Claims { claim, look_for: words([ZYPPER, RPM, DRACUT]), read: Vec::new() }
    }

    fn plan(&self, job: &Job) -> Result<Plan, Refused> {
        let has = |path: &str| job.present.get(path).copied().unwrap_or(false);
        let mut plan = Plan {
            troubles: troubles::troubles(),
            caches: vec![oven_rpm::cache(CACHE, &[])],
            ..Plan::default()
        };
        (plan.failures, plan.notes) = (oven_rpm::failures(), oven_rpm::notes());
        if has(RPM) {
            plan.facts = BTreeMap::from([("packages".to_owned(), oven_rpm::list_packages_command())]);
            plan.expect = oven_rpm::expected(Vec::new());
        }
        refuse_unsupported(job)?;
        let changes = job.upgrade != Upgrade::None || !job.packages.is_empty();
        if changes || !job.repositories.is_empty() || !job.hold.is_empty() {
            if let Some(missing) = [ZYPPER, RPM].into_iter().find(|path| !has(path)) {
                return Err(Refused(format!("packages cannot be installed: the image has no {missing}")));
            }
            let requests = PackageRequests::from_job(job, &SPELLING)?;
            plan.steps = repository::add(job, &mut plan)?;
            plan.progress = progress::lines();
            plan.troubles.splice(0..0, requests.troubles.iter().cloned());
            plan.expect = oven_rpm::expected(requests.wanted.clone());
            if changes {
                plan.shims.extend(has(DRACUT).then(oven_rpm::generic_initramfs));
                plan.steps.extend(steps(job, &requests));
                plan.caches = vec![oven_rpm::cache(CACHE, &SOURCES)];
                if oven_rpm::names_version(job) {
                    plan.versions = versions_command();
                }
            }
            plan.steps.extend(holds(job, &requests)?);
            plan.steps.sort_by_key(|step| step.phase);
        }
        if has(ZYPPER) {
            plan.steps.extend(clean());
        }
        Ok(plan)
    }
}

/// The files that define where packages come from, and with which credentials they are downloaded.
const SOURCES: [&str; 2] = ["/etc/zypp", "/run/oven/keys"];

fn refuse_unsupported(job: &Job) -> Result<(), Refused> {
    let refuse = |what: &str| Err(Refused(what.to_owned()));
    if !job.debconf.is_empty() {
        return refuse("debconf: it works only with Debian packages");
    }
    if job.conffiles == Conffiles::Replace {
        return refuse(
            "conffiles: `replace` is not supported, because an rpm package itself decides what happens to a changed \
             configuration file; add the file with [[file]]",
        );
    }
    if job.mirror.is_some() {
        return refuse(
            "mirror: the layout of SUSE's archives is unknown; add [[repository]] entries instead",
        );
    }
    if job.ca_file.is_some() {
        return refuse("ca_file: zypper uses only the image's certificates; add yours to the base image");
    }
    Ok(())
}

const SPELLING: Spelling = Spelling {
    named: |name, architecture, version| {
        let architecture = architecture.map(|a| format!(".{a}")).unwrap_or_default();
        // zypper does not support patterns of versions. So it gets only the name and installs the newest version, which
        // oven then compares with the pattern.
        let version = version.map(|v| v.strip_suffix("-*").unwrap_or(v)).filter(|v| !v.contains('*'));
        let version = version.map(|v| format!("={v}")).unwrap_or_default();
        format!("{name}{architecture}{version}")
    },
    group: |name| format!("pattern:{name}"),
    missing: &["No provider of '{}' found.", "Package '{}' not found."],
    missing_group: &[
        "No provider of 'pattern:{}' found.",
        "Pattern '{}' not found.",
        "'pattern:{}' not found*",
    ],
};

fn zypper(arguments: &[&str]) -> Vec<String> {
    words(["zypper", "--non-interactive"].into_iter().chain(arguments.iter().copied()))
}

/// The command that prints the versions of the package `{name}`, from the indexes of the last refresh.
fn versions_command() -> Vec<String> {
    let query =
        ["--no-refresh", "--xmlout", "search", "--details", "--match-exact", "--type", "package", "{name}"];
    oven_rpm::list_versions(zypper(&query), "sed -n 's/.* edition=\"\\([^\"]*\\)\".*/\\1/p'")
}

fn steps(job: &Job, requests: &PackageRequests) -> Vec<Step> {
    let count = count(requests);
    let clean = zypper(&["clean", "--metadata", "--raw-metadata"]);
    let recommends = if job.recommends { "--recommends" } else { "--no-recommends" };
    let accept_licenses = "--auto-agree-with-licenses";
    // zypper downloads missing metadata by itself. A retry relies on this, because the metadata is removed before the
    // retry.
    let get = |why: &str, verb: &[&str], more: &[&str], arguments: &[String]| {
        let argv = zypper(&[verb, &["--download-only", accept_licenses], more].concat());
        let argv = argv.into_iter().chain(arguments.iter().cloned()).collect();
        Step { also_good: vec![REBOOT_ADVISED], ..fetch(why, argv, &clean) }
    };
    let change = |phase, why: &str, verb: &[&str], more: &[&str], arguments: &[String]| {
        let argv = zypper(&[&["--no-refresh"], verb, &[accept_licenses], more].concat());
        let argv = argv.into_iter().chain(arguments.iter().cloned()).collect();
        Step { network: job.network, also_good: vec![REBOOT_ADVISED], ..step(phase, why, argv) }
    };
    // An explicit refresh asks every repository for new metadata, even if the last refresh was a short time ago.
    let refresh = fetch("refreshing the package index", zypper(&["refresh"]), &clean);
    let mut steps = vec![Step { timeout: UPDATE_TIMEOUT, ..refresh }];
    let upgrade: Option<&[&str]> = match job.upgrade {
        Upgrade::None => None,
        Upgrade::All if ROLLING.contains(&job.os_release.id()) => Some(&["dist-upgrade"]),
        Upgrade::All => Some(&["update"]),
        Upgrade::Security => Some(&["patch", "--category", "security"]),
    };
    // With --oldpackage, a version or a package file of the definition can replace a newer installed version.
    let mut more = vec![recommends, "--oldpackage"];
    if requests.files {
        // The files need not be signed, because they are part of the definition and of its fingerprint.
        more.push("--allow-unsigned-rpm");
    }
    if let Some(verb) = upgrade {
        steps.push(get("downloading upgrades", verb, &[recommends], &[]));
    }
    if !requests.arguments.is_empty() {
        let why = format!("downloading {count} and dependencies");
        steps.push(get(&why, &["install"], &more, &requests.arguments));
    }
    if let Some(verb) = upgrade {
        steps.push(change(Phase::Upgrade, "upgrading packages", verb, &[recommends], &[]));
    }
    if !requests.arguments.is_empty() {
        steps.push(change(
            Phase::Install,
            &format!("installing {count}"),
            &["install"],
            &more,
            &requests.arguments,
        ));
    }
    steps
}

/// Locks held packages. A lock also prevents the installation of a package. So packages that this job installs are
/// locked after their installation.
fn holds(job: &Job, requests: &PackageRequests) -> Result<Vec<Step>, Refused> {
    let is_requested = |name: &String| requests.wanted.iter().any(|wanted| wanted.name == *name);
    let mut steps = Vec::new();
    for (phase, after) in [(Phase::Prepare, false), (Phase::Install, true)] {
        let names: Vec<_> =
            job.hold.iter().filter(|name| is_requested(name) == after).map(String::as_str).collect();
        let plain = |name: &&&str| {
            name.starts_with(|c: char| c.is_ascii_alphanumeric())
                && name.chars().all(|c| c.is_ascii_alphanumeric() || "+.-_".contains(c))
        };
        if let Some(bad) = names.iter().find(|name| !plain(name)) {
            return Err(Refused(format!("hold: `{bad}` is not a valid package name")));
        }
        if !names.is_empty() {
            let argv = zypper(&[&["addlock"], names.as_slice()].concat());
            steps.push(step(phase, &format!("holding {}", names.join(", ")), argv));
        }
    }
    Ok(steps)
}

/// Removes indexes and downloaded packages of all repositories. Downloaded keys are removed separately, because
/// zypper's own command does not remove them.
fn clean() -> [Step; 2] {
    let step = |why: &str, argv| Step { timeout: CLEAN_TIMEOUT, ..step(Phase::Clean, why, argv) };
    let keys = format!("{CACHE}/pubkeys");
    [
        step("removing package indexes and caches", zypper(&["clean", "--all"])),
        step("removing zypper's downloaded keys", words(["rm", "-r", "-f", &keys])),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_listed_newest_first() {
        let solvable = |version: &str| {
            format!(
                "<solvable status=\"not-installed\" name=\"x\" kind=\"package\" edition=\"{version}\" arch=\"noarch\" \
                 repository=\"main\"/>\n"
            )
        };
        let output = ["1.9-1", "1:1.0-2", "1.10-1", "1.9-1"].map(solvable).concat();
        let output =
            format!("<?xml version='1.0'?>\n<stream>\n<search-result version=\"0.0\">\n{output}</stream>\n");
        let command = versions_command();
        let mut sh = std::process::Command::new("sh");
        let listed = sh.args(&command[1..4]).args(["printf", "%s", &output]).output().unwrap();
        assert_eq!(String::from_utf8(listed.stdout).unwrap(), "1:1.0-2\n1.10-1\n1.9-1\n");
    }
}
