//! SUSE Linux Enterprise and openSUSE: zypper and rpm.
//!
//! Packages are downloaded in one step, which has the network and runs no package's code, and installed in another,
//! which has none and takes them from the cache.

mod repository;
mod troubles;

use oven_distro::{Claim, Claims, Conffiles, Distro, Job, OsRelease, Phase, Plan, Refused, Step, Upgrade};
use oven_rpm::{Asks, CLEAN_TIMEOUT, DRACUT, RPM, Spelling, UPDATE_TIMEOUT, count, fetch, step, words};
use std::collections::BTreeMap;

/// The plugin. It holds nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Suse;

const ZYPPER: &str = "/usr/bin/zypper";
/// What os-release calls those that this plugin was written for.
const OWN: [&str; 8] = [
    "opensuse",
    "opensuse-leap",
    "opensuse-microos",
    "opensuse-slowroll",
    "opensuse-tumbleweed",
    "sle-micro",
    "sled",
    "sles",
];
/// Releases without an end, which are upgraded as a whole.
const ROLLING: [&str; 3] = ["opensuse-microos", "opensuse-slowroll", "opensuse-tumbleweed"];
/// "Done, and a reboot is advised": that comes when an instance boots.
const REBOOT_ADVISED: u8 = 102;

impl Distro for Suse {
    fn id(&self) -> &str {
        "suse"
    }

    fn claims(&self, os: &OsRelease) -> Claims {
        let claim = match os.id() {
            id if OWN.contains(&id) => Claim::Exact,
            _ if os.id_like().any(|id| id == "suse" || OWN.contains(&id)) => Claim::Family,
            _ => return Claims::default(),
        };
        Claims { claim, look_for: words([ZYPPER, RPM, DRACUT]), read: Vec::new() }
    }

    fn plan(&self, job: &Job) -> Result<Plan, Refused> {
        let has = |path: &str| job.present.get(path).copied().unwrap_or(false);
        let mut plan = Plan { troubles: troubles::all(), ..Plan::default() };
        (plan.failures, plan.notes) = (oven_rpm::failures(), oven_rpm::notes());
        if has(RPM) {
            plan.facts = BTreeMap::from([("packages".to_owned(), oven_rpm::query())]);
            plan.expect = oven_rpm::expect(Vec::new());
        }
        refuse_what_zypper_has_not(job)?;
        let changes = job.upgrade != Upgrade::None || !job.packages.is_empty();
        if changes || !job.repositories.is_empty() || !job.hold.is_empty() {
            if let Some(missing) = [ZYPPER, RPM].into_iter().find(|path| !has(path)) {
                return Err(Refused(format!("packages cannot be installed: the image has no {missing}")));
            }
            let asks = Asks::of(job, &SPELLING)?;
            plan.steps = repository::add(job, &mut plan)?;
            plan.troubles.splice(0..0, asks.troubles.iter().cloned());
            plan.expect = oven_rpm::expect(asks.wanted.clone());
            if changes {
                plan.shims.extend(has(DRACUT).then(oven_rpm::generic_initramfs));
                plan.steps.extend(steps(job, &asks));
                plan.caches = vec![oven_rpm::cache("/var/cache/zypp", &SOURCES)];
            }
            plan.steps.extend(holds(job, &asks)?);
            plan.steps.sort_by_key(|step| step.phase);
        }
        if has(ZYPPER) {
            plan.steps.push(clean());
        }
        Ok(plan)
    }
}

/// What says where packages come from, and by which names repositories are asked.
const SOURCES: [&str; 2] = ["/etc/zypp", "/run/oven/keys"];

fn refuse_what_zypper_has_not(job: &Job) -> Result<(), Refused> {
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
    if job.mirror.is_some() {
        return refuse("mirror: how SUSE's archives are laid out is not known: name repositories instead");
    }
    if job.ca_file.is_some() {
        return refuse(
            "ca_file: zypper is told of certificates by the image alone: add them to the base image",
        );
    }
    Ok(())
}

