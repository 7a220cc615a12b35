//! Debian, Ubuntu and their relatives: apt and dpkg.
//!
//! Packages are downloaded in one step, which has the network and runs no code of packages. They are installed in
//! another step, which has no network. Both steps use the same apt command, so both select the same packages. A
//! configuration file that exists only while the steps run controls how apt behaves (see `conf.rs`).

mod caches;
mod conf;
mod fonts;
mod hold;
mod mirror;
mod packages;
mod priority;
mod progress;
mod repositories;
mod security;
mod tools;
mod troubles;
mod verify;

use oven_distro::{
    Claim, Claims, Conffiles, Distro, Expect, Job, OsRelease, Package, Phase, Plan, Refused, Shim, Step,
    Upgrade,
};
use packages::{PackageGroup, PackageRequests};
use std::collections::BTreeMap;

/// The plugin. It has no state.
#[derive(Debug, Clone, Copy, Default)]
pub struct Debian;

const APT_GET: &str = "/usr/bin/apt-get";
const APT_MARK: &str = "/usr/bin/apt-mark";
const DPKG_QUERY: &str = "/usr/bin/dpkg-query";
const SET_SELECTIONS: &str = "/usr/bin/debconf-set-selections";
const DEBCONF_ANSWERS: &str = "/run/oven/debconf";
const STATUS: &str = "/var/lib/dpkg/status";
const LISTS: &str = "/var/lib/apt/lists";
const INITRAMFS_TOOLS: &str = "/usr/sbin/mkinitramfs";
/// The last configuration file that initramfs-tools reads. It is copied into the initramfs, but no program in the
/// initramfs reads it.
const GENERIC_INITRAMFS: &str = "/etc/initramfs-tools/conf.d/zz-generic";

/// Prints the versions of a package, newest first. `madison` prints a line for each version and repository.
const LIST_VERSIONS: [&str; 5] = [
    "sh",
    "-c",
    "apt-cache madison -- \"$1\" 2> /dev/null | cut -d '|' -f 2 | tr -d ' ' | uniq",
    "sh",
    "{name}",
];

/// Time limits in seconds. An index has some 10 MB. All packages of a server together have some 1 GB.
const UPDATE_TIMEOUT: u64 = 15 * 60;
const FETCH_TIMEOUT: u64 = 60 * 60;
/// A package's script that runs longer than this is assumed to hang.
const INSTALL_TIMEOUT: u64 = 60 * 60;
const CLEAN_TIMEOUT: u64 = 5 * 60;
/// apt itself retries each file. These retries are for an archive that changes while it is read.
const RETRIES: u32 = 2;

impl Distro for Debian {
    fn id(&self) -> &str {
        "debian"
    }

    fn claims(&self, os: &OsRelease) -> Claims {
        let claim = match os.id() {
            "debian" | "ubuntu" => Claim::Exact,
            _ if os.id_like().any(|id| id == "debian" || id == "ubuntu") => Claim::Family,
            _ => return Claims::default(),
        };
        let look_for =
            [APT_GET, APT_MARK, DPKG_QUERY, SET_SELECTIONS, INITRAMFS_TOOLS, conf::IMAGE_MAIN_CONFIG];
        Claims {
            claim,
            look_for: look_for.into_iter().chain(mirror::LOOK_FOR).map(str::to_owned).collect(),
            read: [security::IMAGE_PREFERENCES]
                .iter()
                .chain(&priority::IMAGE_SOURCES)
                .map(|&p| p.to_owned())
                .collect(),
        }
    }

