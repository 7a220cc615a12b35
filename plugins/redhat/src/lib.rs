//! Fedora, RHEL, Amazon Linux, Rocky, Alma, CentOS, Oracle and their relatives: dnf, yum or microdnf, and rpm.
//!
//! Packages are downloaded in one step, which has the network and runs no code of packages. They are installed from the
//! cache in another step, which has no network. The image's own settings and repositories apply. Additional settings of
//! a bake are given on the command line (see `manager.rs`), so they cannot remain in the image.

mod manager;
mod mirror;
mod progress;
mod repository;
mod tools;
mod troubles;

use manager::Manager;
use oven_distro::{
    Cache, Claim, Claims, Conffiles, Distro, Job, OsRelease, Phase, Plan, Refused, Step, Upgrade,
};
use oven_rpm::{CLEAN_TIMEOUT, DRACUT, PackageRequests, RPM, UPDATE_TIMEOUT, count, fetch, step};
use std::collections::BTreeMap;

/// The plugin. It has no state.
#[derive(Debug, Clone, Copy, Default)]
pub struct RedHat;

/// The `ID`s that this plugin was written for.
const IDS: [&str; 8] = ["almalinux", "amzn", "centos", "fedora", "ol", "redhat", "rhel", "rocky"];

impl Distro for RedHat {
    fn id(&self) -> &str {
        "redhat"
    }

    fn claims(&self, os: &OsRelease) -> Claims {
        let claim = match os.id() {
            id if IDS.contains(&id) => Claim::Exact,
            _ if os.id_like().any(|id| IDS.contains(&id)) => Claim::Family,
            _ => return Claims::default(),
        };
        let look_for = [RPM, DRACUT].into_iter().chain(manager::LOOK_FOR).map(str::to_owned).collect();
        Claims { claim, look_for, read: Vec::new() }
    }

    fn plan(&self, job: &Job) -> Result<Plan, Refused> {
        let has = |path: &str| job.present.get(path).copied().unwrap_or(false);
        let manager = Manager::detect(has);
        let mut plan =
            Plan { troubles: troubles::troubles(), failures: troubles::failures(), ..Plan::default() };
        (plan.notes, plan.caches) = (troubles::notes(), caches(manager, None));
        if has(RPM) {
            plan.facts = BTreeMap::from([("packages".to_owned(), oven_rpm::list_packages_command())]);
            plan.expect = oven_rpm::expected(Vec::new());
        }
        refuse_unsupported(job)?;
        let changes = job.upgrade != Upgrade::None || !job.packages.is_empty();
        if let Some(manager) = manager.filter(|_| has(RPM)) {
            plan.tools = tools::tools(job, manager, changes)?;
            plan.progress = plan.tools.iter().flat_map(|_| progress::lines()).collect();
        }
        if !changes && job.repositories.is_empty() && job.hold.is_empty() {
            plan.steps.extend(manager.into_iter().flat_map(clean));
            return Ok(plan);
        }
        let Some(manager) = manager.filter(|_| has(RPM)) else {
            return Err(Refused(
                "packages cannot be installed: the image must have rpm, and dnf, yum or microdnf".into(),
            ));
        };
        let requests = PackageRequests::from_job(job, &manager.spelling())?;
        let options = manager.options(job)?;
        manager.ensure_priorities(job)?;
        repository::add(job, &mut plan)?;
        plan.troubles.splice(0..0, requests.troubles.iter().cloned());
        plan.expect = oven_rpm::expected(requests.wanted.clone());
        if changes {
            plan.shims.extend(has(DRACUT).then(oven_rpm::generic_initramfs));
            plan.steps = steps(job, manager, &requests, &options)?;
            plan.caches = caches(Some(manager), manager.cache());
            if oven_rpm::names_version(job) {
                plan.versions = manager.versions_command(&options);
            }
        }
        plan.progress = progress::lines();
        plan.steps.extend(holds(job, manager, &requests)?);
        plan.steps.sort_by_key(|step| step.phase);
        plan.steps.extend(clean(manager));
        Ok(plan)
    }
}

/// The files that define where packages come from, who signs them, and with which credentials they are downloaded.
const SOURCES: [&str; 7] = [
    "/etc/yum.repos.d",
    "/etc/yum.conf",
    "/etc/yum",
    "/etc/dnf",
    "/etc/pki/rpm-gpg",
    "/etc/pki/entitlement",
    "/run/oven/keys",
];