const SPELLING: Spelling = Spelling {
    named: |name, architecture, version| {
        let architecture = architecture.map(|a| format!(".{a}")).unwrap_or_default();
        // zypper knows no patterns: the newest comes, and is compared with the pattern when it is there.
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

fn steps(job: &Job, asks: &Asks) -> Vec<Step> {
    let count = count(asks);
    let clean = zypper(&["clean", "--metadata", "--raw-metadata"]);
    let recommends = if job.recommends { "--recommends" } else { "--no-recommends" };
    let agree = "--auto-agree-with-licenses";
    // zypper refreshes where it finds something missing: that is what a retry needs, after metadata was dropped.
    let get = |why: &str, verb: &[&str], more: &[&str], arguments: &[String]| {
        let argv = zypper(&[verb, &["--download-only", agree], more].concat());
        let argv = argv.into_iter().chain(arguments.iter().cloned()).collect();
        Step { also_good: vec![REBOOT_ADVISED], ..fetch(why, argv, &clean) }
    };
    let change = |phase, why: &str, verb: &[&str], more: &[&str], arguments: &[String]| {
        let argv = zypper(&[&["--no-refresh"], verb, &[agree], more].concat());
        let argv = argv.into_iter().chain(arguments.iter().cloned()).collect();
        Step { network: job.network, also_good: vec![REBOOT_ADVISED], ..step(phase, why, argv) }
    };
    // Asked for, it looks at every repository, however short ago it did; and downloads what is new.
    let refresh = fetch("refreshing the package index", zypper(&["refresh"]), &clean);
    let mut steps = vec![Step { timeout: UPDATE_TIMEOUT, ..refresh }];
    let upgrade: Option<&[&str]> = match job.upgrade {
        Upgrade::None => None,
        Upgrade::All if ROLLING.contains(&job.os_release.id()) => Some(&["dist-upgrade"]),
        Upgrade::All => Some(&["update"]),
        Upgrade::Security => Some(&["patch", "--category", "security"]),
    };
    // Who names a version, or hands a package over, means that one.
    let mut more = vec![recommends, "--oldpackage"];
    if asks.files {
        // The definition's own: what it is, the bake's fingerprint says.
        more.push("--allow-unsigned-rpm");
    }
    if let Some(verb) = upgrade {
        steps.push(get("downloading upgrades", verb, &[recommends], &[]));
    }
    if !asks.arguments.is_empty() {
        let why = format!("downloading {count} and dependencies");
        steps.push(get(&why, &["install"], &more, &asks.arguments));
    }
    if let Some(verb) = upgrade {
        steps.push(change(Phase::Upgrade, "upgrading packages", verb, &[recommends], &[]));
    }
    if !asks.arguments.is_empty() {
        steps.push(change(
            Phase::Install,
            &format!("installing {count}"),
            &["install"],
            &more,
            &asks.arguments,
        ));
    }
    steps
}

/// A lock also keeps a package from being installed: what is installed now is locked after that.
fn holds(job: &Job, asks: &Asks) -> Result<Vec<Step>, Refused> {
    let asked = |name: &String| asks.wanted.iter().any(|wanted| wanted.name == *name);
    let mut steps = Vec::new();
    for (phase, after) in [(Phase::Prepare, false), (Phase::Install, true)] {
        let names: Vec<_> = job.hold.iter().filter(|name| asked(name) == after).map(String::as_str).collect();
        let plain = |name: &&&str| {
            name.starts_with(|c: char| c.is_ascii_alphanumeric())
                && name.chars().all(|c| c.is_ascii_alphanumeric() || "+.-_".contains(c))
        };
        if let Some(bad) = names.iter().find(|name| !plain(name)) {
            return Err(Refused(format!("hold: `{bad}`: not the name of a package")));
        }
        if !names.is_empty() {
            let argv = zypper(&[&["addlock"], names.as_slice()].concat());
            steps.push(step(phase, &format!("holding {}", names.join(", ")), argv));
        }
    }
    Ok(steps)
}

/// Indexes and downloaded packages, of all repositories.
fn clean() -> Step {
    let argv = zypper(&["clean", "--all"]);
    Step { timeout: CLEAN_TIMEOUT, ..step(Phase::Clean, "removing package indexes and caches", argv) }
}
