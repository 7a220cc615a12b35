//! Programs that are in the image for a bake alone, and how they go again.

use crate::manager::Manager;
use oven_distro::{Job, Phase, Question, Refused, Step, Tools};
use oven_rpm::{UPDATE_TIMEOUT, fetch, step, words};

/// `None` where one of them is in no package that is known, and where the package manager cannot tell what was installed
/// for something else's sake: yum and microdnf. `refreshed`: the plan's own steps refresh the package index.
pub fn tools(job: &Job, manager: Manager, refreshed: bool) -> Result<Option<Tools>, Refused> {
    let (mark, list): (&[_], _) = match manager {
        Manager::Dnf5 => (&["mark", "dependency"], "%{name}\\n"),
        Manager::Dnf => (&["mark", "remove"], "%{name}"),
        Manager::Yum | Manager::Microdnf => return Ok(None),
    };
    let packages: Option<Vec<_>> = job.tools.iter().map(|program| package(program)).collect();
    let Some(packages) = packages.filter(|packages| !packages.is_empty()) else { return Ok(None) };
    let (names, packages) = (packages.join(" and "), words(packages));
    // What is merely recommended is not needed for as long as a bake takes.
    let options = manager.options(&Job { recommends: false, ..job.clone() })?;
    let clean = manager.clean_metadata();
    let verb = words(["install"]);
    // What is installed says nothing of repositories, and needs none.
    let installed = words(["-y", "--disablerepo=*"]);
    let mut steps = Vec::new();
    if !refreshed {
        let argv = manager.argv(&[&options, &manager.refresh()]);
        steps.push(Step { timeout: UPDATE_TIMEOUT, ..fetch("refreshing the package index", argv, &clean) });
    }
    let download = manager.argv(&[&options, &verb, &manager.fetching(), &packages]);
    steps.push(fetch(&format!("downloading {names} for this bake"), download, &clean));
    let install = manager.argv(&[&options, &manager.cached(), &verb, &packages]);
    let install = step(Phase::Install, &format!("installing {names} for this bake"), install);
    steps.push(Step { network: job.network, ..install });
    let mark = manager.argv(&[&installed, &words(mark.iter().copied()), &packages]);
    steps.push(step(Phase::Install, &format!("marking {names}"), mark));

    let unneeded = ["-q", "--disablerepo=*", "repoquery", "--unneeded", "--queryformat", list];
    let unneeded = step(Phase::Verify, "", manager.argv(&[&words(unneeded)]));
    // Exactly those: not what nothing needs any more without them.
    let remove =
        words(["--setopt=clean_requirements_on_remove=0", "remove", "{name}-{version}.{architecture}"]);
    let remove = step(Phase::Install, &format!("removing {names}"), manager.argv(&[&installed, &remove]));
    Ok(Some(Tools {
        steps,
        unneeded: Question { argv: unneeded.argv, env: unneeded.env, output: "*".into() },
        remove: vec![remove],
    }))
}

fn package(program: &str) -> Option<&'static str> {
    (program == "ansible-playbook").then_some("ansible-core")
}
