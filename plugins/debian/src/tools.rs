//! Programs that are installed only for a bake, and removed after the last playbook.

use crate::progress::STATUS;
use crate::{CLEAN_TIMEOUT, FETCH_TIMEOUT, INSTALL_TIMEOUT, RETRIES, environment, prune_step, refresh_step};
use oven_distro::{Job, Phase, Question, Step, Tools};

/// `None` if the job asks for no tools, or if the package of a tool is unknown. `has_index` is true if the plan's own
/// steps refresh the package index.
pub fn tools(job: &Job, has_index: bool) -> Option<Tools> {
    if job.tools.is_empty() {
        return None;
    }
    let packages = job.tools.iter().map(|program| package_of(job, program)).collect::<Option<Vec<_>>>()?;
    let step = |phase, why: &str, argv: &[&str], names: &[&str]| Step {
        phase,
        why: why.to_owned(),
        argv: argv.iter().chain(names).map(|word| (*word).to_owned()).collect(),
        env: environment(job.conffiles),
        retries: 0,
        before_retry: Vec::new(),
        network: false,
        also_good: Vec::new(),
        once: false,
        timeout: INSTALL_TIMEOUT,
    };
    let fetch = |why: &str, argv: &[&str], names: &[&str]| Step {
        retries: RETRIES,
        network: true,
        timeout: FETCH_TIMEOUT,
        ..step(Phase::Fetch, why, argv, names)
    };
    let names = packages.join(" and ");
    let mut steps = Vec::new();
    if !has_index {
        steps.extend([refresh_step(job), prune_step(job)]);
    }
    // Recommended packages are not needed during a bake.
    let install = [&["apt-get", "--no-install-recommends", "install"][..], &STATUS, &["--"]].concat();
    let download =
        [&["apt-get", "--download-only", "--no-install-recommends", "install"][..], &STATUS, &["--"]]
            .concat();
    steps.push(fetch(&format!("downloading {names} for this bake"), &download, &packages));
    steps.push(Step {
        network: job.network,
        ..step(Phase::Install, &format!("installing {names} for this bake"), &install, &packages)
    });
    steps.push(step(
        Phase::Install,
        &format!("marking {names} as automatically installed"),
        &["apt-mark", "auto"],
        &packages,
    ));
    // With these options, a package counts as unneeded even if other packages recommend or suggest it.
    let unneeded = [
        "apt-get",
        "--simulate",
        "-o",
        "APT::AutoRemove::RecommendsImportant=false",
        "-o",
        "APT::AutoRemove::SuggestsImportant=false",
        "autoremove",
    ];
    Some(Tools {
        steps,
        unneeded: Question {
            argv: unneeded.map(str::to_owned).to_vec(),
            env: environment(job.conffiles),
            output: "Remv * *".into(),
        },
        remove: vec![
            // The mark "automatically installed" is removed first, because apt would keep it after the package is
            // removed.
            step(Phase::Install, &format!("unmarking {names}"), &["apt-mark", "manual", "{name}"], &[]),
            // dpkg is used directly, because it removes exactly the given packages or none.
            Step {
                timeout: CLEAN_TIMEOUT,
                ..step(Phase::Install, &format!("removing {names}"), &["dpkg", "--purge", "{name}"], &[])
            },
        ],
    })
}

fn package_of(job: &Job, program: &str) -> Option<&'static str> {
    match program {
        // Older releases have only the package `ansible`, which also contains all collections.
        "ansible-playbook" if is_older_release(job) => Some("ansible"),
        "ansible-playbook" => Some("ansible-core"),
        _ => None,
    }
}

/// Whether the release is older than Debian 12 or Ubuntu 22.04.
fn is_older_release(job: &Job) -> bool {
    let first = match job.os_release.id() {
        "ubuntu" => 22,
        "debian" => 12,
        _ => return false,
    };
    let version = job.os_release.get("VERSION_ID").and_then(|v| v.split('.').next()?.parse::<u32>().ok());
    version.is_some_and(|version| version < first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caches::PRUNE;
    use oven_distro::OsRelease;

    fn of(os: &str, program: &str) -> Option<Tools> {
        let (os_release, programs) = (OsRelease::parse(os), vec![program.to_owned()]);
        tools(&Job { os_release, tools: programs, ..Job::default() }, false)
    }

    #[test]
    fn the_package_depends_on_the_release() {
        for (os, package) in [
            ("ID=debian\nVERSION_ID=12", "ansible-core"),
            ("ID=debian\nVERSION_ID=11", "ansible"),
            ("ID=ubuntu\nVERSION_ID=20.04", "ansible"),
            ("ID=ubuntu\nVERSION_ID=24.04", "ansible-core"),
            ("ID=debian", "ansible-core"),
        ] {
            let tools = of(os, "ansible-playbook").unwrap();
            assert_eq!(tools.steps[2].argv.last().map(String::as_str), Some(package), "{os}");
        }
        assert_eq!(of("ID=debian", "chef-client"), None);
        assert_eq!(tools(&Job::default(), false), None);
    }

    #[test]
    fn only_downloads_have_the_network() {
        let tools = of("ID=debian", "ansible-playbook").unwrap();
        for step in tools.steps.iter().chain(&tools.remove) {
            assert_eq!(step.network, step.phase == Phase::Fetch, "{step:?}");
            let downloads = step.argv.iter().any(|a| a == "update" || a == "--download-only");
            assert_eq!(step.phase == Phase::Fetch, downloads || step.argv == [PRUNE], "{step:?}");
        }
        assert!(tools.remove.iter().all(|step| step.argv.contains(&"{name}".to_owned())));
    }
}