    fn plan(&self, job: &Job) -> Result<Plan, Refused> {
        let has = |path: &str| job.present.get(path).copied().unwrap_or(false);
        let requests = PackageRequests::from_job(job)?;
        let repositories = repositories::from_job(job)?;
        hold::check_names(job)?;
        let downloads =
            job.upgrade != Upgrade::None || !requests.groups.is_empty() || !job.repositories.is_empty();
        let changes = downloads || !job.hold.is_empty() || !job.debconf.is_empty();
        let tools = tools::tools(job, downloads);
        let needed = [
            (APT_GET, downloads || tools.is_some(), "packages cannot be installed"),
            (DPKG_QUERY, changes || tools.is_some(), "packages cannot be installed"),
            (APT_MARK, !job.hold.is_empty(), "packages cannot be held"),
            (SET_SELECTIONS, !job.debconf.is_empty(), "answers to `debconf` cannot be stored"),
        ];
        if let Some((missing, _, what)) = needed.into_iter().find(|(path, needed, _)| *needed && !has(path)) {
            return Err(Refused(format!("{what}: the image has no {missing}")));
        }
        let mut plan =
            Plan { shims: vec![policy_rc_d()], troubles: troubles::troubles(job), tools, ..Plan::default() };
        plan.caches = caches::caches(changes || plan.tools.is_some());
        if job.packages.iter().any(|package| matches!(package, Package::Named { version: Some(_), .. })) {
            plan.versions = LIST_VERSIONS.map(str::to_owned).to_vec();
        }
        if has(DPKG_QUERY) {
            plan.facts = BTreeMap::from([("packages".to_owned(), list_packages_command())]);
            plan.expect = expected_states();
        }
        if changes || plan.tools.is_some() {
            plan.progress = progress::lines();
            plan.shims.extend(conf::apt_configs());
            plan.shims.push(verify::shim());
            plan.shims.push(conf::main_config(job, has(conf::IMAGE_MAIN_CONFIG)));
            plan.shims.extend(mirror::shims(job)?);
            plan.shims.extend(has(INITRAMFS_TOOLS).then(generic_initramfs));
            plan.shims.extend(caches::shims());
            plan.shims.push(fonts::shim());
        }
        if changes {
            if has(APT_MARK) {
                plan.facts.insert("held".to_owned(), hold::list_command());
            }
            plan.expect.packages = hold::add_expected(job, requests.wanted);
            plan.shims.extend(repositories.shims);
            plan.shims.extend(debconf_answers(&job.debconf));
            plan.shims.extend(security::pins(job));
            plan.files = repositories.files;
            plan.failures = repositories.failures;
            plan.steps = steps(job, &requests.groups, downloads);
        }
        if has(APT_GET) {
            plan.steps.push(clean_step());
        }
        Ok(plan)
    }
}

/// Prevents the start of services. Before `invoke-rc.d` or `deb-systemd-invoke` starts a service, it runs this script
/// if the script is executable. The script's exit status 101 means "forbidden".
fn policy_rc_d() -> Shim {
    let content = "#!/bin/sh\n# Exists while oven bakes: services start when an instance boots.\nexit 101\n";
    Shim { path: "/usr/sbin/policy-rc.d".into(), content: content.into(), mode: 0o755 }
}

/// Configures initramfs-tools to include the drivers for every machine, and not only for the builder. This is the
/// default of initramfs-tools, but the image may have another setting.
fn generic_initramfs() -> Shim {
    Shim { path: GENERIC_INITRAMFS.into(), content: "MODULES=most\n".into(), mode: 0o644 }
}

fn list_packages_command() -> Vec<String> {
    let format = r"-f=${Package}\t${Version}\t${Architecture}\t${db:Status-Status}\t${Provides}\n";
    ["dpkg-query", "-W", format].map(str::to_owned).to_vec()
}

/// dpkg's names for states of packages. A package in any other state is broken: half-installed, unpacked,
/// half-configured or waiting for a trigger. `dpkg --audit` also reports these states.
fn expected_states() -> Expect {
    let (sound, absent) = (["installed"], ["config-files", "not-installed"]);
    Expect {
        sound: sound.map(str::to_owned).to_vec(),
        absent: absent.map(str::to_owned).to_vec(),
        packages: Vec::new(),
    }
}

