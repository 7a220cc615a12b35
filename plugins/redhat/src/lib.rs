//! Fedora, RHEL, Amazon Linux, Rocky, Alma, CentOS, Oracle and their relatives: dnf, yum or microdnf, and rpm.
//!
//! Packages are downloaded in one step, which has the network and runs no package's code, and installed in another,
//! which has none and takes them from the cache. The image's own settings and repositories count; what a bake needs
//! beside them is said on the command line (`manager.rs`), so nothing of it can stay.

mod manager;
mod mirror;
mod repository;
mod tools;
mod troubles;

use manager::Manager;
use oven_distro::{Claim, Claims, Conffiles, Distro, Job, OsRelease, Phase, Plan, Refused, Step, Upgrade};
use oven_rpm::{Asks, CLEAN_TIMEOUT, DRACUT, RPM, UPDATE_TIMEOUT, count, fetch, step};
use std::collections::BTreeMap;

/// The plugin. It holds nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct RedHat;

/// What os-release calls those that this plugin was written for.
const OWN: [&str; 8] = ["almalinux", "amzn", "centos", "fedora", "ol", "redhat", "rhel", "rocky"];

impl Distro for RedHat {
    fn id(&self) -> &str {
        "redhat"
    }

    fn claims(&self, os: &OsRelease) -> Claims {
        let claim = match os.id() {
            id if OWN.contains(&id) => Claim::Exact,
            _ if os.id_like().any(|id| OWN.contains(&id)) => Claim::Family,
            _ => return Claims::default(),
        };
        let look_for = [RPM, DRACUT].into_iter().chain(manager::LOOK_FOR).map(str::to_owned).collect();
        Claims { claim, look_for, read: Vec::new() }
    }

    fn plan(&self, job: &Job) -> Result<Plan, Refused> {
        let has = |path: &str| job.present.get(path).copied().unwrap_or(false);
        let manager = Manager::of(has);
        let mut plan = Plan { troubles: troubles::all(), failures: troubles::failures(), ..Plan::default() };
        plan.notes = troubles::notes();
        if has(RPM) {
            plan.facts = BTreeMap::from([("packages".to_owned(), oven_rpm::query())]);
            plan.expect = oven_rpm::expect(Vec::new());
        }
        refuse_what_rpm_has_not(job)?;
        let changes = job.upgrade != Upgrade::None || !job.packages.is_empty();
        if let Some(manager) = manager.filter(|_| has(RPM)) {
            plan.tools = tools::tools(job, manager, changes)?;
        }
        if !changes && job.repositories.is_empty() && job.hold.is_empty() {
            plan.steps.extend(manager.into_iter().flat_map(clean));
            return Ok(plan);
        }
        let Some(manager) = manager.filter(|_| has(RPM)) else {
            return Err(Refused(
                "packages cannot be installed: the image has no dnf, yum or microdnf, or no rpm".into(),
            ));
        };
        let asks = Asks::of(job, &manager.spelling())?;
        let options = manager.options(job)?;
        repository::add(job, &mut plan)?;
        plan.troubles.splice(0..0, asks.troubles.iter().cloned());
        plan.expect = oven_rpm::expect(asks.wanted.clone());
        if changes {
            plan.shims.extend(has(DRACUT).then(oven_rpm::generic_initramfs));
            plan.steps = steps(job, manager, &asks, &options)?;
            plan.caches = manager.cache().map(|path| oven_rpm::cache(path, &SOURCES)).into_iter().collect();
        }
        plan.steps.extend(holds(job, manager, &asks)?);
        plan.steps.sort_by_key(|step| step.phase);
        plan.steps.extend(clean(manager));
        Ok(plan)
    }
}

/// What says where packages come from, who signs them, and by which names repositories are asked.
const SOURCES: [&str; 7] = [
    "/etc/yum.repos.d",
    "/etc/yum.conf",
    "/etc/yum",
    "/etc/dnf",
    "/etc/pki/rpm-gpg",
    "/etc/pki/entitlement",
    "/run/oven/keys",
];