/// The caches of all package managers, because a script may use another package manager than this plan. `used` is the
/// directory into which this plan's steps download. oven caches only this directory.
fn caches(manager: Option<Manager>, used: Option<&str>) -> Vec<Cache> {
    let cache = |path| {
        let sources: &[&str] = if used == Some(path) { &SOURCES } else { &[] };
        oven_rpm::cache(path, sources)
    };
    // The directory of dnf 5 is listed only if the package manager empties it. `clean all` of dnf 4 does not empty it,
    // and some programs use this directory even in images without dnf 5.
    let has_dnf5 = matches!(manager, Some(Manager::Dnf5 | Manager::Microdnf));
    manager::CACHES.into_iter().filter(|path| has_dnf5 || *path != manager::DNF5_CACHE).map(cache).collect()
}

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
    Ok(())
}

fn steps(
    job: &Job,
    manager: Manager,
    requests: &PackageRequests,
    options: &[String],
) -> Result<Vec<Step>, Refused> {
    let count = count(requests);
    let clean = manager.clean_metadata_command();
    let get = |why: &str, verb: Vec<String>, arguments: &[String]| {
        // dnf 5 accepts the download option only after the verb.
        let (verb, more) = verb.split_at(1);
        let argv = manager.argv(&[options, verb, &manager.download_options(), more, arguments]);
        let step = fetch(why, argv, &clean);
        manager.with_locale(step)
    };
    let change = |phase, why: &str, verb: Vec<String>, arguments: &[String]| {
        let step =
            step(phase, why, manager.argv(&[options, &manager.cache_only_options(), &verb, arguments]));
        manager.with_locale(Step { network: job.network, ..step })
    };
    let mut steps = Vec::new();
    let refresh =
        fetch("refreshing the package index", manager.argv(&[options, &manager.refresh_command()]), &clean);
    steps.push(manager.with_locale(Step { timeout: UPDATE_TIMEOUT, ..refresh }));
    let upgrade = manager.upgrade_command(job)?;
    if let Some(verb) = &upgrade {
        steps.push(get("downloading upgrades", verb.clone(), &[]));
    }
    if !requests.arguments.is_empty() {
        let why = format!("downloading {count} and dependencies");
        steps.push(get(&why, oven_rpm::words(["install"]), &requests.arguments));
    }
    if let Some(verb) = upgrade {
        steps.push(change(Phase::Upgrade, "upgrading packages", verb, &[]));
    }
    if !requests.arguments.is_empty() {
        let why = format!("installing {count}");
        steps.push(change(Phase::Install, &why, oven_rpm::words(["install"]), &requests.arguments));
    }
    Ok(steps)
}

/// Locks held packages before the upgrade, so that the upgrade does not change them. Held packages that this job
/// installs are locked after their installation.
fn holds(job: &Job, manager: Manager, requests: &PackageRequests) -> Result<Vec<Step>, Refused> {
    let is_requested = |name: &String| requests.wanted.iter().any(|wanted| wanted.name == *name);
    let mut steps = Vec::new();
    for (phase, after) in [(Phase::Prepare, false), (Phase::Install, true)] {
        let names: Vec<_> = job.hold.iter().filter(|name| is_requested(name) == after).cloned().collect();
        if let Some(bad) = names.iter().find(|name| !is_name(name)) {
            return Err(Refused(format!("hold: `{bad}` is not a valid package name")));
        }
        if !names.is_empty() {
            let argv = manager.argv(&[
                &manager.hold_command(|path| job.present.get(path).copied().unwrap_or(false))?,
                &names,
            ]);
            steps.push(manager.with_locale(step(phase, &format!("holding {}", names.join(", ")), argv)));
        }
    }
    Ok(steps)
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "+.-_".contains(c))
}

/// Removes indexes and downloaded packages, including those of disabled repositories.
fn clean(manager: Manager) -> Vec<Step> {
    let step = |why: &str, argv| {
        let step = step(Phase::Clean, why, argv);
        manager.with_locale(Step { timeout: CLEAN_TIMEOUT, ..step })
    };
    let mut steps =
        vec![step("removing package indexes and caches", manager.argv(&[&manager.clean_all_command()]))];
    // `clean all` does not remove these lists of expired metadata, of files to delete and of trusted keys.
    let lists: &[&str] = match manager {
        Manager::Dnf5 => &["/var/cache/libdnf5/temporary_files.toml"],
        Manager::Dnf => &[
            "/var/cache/dnf/expired_repos.json",
            "/var/cache/dnf/tempfiles.json",
            "/var/cache/dnf/.gpgkeyschecked.yum",
        ],
        Manager::Yum | Manager::Microdnf => &[],
    };
    if !lists.is_empty() {
        let argv = oven_rpm::words(["rm", "-f"].iter().chain(lists).copied());
        steps.push(step("removing dnf's lists of caches", argv));
    }
    steps
}