/// The answers to packages' debconf questions, as a file.
fn debconf_answers(debconf: &[String]) -> Option<Shim> {
    let content = debconf.iter().map(|line| format!("{line}\n")).collect::<String>();
    // Only root can read the file, because an answer may be a password.
    (!debconf.is_empty()).then(|| Shim { path: DEBCONF_ANSWERS.into(), content, mode: 0o600 })
}

fn refresh_step(job: &Job) -> Step {
    let mut env = environment(job.conffiles);
    env.insert("APT_CONFIG".into(), conf::UPDATE_CONFIG.into());
    Step {
        phase: Phase::Fetch,
        why: "refreshing the package index".into(),
        argv: ["apt-get", "update"].into_iter().chain(progress::STATUS).map(str::to_owned).collect(),
        env,
        retries: RETRIES,
        // Deletes the index, so that apt downloads all of it again. Otherwise apt could combine new files with stale
        // files that it got from a proxy's cache.
        before_retry: ["find", LISTS, "-xdev", "-type", "f", "-delete"].map(str::to_owned).to_vec(),
        network: true,
        also_good: Vec::new(),
        once: false,
        timeout: UPDATE_TIMEOUT,
    }
}

/// Removes cached packages that the new index no longer lists.
fn prune_step(job: &Job) -> Step {
    Step {
        phase: Phase::Fetch,
        why: caches::PRUNE_WHY.into(),
        argv: vec![caches::PRUNE.into()],
        env: environment(job.conffiles),
        retries: 0,
        before_retry: Vec::new(),
        // This step does not use the network. But it is a fetch step, and every fetch step must have the network.
        network: true,
        also_good: Vec::new(),
        once: true,
        timeout: FETCH_TIMEOUT,
    }
}

fn steps(job: &Job, groups: &[PackageGroup], downloads: bool) -> Vec<Step> {
    let environment = environment(job.conffiles);
    let step = |phase, why: &str, argv: &[&str], packages: &[String]| Step {
        phase,
        why: why.to_owned(),
        argv: argv.iter().map(|a| (*a).to_owned()).chain(packages.iter().cloned()).collect(),
        env: environment.clone(),
        retries: 0,
        before_retry: Vec::new(),
        also_good: Vec::new(),
        once: false,
        network: false,
        timeout: INSTALL_TIMEOUT,
    };
    let fetch = |why: &str, argv: &[&str], packages: &[String]| Step {
        retries: RETRIES,
        network: true,
        once: true,
        timeout: FETCH_TIMEOUT,
        ..step(Phase::Fetch, why, argv, packages)
    };
    let mut steps = Vec::new();
    if !job.debconf.is_empty() {
        let why = "storing answers to debconf questions";
        steps.push(step(Phase::Prepare, why, &["debconf-set-selections", DEBCONF_ANSWERS], &[]));
    }
    if let Some(removal) = priority::removal(job) {
        let why = priority::REMOVE_WHY;
        steps.push(step(Phase::Prepare, why, &[], &removal));
    }
    // Packages that this job installs can only be held after their installation.
    let (hold_first, hold_after) = hold::split_by_time(job);
    if !hold_first.is_empty() {
        steps.push(step(Phase::Prepare, "holding packages", &["apt-mark", "hold", "--"], &hold_first));
    }
    if downloads {
        steps.extend([refresh_step(job), prune_step(job)]);
    }
    // `dist-upgrade` is used, because it upgrades everything, including a kernel whose package has a new name. apt
    // decides which packages it removes.
    let (what, upgrade) = match job.upgrade {
        Upgrade::Security => ("security upgrades", security::UPGRADE),
        Upgrade::None | Upgrade::All => ("upgrades", &["dist-upgrade"][..]),
    };
    if job.upgrade != Upgrade::None {
        let argv = [&["apt-get", "--download-only"], upgrade, &progress::STATUS].concat();
        steps.push(fetch(&format!("downloading {what}"), &argv, &[]));
    }
    for group in groups {
        // If all packages are upgraded, `dist-upgrade` also downloads the requested packages, so that apt selects
        // dependencies that fit the upgraded system. After a security upgrade, `install` downloads them, because the
        // pins of the upgrade must not apply to requested packages.
        // A suite must not upgrade other packages.
        let verb = match (job.upgrade, &group.suite) {
            (Upgrade::All, None) => "dist-upgrade",
            _ => "install",
        };
        let why = format!("downloading {} and dependencies", group.title());
        let argv =
            [&["apt-get", "--download-only", verb][..], &suite_option(group), &progress::STATUS, &["--"]];
        steps.push(fetch(&why, &argv.concat(), &group.arguments));
    }
    if job.upgrade != Upgrade::None || !groups.is_empty() {
        steps.push(fetch(caches::DECOMPRESS_WHY, &[caches::DECOMPRESS], &[]));
    }
    let change = |phase, why: &str, argv: &[&str], packages: &[String]| Step {
        network: job.network,
        ..step(phase, why, argv, packages)
    };
    // The option --no-download is not used, because with it apt fails on the path of a local file.
    if job.upgrade == Upgrade::Security {
        steps.push(step(Phase::Upgrade, security::FIND_SUITE_WHY, security::FIND_SUITE, &[]));
    }
    if job.upgrade != Upgrade::None {
        let why =
            if job.upgrade == Upgrade::Security { "upgrading for security" } else { "upgrading packages" };
        steps.push(change(Phase::Upgrade, why, &[&["apt-get"], upgrade, &progress::STATUS].concat(), &[]));
    }
    for group in groups {
        let why = format!("installing {}", group.title());
        let argv = [&["apt-get", "install"][..], &suite_option(group), &progress::STATUS, &["--"]];
        steps.push(change(Phase::Install, &why, &argv.concat(), &group.arguments));
    }
    if !hold_after.is_empty() {
        steps.push(step(
            Phase::Install,
            "holding the installed packages",
            &["apt-mark", "hold", "--"],
            &hold_after,
        ));
    }
    steps
}