fn refuse_what_rpm_has_not(job: &Job) -> Result<(), Refused> {
    let refuse = |what: &str| Err(Refused(what.to_owned()));
    if !job.debconf.is_empty() {
        return refuse("debconf: rpm packages ask nothing when they are installed");
    }
    if job.conffiles == Conffiles::Replace {
        return refuse(
            "conffiles: an rpm package itself says what happens to a configuration file that was changed; place your \
             own by [[file]]",
        );
    }
    Ok(())
}

fn steps(job: &Job, manager: Manager, asks: &Asks, options: &[String]) -> Result<Vec<Step>, Refused> {
    let count = count(asks);
    let clean = manager.clean_metadata();
    let get = |why: &str, verb: Vec<String>, arguments: &[String]| {
        // dnf 5 wants it behind the verb.
        let (verb, more) = verb.split_at(1);
        let argv = manager.argv(&[options, verb, &manager.fetching(), more, arguments]);
        let step = fetch(why, argv, &clean);
        manager.spoken_to(step)
    };
    let change = |phase, why: &str, verb: Vec<String>, arguments: &[String]| {
        let step = step(phase, why, manager.argv(&[options, &manager.cached(), &verb, arguments]));
        manager.spoken_to(Step { network: job.network, ..step })
    };
    let mut steps = Vec::new();
    let refresh = fetch("refreshing the package index", manager.argv(&[options, &manager.refresh()]), &clean);
    steps.push(manager.spoken_to(Step { timeout: UPDATE_TIMEOUT, ..refresh }));
    let upgrade = manager.upgrade(job)?;
    if let Some(verb) = &upgrade {
        steps.push(get("downloading upgrades", verb.clone(), &[]));
    }
    if !asks.arguments.is_empty() {
        let why = format!("downloading {count} and dependencies");
        steps.push(get(&why, oven_rpm::words(["install"]), &asks.arguments));
    }
    if let Some(verb) = upgrade {
        steps.push(change(Phase::Upgrade, "upgrading packages", verb, &[]));
    }
    if !asks.arguments.is_empty() {
        let why = format!("installing {count}");
        steps.push(change(Phase::Install, &why, oven_rpm::words(["install"]), &asks.arguments));
    }
    Ok(steps)
}

/// What is to be held is held first, for it may be older than what an upgrade brings; but for what is installed now.
fn holds(job: &Job, manager: Manager, asks: &Asks) -> Result<Vec<Step>, Refused> {
    let asked = |name: &String| asks.wanted.iter().any(|wanted| wanted.name == *name);
    let mut steps = Vec::new();
    for (phase, after) in [(Phase::Prepare, false), (Phase::Install, true)] {
        let names: Vec<_> = job.hold.iter().filter(|name| asked(name) == after).cloned().collect();
        if let Some(bad) = names.iter().find(|name| !is_name(name)) {
            return Err(Refused(format!("hold: `{bad}`: not the name of a package")));
        }
        if !names.is_empty() {
            let argv = manager
                .argv(&[&manager.hold(|path| job.present.get(path).copied().unwrap_or(false))?, &names]);
            steps.push(manager.spoken_to(step(phase, &format!("holding {}", names.join(", ")), argv)));
        }
    }
    Ok(steps)
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "+.-_".contains(c))
}

/// Indexes and downloaded packages, those of repositories that are switched off, too.
fn clean(manager: Manager) -> Vec<Step> {
    let step = |why: &str, argv| {
        let step = step(Phase::Clean, why, argv);
        manager.spoken_to(Step { timeout: CLEAN_TIMEOUT, ..step })
    };
    let mut steps = vec![step("removing package indexes and caches", manager.argv(&[&manager.clean_all()]))];
    if manager == Manager::Dnf {
        // Of what is expired, to be deleted, and trusted: its own `clean all` leaves them.
        let lists = ["expired_repos.json", "tempfiles.json", ".gpgkeyschecked.yum"];
        let lists = lists.map(|name| format!("/var/cache/dnf/{name}"));
        let argv = ["rm", "-f"].into_iter().chain(lists.iter().map(String::as_str));
        steps.push(step("removing dnf's lists of caches", oven_rpm::words(argv)));
    }
    steps
}