/// apt then also takes new dependencies from the suite.
fn suite_option(group: &PackageGroup) -> Vec<&str> {
    group.suite.as_deref().map_or(Vec::new(), |suite| vec!["-t", suite])
}

fn environment(conffiles: Conffiles) -> BTreeMap<String, String> {
    // The program ucf handles configuration files that dpkg does not know.
    let ucf = match conffiles {
        Conffiles::Keep => "UCF_FORCE_CONFFOLD",
        Conffiles::Replace => "UCF_FORCE_CONFFNEW",
    };
    [
        ("APT_CONFIG", conf::APT_CONFIG),
        ("APT_LISTBUGS_FRONTEND", "none"),
        ("APT_LISTCHANGES_FRONTEND", "none"),
        ("DEBCONF_NONINTERACTIVE_SEEN", "true"),
        ("DEBIAN_FRONTEND", "noninteractive"),
        // oven matches apt's messages, so they have to be in English.
        ("LC_ALL", "C.UTF-8"),
        ("NEEDRESTART_SUSPEND", "1"),
        (ucf, "1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// Removes the indexes and the downloaded packages. Symlinks to files are also removed, because the indexes of a
/// repository are symlinks if the repository is a directory of the image. Directories and symlinks to directories are
/// not removed, because some belong to apt's own user.
fn clean_step() -> Step {
    let argv = [
        &["find", LISTS, "/var/cache/apt", "-mindepth", "1", "-xdev"][..],
        &["(", "-type", "f", "-o", "-type", "l", "!", "-xtype", "d", ")", "-delete"],
    ];
    Step {
        phase: Phase::Clean,
        why: "removing package indexes and caches".into(),
        argv: argv.concat().into_iter().map(str::to_owned).collect(),
        env: BTreeMap::new(),
        retries: 0,
        before_retry: Vec::new(),
        also_good: Vec::new(),
        once: false,
        network: false,
        timeout: CLEAN_TIMEOUT,
    }
}
